//! Where bytes rest: one directory that holds everything peel keeps, and the rules that keep it correct.
//!
//! Called by `fs` (which fills and serves it) and by the command. A [`Store`] never talks to a network and never decides
//! what to fetch; it takes verified bytes and gives them back.
//!
//! | path below the root | what | made durable by |
//! |---|---|---|
//! | `version` | layout of the directory, one line | `fsync` of file and directory, when the store is made |
//! | `lock` | `flock` of the process that owns the store; holds its process id | - |
//! | `marker` | JSON: boot and mount, clean or not, time of the last checkpoint ([`recovery`]) | `fsync` of file and directory |
//! | `objects/ab/cdef...` | complete files by sha256, mode 0444; an overlay data layer | `syncfs` before they get this name ([`durable`]) |
//! | `pending/abcdef...` | complete files that the disk has not confirmed ([`pending`]) | nothing: hashed at each read |
//! | `partial/ab/cdef....data` | sparse file of an object some of whose chunks are missing | nothing: chunks are hashed again |
//! | `partial/ab/cdef....map` | header and one byte for each chunk ([`partial`]) | nothing, same reason |
//! | `erofs/<manifest>.v<n>.erofs` | metadata image of an image's tree, by writer version ([`erofs`]) | `fsync` before it gets this name |
//! | `records/images/<manifest>` | manifest, config and layer digests ([`records`]) | checksum in the file |
//! | `records/names/<sha256 of the name>` | what an image name meant | checksum in the file |
//! | `records/layers/<blob>` | index of a layer | checksum in the file |
//! | `records/verdicts/<sha256>` | what the check of a whole layer found | checksum in the file |
//! | `tmp/` | files on their way to another name; emptied when the store is locked | - |
//! | `mounts/` | scratch directories of mounts; the server's | - |
//! | `run/` | the server's socket; the server's | - |
//!
//! What must hold: a name below `objects/` exists only for content that hashes to it and that the disk has,
//! and never changes once it is there. What the disk has not confirmed is hashed after each read, before a
//! byte of it is exposed.
//! Everything else may be thrown away at any time. The root has mode 0700 and belongs to the user that runs the server, so
//! nobody else can put bytes into it; that is why a checksum is enough for records.

pub mod durable;
pub mod erofs;
mod error;
mod marker;
pub mod objects;
pub mod partial;
pub mod pending;
pub mod records;
pub mod recovery;
pub mod usage;

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::{Mode, OFlags};

pub use durable::Watch;
use error::Context;
pub use error::Error;
pub use objects::{ObjectWriter, Verdict};
pub use partial::{ChunkState, PartialObject};
pub use pending::Checked;
pub use records::{ImageRecord, LayerVerdict};
pub use usage::{Count, Usage};

/// First line of the version file. Another layout gets another number; there is no migration, a store is a cache.
const LAYOUT: &str = "peel store 1";

/// Directories of the root and their modes. `objects` and its shards are readable so that a data layer works like any
/// other directory; the root above keeps others out.
const DIRECTORIES: [(&str, u32); 11] = [
    ("objects", 0o755),
    ("pending", 0o700),
    ("partial", 0o700),
    ("erofs", 0o700),
    ("records", 0o700),
    ("records/images", 0o700),
    ("records/names", 0o700),
    ("records/layers", 0o700),
    ("records/verdicts", 0o700),
    ("tmp", 0o700),
    ("mounts", 0o700),
];

/// What else may be in the root of a store whose version is lost.
const FILES: [&str; 6] = [
    "version",
    "lock",
    "marker",
    "marker.new",
    "lost-objects",
    "lost+found",
];

/// The socket's directory, apart because the server may find it in use.
const RUN_DIRECTORY: (&str, u32) = ("run", 0o700);

/// One store directory. Cheap to clone; used by one server process at a time (see [`Store::lock`]).
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    root: PathBuf,
    /// Open since before the first write, so that `syncfs` reports every error of one.
    root_fd: OwnedFd,
    objects_fd: OwnedFd,
    /// Held from [`Store::lock`] until the last handle goes.
    lock: Mutex<Option<File>>,
    marker: marker::Marker,
    /// This process owns the store and has recovered it.
    locked: AtomicBool,
    partials: partial::Registry,
    pending: pending::Pending,
    syncs: durable::Syncs,
    turn: Mutex<durable::Turn>,
    watch: Watcher,
    /// How many of the next syncs fail.
    #[cfg(test)]
    failures: std::sync::atomic::AtomicU32,
    next_temporary: AtomicU64,
    /// Set once the file system has refused `O_TMPFILE`.
    named_temporaries: AtomicBool,
}

/// Who hears what becomes of what is written.
#[derive(Default)]
struct Watcher(OnceLock<Box<dyn Watch>>);

impl std::fmt::Debug for Watcher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(if self.0.get().is_some() {
            "watched"
        } else {
            "not watched"
        })
    }
}

