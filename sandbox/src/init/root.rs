//! The container's root: its mounts, devices, masked paths and terminal.
//!
//! Called by the first process in its new mount namespace. What must hold: paths of the image are looked up only after
//! the root was changed, relative to the new root and without magic links; what belongs to the host is opened before
//! that, as detached mounts. A mount goes onto a directory that was opened, never onto a path, and masks are found
//! through the /proc and /sys that were just made, never through the image's names.

mod console;
pub(super) mod devices;
mod files;

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags,
    UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, move_mount, open_tree,
    unmount,
};

pub(super) use console::Console;

use crate::sys;
use crate::wire::{At, Failure, Setup};

/// What of /proc a container does not see (Docker's list).
const MASKED_PROC: [&str; 10] = [
    "acpi",
    "asound",
    "interrupts",
    "kcore",
    "keys",
    "latency_stats",
    "sched_debug",
    "scsi",
    "timer_list",
    "timer_stats",
];
/// What of /sys it does not see: firmware tables, and power meters, which leak what others compute.
const MASKED_SYS: [&str; 2] = ["firmware", "devices/virtual/powercap"];
/// Size of /dev and of /dev/shm (Docker's default).
const TMPFS_SIZE: &str = "65536k";

/// `nosuid,nodev,noexec`.
fn closed() -> MountAttrFlags {
    MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC
}

/// `nosuid,nodev,noexec` and read-only.
fn closed_read_only() -> MountAttrFlags {
    closed() | MountAttrFlags::MOUNT_ATTR_RDONLY
}

/// Makes `root` the root of this mount namespace, with everything that a container finds in it. What can be missing is
/// noted in `warnings`. Returns the terminal where one is asked for.
pub(super) fn enter(
    root: OwnedFd,
    setup: &Setup,
    own_cgroup: bool,
    warnings: &mut Vec<String>,
) -> Result<Option<Console>, Failure> {
    // Nothing that happens here may reach the host's mounts.
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .at("making mounts private")?;
    let devices = devices::make().at("making the devices")?;
    let mut binds = Vec::new();
    for bind in &setup.binds {
        let shown = String::from_utf8_lossy(&bind.source);
        let tree = clone_tree(CWD, bind.source.as_slice(), true).at(format!("binding {shown}"))?;
        let read_only = if bind.read_only {
            libc::MOUNT_ATTR_RDONLY
        } else {
            0
        };
        sys::set_mount_attributes(tree.as_fd(), libc::MOUNT_ATTR_NODEV | read_only, true)
            .at(format!("binding {shown}"))?;
        binds.push((tree, bind));
    }
    let host_files = files::HostFiles::make(setup)?;
    change_root(root).at("changing the root")?;

    let dev = attach_file_system(
        "tmpfs",
        &devices::options(),
        MountAttrFlags::MOUNT_ATTR_NOSUID,
        "dev",
    )
    .at("mounting /dev")?;
    if let Some(dev) = &dev {
        devices::fill(dev.as_fd(), &devices).at("filling /dev")?;
    }
    let proc = attach_file_system("proc", &[], closed(), "proc").at("mounting /proc")?;
    let sys = attach_file_system("sysfs", &[], closed_read_only(), "sys").at("mounting /sys")?;
    for (name, mounted) in [("/dev", &dev), ("/proc", &proc), ("/sys", &sys)] {
        if mounted.is_none() {
            warnings.push(format!(
                "it has no {name}: the image has no such directory and cannot be written to"
            ));
        }
    }
    let mut masks = Masks {
        null: devices.cover,
        null_is_mounted: false,
        empty: None,
    };
    if let Some(proc) = &proc {
        make_proc_read_only(proc.as_fd()).at("making /proc read-only")?;
        for name in MASKED_PROC {
            masks
                .cover(proc.as_fd(), name)
                .at(format!("masking /proc/{name}"))?;
        }
    }
    if let Some(sys) = &sys {
        for name in MASKED_SYS {
            masks
                .cover(sys.as_fd(), name)
                .at(format!("masking /sys/{name}"))?;
        }
        // Without a cgroup of its own the container would see, and be shown as, the caller's.
        if own_cgroup && let Err(error) = attach_below(sys.as_fd(), "fs/cgroup", "cgroup2") {
            warnings.push(format!("it has no /sys/fs/cgroup: {error}"));
        }
    }
    host_files.attach(warnings);
    for (tree, bind) in binds {
        let shown = String::from_utf8_lossy(&bind.destination);
        files::bind(&tree, &bind.destination).at(format!("binding to {shown}"))?;
    }
    match (&dev, setup.terminal) {
        (Some(dev), true) => Console::open(dev.as_fd()).map(Some),
        (None, true) => Err(Failure::step(
            "making a terminal, which needs /dev",
            &io::Error::from(Errno::ROFS),
        )),
        (_, false) => Ok(None),
    }
}

