//! The caller's side of a container: makes its processes, releases, signals and waits for them.
//!
//! Called by the command from any thread. What must hold: the caller's end of the `control` socket exists once and is
//! close-on-exec, because its end of stream is how the supervisor learns that the caller died.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio as ProcessStdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::termios::{Winsize, tcsetwinsize};
use rustix::thread::UnshareFlags;

use crate::wire::{self, Bind, Failure, Kind, Ready, Report, Setup};
use crate::{Error, Exit, Isolation, Process, Stdio, cgroup, init, sys};

/// How long the set-up may take. It opens files of the root (/etc/passwd), which a slow registry can hold up for as long
/// as the file system's own deadline.
const CREATE_DEADLINE: Duration = Duration::from_secs(300);
/// How long the exec may take: the kernel reads the program's first page and its interpreter's.
const START_DEADLINE: Duration = Duration::from_secs(300);
/// How long the supervisor may take to end after the container is told to.
const END_DEADLINE: Duration = Duration::from_secs(10);
/// Tells apart containers of one process.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// A container: first made (namespaces, root, everything up to the first instruction), then started. Dropping it kills
/// what still runs.
#[derive(Debug)]
pub struct Container {
    supervisor: Child,
    control: Option<UnixStream>,
    /// To the first process; taken when it is released.
    init: Option<UnixStream>,
    pid: u32,
    signaller: Signaller,
    console: Option<OwnedFd>,
    cgroup: Option<PathBuf>,
    warnings: Vec<String>,
    exit: Option<Exit>,
    program: OsString,
}

/// Sends signals to a container from another thread than the one that waits for it.
#[derive(Debug, Clone)]
pub struct Signaller(Arc<OwnedFd>);

impl Signaller {
    /// Sends a signal to the first process; none when it has ended already. As with every pid 1, a signal for which the
    /// program has no handler does nothing, SIGKILL and SIGSTOP excepted.
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        match sys::send_signal(self.0.as_fd(), signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(host("sending a signal", error)),
            _ => Ok(()),
        }
    }

    /// Kills every process of the container.
    pub fn kill(&self) -> Result<(), Error> {
        // The kernel ends a pid namespace with its first process.
        self.signal(libc::SIGKILL)
    }
}

impl Container {
    /// Makes the container around `root`, a detached mount of its root file system. Its first process waits.
    /// Needs CAP_SYS_ADMIN. Everything made is undone on an error.
    pub fn create(
        root: OwnedFd,
        process: &Process,
        isolation: &Isolation,
        stdio: Stdio,
    ) -> Result<Self, Error> {
        let setup = describe(process, isolation)?;
        let program = process.args.first().cloned().unwrap_or_default();
        let pair = || UnixStream::pair().map_err(|error| host("making a socket", error));
        let (control, remote) = pair()?;
        let (init, init_remote) = pair()?;
        let stdin = match stdio.stdin {
            Some(stdin) => stdin,
            None => open_null().map_err(|error| host("opening /dev/null", error))?,
        };
        let supervisor = spawn(remote.into()).map_err(|error| host("starting the supervisor", error))?;
        let mut guard = Guard {
            supervisor: Some(supervisor),
            control: Some(control),
            cgroup: None,
        };
        let control = guard.control.as_ref().ok_or(Error::Ended("supervisor"))?;
        let fds = [
            root.as_fd(),
            stdin.as_fd(),
            stdio.stdout.as_fd(),
            stdio.stderr.as_fd(),
            init_remote.as_fd(),
        ];
        let sent = wire::send(control, &setup, &fds);
        // Only the first process may hold these, or its end could not be seen and the root would stay mounted.
        drop((root, stdin, stdio.stdout, stdio.stderr, init_remote));
        sent.map_err(|error| host("talking to the supervisor", error))?;
        let (report, mut fds) = receive(control, CREATE_DEADLINE, "setting up the container")?
            .ok_or(Error::Ended("supervisor"))?;
        let (cgroup, mut warnings) = match report {
            Report::Spawned { cgroup, warnings } => (cgroup.map(PathBuf::from), warnings),
            Report::Failed(failure) => return Err(explain(failure, process)),
            Report::Exited(_) | Report::Killed(_) => return Err(Error::Ended("first process")),
        };
        guard.cgroup.clone_from(&cgroup);
        let pidfd = fds.pop().ok_or(Error::Ended("first process"))?;
        let (ready, mut fds) = receive(&init, CREATE_DEADLINE, "setting up the container")?
            .ok_or(Error::Ended("first process"))?;
        match ready {
            Ready::Yes { warnings: more } => warnings.extend(more),
            Ready::Failed(failure) => return Err(explain(failure, process)),
        }
        // Only now: the pid of one that failed is gone by itself, and with it the reason would be lost.
        let pid = pid_of(&pidfd).map_err(|error| host("reading the container's pid", error))?;
        for warning in &warnings {
            tracing::warn!(pid, "container: {warning}");
        }
        let (Some(supervisor), Some(control)) = (guard.supervisor.take(), guard.control.take()) else {
            return Err(Error::Ended("supervisor"));
        };
        Ok(Self {
            supervisor,
            control: Some(control),
            init: Some(init),
            pid,
            signaller: Signaller(Arc::new(pidfd)),
            console: fds.pop(),
            cgroup,
            warnings,
            exit: None,
            program,
        })
    }

