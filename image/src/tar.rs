//! Tar streams: [`Reader`] takes one apart, [`mod@write`] makes one, [`index`] turns a plain layer into a
//! [`LayerIndex`](crate::layer::LayerIndex).
//!
//! Called by the eStargz writer, by the conversion of layers that cannot be lazy, and by tests. Understood are the
//! formats that POSIX pax(1), GNU tar, Go's archive/tar and bsdtar write: V7, USTAR, PAX (local and global records), GNU
//! long names, base-256 numbers, and sparse files of GNU tar (old GNU, PAX 0.0, 0.1, 1.0), which are expanded.
//!
//! Where readers differ, ours sides with Go's archive/tar, which containerd and Podman unpack with, so that an image means
//! the same thing here and there. So global PAX records, which POSIX applies, mean nothing, and what stands before them is about
//! them and not about the next entry; a name that ends in `/` makes a directory of an entry of type NUL (V7) and of no other, where
//! GNU tar does that with type `0`, too. `LIBARCHIVE.xattr.*` records are ignored as in Go: bsdtar writes each attribute as
//! `SCHILY.xattr.*` too.
//!
//! Streams come from strangers: every error names the entry and its offset, and every allocation has a limit.

mod header;
pub mod index;
mod pax;
mod read;
mod sparse;
#[cfg(test)]
mod tests;
pub mod write;

use std::error::Error;
use std::fmt;

use crate::layer::{Device, EntryKind, Metadata};
use crate::path::{EntryPath, PathError};

pub use header::BLOCK;
pub use index::index_tar;
pub use read::{Reader, Trailer};

/// Most bytes of one extension (PAX records, a GNU long name, a sparse map). Go's archive/tar has the same limit.
pub const EXTENSION_MAX: u64 = 1 << 20;
/// Most bytes of all header blocks of one entry: room for a few extensions, and a bound for [`TarEntry::raw_headers`].
pub const HEADERS_MAX: u64 = 4 << 20;
/// Most zeros that the holes of all sparse files of a stream may expand to: a header of 512 bytes can ask for 8 EiB.
pub const HOLES_MAX: u64 = 16 << 30;
/// Longest name of an extended attribute in bytes (Linux `XATTR_NAME_MAX`).
pub const XATTR_NAME_MAX: usize = 255;
/// Longest value of an extended attribute in bytes (Linux `XATTR_SIZE_MAX`).
pub const XATTR_VALUE_MAX: usize = 65536;

/// One entry of a tar stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TarEntry {
    /// Offset in the stream of the first header block (of the first extension, where there is one).
    pub offset: u64,
    /// The name as it stands in the stream.
    pub name: Box<[u8]>,
    /// The cleaned name.
    pub path: EntryPath,
    /// Owner, mode, times, attributes. The mode holds permission, set-id and sticky bits only.
    pub metadata: Metadata,
    /// The mode as it stands in the header: some writers put the file type into it.
    pub raw_mode: i64,
    /// User and group as they stand in the headers, where -1 and 4294967295 mean none.
    pub raw_owner: (i64, i64),
    /// Time of the last access, seconds and nanoseconds, where the headers give one.
    pub access_time: Option<(i64, u32)>,
    /// Time of the last change of the inode, likewise.
    pub change_time: Option<(i64, u32)>,
    /// What the entry is.
    pub kind: TarKind,
    /// Name of the owning user; empty where the stream gives none.
    pub user_name: Box<[u8]>,
    /// Name of the owning group; empty where the stream gives none.
    pub group_name: Box<[u8]>,
    /// Every header block of this entry exactly as it stood, extensions included.
    pub raw_headers: Vec<u8>,
    /// Whether [`TarEntry::raw_headers`], the content and its padding mean the same anywhere in any stream. Not so for a
    /// sparse file, whose content the reader expands, and for any entry after a global PAX header: a writer must
    /// encode the headers of such an entry anew.
    pub self_contained: bool,
}

/// What a tar entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TarKind {
    /// A directory.
    Directory,
    /// A regular file.
    Regular {
        /// Length of the content in bytes, holes expanded.
        size: u64,
    },
    /// A symbolic link and its target, byte for byte; neither empty nor longer than Linux's `PATH_MAX`.
    Symlink(Box<[u8]>),
    /// Another name of an earlier file.
    Hardlink {
        /// The target as it stands in the stream.
        raw: Box<[u8]>,
        /// The cleaned target.
        target: EntryPath,
    },
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