/// Mounts the root over the old one and drops the old one with all that was in it.
fn change_root(root: OwnedFd) -> io::Result<()> {
    sys::set_mount_attributes(root.as_fd(), libc::MOUNT_ATTR_NODEV, false)?;
    // Any directory does; it is gone a moment later.
    move_mount(
        &root,
        "",
        CWD,
        files::SCRATCH,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )?;
    rustix::process::fchdir(&root)?;
    // Old and new root in one place: the old one ends up on top of the new and is taken off at once.
    rustix::process::pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    Ok(())
}

/// A detached copy of a mount of the host, or of our own.
fn clone_tree<P: rustix::path::Arg>(at: BorrowedFd<'_>, path: P, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(at, path, flags | OpenTreeFlags::AT_EMPTY_PATH)?)
}

/// A new tmpfs that is mounted on the host's side for the moment that is left of it: single files can be taken only from a
/// file system that is mounted somewhere. Called before the root is changed.
fn mounted_tmpfs(size: &str, attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let store = new_file_system("tmpfs", &[("size", size), ("mode", "755")], attributes)?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&store, "", CWD, files::SCRATCH, flags)?;
    Ok(store)
}

/// Makes the root itself read-only; mounts on it stay as they are. Called inside the root, when nothing has to be made in
/// it any more.
pub(super) fn make_root_read_only() -> io::Result<()> {
    sys::set_mount_attributes(root_directory()?.as_fd(), libc::MOUNT_ATTR_RDONLY, false)
}

/// A new file system, detached.
fn new_file_system(kind: &str, options: &[(&str, &str)], attributes: MountAttrFlags) -> io::Result<OwnedFd> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in options {
        fsconfig_set_string(context.as_fd(), *key, *value)?;
    }
    fsconfig_create(context.as_fd())?;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

/// Mounts a detached tree onto what `target` refers to.
fn attach(tree: BorrowedFd<'_>, target: BorrowedFd<'_>) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(tree, "", target, "", flags)?)
}

/// A new file system on a directory of the root's top, made if it is missing; `None` when it cannot be made because the
/// root is read-only. A symlink in its place is refused: whatever it leads to was not meant.
fn attach_file_system(
    kind: &str,
    options: &[(&str, &str)],
    attributes: MountAttrFlags,
    name: &str,
) -> io::Result<Option<OwnedFd>> {
    let root = root_directory()?;
    let target = match open_below(root.as_fd(), name, OFlags::DIRECTORY) {
        Err(Errno::NOENT) => match rustix::fs::mkdirat(&root, name, Mode::from_raw_mode(0o755)) {
            Err(Errno::ROFS) => return Ok(None),
            made => {
                made?;
                open_below(root.as_fd(), name, OFlags::DIRECTORY)?
            }
        },
        target => target?,
    };
    let mounted = new_file_system(kind, options, attributes)?;
    attach(mounted.as_fd(), target.as_fd())?;
    Ok(Some(mounted))
}

/// A new file system on a directory below another one of ours.
fn attach_below(parent: BorrowedFd<'_>, name: &str, kind: &str) -> io::Result<()> {
    let target = open_below(parent, name, OFlags::DIRECTORY)?;
    let mounted = new_file_system(kind, &[], closed_read_only())?;
    attach(mounted.as_fd(), target.as_fd())
}