impl Store {
    /// Opens the store in `root`, made if it is not there (mode 0700). Does not lock it. An existing directory must be
    /// empty or a store of this user that nobody else can enter.
    pub fn open(root: &Path) -> Result<Self, Error> {
        if let Some(parent) = root.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            fs::create_dir_all(parent).context("make directory", parent)?;
        }
        make_directory(root, 0o700)?;
        let root = fs::canonicalize(root).context("resolve", root)?;
        let fresh = check_root(&root)?;
        for (name, mode) in DIRECTORIES.into_iter().chain([RUN_DIRECTORY]) {
            make_directory(&root.join(name), mode)?;
        }
        for shard in 0..=u8::MAX {
            make_directory(&root.join(format!("objects/{shard:02x}")), 0o755)?;
        }
        let root_fd = open_directory(&root)?;
        let marker = marker::Marker::new(&root, root_fd.as_fd())?;
        let objects_fd = open_directory(&root.join("objects"))?;
        let store = Self {
            inner: Arc::new(Inner {
                root,
                root_fd,
                objects_fd,
                lock: Mutex::new(None),
                marker,
                locked: AtomicBool::new(false),
                partials: partial::Registry::default(),
                pending: pending::Pending::default(),
                syncs: durable::Syncs::default(),
                turn: Mutex::default(),
                watch: Watcher::default(),
                #[cfg(test)]
                failures: std::sync::atomic::AtomicU32::new(0),
                next_temporary: AtomicU64::new(0),
                named_temporaries: AtomicBool::new(false),
            }),
        };
        if fresh {
            store.write_version()?;
        }
        Ok(store)
    }

    /// The directory given to [`Store::open`], absolute and without symbolic links.
    pub fn root(&self) -> &Path {
        &self.inner.root
    }

    /// Directory of complete objects (`ab/cdef...` below it): an overlay data layer.
    pub fn objects_dir(&self) -> PathBuf {
        self.root().join("objects")
    }

    /// The open directory of complete objects, for `fsconfig` of an overlay's data layer.
    pub fn objects_fd(&self) -> BorrowedFd<'_> {
        self.inner.objects_fd.as_fd()
    }

    /// Where the server makes a scratch directory for each writable mount.
    pub fn mounts_dir(&self) -> PathBuf {
        self.root().join("mounts")
    }

    /// Where the server's socket stands.
    pub fn run_dir(&self) -> PathBuf {
        self.root().join("run")
    }

    /// A name below `tmp/` that nothing else has; what is left there is removed by [`Store::lock`].
    fn temporary_path(&self) -> PathBuf {
        let number = self.inner.next_temporary.fetch_add(1, Ordering::Relaxed);
        self.root().join(format!("tmp/{}-{number}", std::process::id()))
    }

    /// Makes the directory a store, durably: without its version a store that is not empty is no store.
    fn write_version(&self) -> Result<(), Error> {
        let path = &self.root().join("version");
        let temporary = self.temporary_path();
        let write = || -> Result<(), Error> {
            let mut file = File::create(&temporary).context("make", &temporary)?;
            file.write_all(format!("{LAYOUT}\n").as_bytes())
                .and_then(|()| file.sync_all())
                .context("write", &temporary)?;
            fs::rename(&temporary, path).context("rename to", path)?;
            rustix::fs::fsync(&self.inner.root_fd).context("sync", self.root())
        };
        let result = write();
        if result.is_err() {
            remove_quietly(&temporary);
        }
        result
    }
}

/// Makes a directory unless it is there.
fn make_directory(path: &Path, mode: u32) -> Result<(), Error> {
    match fs::DirBuilder::new().mode(mode).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result.context("make directory", path),
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, Error> {
    rustix::fs::open(
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
    .context("open directory", path)
}

/// Checks that the directory is ours alone and is a store or can become one; true when it has yet to become one.
fn check_root(root: &Path) -> Result<bool, Error> {
    let metadata = fs::metadata(root).context("look at", root)?;
    let expected = rustix::process::geteuid().as_raw();
    if metadata.uid() != expected {
        return Err(Error::Owner {
            root: root.to_owned(),
            owner: metadata.uid(),
            expected,
        });
    }
    let mode = metadata.mode() & 0o7777;
    let version = root.join("version");
    match fs::read(&version) {
        // What a power loss may leave of a version that was not durable.
        Ok(content) if content.is_empty() => become_store(root),
        Ok(content) => {
            let found = String::from_utf8_lossy(content.get(..content.len().min(64)).unwrap_or_default());
            if found.trim_end() != LAYOUT {
                return Err(Error::Layout {
                    root: root.to_owned(),
                    found: found.trim_end().to_owned(),
                    expected: LAYOUT,
                });
            }
            if mode & 0o077 != 0 {
                return Err(Error::Mode {
                    root: root.to_owned(),
                    mode,
                });
            }
            Ok(false)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => become_store(root),
        Err(error) => Err(error).context("read", &version),
    }
}

/// Takes a directory that holds nothing but ours; always true. An interrupted first open leaves some of our directories and files, and
/// a fresh ext4 has lost+found.
fn become_store(root: &Path) -> Result<bool, Error> {
    for entry in fs::read_dir(root).context("list", root)? {
        let name = entry.context("list", root)?.file_name();
        let ours = DIRECTORIES
            .into_iter()
            .chain([RUN_DIRECTORY])
            .map(|(directory, _)| directory)
            .chain(FILES)
            .any(|known| name == known);
        if !ours {
            return Err(Error::NotAStore(root.to_owned()));
        }
    }
    fs::set_permissions(root, fs::Permissions::from_mode(0o700)).context("set the mode of", root)?;
    Ok(true)
}

/// Removes a file whose absence is no news; anything else is logged, because nobody can act on it.
fn remove_quietly(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(?path, %error, "cannot remove a file of the store");
        }
        _ => {}
    }
}

#[cfg(test)]
mod tests;
