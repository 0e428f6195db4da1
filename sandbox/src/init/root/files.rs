//! Files that the container gets from the host: resolv.conf, hosts, hostname, and the binds that were asked for.
//!
//! The three files are copies in a file system of their own, so that the program may change them, as under Docker, and
//! neither the host nor the image sees that.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use super::{attach, clone_tree, closed, host_file, make_directories, mounted_tmpfs, root_directory};
use crate::Network;
use crate::wire::{At, Failure, Setup};

/// A directory that every host has, to mount on for a moment before the root is changed.
pub(super) const SCRATCH: &str = "/proc";
/// /etc/hosts of a container without the host's network.
const LOOPBACK_HOSTS: &str = "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n";

/// The three files as detached mounts, with their places.
pub(super) struct HostFiles(Vec<(&'static str, OwnedFd)>);

impl HostFiles {
    /// Makes the copies; called before the root is changed.
    pub(super) fn make(setup: &Setup) -> Result<Self, Failure> {
        Self::try_make(setup).at("copying /etc/hosts and its kind")
    }

    fn try_make(setup: &Setup) -> io::Result<Self> {
        let mut contents = vec![("hostname", format!("{}\n", setup.hostname).into_bytes())];
        match setup.network {
            Network::Host => {
                contents.push(("hosts", host_file("/etc/hosts")));
                contents.push(("resolv.conf", host_file("/etc/resolv.conf")));
            }
            Network::None => contents.push(("hosts", LOOPBACK_HOSTS.into())),
        }
        let store = mounted_tmpfs("4m", closed())?;
        let mut files = Vec::new();
        for (name, contents) in contents {
            let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&store, name, flags, Mode::from_raw_mode(0o644))?;
            io::Write::write_all(&mut std::fs::File::from(file), &contents)?;
            files.push((name, clone_tree(store.as_fd(), name, false)?));
        }
        Ok(Self(files))
    }

    /// Puts them into /etc; called inside the root. A root without a place for one, and without the chance to make one,
    /// goes without.
    pub(super) fn attach(self, warnings: &mut Vec<String>) {
        for (name, tree) in self.0 {
            let path = format!("/etc/{name}");
            let done =
                open_or_make_file(path.as_bytes()).and_then(|target| attach(tree.as_fd(), target.as_fd()));
            // A read-only root without a place for one goes without.
            if let Err(error) = done
                && error.raw_os_error() != Some(libc::EROFS)
            {
                warnings.push(format!("{path} is the image's own: {error}"));
            }
        }
    }
}

/// Opens a path as a place, with the links in it resolved inside the root and magic links refused.
pub(super) fn open_inside(path: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(root_directory()?, path, flags, Mode::empty(), resolve)
}

/// Mounts a tree at a path of the root: on a directory or on a file, as the tree is, made where it is missing.
pub(super) fn bind(tree: &OwnedFd, destination: &[u8]) -> io::Result<()> {
    let found = rustix::fs::statat(tree, "", AtFlags::EMPTY_PATH)?;
    let target = if rustix::fs::FileType::from_raw_mode(found.st_mode).is_dir() {
        make_directories(destination)?
    } else {
        open_or_make_file(destination)?
    };
    attach(tree.as_fd(), target.as_fd())
}

/// Links in a row that are followed to a file that has to be made; the kernel follows as many (`MAXSYMLINKS`).
const LINKS_MAX: usize = 40;

/// Opens a file of the root as a place, making it and its directories where they are missing. A link that leads nowhere,
/// as /etc/resolv.conf of an image that systemd-resolved ran in, gets what it leads to.
fn open_or_make_file(path: &[u8]) -> io::Result<OwnedFd> {
    let mut path = path.to_vec();
    for _ in 0..LINKS_MAX {
        match open_inside(&path, OFlags::empty()) {
            Err(Errno::NOENT) => {}
            found => return Ok(found?),
        }
        let Some(target) = dangling_link(&path)? else {
            return make_file(&path);
        };
        path = target;
    }
    Err(Errno::LOOP.into())
}

/// Where the link at `path` leads, as a path from the root; `None` when there is no link.
fn dangling_link(path: &[u8]) -> io::Result<Option<Vec<u8>>> {
    let link = match open_inside(path, OFlags::NOFOLLOW) {
        Err(Errno::NOENT) => return Ok(None),
        link => link?,
    };
    let target = rustix::fs::readlinkat(link, "", Vec::new())?.into_bytes();
    if target.starts_with(b"/") {
        return Ok(Some(target));
    }
    let parent = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let parent = path.get(..parent).unwrap_or_default();
    Ok(Some([parent, b"/", target.as_slice()].concat()))
}

/// Makes a file and its directories.
fn make_file(path: &[u8]) -> io::Result<OwnedFd> {
    let split = path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
    let (parent, name) = path.split_at(split);
    let name = name.strip_prefix(b"/").unwrap_or(name);
    let parent = make_directories(parent)?;
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
    Ok(open_inside(path, OFlags::empty())?)
}
