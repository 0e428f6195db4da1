//! The format-independent model of one layer: what a TOC or a tar stream says, in the blob's order.
//!
//! Readers of every format produce a [`LayerIndex`]; [`crate::tree`] merges several of them, the store keeps them, and
//! the fetcher finds a file's bytes through its [`Chunk`]s. Whiteouts (`.wh.*`) are ordinary entries here: they
//! mean something only when layers are merged.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::path::EntryPath;
use peel_hash::Digest;

/// Permission, set-id and sticky bits: all that [`Metadata::mode`] may hold.
pub const MODE_MASK: u16 = 0o7777;

/// Mode of every symbolic link: Linux has no other one, whatever the headers say.
pub const SYMLINK_MODE: u16 = 0o777;

/// The owner that an id of a header stands for; `None` for what is no id. `(uid_t)-1`, written as 4294967295 or as -1, is no user but
/// "leave it" for chown(2): tools that unpack leave such a file to root, who made it.
pub(crate) fn owner(id: i64) -> Option<u32> {
    /// `(uid_t)-1`.
    const LEAVE: u32 = u32::MAX;
    match u32::try_from(id) {
        Ok(LEAVE) => Some(0),
        Ok(id) => Some(id),
        Err(_) => (id == -1).then_some(0),
    }
}

/// Bytes of memory that an extended attribute takes beside its name and value: two allocations, and its place in the map.
pub const XATTR_COST: u64 = 80;

/// Extended attributes: full name (`user.x`, `security.capability`, ...) to value.
pub type Xattrs = BTreeMap<Box<[u8]>, Box<[u8]>>;

/// All that is known of one layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerIndex {
    /// The entries in the order of the layer. A later entry of the same path replaces an earlier one.
    pub entries: Vec<Entry>,
    /// End of the blob range `[0, prefetch_end)` that holds the prioritized files (eStargz's prefetch landmark), in
    /// blob bytes. `None` where the layer has no such range.
    pub prefetch_end: Option<u64>,
}

impl LayerIndex {
    /// Bytes of memory that it takes, but for what allocations of names and lists cost beyond their length.
    pub fn memory(&self) -> u64 {
        let entries = self.entries.iter().map(|entry| {
            let attributes = entry.metadata.xattrs.iter();
            let attributes: u64 = attributes
                .map(|(name, value)| XATTR_COST + (name.len() + value.len()) as u64)
                .sum();
            let content = match &entry.kind {
                EntryKind::Regular(content) => content.chunks.len() * size_of::<Chunk>(),
                EntryKind::Symlink(target) => target.len(),
                EntryKind::Hardlink(target) => target.as_bytes().len(),
                _ => 0,
            };
            (size_of::<Entry>() + entry.path.as_bytes().len() + content) as u64 + attributes
        });
        entries.sum()
    }
}

/// One file, directory or other node of a layer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// Where it stands in the tree.
    pub path: EntryPath,
    /// Owner, mode, times, attributes. Those of a hard link are given to the inode that it names.
    pub metadata: Metadata,
    /// What it is.
    pub kind: EntryKind,
}

/// What every inode has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Metadata {
    /// Bits of [`MODE_MASK`]; [`SYMLINK_MODE`] for a symbolic link.
    pub mode: u16,
    /// Owning user id; never 4294967295.
    pub uid: u32,
    /// Owning group id; never 4294967295.
    pub gid: u32,
    /// Modification time: seconds since the epoch, may be negative.
    pub mtime: i64,
    /// Nanoseconds beside [`Metadata::mtime`], below 1,000,000,000.
    pub mtime_nanoseconds: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

/// The types of tar entries that a container image can hold.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum EntryKind {
    /// A directory.
    Directory,
    /// A regular file.
    Regular(FileContent),
    /// A symbolic link and its target, byte for byte.
    Symlink(Box<[u8]>),
    /// Another name of a file of the same layer.
    Hardlink(EntryPath),
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Device {
    /// Major number; Linux keeps 12 bits.
    pub major: u32,
    /// Minor number; Linux keeps 20 bits.
    pub minor: u32,
}

/// The content of a regular file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileContent {
    /// Length in bytes.
    pub size: u64,
    /// sha256 of the whole content; always [`Digest::EMPTY`] for an empty file. `None` where the layer does not say:
    /// such a file cannot be served lazily.
    pub digest: Option<Digest>,
    /// The pieces, in file order, without gaps from 0 to `size`. Empty for an empty file, and for a layer whose bytes
    /// cannot be reached piece by piece (a plain tar stream): then the content is known by its digest alone.
    pub chunks: Vec<Chunk>,
}

/// The unit that is fetched, decompressed and verified.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chunk {
    /// First byte in the file.
    pub file_offset: u64,
    /// Length in the file, in bytes; never 0.
    pub size: u64,
    /// sha256 of the uncompressed chunk.
    pub digest: Digest,
    /// Where its bytes come from.
    pub source: ChunkSource,
}

/// Where the bytes of a chunk come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChunkSource {
    /// A compressed stream inside the layer blob.
    Blob {
        /// How the stream is compressed.
        encoding: Encoding,
        /// First byte of the stream in the blob.
        offset: u64,
        /// Bytes in the blob up to which the stream may reach: the next stream's start or the end of the payload.
        compressed_size: u64,
        /// Where the chunk starts in the stream's uncompressed bytes: 0 unless several chunks share one stream.
        inner_offset: u64,
    },
    /// A run of zeros, which is never fetched.
    Zeros,
}

/// How a stream inside a blob is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Encoding {
    /// One gzip member, RFC 1952 (or several, read on until the chunk is full).
    Gzip,
    /// One zstd frame, RFC 8878 (or several).
    Zstd,
    /// Bytes as they are.
    Plain,
}

impl FileContent {
    /// The content of a file of no bytes.
    pub fn empty() -> Self {
        Self {
            size: 0,
            digest: Some(Digest::EMPTY),
            chunks: Vec::new(),
        }
    }

    /// Whether every byte can be fetched on its own: the whole digest is known and the chunks cover the file.
    pub fn is_lazy(&self) -> bool {
        self.digest.is_some() && (self.size == 0 || !self.chunks.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::owner;

    #[test]
    fn an_owner_that_is_none_is_root() {
        for (id, expected) in [
            (0, Some(0)),
            (1000, Some(1000)),
            (4_294_967_294, Some(4_294_967_294)),
            (4_294_967_295, Some(0)),
            (-1, Some(0)),
            (4_294_967_296, None),
            (-2, None),
            (i64::MIN, None),
            (i64::MAX, None),
        ] {
            assert_eq!(owner(id), expected, "{id}");
        }
    }
}
