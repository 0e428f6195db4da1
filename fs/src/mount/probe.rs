//! What this kernel can do, for `peel doctor`: each answer is yes, or a reason in one sentence.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

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
    let root = directory.join(format!("probe-{}-{writable}", std::process::id()));
    let result = (|| {
        for name in ["tree", "data", "scratch"] {
            fs::create_dir_all(root.join(name)).map_err(Error::io(root.join(name), "make a directory"))?;
        }
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
    })();
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
