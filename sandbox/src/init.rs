//! The container's side: the supervisor and the first process.
//!
//! [`become_init_if_asked`] is called by the binary's `main` before anything else, so this process has one thread. The
//! supervisor reads a [`Setup`] from its standard input, makes the first process in new namespaces and watches caller and
//! container. The first process builds its root ([`root`]), becomes its user, gives up what it may not have, finds the
//! program, says that it is ready and waits for one byte. What must hold: between exec of this binary and exec of the
//! program nothing of the image is executed, and no path of the image is followed outside the root.

mod credentials;
mod program;
mod root;
mod user;

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::process::exit;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions};
use rustix::thread::UnshareFlags;

use crate::cgroup::Cgroup;
use crate::process::name;
use crate::wire::{self, At, Failure, Kind, Ready, Report, Setup};
use crate::{Network, seccomp, sys};

/// `argv[0]` of a supervisor. All else comes over its standard input.
pub(crate) const MARKER: &str = "peel-container-init";
/// The byte that releases the first process.
pub(crate) const RELEASE: u8 = 1;
/// Largest file of the image that is read here (/etc/passwd and /etc/group).
const FILE_MAX: u64 = 4 << 20;

/// The binary's `main` calls this first: when the process was started as a container's init it does that work and never
/// returns.
pub fn become_init_if_asked() {
    if std::env::args_os().next().is_some_and(|name| name == MARKER) {
        exit(i32::from(supervise().is_err()));
    }
}

/// What comes with a [`Setup`], in this order.
struct Handles {
    root: OwnedFd,
    stdio: [OwnedFd; 3],
    init: UnixStream,
}

/// The supervisor: makes the first process, waits for its end or the caller's.
fn supervise() -> io::Result<()> {
    sys::close_inherited()?;
    let control = UnixStream::from(rustix::stdio::stdin().try_clone_to_owned()?);
    // The only copy of our end must be the one that the caller's death is seen on, and none may reach the container.
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    // Out of the terminal's foreground group: Ctrl-C is for the caller, who passes it on.
    rustix::process::setsid()?;
    let Some((setup, fds)) = wire::receive::<Setup>(&control)? else {
        return Ok(());
    };
    let Ok([root, stdin, stdout, stderr, init]) = <[OwnedFd; 5]>::try_from(fds) else {
        return Err(io::Error::from(io::ErrorKind::InvalidData));
    };
    let handles = Handles {
        root,
        stdio: [stdin, stdout, stderr],
        init: UnixStream::from(init),
    };
    let mut warnings = Vec::new();
    let mut cgroup = Cgroup::make(&setup.cgroup).map_or_else(
        |reason| {
            warnings.push(format!("it runs in the caller's cgroup: {reason}"));
            None
        },
        Some,
    );
    let mut flags = libc::CLONE_NEWPID | libc::CLONE_NEWNS | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
    if setup.network == Network::None {
        flags |= libc::CLONE_NEWNET;
    }
    let mut forked = sys::fork(flags, cgroup.as_ref().map(Cgroup::as_fd));
    if let (Err(error), Some(unusable)) = (&forked, cgroup.take_if(|_| forked.is_err())) {
        warnings.push(format!("it runs in the caller's cgroup: {error}"));
        let _unused = unusable.remove();
        forked = sys::fork(flags, None);
    }
    let pidfd = match forked {
        Ok(sys::Forked::Child) => {
            drop(control);
            first_process(setup, handles, cgroup.is_some())
        }
        Ok(sys::Forked::Parent(pidfd)) => pidfd,
        Err(error) => {
            let failure = Failure::step("making its namespaces", &error);
            return wire::send(&control, &Report::Failed(failure), &[]);
        }
    };
    drop(handles);
    let path = cgroup.as_ref().and_then(|cgroup| cgroup.path().to_str());
    let spawned = Report::Spawned {
        cgroup: path.map(str::to_owned),
        warnings,
    };
    let told = wire::send(&control, &spawned, &[pidfd.as_fd()]);
    let ended = told.and_then(|()| watch(control.as_fd(), pidfd.as_fd()));
    if !matches!(ended, Ok(true)) {
        // Nobody is there any more to run for.
        sys::send_signal(pidfd.as_fd(), libc::SIGKILL)?;
    }
    let status = loop {
        match rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
            Err(Errno::INTR) => {}
            status => break status?,
        }
    };
    if let Some(cgroup) = cgroup {
        // The caller tries again, and says so if it fails too.
        let _unused = cgroup.remove();
    }
    let report = match status.map(|status| (status.exit_status(), status.terminating_signal())) {
        Some((Some(code), _)) => Report::Exited(code),
        Some((None, Some(signal))) => Report::Killed(signal),
        _ => Report::Killed(libc::SIGKILL),
    };
    wire::send(&control, &report, &[])
}

/// Waits for the container's end (`true`) or the caller's (`false`).
fn watch(control: BorrowedFd<'_>, pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    loop {
        let mut fds = [
            PollFd::from_borrowed_fd(control, PollFlags::IN),
            PollFd::from_borrowed_fd(pidfd, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            // The caller says nothing after the set-up, so whatever happens on its socket is the end.
            Ok(_) => return Ok(!fds[1].revents().is_empty()),
        }
    }
}

