//! The container's terminal.
//!
//! Made by the first process in the container's own devpts, so that `tty` inside names a device that is there. The master
//! side goes to the caller.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, Uid, fchown};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt};

use super::{attach, clone_tree, make_file, open_below};
use crate::wire::{At, Failure};

/// Both sides of a terminal.
pub(crate) struct Console {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Console {
    /// Makes a terminal and binds it to /dev/console.
    pub(super) fn open(dev: BorrowedFd<'_>) -> Result<Self, Failure> {
        let (master, slave) = pair(dev).at("making a terminal")?;
        Ok(Self { master, slave })
    }

    /// Makes it the controlling terminal and standard input, output and error, and gives it to the user.
    pub(in crate::init) fn take_over(&mut self, uid: u32) -> Result<(), Failure> {
        fchown(&self.slave, Some(Uid::from_raw(uid)), None).at("giving the terminal to the user")?;
        rustix::process::ioctl_tiocsctty(&self.slave).at("taking the terminal")?;
        rustix::stdio::dup2_stdin(&self.slave).at("setting standard input")?;
        rustix::stdio::dup2_stdout(&self.slave).at("setting standard output")?;
        rustix::stdio::dup2_stderr(&self.slave).at("setting standard error")
    }

    /// The side for the caller.
    pub(in crate::init) fn into_master(self) -> OwnedFd {
        self.master
    }
}

fn pair(dev: BorrowedFd<'_>) -> io::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let master = rustix::fs::openat(dev, "pts/ptmx", flags, Mode::empty())?;
    unlockpt(&master)?;
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags)?;
    make_file(dev, "console")?;
    // A new instance of devpts numbers its terminals from 0, and this is the first.
    let device = clone_tree(dev, "pts/0", false)?;
    let target = open_below(dev, "console", OFlags::empty())?;
    attach(device.as_fd(), target.as_fd())?;
    Ok((master, slave))
}