impl TarKind {
    /// Bytes of content that follow the headers: 0 for all but regular files.
    pub fn size(&self) -> u64 {
        match self {
            Self::Regular { size } => *size,
            _ => 0,
        }
    }
}

impl From<&EntryKind> for TarKind {
    fn from(kind: &EntryKind) -> Self {
        match kind {
            EntryKind::Directory => Self::Directory,
            EntryKind::Regular(content) => Self::Regular { size: content.size },
            EntryKind::Symlink(target) => Self::Symlink(target.clone()),
            EntryKind::Hardlink(target) => Self::Hardlink {
                raw: target.as_bytes().into(),
                target: target.clone(),
            },
            EntryKind::CharDevice(device) => Self::CharDevice(*device),
            EntryKind::BlockDevice(device) => Self::BlockDevice(*device),
            EntryKind::Fifo => Self::Fifo,
        }
    }
}

/// Why a tar stream cannot be read or an entry cannot be written, and where.
#[derive(Debug)]
pub struct TarError {
    /// The entry's name as far as it is known, shortened; empty between entries.
    pub entry: String,
    /// Offset in the stream of the entry's first header block; 0 for an entry that is being written.
    pub offset: u64,
    /// What is wrong.
    pub problem: TarProblem,
}

/// With what is wrong; [`Error::source`] goes on behind it, so that a chain of causes says it once.
impl fmt::Display for TarError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry.as_str() {
            "" => write!(f, "tar stream at byte {}: {}", self.offset, self.problem),
            entry => write!(f, "tar entry {entry:?} at byte {}: {}", self.offset, self.problem),
        }
    }
}

impl Error for TarError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.problem.source()
    }
}

/// What is wrong with a tar entry.
#[derive(Debug, thiserror::Error)]
pub enum TarProblem {
    /// The underlying stream failed.
    #[error("reading the stream failed")]
    Read(#[source] std::io::Error),
    /// The sink for file contents or the output stream failed.
    #[error("writing its content failed")]
    Write(#[source] std::io::Error),
    /// The stream ends inside a header, an extension or a content.
    #[error("the stream ends too early, inside {0}")]
    Truncated(&'static str),
    /// The header's checksum does not fit its bytes: no tar stream, or a damaged one.
    #[error("the header's checksum is wrong: this is no tar header")]
    Checksum,
    /// One zero block is followed by something else.
    #[error("a single zero block stands between entries")]
    LoneZeroBlock,
    /// A numeric field is malformed, negative where it must not be, or too large for what it counts.
    #[error("the field {0} is malformed or out of range")]
    Number(&'static str),
    /// A PAX record is malformed.
    #[error("malformed PAX record: {0}")]
    Pax(&'static str),
    /// A sparse map is malformed.
    #[error("malformed sparse map: {0}")]
    Sparse(&'static str),
    /// Extensions or contents are larger than a limit.
    #[error("{what} of more than {limit} bytes")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit in bytes.
        limit: u64,
    },
    /// The stream has more entries than a layer may have.
    #[error("more than {0} entries")]
    TooManyEntries(u64),
    /// The name or the link target cannot be a path.
    #[error(transparent)]
    Path(#[from] PathError),
    /// A symbolic link's target is empty, longer than `PATH_MAX`, or holds a NUL byte.
    #[error("the target of the symbolic link is empty, too long, or holds a NUL byte")]
    SymlinkTarget,
    /// A user or group name, or the name or value of an extended attribute, is empty, too long, or holds a NUL byte.
    #[error("{0} is empty, too long, or holds a NUL byte")]
    Text(&'static str),
    /// An entry type that container images do not have.
    #[error("unsupported entry type {0:?}")]
    Type(char),
    /// An entry that can have no content claims to have some.
    #[error("a directory with content")]
    DirectoryContent,
}

impl TarError {
    fn new(name: &[u8], offset: u64, problem: TarProblem) -> Self {
        /// Keeps a message readable when the name is hostile.
        const SHOWN: usize = 200;
        let entry = String::from_utf8_lossy(name.get(..SHOWN).unwrap_or(name)).into_owned();
        Self {
            entry,
            offset,
            problem,
        }
    }
}

/// The length of `bytes` in the type that offsets have.
fn len64(bytes: &[u8]) -> u64 {
    u64::try_from(bytes.len()).unwrap_or(u64::MAX)
}
