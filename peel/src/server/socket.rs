//! The `run` directory of a store: the server's lock, its socket, and who may start it.
//!
//! A unix socket's address holds 107 bytes. The path of a store may be longer, so both sides reach the socket through
//! the descriptor of its directory: `/proc/self/fd/N/peel.sock`.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::fs::{FlockOperation, OFlags};

use crate::store_dir::{self, StoreDir};

/// Name of the socket in the run directory.
pub const SOCKET: &str = "peel.sock";
/// Held by a server as long as it lives.
pub const LOCK: &str = "daemon.lock";
/// Held by a client while it starts a server.
pub const START_LOCK: &str = "start.lock";

/// The server's log.
const LOG: &str = "daemon.log";

/// How often a lock that somebody else has is tried.
const LOCK_EVERY: Duration = Duration::from_millis(10);

/// The open `run` directory of a store.
#[derive(Debug)]
pub struct RunDir {
    dir: File,
    path: PathBuf,
}

impl RunDir {
    /// Opens `<store>/run`, with the checks of [`StoreDir`]; what is missing is made.
    pub fn make(store: &Path) -> anyhow::Result<Self> {
        Ok(Self::of(store, StoreDir::make(store)?))
    }

    /// The same; `None` when there is no such store.
    pub fn open(store: &Path) -> anyhow::Result<Option<Self>> {
        Ok(StoreDir::open(store)?.map(|dir| Self::of(store, dir)))
    }

    fn of(store: &Path, dir: StoreDir) -> Self {
        Self {
            dir: dir.into_run(),
            path: store.join("run"),
        }
    }

    /// The server's log, for writing at its end. It goes on where the server before left it: what that one said last is
    /// what people look for. Its size is bounded by [`crate::logging`].
    pub fn open_log(&self) -> anyhow::Result<File> {
        self.open_file(LOG, OFlags::WRONLY | OFlags::APPEND)
    }

    fn open_file(&self, name: &str, flags: OFlags) -> anyhow::Result<File> {
        store_dir::open_file(self.dir.as_fd(), name, flags)
            .with_context(|| format!("{}: cannot be written", self.path.join(name).display()))
    }

    /// Path of a file in the directory, short however long the store's path is. Valid in this process.
    fn short(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.dir.as_raw_fd()))
    }

    /// Takes a lock of the directory, tried for as long as `patience`; it is held until the file is dropped.
    pub fn lock(&self, name: &str, patience: Duration) -> anyhow::Result<File> {
        let path = self.path.join(name);
        let file = self.open_file(name, OFlags::WRONLY)?;
        let deadline = Instant::now() + patience;
        loop {
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(file),
                Err(rustix::io::Errno::WOULDBLOCK) if Instant::now() < deadline => {
                    std::thread::sleep(LOCK_EVERY);
                }
                Err(error) => {
                    return Err(io::Error::from(error))
                        .with_context(|| format!("{}: not locked", path.display()));
                }
            }
        }
    }

    /// Whether some process holds that lock.
    pub fn is_locked(&self, name: &str) -> bool {
        self.lock(name, Duration::ZERO).is_err()
    }

    /// Connects to the server's socket.
    pub fn connect(&self) -> io::Result<UnixStream> {
        UnixStream::connect(self.short(SOCKET))
    }

    /// Takes the place of a server that is gone. The caller holds [`LOCK`].
    pub(super) fn listen(self) -> anyhow::Result<Listener> {
        let socket = self.short(SOCKET);
        let shown = || self.path.join(SOCKET);
        match std::fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
        .and_then(|()| UnixListener::bind(&socket))
        .and_then(|listener| {
            std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        })
        .with_context(|| format!("{}: cannot listen", shown().display()))
        .map(|listener| Listener {
            listener,
            run_dir: self,
        })
    }
}

/// The listening socket of a server.
#[derive(Debug)]
pub(super) struct Listener {
    listener: UnixListener,
    run_dir: RunDir,
}

impl Listener {
    /// The next connection; `None` once the listener is closed.
    pub(super) fn accept(&self) -> Option<UnixStream> {
        loop {
            match self.listener.accept() {
                Ok((stream, _)) => return Some(stream),
                // What shutdown(2) makes of a listening socket.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => return None,
                Err(error) => {
                    tracing::warn!("accept: {error}");
                    // Out of descriptors, most likely: waiting is all that can help.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// Removes the socket and ends [`Listener::accept`]. Clients in the queue see a closed connection.
    pub(super) fn close(&self) {
        let _ = std::fs::remove_file(self.run_dir.short(SOCKET));
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_with_a_long_path_has_a_socket() {
        let root = tempfile::tempdir().unwrap();
        let store = root.path().join("x".repeat(200)).join("y".repeat(200));
        let listener = RunDir::make(&store).unwrap().listen().unwrap();
        let client = RunDir::open(&store).unwrap().unwrap();
        let _stream = client.connect().unwrap();
        assert!(listener.accept().is_some());
        listener.close();
        assert!(listener.accept().is_none());
        assert_eq!(client.connect().unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn a_lock_has_one_holder() {
        let store = tempfile::tempdir().unwrap();
        let dir = RunDir::make(store.path()).unwrap();
        let held = dir.lock(LOCK, Duration::ZERO).unwrap();
        assert!(dir.is_locked(LOCK));
        drop(held);
        assert!(!dir.is_locked(LOCK));
    }
}
