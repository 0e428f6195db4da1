//! The other end of a server's socket: finds the server of a store or starts it, and asks it.
//!
//! Starting is free of races: only the holder of `start.lock` starts a server, and it looks once more before it does. A
//! server that is just ending closes the connection before it answered; the client then tries again until its
//! deadline.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use peel_fs::{Progress, Stats};

use crate::cli::Global;
use crate::protocol::{MountRequest, Mounted, PROGRAM_VERSION, Request, Response, SILENCE, Status, VERSION};
use crate::server::{READY, RunDir, START_LOCK};
use crate::wire::{Connection, Error};

/// How long a client tries to get a server.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a server may take to start: after a power loss it looks through the store first.
const START: Duration = Duration::from_secs(300);
/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection to the server of a store.
#[derive(Debug)]
pub struct Client {
    connection: Connection,
    pid: u32,
}

/// Why there is no connection yet.
enum Attempt {
    Connected(Client),
    /// No server, or one that is ending.
    Nobody,
}

impl Client {
    /// Connects to the server of the store; starts one if there is none.
    pub fn connect(global: &Global) -> anyhow::Result<Self> {
        let store = std::path::absolute(&global.store).context("store directory")?;
        let run_dir = RunDir::make(&store)?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Attempt::Connected(client) = attempt(&run_dir, &store)? {
                return Ok(client);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "no server for the store {} within {} s; see {}",
                    store.display(),
                    PATIENCE.as_secs(),
                    log_path(&store).display()
                );
            }
            {
                let _starting = run_dir.lock(START_LOCK, left)?;
                if let Attempt::Connected(client) = attempt(&run_dir, &store)? {
                    return Ok(client);
                }
                start(&store, &run_dir, global)?;
                // It said that it accepts connections.
                if let Attempt::Connected(client) = attempt(&run_dir, &store)? {
                    return Ok(client);
                }
            }
            std::thread::sleep(PAUSE.min(left));
        }
    }

    /// Connects to the server of the store if there is one.
    pub fn connect_if_running(store: &Path) -> anyhow::Result<Option<Self>> {
        let Some(run_dir) = RunDir::open(store)? else {
            return Ok(None);
        };
        let deadline = Instant::now() + SILENCE;
        loop {
            match attempt(&run_dir, store)? {
                Attempt::Connected(client) => return Ok(Some(client)),
                // A server that is starting or ending holds its lock without answering: it settles soon.
                Attempt::Nobody if run_dir.is_locked(crate::server::LOCK) && Instant::now() < deadline => {
                    std::thread::sleep(PAUSE);
                }
                Attempt::Nobody => return Ok(None),
            }
        }
    }

    /// Process id of the server.
    pub fn server_pid(&self) -> u32 {
        self.pid
    }

    fn ask(&mut self, request: &Request) -> anyhow::Result<()> {
        self.connection.send(request, None).context(LOST)
    }

    fn answer(&mut self) -> anyhow::Result<(Response, Option<OwnedFd>)> {
        match self.connection.receive().context(LOST)? {
            (Response::Error { message }, _) => bail!(message),
            answer => Ok(answer),
        }
    }

    /// Loads and mounts an image; returns its detached mount. The mount is leased to this connection until
    /// [`Client::keep`].
    pub fn mount(
        &mut self,
        request: MountRequest,
        progress: &mut dyn FnMut(Progress),
    ) -> anyhow::Result<(Mounted, OwnedFd)> {
        self.ask(&Request::Mount(request))?;
        loop {
            match self.answer()? {
                (Response::Progress(step), _) => progress(step),
                (Response::Working, _) => {}
                (Response::Mounted(mounted), Some(fd)) => return Ok((*mounted, fd)),
                (other, _) => bail!("the server answered {other:?}"),
            }
        }
    }

    /// Makes the mount outlive this connection; call it before the mount is moved to `dir`.
    pub fn keep(&mut self, id: &str, dir: &Path) -> anyhow::Result<()> {
        self.ask(&Request::Keep {
            id: id.to_owned(),
            dir: dir.to_owned(),
        })?;
        self.expect_done()
    }

    /// Ends a mount of the server: its handle and its writable layer.
    pub fn release(&mut self, id: &str) -> anyhow::Result<()> {
        self.ask(&Request::Release { id: id.to_owned() })?;
        self.expect_done()
    }

    fn expect_done(&mut self) -> anyhow::Result<()> {
        match self.answer()?.0 {
            Response::Done => Ok(()),
            other => bail!("the server answered {other:?}"),
        }
    }

    /// What the server has.
    pub fn status(&mut self) -> anyhow::Result<Status> {
        self.ask(&Request::Status)?;
        match self.answer()?.0 {
            Response::Status(status) => Ok(status),
            other => bail!("the server answered {other:?}"),
        }
    }

    /// What the server has fetched since it began.
    pub fn stats(&mut self) -> anyhow::Result<Stats> {
        self.ask(&Request::Stats)?;
        match self.answer()?.0 {
            Response::Stats(stats) => Ok(stats),
            other => bail!("the server answered {other:?}"),
        }
    }
}

