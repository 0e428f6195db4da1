//! A file system context (`fsopen`): every failure is told with the messages that the kernel left in it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

use crate::error::Error;

/// Longest message that the kernel keeps for a context, and how many of them it keeps (fs/fs_context.c: a ring of 8).
const MESSAGE_MAX: usize = 1024;
const MESSAGES_MAX: usize = 8;

/// A file system that is being configured.
#[derive(Debug)]
pub(super) struct Context {
    fd: OwnedFd,
    what: String,
}

impl Context {
    /// Starts the configuration of a file system of type `kind`; `what` names the mount in errors.
    pub(super) fn open(kind: &str, what: String) -> Result<Self, Error> {
        match rustix::mount::fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(fd) => Ok(Self { fd, what }),
            Err(error) => Err(Error::Mount {
                what,
                step: format!("open a {kind} file system context"),
                messages: String::new(),
                source: error.into(),
            }),
        }
    }

    /// Sets an option to a text.
    pub(super) fn string(&self, key: &str, value: &str) -> Result<(), Error> {
        let result = rustix::mount::fsconfig_set_string(self.fd.as_fd(), key, value);
        self.check(result, || format!("set {key}={value}"))
    }

    /// Sets an option that has no value.
    pub(super) fn flag(&self, key: &str) -> Result<(), Error> {
        let result = rustix::mount::fsconfig_set_flag(self.fd.as_fd(), key);
        self.check(result, || format!("set {key}"))
    }

    /// Sets an option to an open file (overlayfs since Linux 6.13).
    pub(super) fn descriptor(&self, key: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let result = rustix::mount::fsconfig_set_fd(self.fd.as_fd(), key, fd);
        self.check(result, || format!("set {key} to an open directory"))
    }

    /// Makes the superblock.
    pub(super) fn create(&self) -> Result<(), Error> {
        let result = rustix::mount::fsconfig_create(self.fd.as_fd());
        self.check(result, || "create the file system".to_owned())
    }

    /// Makes the detached mount.
    pub(super) fn mount(self, attributes: MountAttrFlags) -> Result<OwnedFd, Error> {
        let result = rustix::mount::fsmount(self.fd.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes);
        match result {
            Ok(mount) => Ok(mount),
            Err(error) => Err(self.error("make the mount".to_owned(), error)),
        }
    }

    fn check(&self, result: Result<(), Errno>, step: impl FnOnce() -> String) -> Result<(), Error> {
        result.map_err(|error| self.error(step(), error))
    }

    fn error(&self, step: String, error: Errno) -> Error {
        Error::Mount {
            what: self.what.clone(),
            step,
            messages: self.messages().join("; "),
            source: io::Error::from(error),
        }
    }

    /// Takes the messages out of the context: each read gives one, `ENODATA` says that there is none left.
    fn messages(&self) -> Vec<String> {
        let mut messages = Vec::new();
        let mut buffer = [0_u8; MESSAGE_MAX];
        while messages.len() < MESSAGES_MAX {
            let Ok(length) = rustix::io::read(&self.fd, &mut buffer) else {
                break;
            };
            let text = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default());
            // The first two characters are the level ("e ", "w ", "i ").
            let text = text.get(2..).unwrap_or(&text).trim();
            if !text.is_empty() {
                messages.push(text.to_owned());
            }
        }
        messages
    }
}