/// Becomes the container's program.
fn first_process(setup: Setup, handles: Handles, own_cgroup: bool) -> ! {
    let Handles { root, stdio, init } = handles;
    let failed = match prepare(&setup, root, stdio, own_cgroup) {
        Ok((program, console, warnings)) => {
            let console: Vec<BorrowedFd<'_>> = console.iter().map(OwnedFd::as_fd).collect();
            let mut byte = [0];
            let released = wire::send(&init, &Ready::Yes { warnings }, &console)
                .and_then(|()| (&init).read(&mut byte))
                .is_ok_and(|count| count == 1 && byte == [RELEASE]);
            if !released {
                exit(1);
            }
            program.exec()
        }
        Err(failure) => failure,
    };
    let _unused = wire::send(&init, &Ready::Failed(failed), &[]);
    exit(1)
}

/// Everything up to the exec. Returns the program, the terminal's master side and warnings.
fn prepare(
    setup: &Setup,
    root: OwnedFd,
    mut stdio: [OwnedFd; 3],
    own_cgroup: bool,
) -> Result<(program::Program, Option<OwnedFd>, Vec<String>), Failure> {
    let mut warnings = Vec::new();
    sys::reset_signals();
    rustix::process::umask(Mode::WGRP | Mode::WOTH);
    // A session of its own, so that it can have a terminal of its own.
    rustix::process::setsid().at("starting a session")?;
    // After the move into the cgroup, which becomes the root of what the container sees.
    sys::unshare(UnshareFlags::NEWCGROUP).at("making a cgroup namespace")?;
    rustix::system::sethostname(setup.hostname.as_bytes()).at("setting the host name")?;
    if setup.network == Network::None {
        sys::raise_loopback().at("raising the loopback interface")?;
    }
    let mut console = root::enter(root, setup, own_cgroup, &mut warnings)?;
    let account = user::find(&setup.user, &|path| read_file(path))?;
    if let Some(console) = &mut console {
        console.take_over(account.uid)?;
    } else {
        for stream in &mut stdio {
            if let Some(null) = root::devices::own_null(stream).at("opening the container's /dev/null")? {
                *stream = null;
            }
        }
        let [stdin, stdout, stderr] = &stdio;
        rustix::stdio::dup2_stdin(stdin).at("setting standard input")?;
        rustix::stdio::dup2_stdout(stdout).at("setting standard output")?;
        rustix::stdio::dup2_stderr(stderr).at("setting standard error")?;
        credentials::own_pipes(&stdio, account.uid)?;
    }
    drop(stdio);
    enter_directory(&setup.cwd)?;
    if setup.read_only {
        // The last thing that is made in the root is the working directory.
        root::make_root_read_only().at("making the root read-only")?;
    }
    sys::close_others_on_exec().at("closing the host's files")?;
    credentials::become_user(&account)?;
    let mut env: Vec<OsString> = setup.env.iter().cloned().map(OsString::from_vec).collect();
    if !env.iter().any(|entry| name(entry) == b"HOSTNAME") {
        env.push(OsString::from_vec(
            [b"HOSTNAME=", setup.hostname.as_bytes()].concat(),
        ));
    }
    set_home(&mut env, &account.home);
    let program = program::Program::find(&setup.args, env)?;
    let filter = seccomp::profile()
        .map_err(|error| Failure::new(Kind::Step, format!("compiling the seccomp profile: {error}"), 0))?;
    seccompiler::apply_filter(&filter)
        .map_err(|error| Failure::new(Kind::Step, format!("installing the seccomp profile: {error}"), 0))?;
    Ok((program, console.map(root::Console::into_master), warnings))
}

/// Gives the program its user's home directory where the environment names none. An empty `HOME` counts as none, as with
/// runc; other variables may be empty.
fn set_home(env: &mut Vec<OsString>, home: &[u8]) {
    let entry = OsString::from_vec([b"HOME=", home].concat());
    match env.iter_mut().find(|entry| name(entry) == b"HOME") {
        None => env.push(entry),
        Some(present) if present.as_bytes().len() <= b"HOME=".len() => *present = entry,
        Some(_) => {}
    }
}

/// Enters the working directory, made if it is missing. Magic links (`/proc/self/fd/N`) would lead to the host.
fn enter_directory(path: &[u8]) -> Result<(), Failure> {
    let failed = |error: io::Error| {
        let path = String::from_utf8_lossy(path).into_owned();
        Failure::new(Kind::Directory, path, error.raw_os_error().unwrap_or(0))
    };
    let directory = root::make_directories(path).map_err(failed)?;
    rustix::process::fchdir(directory).map_err(|error| failed(error.into()))
}

/// Contents of a file of the image, not following links out of it; `None` when there is no such regular file.
fn read_file(path: &str) -> io::Result<Option<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(root::root_directory()?, path, flags, Mode::empty(), resolve) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        file => File::from(file?),
    };
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut contents = Vec::new();
    file.take(FILE_MAX + 1).read_to_end(&mut contents)?;
    if u64::try_from(contents.len()).is_ok_and(|length| length > FILE_MAX) {
        let reason = format!("it has more than {FILE_MAX} bytes, the most that is read");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, reason));
    }
    Ok(Some(contents))
}

/// A string for a system call; the caller of `create` has refused NUL bytes already.
fn c_string(bytes: Vec<u8>) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_| Failure::new(Kind::Step, "a string holds a NUL byte", libc::EINVAL))
}
