//! The kernel mounts that an image consists of: the EROFS image of its tree, the FUSE object file system, and the
//! overlay that joins them.
//!
//! All of them are detached (`fsmount` without `move_mount`): nothing appears in a mount table until the holder of the
//! overlay's descriptor moves it somewhere, and everything goes away with the last descriptor. Called by the service;
//! [`probe`] answers `peel doctor`.

mod context;
pub mod probe;

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags, StatVfsMountFlags, XattrFlags};
use rustix::mount::{FsPickFlags, MountAttrFlags};

use crate::error::Error;
use context::Context;

/// The object file system, mounted but not served yet.
#[derive(Debug)]
pub(crate) struct FuseMount {
    /// The `/dev/fuse` descriptor. Whoever holds a duplicate keeps the connection alive.
    pub(crate) device: OwnedFd,
    /// The detached mount.
    pub(crate) mount: OwnedFd,
}

/// Name of an object directory entry below which everything of the FUSE mount hangs.
const FUSE_SOURCE: &str = "peel-objects";

/// Mounts a FUSE file system, detached. The kernel's INIT request waits on the device.
pub(crate) fn fuse() -> Result<FuseMount, Error> {
    let path = Path::new("/dev/fuse");
    let device = rustix::fs::open(path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(io::Error::from)
        .map_err(Error::io(path, "open the FUSE device"))?;
    let context = Context::open("fuse", "object file system".to_owned())?;
    context.string("source", FUSE_SOURCE)?;
    context.string("fd", &device.as_raw_fd().to_string())?;
    context.string("rootmode", "40000")?;
    context.string("user_id", "0")?;
    context.string("group_id", "0")?;
    context.flag("allow_other")?;
    context.flag("default_permissions")?;
    context.flag("ro")?;
    context.create()?;
    let mount = context.mount(
        MountAttrFlags::MOUNT_ATTR_RDONLY
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOSUID,
    )?;
    Ok(FuseMount { device, mount })
}

/// Mounts an EROFS image straight from its file (Linux 6.12), read-only and detached. The file is named by its descriptor:
/// an option of a file system context has at most 255 bytes (`fsconfig`), a path may have more.
pub(crate) fn erofs(image: &Path) -> Result<OwnedFd, Error> {
    let file = fs::File::open(image).map_err(Error::io(image, "open the EROFS image"))?;
    let context = Context::open("erofs", format!("EROFS image {}", image.display()))?;
    context.string("source", &format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    context.flag("ro")?;
    context.create()?;
    context.mount(MountAttrFlags::MOUNT_ATTR_RDONLY)
}

/// Joins the tree and its data layers into a root file system, detached. Data is looked for in `data` in order.
/// `scratch` gets the directories `upper` and `work`; without it the mount is read-only.
pub(crate) fn overlay(
    name: &str,
    tree: BorrowedFd<'_>,
    data: &[BorrowedFd<'_>],
    scratch: Option<&Path>,
) -> Result<OwnedFd, Error> {
    let context = Context::open("overlay", format!("overlay of {name}"))?;
    context.string("source", &format!("peel {name}"))?;
    context.descriptor("lowerdir+", tree)?;
    for directory in data {
        context.descriptor("datadir+", *directory)?;
    }
    let writable = scratch
        .map(|scratch| prepare_scratch(scratch, tree))
        .transpose()?;
    if let Some((upper, work)) = &writable {
        context.descriptor("upperdir", upper.as_fd())?;
        context.descriptor("workdir", work.as_fd())?;
        // The writable layer is thrown away with its mount, so nothing in it is worth a sync; without this, every
        // unmount would write out all that is dirty on the store's file system.
        context.flag("volatile")?;
    }
    context.string("metacopy", "on")?;
    context.string("redirect_dir", "on")?;
    if writable.is_none() {
        context.flag("ro")?;
    }
    context.create()?;
    context.mount(if writable.is_some() {
        MountAttrFlags::empty()
    } else {
        MountAttrFlags::MOUNT_ATTR_RDONLY
    })
}

/// Makes `upper` and `work`. The attributes of the mounted root are those of `upper`, so they are copied from the tree.
fn prepare_scratch(scratch: &Path, tree: BorrowedFd<'_>) -> Result<(OwnedFd, OwnedFd), Error> {
    let upper_path = scratch.join("upper");
    let work_path = scratch.join("work");
    for path in [&upper_path, &work_path] {
        fs::create_dir(path).map_err(Error::io(path, "make a directory of the writable layer"))?;
    }
    let upper = open_directory(&upper_path)?;
    copy_attributes(tree, upper.as_fd()).map_err(Error::io(
        &upper_path,
        "copy the attributes of the image's root directory",
    ))?;
    Ok((upper, open_directory(&work_path)?))
}

fn copy_attributes(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // A mount descriptor is an O_PATH descriptor: reading it needs an open of its own.
    let root = rustix::fs::openat(
        from,
        c".",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?;
    let root = fs::File::from(root);
    let metadata = root.metadata()?;
    let target = fs::File::from(to.try_clone_to_owned()?);
    std::os::unix::fs::fchown(&target, Some(metadata.uid()), Some(metadata.gid()))?;
    target.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    copy_xattrs(root.as_fd(), to)?;
    target.set_times(
        fs::FileTimes::new()
            .set_modified(metadata.modified()?)
            .set_accessed(metadata.modified()?),
    )
}

fn copy_xattrs(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    // The kernel's limits: XATTR_LIST_MAX and XATTR_SIZE_MAX (linux/limits.h).
    const LIMIT: usize = 65536;
    let mut names = vec![0_u8; LIMIT];
    let length = rustix::fs::flistxattr(from, names.as_mut_slice())?;
    for name in names.get(..length).unwrap_or_default().split(|byte| *byte == 0) {
        if name.is_empty() || name.starts_with(b"trusted.overlay.") {
            continue;
        }
        let mut value = vec![0_u8; LIMIT];
        let length = rustix::fs::fgetxattr(from, name, value.as_mut_slice())?;
        rustix::fs::fsetxattr(
            to,
            name,
            value.get(..length).unwrap_or_default(),
            XattrFlags::empty(),
        )?;
    }
    Ok(())
}

/// Opens a directory for use as an overlay layer.
pub(crate) fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .map_err(io::Error::from)
    .map_err(Error::io(path, "open a directory"))
}

/// Makes an overlay forget the unused names that it has looked up, so that the next open of a file finds its data
/// again from the first data layer on. Open files are not touched.
pub(crate) fn forget_unused(overlay: BorrowedFd<'_>) -> io::Result<()> {
    let context = rustix::mount::fspick(
        overlay,
        c"",
        FsPickFlags::FSPICK_EMPTY_PATH | FsPickFlags::FSPICK_CLOEXEC,
    )?;
    // The flags are given anew each time: without this one the kernel refuses to make the overlay writable.
    if rustix::fs::fstatvfs(overlay)?
        .f_flag
        .contains(StatVfsMountFlags::RDONLY)
    {
        rustix::mount::fsconfig_set_flag(context.as_fd(), "ro")?;
    }
    // Any reconfiguration shrinks the superblock's dentry cache first (fs/super.c, reconfigure_super); none is asked for.
    rustix::mount::fsconfig_reconfigure(context.as_fd())?;
    Ok(())
}

/// Minor number of the anonymous device of a mount: names its directories in `/sys/class/bdi` and in fusectl.
pub(crate) fn device_minor(mount: BorrowedFd<'_>) -> io::Result<u32> {
    Ok(rustix::fs::minor(rustix::fs::fstat(mount)?.st_dev))
}

/// Lets the kernel read further ahead in the files of a mount; `kib` is in KiB. The FUSE protocol can only lower the
/// kernel's default of 128 KiB.
pub(crate) fn set_read_ahead(mount: BorrowedFd<'_>, kib: u32) -> io::Result<()> {
    let minor = device_minor(mount)?;
    fs::write(format!("/sys/class/bdi/0:{minor}/read_ahead_kb"), kib.to_string())
}

/// Ends a FUSE connection: every request that waits, and every later one, fails. Works while other mounts (overlays)
/// still hold the file system.
pub(crate) fn abort_fuse(mount: BorrowedFd<'_>) -> Result<(), Error> {
    let minor = device_minor(mount).map_err(Error::io("/sys/fs/fuse", "find the FUSE connection"))?;
    // A control file system of our own: the host's may not be mounted, or not be visible from here.
    let control = Context::open("fusectl", "FUSE control file system".to_owned())?;
    control.create()?;
    let control = control.mount(MountAttrFlags::empty())?;
    let name = format!("{minor}/abort");
    rustix::fs::openat(
        &control,
        name.as_str(),
        OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .and_then(|file| rustix::io::write(&file, b"1"))
    .map_err(io::Error::from)
    .map_err(Error::io(name, "abort the FUSE connection"))?;
    Ok(())
}