/// The root as a place, which the lookups that stay inside it start from.
pub(super) fn root_directory() -> Result<OwnedFd, Errno> {
    rustix::fs::open(
        "/",
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

/// Opens a path below a directory as a place, following no link at all.
fn open_below(parent: BorrowedFd<'_>, path: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
    let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
    rustix::fs::openat2(parent, path, flags, Mode::empty(), resolve)
}

/// An empty file to mount on.
fn make_file(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::WRONLY | OFlags::CLOEXEC;
    rustix::fs::openat(parent, name, flags, Mode::from_raw_mode(0o644))?;
    Ok(())
}

/// Makes everything in /proc read-only but the directories of processes. The kernel has one node for all /proc of the
/// machine behind each of the rest, so that a mode or owner that is set here would be the host's too.
fn make_proc_read_only(proc: BorrowedFd<'_>) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let listing = rustix::fs::openat(proc, ".", flags, Mode::empty())?;
    for entry in rustix::fs::Dir::new(listing)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        let process = name.iter().all(u8::is_ascii_digit);
        // Links lead to a process, or were given a target by nobody but the kernel.
        if process || name.starts_with(b".") || entry.file_type() == FileType::Symlink {
            continue;
        }
        if let Ok(name) = std::str::from_utf8(name) {
            make_read_only(proc, name)?;
        }
    }
    Ok(())
}

/// Makes a path below one of our mounts read-only by mounting it onto itself; nothing when there is no such path.
fn make_read_only(parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let target = match open_below(parent, name, OFlags::empty()) {
        Err(Errno::NOENT) => return Ok(()),
        target => target?,
    };
    let tree = clone_tree(target.as_fd(), "", true)?;
    let attributes =
        libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    sys::set_mount_attributes(tree.as_fd(), attributes, true)?;
    attach(tree.as_fd(), target.as_fd())
}

/// Covers paths with nothing: files with /dev/null, directories with an empty read-only file system.
struct Masks {
    null: OwnedFd,
    null_is_mounted: bool,
    empty: Option<OwnedFd>,
}

impl Masks {
    /// Covers one path below one of our mounts; nothing when there is no such path.
    fn cover(&mut self, parent: BorrowedFd<'_>, name: &str) -> io::Result<()> {
        let target = match open_below(parent, name, OFlags::empty()) {
            Err(Errno::NOENT) => return Ok(()),
            target => target?,
        };
        let found = rustix::fs::statat(&target, "", AtFlags::EMPTY_PATH)?;
        let directory = FileType::from_raw_mode(found.st_mode).is_dir();
        let tree = match (&self.empty, directory) {
            (Some(empty), true) => clone_tree(empty.as_fd(), "", false)?,
            (None, true) => {
                let empty = new_file_system("tmpfs", &[("size", "0"), ("mode", "555")], closed_read_only())?;
                attach(empty.as_fd(), target.as_fd())?;
                self.empty = Some(empty);
                return Ok(());
            }
            (_, false) if self.null_is_mounted => clone_tree(self.null.as_fd(), "", false)?,
            (_, false) => {
                self.null_is_mounted = true;
                return attach(self.null.as_fd(), target.as_fd());
            }
        };
        attach(tree.as_fd(), target.as_fd())
    }
}

/// Opens a directory of the root, making what is missing of it; the caller is inside the root.
pub(super) fn make_directories(path: &[u8]) -> io::Result<OwnedFd> {
    let mut at: Vec<u8> = b"/".to_vec();
    let mut directory = files::open_inside(&at, OFlags::DIRECTORY)?;
    for component in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
        at.extend_from_slice(component);
        directory = match files::open_inside(&at, OFlags::DIRECTORY) {
            Err(Errno::NOENT) => {
                rustix::fs::mkdirat(&directory, component, Mode::from_raw_mode(0o755))?;
                files::open_inside(&at, OFlags::DIRECTORY)?
            }
            found => found?,
        };
        at.push(b'/');
    }
    Ok(directory)
}

/// A small file of the host; empty when it is not there.
fn host_file(path: &str) -> Vec<u8> {
    fs::read(path).unwrap_or_default()
}