/// Context of every failure of the connection itself.
const LOST: &str = "connection to the server of the store lost";

/// Where the server of a store logs.
pub fn log_path(store: &Path) -> PathBuf {
    store.join("run/daemon.log")
}

/// Connects and says hello.
fn attempt(run_dir: &RunDir, store: &Path) -> anyhow::Result<Attempt> {
    let stream = match run_dir.connect() {
        Ok(stream) => stream,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            ) =>
        {
            return Ok(Attempt::Nobody);
        }
        Err(error) => {
            return Err(error)
                .with_context(|| format!("socket of the server in {}", store.join("run").display()));
        }
    };
    let mut connection = Connection::new(stream, Some(SILENCE)).context("socket")?;
    match hello(&mut connection) {
        Ok(Response::Hello {
            protocol,
            program,
            pid,
        }) => {
            if (protocol, program.as_str()) != (VERSION, PROGRAM_VERSION) {
                bail!(
                    "the server of the store {} is peel {program} (process {pid}), this is peel {PROGRAM_VERSION}; it \
                     ends by itself when nothing is mounted any more, or with: kill {pid}",
                    store.display()
                );
            }
            Ok(Attempt::Connected(Client { connection, pid }))
        }
        Ok(other) => bail!("the server of the store {} answered {other:?}", store.display()),
        Err(error) if error.is_disconnect() => Ok(Attempt::Nobody),
        Err(error) => Err(error).with_context(|| format!("server of the store {}", store.display())),
    }
}

fn hello(connection: &mut Connection) -> Result<Response, Error> {
    connection.send(
        &Request::Hello {
            protocol: VERSION,
            program: PROGRAM_VERSION.to_owned(),
        },
        None,
    )?;
    Ok(connection.receive()?.0)
}

/// Starts a server and waits until it accepts connections. The caller holds [`START_LOCK`].
fn start(store: &Path, run_dir: &RunDir, global: &Global) -> anyhow::Result<()> {
    let log = run_dir.open_log()?;
    crate::sys::close_inherited_on_exec().context("close_range")?;
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0("peel")
        .arg("--store")
        .arg(store)
        .args(["daemon", "--detached"])
        .args(std::iter::repeat_n("--verbose", usize::from(global.verbose)))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(log);
    let mut child = command.spawn().context("starting the server of the store")?;
    let mut said = String::new();
    if let Some(out) = child.stdout.take() {
        read_until(out.into(), Instant::now() + START, &mut said)
            .context("waiting for the server of the store to start")?;
    }
    if said.trim_end() == READY {
        return Ok(());
    }
    let status = child.wait().context("server of the store")?;
    match said.trim() {
        "" => bail!(
            "the server of the store ended while it started ({status}); see {}",
            log_path(store).display()
        ),
        reason => bail!("the server of the store did not start: {reason}"),
    }
}

/// Reads to the end of a pipe.
fn read_until(pipe: OwnedFd, deadline: Instant, text: &mut String) -> anyhow::Result<()> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    let mut pipe = File::from(pipe);
    let mut bytes = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).context("time limit")?;
        let ready =
            rustix::io::retry_on_intr(|| poll(&mut [PollFd::new(&pipe, PollFlags::IN)], Some(&timeout)))?;
        if ready == 0 {
            bail!("nothing within {} s", START.as_secs());
        }
        match pipe.read(&mut buffer)? {
            0 => break,
            length => bytes.extend_from_slice(buffer.get(..length).unwrap_or_default()),
        }
    }
    *text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(())
}