    /// Host pid of the first process.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// What could not be set up and was done without: one sentence each, for the user.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The master side of the terminal, when the process has one. Reads fail with EIO once the container has closed it.
    pub fn console(&self) -> Option<BorrowedFd<'_>> {
        self.console.as_ref().map(OwnedFd::as_fd)
    }

    /// Tells the terminal its size in characters; nothing without one.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<(), Error> {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        match &self.console {
            Some(console) => {
                tcsetwinsize(console, size).map_err(|error| host("setting the terminal's size", error.into()))
            }
            None => Ok(()),
        }
    }

    /// A handle that sends signals while another thread waits.
    pub fn signaller(&self) -> Signaller {
        self.signaller.clone()
    }

    /// Lets the first process go on to exec. An error when the program cannot be executed, with the reason.
    pub fn start(&mut self) -> Result<(), Error> {
        let mut init = self.init.take().ok_or(Error::Started)?;
        // When it has been killed in the meantime, wait() tells.
        let _unused = init.write_all(&[init::RELEASE]);
        match receive(&init, START_DEADLINE, "executing the program")? {
            // The socket is close-on-exec: its end without a word is the exec.
            None => Ok(()),
            Some((Ready::Failed(failure), _)) => {
                let process = self.program.clone();
                Err(explain_program(failure, &process))
            }
            Some((Ready::Yes { .. }, _)) => Err(Error::Ended("first process")),
        }
    }

    /// Sends a signal to the first process. See [`Signaller::signal`].
    pub fn signal(&self, signal: i32) -> Result<(), Error> {
        self.signaller.signal(signal)
    }

    /// Waits for its end. Everything of the container is gone afterwards.
    pub fn wait(&mut self) -> Result<Exit, Error> {
        loop {
            if let Some(exit) = self.wait_for(Duration::from_secs(3600))? {
                return Ok(exit);
            }
        }
    }

    /// As [`Container::wait`], for at most this long; `None` when it still runs then.
    pub fn wait_for(&mut self, limit: Duration) -> Result<Option<Exit>, Error> {
        if self.exit.is_some() {
            return Ok(self.exit);
        }
        let Some(control) = &self.control else {
            return Err(Error::Ended("supervisor"));
        };
        if !readable(control.as_fd(), limit).map_err(|error| host("waiting for the container", error))? {
            return Ok(None);
        }
        let report = receive::<Report>(control, END_DEADLINE, "waiting for the container's exit code")?;
        let exit = match report {
            Some((Report::Exited(code), _)) => Exit::Code(code),
            Some((Report::Killed(signal), _)) => Exit::Signal(signal),
            // The supervisor was killed, and the kernel killed the container with it.
            _ => Exit::Signal(libc::SIGKILL),
        };
        self.exit = Some(exit);
        self.init = None;
        end(&mut self.supervisor, self.control.take(), self.cgroup.take());
        Ok(self.exit)
    }

    /// Kills every process of the container.
    pub fn kill(&self) -> Result<(), Error> {
        self.signaller.kill()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if self.exit.is_none() {
            end(&mut self.supervisor, self.control.take(), self.cgroup.take());
        }
    }
}

