//! The container's /dev: its device nodes, links, and the file systems below it.
//!
//! The nodes are made anew in a file system of their own, so that mode, owner and times that the program gives them are
//! the container's alone. Where nodes cannot be made (a user namespace, a device cgroup, a missing CAP_MKNOD) the host's
//! are bound read-only: reading and writing the device works on such a mount, changing its node does not.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::MountAttrFlags;

use super::{
    TMPFS_SIZE, attach, clone_tree, closed, make_file, mounted_tmpfs, new_file_system, open_below,
    root_directory,
};
use crate::sys;

/// The devices that every container has, by the OCI runtime specification: name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] = [
    NULL,
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];
const NULL: (&str, u32, u32) = ("null", 1, 3);
/// Links in /dev, by the same.
const LINKS: [(&str, &str); 6] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
    ("core", "/proc/kcore"),
];

/// Detached mounts of single device nodes.
pub(super) struct Devices {
    nodes: Vec<(&'static str, OwnedFd)>,
    /// The null device once more, to cover files with.
    pub(super) cover: OwnedFd,
}

/// Makes the devices; called before the root is changed.
pub(super) fn make() -> io::Result<Devices> {
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    // It is not `nodev`, and the program never reaches its directory: only the single nodes are mounted in the root.
    let store = mounted_tmpfs("64k", attributes)?;
    let node = |(name, major, minor): &(&'static str, u32, u32)| {
        let mode = Mode::from_raw_mode(0o666);
        let number = rustix::fs::makedev(*major, *minor);
        match rustix::fs::mknodat(&store, *name, FileType::CharacterDevice, mode, number) {
            Ok(()) => {
                // The mask for new files took something off.
                rustix::fs::chmodat(&store, *name, mode, AtFlags::empty())?;
                clone_tree(store.as_fd(), *name, false)
            }
            Err(Errno::EXIST) => clone_tree(store.as_fd(), *name, false),
            Err(Errno::PERM | Errno::ACCESS) => hosts(name, number),
            Err(error) => Err(error.into()),
        }
    };
    let nodes = DEVICES.iter().map(|device| Ok((device.0, node(device)?)));
    Ok(Devices {
        nodes: nodes.collect::<io::Result<_>>()?,
        cover: node(&NULL)?,
    })
}

/// The host's own node, on a mount that lets nobody change it.
fn hosts(name: &str, number: u64) -> io::Result<OwnedFd> {
    let node = clone_tree(CWD, format!("/dev/{name}"), false)?;
    let found = rustix::fs::statat(&node, "", AtFlags::EMPTY_PATH)?;
    if found.st_rdev != number {
        return Err(io::Error::other(format!(
            "/dev/{name} of the host is another device"
        )));
    }
    let attributes = libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    sys::set_mount_attributes(node.as_fd(), attributes, false)?;
    Ok(node)
}

/// Options of the file system that /dev is.
pub(super) fn options() -> [(&'static str, &'static str); 2] {
    [("mode", "755"), ("size", TMPFS_SIZE)]
}

/// Puts devices, links and the file systems below /dev into it.
pub(super) fn fill(dev: BorrowedFd<'_>, devices: &Devices) -> io::Result<()> {
    for (name, tree) in &devices.nodes {
        make_file(dev, name)?;
        attach(tree.as_fd(), open_below(dev, name, OFlags::empty())?.as_fd())?;
    }
    // The devices are mounts of their own; what the program makes here is not.
    sys::set_mount_attributes(dev, libc::MOUNT_ATTR_NODEV, false)?;
    for (name, target) in LINKS {
        rustix::fs::symlinkat(target, dev, name)?;
    }
    let shm = [("mode", "1777"), ("size", TMPFS_SIZE)];
    // Group 5 is tty in every distribution.
    let pts = [("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5")];
    let pts_attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    for (name, kind, options, attributes) in [
        ("shm", "tmpfs", shm.as_slice(), closed()),
        ("mqueue", "mqueue", [].as_slice(), closed()),
        ("pts", "devpts", pts.as_slice(), pts_attributes),
    ] {
        rustix::fs::mkdirat(dev, name, Mode::from_raw_mode(0o755))?;
        let target = open_below(dev, name, OFlags::DIRECTORY)?;
        attach(
            new_file_system(kind, options, attributes)?.as_fd(),
            target.as_fd(),
        )?;
    }
    Ok(())
}

/// Whether a descriptor is the null device, whoever's node it is.
fn is_null(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let found = rustix::fs::fstat(fd)?;
    let device = FileType::from_raw_mode(found.st_mode) == FileType::CharacterDevice;
    Ok(device && found.st_rdev == rustix::fs::makedev(NULL.1, NULL.2))
}

/// Opens the container's own /dev/null, which [`fill`] put there; checked to be it.
fn open_null(flags: OFlags) -> io::Result<OwnedFd> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_SYMLINKS;
    let flags = flags | OFlags::CLOEXEC;
    let null = rustix::fs::openat2(root_directory()?, "dev/null", flags, Mode::empty(), resolve)?;
    if is_null(null.as_fd())? {
        Ok(null)
    } else {
        Err(io::Error::other("/dev/null of the container is another device"))
    }
}

/// The container's own null device instead of a descriptor of the host's, which the program could change the node by.
/// Called inside the root. Other descriptors, and one of a root that has no /dev, stay as they are.
pub(in crate::init) fn own_null(fd: &OwnedFd) -> io::Result<Option<OwnedFd>> {
    if !is_null(fd.as_fd())? {
        return Ok(None);
    }
    let access = rustix::fs::fcntl_getfl(fd)? & OFlags::ACCMODE;
    match open_null(access) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        null => null.map(Some),
    }
}
