//! Why the store could not do something. Every variant names the file, object or record and says what to do.

use std::io;
use std::path::{Path, PathBuf};

use peel_image::Digest;

/// Why the store could not do something.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused an operation on a file of the store.
    #[error("cannot {action} {path:?}: {source}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file system of the store, or its owner's quota, is full. Nothing half-written is left.
    #[error(
        "cannot {action} {path:?}: the disk (or quota) that holds the store is full; free space there, then try again"
    )]
    NoSpace {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
    },
    /// The directory holds other things.
    #[error("{0:?} is neither a store nor an empty directory; choose another directory")]
    NotAStore(PathBuf),
    /// The store was made by a version of the program with another layout.
    #[error(
        "store {root:?} has layout {found:?}, this program uses {expected:?}; use another directory or remove it"
    )]
    Layout {
        /// The store.
        root: PathBuf,
        /// What its version file says.
        found: String,
        /// What this program writes.
        expected: &'static str,
    },
    /// Someone else owns the store, so its content cannot be trusted.
    #[error("store {root:?} belongs to user {owner}, not to user {expected}; use a directory of your own")]
    Owner {
        /// The store.
        root: PathBuf,
        /// Owner of the directory.
        owner: u32,
        /// Effective user of this process.
        expected: u32,
    },
    /// Other users can enter the store.
    #[error(
        "store {root:?} has mode {mode:04o}, which lets other users in; check its content, then `chmod 0700` it"
    )]
    Mode {
        /// The store.
        root: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another process uses the store.
    #[error("store {root:?} is in use by process {holder}; stop it or use another store")]
    Locked {
        /// The store.
        root: PathBuf,
        /// Process id as its lock file says, or "unknown".
        holder: String,
    },
    /// Something was to be written without [`crate::Store::lock`].
    #[error("store {0:?} is not locked by this process; lock it before writing to it")]
    NotLocked(PathBuf),
    /// Bytes do not hash to the name they were meant for; nothing was kept.
    #[error("content hashes to {found}, expected {expected}; it was discarded")]
    DigestMismatch {
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of the bytes.
        found: Digest,
    },
    /// The object is there with another length than its description claims.
    #[error("object {digest} has {found} bytes, but is described as having {expected}")]
    SizeMismatch {
        /// The object.
        digest: Digest,
        /// Length by the description.
        expected: u64,
        /// Length of the object.
        found: u64,
    },
    /// A chunk list that does not cover its file exactly.
    #[error("chunk list of object {digest}: {problem}")]
    ChunkList {
        /// The object.
        digest: Digest,
        /// What is wrong.
        problem: String,
    },
    /// Another image, whose chunk list for the same object differs, is filling it. Chunk digests are vouched for only
    /// by the TOC that they came from, so the two must not share bytes before the whole is checked: fetch the object
    /// whole through [`crate::Store::object_writer`], or wait until it is complete.
    #[error("object {0} is being filled by another image with a different chunk list")]
    ChunkListConflict(Digest),
    /// A chunk index beyond the list.
    #[error("object {digest} has no chunk {index}")]
    NoSuchChunk {
        /// The object.
        digest: Digest,
        /// The index that was asked for.
        index: usize,
    },
    /// A chunk of another length than the list says.
    #[error("chunk {index} of object {digest} has {expected} bytes, was given {found}")]
    ChunkSize {
        /// The object.
        digest: Digest,
        /// Position in the chunk list.
        index: usize,
        /// Length by the list.
        expected: u64,
        /// Length that was given.
        found: usize,
    },
    /// A read beyond the end of the object.
    #[error("range {offset}+{length} is outside object {digest} of {size} bytes")]
    Range {
        /// The object.
        digest: Digest,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: usize,
        /// Length of the object.
        size: u64,
    },
    /// The object still lacks chunks.
    #[error("object {digest} still lacks {missing} chunks")]
    Incomplete {
        /// The object.
        digest: Digest,
        /// How many chunks are not Present.
        missing: usize,
    },
    /// All chunks matched their digests, but the whole did not match its own: the TOC lied. The data is gone.
    #[error("object {0} was discarded: its chunks are those of the TOC, but the whole has another digest")]
    Discarded(Digest),
    /// The disk reports no error, but not all of these files are there.
    #[error(
        "the disk of store {0:?} did not keep all that was written to it; see that it has room and no errors"
    )]
    NotKept(PathBuf),
    /// Bytes of a partial object that were right are not any more: the disk has not taken them. They are
    /// missing again.
    #[error("the disk has lost bytes of object {0}; see that it has room and no errors")]
    Lost(Digest),
    /// A record that is too large to be kept.
    #[error("record {path:?} would have {size} bytes, the limit is {limit}")]
    RecordTooLarge {
        /// Where it would be.
        path: PathBuf,
        /// Its length.
        size: usize,
        /// The limit.
        limit: usize,
    },
    /// A record that cannot be written down.
    #[error("cannot encode record {path:?}: {source}")]
    Encode {
        /// Where it would be.
        path: PathBuf,
        /// Why not.
        source: postcard::Error,
    },
    /// The stream that takes an EROFS image failed.
    #[error("cannot write an EROFS image: {0}")]
    ImageOutput(#[source] io::Error),
    /// The tree cannot be an EROFS image.
    #[error("cannot write {name:?} into an EROFS image: {problem}")]
    Image {
        /// Path inside the image, lossy.
        name: String,
        /// Which limit is exceeded or what does not fit.
        problem: String,
    },
}

impl Error {
    /// Whether the disk is full, so that the caller can stop filling the store.
    pub const fn is_no_space(&self) -> bool {
        matches!(self, Self::NoSpace { .. })
    }

    /// Whether the kernel refused an operation on a file: the disk is full, read-only or fails, or too many files are open. What was to
    /// be written may be right, and may be taken later.
    pub const fn is_io(&self) -> bool {
        matches!(self, Self::NoSpace { .. } | Self::Io { .. })
    }
}

/// Adds the place to what the kernel said.
pub(crate) trait Context<T> {
    /// Wraps the error.
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, action: &'static str, path: &Path) -> Result<T, Error> {
        self.map_err(|error| at(action, path, error.into()))
    }
}

/// Tells a full disk from everything else.
pub(crate) fn at(action: &'static str, path: &Path, source: io::Error) -> Error {
    let path = path.to_owned();
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Error::NoSpace { action, path },
        _ => Error::Io { action, path, source },
    }
}
