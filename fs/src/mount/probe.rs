//! What this kernel can do, for `peel doctor`: each answer is yes, or a reason in one sentence.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use rustix::fs::{Mode, OFlags, XattrFlags};

use crate::error::Error;

/// One thing that the service needs from the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    /// What was tried.
    pub what: &'static str,
    /// `None` when it works, else why it does not, in one sentence.
    pub problem: Option<String>,
}

/// Tries everything. `directory` is a directory on the store's file system where files may be made and removed;
/// `erofs_image` is any small EROFS image in a regular file.
pub fn all(directory: &Path, erofs_image: &Path) -> Vec<Probe> {
    vec![
        detached(),
        fuse(),
        erofs(erofs_image),
        overlay(directory),
        writable_overlay(directory),
    ]
}

/// Access lists on what lies in an EROFS image (`setfacl` in a writable mount). The overlay of Linux 6.18 asks the real
/// inode whether it can set them, before it copies the file up, and one of EROFS never can: not essential, so not in [`all`].
pub fn access_lists(directory: &Path, erofs_image: &Path) -> Probe {
    /// Version 2 of the attribute (linux/posix_acl_xattr.h): owner, group and others as by mode 0755, with no one named.
    const MINIMAL: [u8; 28] = [
        2, 0, 0, 0, //
        1, 0, 7, 0, 255, 255, 255, 255, //
        4, 0, 5, 0, 255, 255, 255, 255, //
        32, 0, 5, 0, 255, 255, 255, 255, //
    ];
    let tried = in_scratch(directory, "acl", |root| {
        let data = super::open_directory(&root.join("data"))?;
        let tree = super::erofs(erofs_image)?;
        let scratch = root.join("scratch");
        let mounted = super::overlay("probe", tree.as_fd(), &[data.as_fd()], Some(&scratch))?;
        // The root is copied up already; a directory in it is not.
        let below = rustix::fs::openat(
            &mounted,
            ACCESS_LIST_DIRECTORY,
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .and_then(|below| {
            rustix::fs::fsetxattr(&below, "system.posix_acl_access", &MINIMAL, XattrFlags::empty())
        });
        below.map_err(std::io::Error::from).map_err(Error::io(
            ACCESS_LIST_DIRECTORY,
            "set an access list on a directory of an image",
        ))
    });
    Probe::of("access lists on files of an image", tried)
}

/// A directory that the image of [`access_lists`] must have.
pub const ACCESS_LIST_DIRECTORY: &str = "directory";

/// Detached mounts: `fsopen` and `fsmount` (Linux 5.2).
pub fn detached() -> Probe {
    let tried = super::context::Context::open("tmpfs", "detached tmpfs".to_owned()).and_then(|context| {
        context.create()?;
        context.mount(rustix::mount::MountAttrFlags::empty())
    });
    Probe::of("detached mounts", tried.map(drop))
}

/// A FUSE mount of our own.
pub fn fuse() -> Probe {
    Probe::of("FUSE", super::fuse().map(drop))
}

/// An EROFS image mounted straight from a file (Linux 6.12; before that it needs a loop device).
pub fn erofs(image: &Path) -> Probe {
    Probe::of("EROFS images mounted from a file", super::erofs(image).map(drop))
}

/// An overlay with data-only layers that are given as open directories (Linux 6.13).
pub fn overlay(directory: &Path) -> Probe {
    Probe::of(
        "overlay mounts with data-only layers",
        try_overlay(directory, false),
    )
}

/// The same with a writable layer.
pub fn writable_overlay(directory: &Path) -> Probe {
    Probe::of(
        "writable overlay mounts on the store's file system",
        try_overlay(directory, true),
    )
}

fn try_overlay(directory: &Path, writable: bool) -> Result<(), Error> {
    in_scratch(directory, if writable { "writable" } else { "plain" }, |root| {
        let tree = super::open_directory(&root.join("tree"))?;
        let data = super::open_directory(&root.join("data"))?;
        let scratch = root.join("scratch");
        super::overlay(
            "probe",
            tree.as_fd(),
            &[data.as_fd()],
            writable.then_some(scratch.as_path()),
        )
        .map(drop)
    })
}

/// Runs a try with directories `tree`, `data` and `scratch` in a directory of its own.
fn in_scratch(
    directory: &Path,
    name: &str,
    attempt: impl FnOnce(&Path) -> Result<(), Error>,
) -> Result<(), Error> {
    let root = directory.join(format!("probe-{}-{name}", std::process::id()));
    let make = || {
        ["tree", "data", "scratch"].iter().try_for_each(|name| {
            fs::create_dir_all(root.join(name)).map_err(Error::io(root.join(name), "make a directory"))
        })
    };
    let result = make().and_then(|()| attempt(&root));
    let removed = fs::remove_dir_all(&root).map_err(Error::io(&root, "remove a directory"));
    result.and(removed)
}

impl Probe {
    fn of(what: &'static str, tried: Result<(), Error>) -> Self {
        Self {
            what,
            problem: tried.err().map(|error| error.to_string()),
        }
    }

    /// Whether it works.
    pub fn works(&self) -> bool {
        self.problem.is_none()
    }
}
