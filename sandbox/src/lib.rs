//! How an image runs: namespaces, root file system, process.
//!
//! Called by the command (`peel run`, `peel optimize`). The binary's `main` must call [`become_init_if_asked`] before it
//! does anything else: a container is started by executing the same binary again.
//!
//! Three processes take part:
//!
//! ```text
//! caller (many threads)        Container::create, start, signal, wait
//!   '- supervisor              pid 1 of a pid namespace of its own, otherwise on the host; watches the caller
//!        '- first process      pid 1 of the container's namespaces; sets itself up, waits, becomes the program
//! ```
//!
//! The caller holds one end of a socket, the supervisor the other. When the caller dies, by whatever means, the supervisor
//! sees the end of the stream, kills the container and ends; when the supervisor dies, the kernel kills everything in its
//! pid namespace, the nested one included. So nothing is left whichever of them is killed, and the program may
//! change its user id without losing a parent-death signal.
//!
//! What must hold inside: the root is a detached mount that the container alone uses; no descriptor, mount or path of the
//! host is reachable from the program but standard input, output and error and the binds that were asked for. There is no
//! device cgroup, so every mount but devpts has `nodev`, and the usual devices are bound one by one.

mod cgroup;
mod container;
mod init;
mod process;
mod seccomp;
mod sys;
mod wire;

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;

pub use container::{Container, Signaller};
pub use init::become_init_if_asked;
pub use process::{DEFAULT_PATH, Overrides, Process, signal_number};

/// Why a container could not be made, started or waited for; one variant per step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Neither the image nor the user says what to run.
    #[error("the image names no program to run: give one after the image's name")]
    NoProgram,
    /// System calls end a string at a NUL byte.
    #[error("{0:?} holds a NUL byte and cannot be passed to a program")]
    Nul(OsString),
    /// The program does not exist in the container.
    #[error("{program:?}: no such program in the container ({reason})")]
    NotFound {
        /// As asked for.
        program: String,
        /// Where it was looked for.
        reason: String,
    },
    /// The program exists, but the kernel does not execute it.
    #[error("{program:?} cannot be executed in the container: {source}")]
    NotExecutable {
        /// As asked for.
        program: String,
        /// The kernel's reason; "Exec format error" is a program for another architecture.
        source: io::Error,
    },
    /// The user or group is in neither /etc/passwd nor /etc/group of the image.
    #[error("user {user:?}: {reason}")]
    User {
        /// As asked for.
        user: String,
        /// What was not found or not readable.
        reason: String,
    },
    /// The working directory cannot be made or entered.
    #[error("working directory {path:?} of the container: {source}")]
    Directory {
        /// As asked for.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A step on the host's side failed.
    #[error("cannot start a container: {step}: {source}")]
    Host {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A step inside the container failed.
    #[error("cannot set up the container: {step}: {source}")]
    Setup {
        /// What was tried.
        step: String,
        /// Why it failed.
        source: io::Error,
    },
    /// A process of ours ended in the middle; killed from outside, or out of memory.
    #[error("the container's {0} ended before the container was ready")]
    Ended(&'static str),
    /// A wait took longer than it may.
    #[error("{step} took longer than {seconds} s and was given up")]
    Deadline {
        /// What was waited for.
        step: &'static str,
        /// The limit.
        seconds: u64,
    },
    /// [`Container::start`] was called a second time.
    #[error("the container was started already")]
    Started,
}

impl Error {
    /// The code that `docker run` would exit with: 127 for a program that is not there, 126 for one that cannot be
    /// executed, 125 for everything else.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotExecutable { .. } => 126,
            _ => 125,
        }
    }
}

/// Network of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Network {
    /// The caller's network namespace.
    Host,
    /// A namespace of its own with only loopback.
    None,
}

/// How the container is kept apart.
#[derive(Debug, Clone)]
pub struct Isolation {
    /// Network namespace.
    pub network: Network,
    /// Host name in its UTS namespace, also the contents of its /etc/hostname.
    pub hostname: String,
    /// Host paths bound into the root: source, destination, read-only. Missing destinations are made.
    pub binds: Vec<(PathBuf, PathBuf, bool)>,
    /// The program finds its root read-only. Mount points, the places of binds and the working directory are made before
    /// that, so the root that is handed over should be writable; binds, /dev and the files from the host stay as they are.
    pub read_only: bool,
}

/// Where standard input, output and error go. A process with a terminal has that instead, and these are closed.
#[derive(Debug)]
pub struct Stdio {
    /// `None` is /dev/null.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// Makes a mount, which nobody uses yet, `nosuid` or `nodev`: set-user-id programs in it give no rights then, and device
/// nodes in it cannot be opened.
pub fn restrict_mount(mount: BorrowedFd<'_>, nosuid: bool, nodev: bool) -> io::Result<()> {
    let flag = |wanted, flag| if wanted { flag } else { 0 };
    let attributes = flag(nosuid, libc::MOUNT_ATTR_NOSUID) | flag(nodev, libc::MOUNT_ATTR_NODEV);
    sys::set_mount_attributes(mount, attributes, false)
}

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl Exit {
    /// As a shell says it: the code, or 128 and the signal's number.
    pub fn code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128 + signal,
        }
    }
}
