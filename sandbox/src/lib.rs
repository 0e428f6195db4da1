//! How an image runs (skeleton of the contract).
#![allow(clippy::todo, missing_debug_implementations, clippy::unused_async)]

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// Why a container could not be made, started or waited for; one variant per step.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Replaced by the real variants.
    #[error("placeholder")]
    Placeholder,
}

/// Network of the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Network {
    /// The caller's network namespace.
    Host,
    /// A namespace of its own with only loopback.
    None,
}

/// What to run and how; the image's config with the user's changes on top.
#[derive(Debug, Clone)]
pub struct Process {
    /// Program and arguments.
    pub args: Vec<OsString>,
    /// `NAME=value`.
    pub env: Vec<OsString>,
    /// Working directory inside the root, made if it is missing.
    pub cwd: PathBuf,
    /// `user[:group]` by name or id as in the image's config; empty is root. Names are looked up in the root's
    /// /etc/passwd and /etc/group.
    pub user: String,
    /// Allocate a terminal.
    pub terminal: bool,
    /// Signal that stops it, by the image's config; SIGTERM when not given.
    pub stop_signal: Option<String>,
}

/// How the container is kept apart.
#[derive(Debug, Clone)]
pub struct Isolation {
    /// Network namespace.
    pub network: Network,
    /// Host name in its UTS namespace.
    pub hostname: String,
    /// Host paths bound into the root: source, destination, read-only.
    pub binds: Vec<(PathBuf, PathBuf, bool)>,
}

/// Where standard input, output and error go.
#[derive(Debug)]
pub struct Stdio {
    /// `None` is /dev/null.
    pub stdin: Option<OwnedFd>,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// A container: first made (namespaces, root, everything up to the first instruction), then started.
#[derive(Debug)]
pub struct Container;

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// With this code.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// The binary's `main` calls this first: when the process was started as a container's init it does that work and never
/// returns.
pub fn become_init_if_asked() {}

impl Container {
    /// Makes the container around `root`, a detached mount of its root file system. Its first process waits.
    pub fn create(
        _root: OwnedFd,
        _process: &Process,
        _isolation: &Isolation,
        _stdio: Stdio,
    ) -> Result<Self, Error> {
        todo!()
    }

    /// Host pid of the first process.
    pub fn pid(&self) -> u32 {
        todo!()
    }

    /// Lets the first process go on to exec. An error when the program cannot be executed, with the reason.
    pub fn start(&mut self) -> Result<(), Error> {
        todo!()
    }

    /// Sends a signal to the first process.
    pub fn signal(&self, _signal: i32) -> Result<(), Error> {
        todo!()
    }

    /// Waits for its end. Everything of the container is gone afterwards.
    pub fn wait(&mut self) -> Result<Exit, Error> {
        todo!()
    }

    /// Kills every process of the container.
    pub fn kill(&self) -> Result<(), Error> {
        todo!()
    }
}