/// Ends what was begun when [`Container::create`] fails half way.
struct Guard {
    supervisor: Option<Child>,
    control: Option<UnixStream>,
    cgroup: Option<PathBuf>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(mut supervisor) = self.supervisor.take() {
            end(&mut supervisor, self.control.take(), self.cgroup.take());
        }
    }
}

/// Tells the supervisor to end with everything it holds, waits for that, and reaps it.
fn end(supervisor: &mut Child, control: Option<UnixStream>, cgroup: Option<PathBuf>) {
    drop(control);
    let deadline = Instant::now() + END_DEADLINE;
    let pidfd = i32::try_from(supervisor.id())
        .ok()
        .and_then(rustix::process::Pid::from_raw)
        .and_then(|pid| rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).ok());
    let ended = pidfd.is_some_and(|pidfd| {
        readable(pidfd.as_fd(), deadline.saturating_duration_since(Instant::now())).unwrap_or(false)
    });
    if !ended {
        // It is pid 1 of a namespace: the container dies with it.
        if let Err(error) = supervisor.kill() {
            tracing::warn!("cannot kill a container's supervisor: {error}");
        }
    }
    if let Err(error) = supervisor.wait() {
        tracing::warn!("cannot wait for a container's supervisor: {error}");
    }
    // Gone already unless the supervisor was killed.
    if let Some(path) = cgroup
        && let Err(error) = cgroup::remove(&path)
    {
        tracing::warn!("cannot remove the container's cgroup {}: {error}", path.display());
    }
}

/// Turns the public description into the message for the other side.
fn describe(process: &Process, isolation: &Isolation) -> Result<Setup, Error> {
    let bytes = |text: &OsStr| -> Result<Vec<u8>, Error> {
        if text.as_bytes().contains(&0) {
            return Err(Error::Nul(text.to_owned()));
        }
        Ok(text.as_bytes().to_vec())
    };
    if process.args.first().is_none_or(|program| program.is_empty()) {
        return Err(Error::NoProgram);
    }
    let list = |list: &[OsString]| list.iter().map(|text| bytes(text)).collect::<Result<_, _>>();
    let bind = |(source, destination, read_only): &(PathBuf, PathBuf, bool)| {
        let source = std::path::absolute(source).map_err(|error| host("finding a path to bind", error))?;
        Ok(Bind {
            source: bytes(source.as_os_str())?,
            destination: bytes(destination.as_os_str())?,
            read_only: *read_only,
        })
    };
    Ok(Setup {
        args: list(&process.args)?,
        env: list(&process.env)?,
        cwd: bytes(process.cwd.as_os_str())?,
        user: process.user.clone(),
        terminal: process.terminal,
        network: isolation.network,
        hostname: isolation.hostname.clone(),
        binds: isolation.binds.iter().map(bind).collect::<Result<_, Error>>()?,
        read_only: isolation.read_only,
        cgroup: format!(
            "{}{}-{}",
            cgroup::PREFIX,
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        ),
    })
}

/// Executes this binary again as a supervisor, with the socket as its standard input and as pid 1 of a new pid namespace.
fn spawn(socket: OwnedFd) -> io::Result<Child> {
    let exe = own_binary()?;
    let start = move || {
        // Concerns the children of this thread alone, and the thread ends here.
        sys::unshare(UnshareFlags::NEWPID)?;
        Command::new(format!("/proc/self/fd/{}", exe.as_raw_fd()))
            .arg0(init::MARKER)
            .stdin(socket)
            .stdout(ProcessStdio::null())
            .stderr(ProcessStdio::null())
            .current_dir("/")
            .spawn()
    };
    let thread = thread::Builder::new()
        .name("peel-spawn".to_owned())
        .spawn(start)?;
    thread
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread that starts containers panicked")))
}

