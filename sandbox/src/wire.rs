//! What the three processes of a container say to each other: JSON messages with descriptors over unix sockets.
//!
//! The caller ([`crate::container`]) sends one [`Setup`] to the supervisor; the supervisor answers with [`Report`]s; the
//! container's first process answers with one [`Ready`] or [`Failure`] on a socket of its own. A message is its length
//! (32 bits, little endian), with the descriptors attached to those four bytes, then JSON. All ends are the same
//! binary, so there is no version; limits hold all the same.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::Network;

/// Largest message. The kernel takes at most 6 MiB of arguments and environment, and a byte is up to four in JSON.
const MESSAGE_MAX: usize = 32 << 20;
/// Most descriptors with one message.
const FDS_MAX: usize = 8;

/// Everything the supervisor and the first process need to know.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Setup {
    pub(crate) args: Vec<Vec<u8>>,
    pub(crate) env: Vec<Vec<u8>>,
    pub(crate) cwd: Vec<u8>,
    pub(crate) user: String,
    pub(crate) terminal: bool,
    pub(crate) network: Network,
    pub(crate) hostname: String,
    pub(crate) binds: Vec<Bind>,
    pub(crate) read_only: bool,
    /// Name of the cgroup to make below the caller's own.
    pub(crate) cgroup: String,
}

/// A host path that is bound into the root.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Bind {
    pub(crate) source: Vec<u8>,
    pub(crate) destination: Vec<u8>,
    pub(crate) read_only: bool,
}

/// From the supervisor.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The first process exists; its pidfd is attached.
    Spawned {
        /// Directory of the container's cgroup, to be removed at the end.
        cgroup: Option<String>,
        warnings: Vec<String>,
    },
    /// It does not.
    Failed(Failure),
    /// It ended with this code.
    Exited(i32),
    /// It ended by this signal.
    Killed(i32),
}

/// From the first process.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Ready {
    /// Waits to be released; with a terminal its master side is attached.
    Yes {
        /// What could not be done and can be done without.
        warnings: Vec<String>,
    },
    /// Ends now.
    Failed(Failure),
}

/// Why the container's own side gave up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Failure {
    pub(crate) kind: Kind,
    /// The step, or for [`Kind::User`] the reason, or the program.
    pub(crate) what: String,
    /// `errno`, 0 when none.
    pub(crate) errno: i32,
}

/// The cases that callers tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// A step of the set-up.
    Step,
    /// The user cannot be found.
    User,
    /// The working directory cannot be entered.
    Directory,
    /// There is no such program.
    NotFound,
    /// There is, but it cannot be executed.
    NotExecutable,
}

impl Failure {
    /// A step that failed, by a system call or otherwise. The number of a system call's error tells it all; any other error has a text,
    /// and gets the number that is nearest, since it is always shown.
    pub(crate) fn step(what: impl Into<String>, error: &io::Error) -> Self {
        if let Some(errno) = error.raw_os_error() {
            return Self::new(Kind::Step, what, errno);
        }
        let errno = match error.kind() {
            io::ErrorKind::FileTooLarge => libc::EFBIG,
            io::ErrorKind::InvalidInput => libc::EINVAL,
            _ => libc::EIO,
        };
        Self::new(Kind::Step, format!("{}: {error}", what.into()), errno)
    }

    /// Any other.
    pub(crate) fn new(kind: Kind, what: impl Into<String>, errno: i32) -> Self {
        Self {
            kind,
            what: what.into(),
            errno,
        }
    }
}

/// Names the step at which a system call failed.
pub(crate) trait At<T> {
    /// Makes a [`Failure`] of an error.
    fn at(self, what: impl Into<String>) -> Result<T, Failure>;
}

impl<T, E: Into<io::Error>> At<T> for Result<T, E> {
    fn at(self, what: impl Into<String>) -> Result<T, Failure> {
        self.map_err(|error| Failure::step(what, &error.into()))
    }
}

/// Sends one message and copies of the descriptors.
pub(crate) fn send<T: Serialize>(socket: &UnixStream, message: &T, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let body = serde_json::to_vec(message)?;
    let length = u32::try_from(body.len())
        .ok()
        .filter(|_| body.len() <= MESSAGE_MAX)
        .ok_or_else(|| io::Error::from(io::ErrorKind::FileTooLarge))?
        .to_le_bytes();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    let sent = sendmsg(
        socket,
        &[IoSlice::new(&length)],
        &mut ancillary,
        SendFlags::NOSIGNAL,
    )?;
    let mut socket = socket;
    socket.write_all(length.get(sent..).unwrap_or_default())?;
    socket.write_all(&body)
}

/// Receives one message and its descriptors; `None` when the other side closed instead.
pub(crate) fn receive<T: DeserializeOwned>(socket: &UnixStream) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut length = [0; 4];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = loop {
        let mut slices = [IoSliceMut::new(&mut length)];
        match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            // A process that is killed with unread data in its socket resets the connection.
            Ok(message) if message.bytes == 0 => return Ok(None),
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            Ok(message) => break message.bytes,
            Err(error) => return Err(error.into()),
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    let mut socket = socket;
    socket.read_exact(length.get_mut(got..).unwrap_or_default())?;
    let length = usize::try_from(u32::from_le_bytes(length)).unwrap_or(usize::MAX);
    if length > MESSAGE_MAX {
        return Err(io::Error::from(io::ErrorKind::FileTooLarge));
    }
    let mut body = vec![0; length];
    socket.read_exact(&mut body)?;
    Ok(Some((serde_json::from_slice(&body)?, fds)))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::{Failure, Kind, MESSAGE_MAX, Ready, receive, send};

    #[test]
    fn messages_and_descriptors_arrive() {
        let (left, right) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        send(
            &left,
            &Ready::Yes {
                warnings: vec!["w".to_owned()],
            },
            &[file.as_fd(), left.as_fd()],
        )
        .unwrap();
        let failure = Failure::new(Kind::User, "nobody", 2);
        send(&left, &Ready::Failed(failure), &[]).unwrap();
        drop(left);
        let (first, fds) = receive::<Ready>(&right).unwrap().unwrap();
        assert!(matches!(first, Ready::Yes { warnings } if warnings == ["w"]));
        assert_eq!(fds.len(), 2);
        let (second, none) = receive::<Ready>(&right).unwrap().unwrap();
        assert!(matches!(second, Ready::Failed(failure) if failure.kind == Kind::User && failure.errno == 2));
        assert!(none.is_empty());
        drop(fds);
        assert!(receive::<Ready>(&right).unwrap().is_none());
    }

    #[test]
    fn every_failure_has_an_error_number() {
        use std::io::{Error, ErrorKind};
        for (error, what, errno) in [
            (Error::from_raw_os_error(libc::ENOSPC), "step", libc::ENOSPC),
            (
                Error::new(ErrorKind::FileTooLarge, "too long"),
                "step: too long",
                libc::EFBIG,
            ),
            (Error::other("odd"), "step: odd", libc::EIO),
        ] {
            let failure = Failure::step("step", &error);
            assert_eq!((failure.what.as_str(), failure.errno), (what, errno));
        }
    }

    #[test]
    fn a_length_beyond_the_limit_is_refused() {
        let (mut left, right) = UnixStream::pair().unwrap();
        left.write_all(&u32::try_from(MESSAGE_MAX + 1).unwrap().to_le_bytes())
            .unwrap();
        assert!(receive::<Ready>(&right).is_err());
    }
}