/// This binary in a form that a container cannot write to. The first process runs from it, so an image whose program is
/// `/proc/self/exe` gets hold of it; through a read-only mount that is harmless.
fn own_binary() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(rustix::fs::CWD, "/proc/self/exe", flags);
    let sealed = mount.map_err(io::Error::from).and_then(|mount| {
        sys::set_mount_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
        Ok(mount)
    });
    // A binary that was replaced on disk, or that comes from another mount namespace, cannot be bound.
    sealed.or_else(|_| copied_binary())
}

/// A sealed copy of this binary in memory.
fn copied_binary() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let mut copy = fs::File::from(rustix::fs::memfd_create("peel", flags)?);
    io::copy(&mut fs::File::open("/proc/self/exe")?, &mut copy)?;
    copy.rewind()?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&copy, seals)?;
    // A file that is open for writing cannot be executed.
    let path = format!("/proc/self/fd/{}", copy.as_raw_fd());
    Ok(rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// The host's null device, on a mount that lets nobody change its node. The first process takes the container's own instead,
/// where it has one.
fn open_null() -> io::Result<OwnedFd> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(rustix::fs::CWD, "/dev/null", flags)?;
    sys::set_mount_attributes(mount.as_fd(), libc::MOUNT_ATTR_RDONLY, false)?;
    Ok(rustix::fs::open(
        format!("/proc/self/fd/{}", mount.as_raw_fd()),
        OFlags::RDONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Host pid of a pidfd's process.
fn pid_of(pidfd: &OwnedFd) -> io::Result<u32> {
    let mut text = String::new();
    fs::File::open(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd()))?.read_to_string(&mut text)?;
    text.lines()
        .find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok())
        .ok_or_else(|| io::Error::other("its fdinfo has no pid"))
}

/// Waits until a descriptor is readable or its other side closed.
fn readable(fd: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    let deadline = Instant::now() + limit;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut fds = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Receives one message within a deadline.
fn receive<T: serde::de::DeserializeOwned>(
    socket: &UnixStream,
    limit: Duration,
    step: &'static str,
) -> Result<Option<(T, Vec<OwnedFd>)>, Error> {
    let failed = |error| host(step, error);
    if !readable(socket.as_fd(), limit).map_err(failed)? {
        return Err(Error::Deadline {
            step,
            seconds: limit.as_secs(),
        });
    }
    wire::receive(socket).map_err(failed)
}

fn host(step: &'static str, source: io::Error) -> Error {
    Error::Host { step, source }
}

/// A failure from inside in the words of the caller's request.
fn explain(failure: Failure, process: &Process) -> Error {
    let source = io::Error::from_raw_os_error(failure.errno);
    match failure.kind {
        Kind::User => Error::User {
            user: process.user.clone(),
            reason: failure.what,
        },
        Kind::Directory => Error::Directory {
            path: Path::new("/").join(&process.cwd),
            source,
        },
        Kind::Step | Kind::NotFound | Kind::NotExecutable => {
            let program = process.args.first().map_or(OsStr::new(""), OsString::as_os_str);
            explain_program(failure, program)
        }
    }
}

/// A failure to find or execute the program.
fn explain_program(failure: Failure, program: &OsStr) -> Error {
    let source = io::Error::from_raw_os_error(failure.errno);
    let program = program.to_string_lossy().into_owned();
    match failure.kind {
        Kind::NotFound => Error::NotFound {
            program,
            reason: failure.what,
        },
        Kind::NotExecutable => Error::NotExecutable { program, source },
        Kind::Step | Kind::User | Kind::Directory => Error::Setup {
            step: failure.what,
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};
    use std::process::{Command, Stdio};

    use super::{copied_binary, own_binary};

    #[test]
    fn both_forms_of_the_binary_run_and_cannot_be_written() {
        for binary in [own_binary().unwrap(), copied_binary().unwrap()] {
            let path = format!("/proc/self/fd/{}", binary.as_raw_fd());
            let status = Command::new(&path)
                .arg("--list")
                .stdout(Stdio::null())
                .status()
                .unwrap();
            assert!(status.success());
            let copy = std::fs::OpenOptions::new().write(true).open(&path);
            let written = copy.and_then(|file| {
                rustix::io::write(file.as_fd(), b"x")?;
                Ok(())
            });
            assert!(written.is_err());
        }
    }
}
