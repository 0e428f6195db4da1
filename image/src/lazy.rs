//! The one place that decides whether a layer can be served file by file, and by which TOC: from what its descriptor says and the
//! bytes around its end to a verified [`LayerIndex`]. No I/O: the caller brings the bytes.
//!
//! ```text
//! Candidate::new       media type, size, annotations
//!   .vouched()         who answers for a TOC, if anybody
//!   .first_range()     the bytes to ask for: the TOC alone where an annotation has its place, else the end of the blob
//!   .locate()          what these bytes are: the format, and where the compressed TOC is
//!   .read()            the compressed TOC to an index; its digests are compared first
//! ```
//!
//! `fs` (mounts) and `peel` (`inspect`, `ls`, `cat`, `convert --reuse`) go this way through `registry`'s `toc`, so they agree about every
//! layer.
//!
//! **Who vouches for a TOC.** Only the manifest, by the sha256 of the JSON ([`annotations::TOC_DIGEST`]), by that of the compressed TOC
//! ([`annotations::PODMAN_MANIFEST_CHECKSUM`] and its older name), or by both. Every digest that is given must be right; two
//! different ones for the same bytes, or one that is no digest, make the layer not lazy. Podman refuses an image that has both kinds,
//! because its two readers would take two different TOCs; here there is one TOC, which must have both digests, so both tools'
//! users get the same files. Where a TOC is stored (the blob, or an image beside it) does not matter to any of this, and positions
//! are hints: a wrong one leads to bytes with another digest.

mod candidate;
mod reason;

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Serialize, Serializer};

pub use candidate::Candidate;
pub use reason::NotLazy;

use crate::estargz;
use crate::estargz::index::Rules;
use crate::estargz::toc::{Json, extract_json};
use crate::layer::{Chunk, ChunkSource, EntryKind, LayerIndex};
use crate::zstd_chunked::{self, Dialect};
use peel_hash::Digest;

/// Largest chunk that is served lazily, in bytes: a chunk is decompressed and verified in memory as a whole. Builders write 4 MiB
/// by default, and Podman's chunks are seldom larger than some MiB.
pub const CHUNK_MAX: u64 = 256 << 20;

/// Most uncompressed bytes of a stream up to the end of a chunk in it, for layers that are served lazily: whatever comes before the chunk
/// is decompressed while a read waits, about a second for so many. A stream that small files share ends with the first chunk that makes
/// it long enough, so twice the largest chunk is beyond real ones.
pub const STREAM_MAX: u64 = 2 * CHUNK_MAX;

/// Most zeros of a file that is served lazily, in bytes: they are hashed while a read waits, which takes half a
/// second for so many, or more than two without SHA instructions.
pub const ZEROS_MAX: u64 = 1 << 30;

/// Most zeros of a layer that is served lazily, in bytes: a few hundred bytes of TOC can ask for [`ZEROS_MAX`] of them.
pub const LAYER_ZEROS_MAX: u64 = 16 << 30;

/// What a layer blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// eStargz: gzip members and a TOC.
    Estargz,
    /// stargz, its predecessor.
    Stargz,
    /// eStargz whose TOC is in the image beside it.
    EstargzExternal,
    /// zstd:chunked.
    ZstdChunked(Dialect),
    /// tar in gzip.
    Gzip,
    /// tar in zstd.
    Zstd,
    /// tar.
    Tar,
    /// Not a layer by its media type.
    Unknown,
}

impl Format {
    /// As `peel inspect` names it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Estargz => "eStargz",
            Self::Stargz => "stargz",
            Self::EstargzExternal => "eStargz with external TOC",
            Self::ZstdChunked(Dialect::Podman) => "zstd:chunked (Podman)",
            Self::ZstdChunked(Dialect::Stargz) => "zstd:chunked (stargz)",
            Self::Gzip => "tar+gzip",
            Self::Zstd => "tar+zstd",
            Self::Tar => "tar",
            Self::Unknown => "unknown",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for Format {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// What told where the TOC is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Origin {
    /// An annotation of the layer's descriptor.
    Annotation,
    /// The footer of the blob.
    Footer,
    /// It is in the image beside this one.
    ImageBeside,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Annotation => "annotation",
            Self::Footer => "footer",
            Self::ImageBeside => "image beside",
        })
    }
}

/// A layer's format and the place of its TOC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// What the blob is.
    pub format: Format,
    /// What told so.
    pub origin: Origin,
    /// The compressed TOC in the blob; `None` where it is in the image beside.
    pub toc: Option<Range<u64>>,
    /// Length of the TOC's JSON in bytes, where something tells it. A hint.
    pub json_size: Option<u64>,
    /// End of the files' bytes in the blob.
    pub payload_end: u64,
}

/// A TOC out of its compression, not compared with anything.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toc {
    /// The JSON, byte for byte.
    pub json: Vec<u8>,
    /// sha256 of the JSON.
    pub json_digest: Digest,
    /// sha256 of the compressed TOC.
    pub compressed_digest: Digest,
}

impl Located {
    /// Takes a TOC out of its compression.
    pub fn open(&self, compressed: &[u8]) -> Result<Toc, NotLazy> {
        let json = self.decompress(compressed)?;
        Ok(Toc {
            json_digest: Digest::of(json.as_bytes()),
            json: json.into_bytes(),
            compressed_digest: Digest::of(compressed),
        })
    }

    fn decompress(&self, compressed: &[u8]) -> Result<Json, NotLazy> {
        match self.format {
            Format::ZstdChunked(_) => {
                zstd_chunked::decompress_toc(compressed, self.json_size).map(Json::from)
            }
            _ => extract_json(compressed),
        }
        .map_err(NotLazy::toc)
    }

    /// What the format allows in a TOC.
    fn rules(&self) -> Rules {
        match self.format {
            Format::ZstdChunked(dialect) => zstd_chunked::rules(self.payload_end, dialect),
            _ => estargz::index::rules(self.payload_end),
        }
    }
}

/// Over what a manifest's digest of a TOC is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Over {
    /// The JSON.
    Json,
    /// The compressed TOC.
    Compressed,
    /// Both, each with a digest of its own.
    Both,
}

/// How a TOC stands to what the manifest says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum TocState {
    /// The layer has none, or none that could be looked at.
    None,
    /// It is the one that the manifest vouches for.
    Verified {
        /// The digest by which it does: that of the JSON, if there is one.
        digest: Digest,
        /// Over what.
        over: Over,
    },
    /// The manifest says nothing about it.
    NotVouchedFor {
        /// sha256 of the TOC JSON.
        digest: Digest,
    },
    /// The manifest says something else.
    Differs {
        /// What it is.
        digest: Digest,
        /// What the manifest says it is.
        annotated: Digest,
    },
}

/// Bytes of a chunk per compressed byte from which on it may be nothing but zeros: both compressors come near 1000 and beyond there.
const ZEROS_RATIO: u64 = 500;

/// Most bytes that are hashed to find the holes of all layers of an image: some seconds, while other images wait for their turn. No real
/// image has such holes in more than a layer or two.
pub const IMAGE_HOLES_MAX: u64 = 4 * ZEROS_MAX;

/// What may still be hashed to find the holes of an image, and what came of it. What has no room is taken for ordinary content.
#[derive(Debug)]
pub struct HoleBudget {
    bytes: AtomicU64,
    /// The files that were hashed, and whether they are zeros: an index may be read again.
    known: Mutex<Vec<(Digest, u64, bool)>>,
}

impl Default for HoleBudget {
    fn default() -> Self {
        Self::new(IMAGE_HOLES_MAX)
    }
}

impl HoleBudget {
    /// Room for so many bytes.
    pub const fn new(bytes: u64) -> Self {
        Self {
            bytes: AtomicU64::new(bytes),
            known: Mutex::new(Vec::new()),
        }
    }

    /// Whether a file of that digest and so many bytes is nothing but zeros; `None` if there is no room to find out.
    fn is_zeros(&self, digest: Digest, size: u64) -> Option<bool> {
        let known = || self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let before = known()
            .iter()
            .find_map(|(of, length, verdict)| ((of, length) == (&digest, &size)).then_some(*verdict));
        if before.is_some() {
            return before;
        }
        let order = Ordering::Relaxed;
        let taken = self
            .bytes
            .fetch_update(order, order, |left| left.checked_sub(size));
        taken.ok()?;
        let verdict = Digest::of_zeros(size) == digest;
        known().push((digest, size, verdict));
        Some(verdict)
    }
}

/// Finds large files of nothing but zeros: a writer that has one chunk for a file says nothing of its kind, but its digest does. As
/// holes they need not fit into memory. Hashes no more than [`ZEROS_MAX`] of a layer and the `budget` of its image, and none for files
/// that did not compress like them.
pub(crate) fn find_holes(index: &mut LayerIndex, budget: &HoleBudget) {
    let mut left = ZEROS_MAX;
    for entry in &mut index.entries {
        let EntryKind::Regular(content) = &mut entry.kind else {
            continue;
        };
        let ([chunk], Some(digest)) = (content.chunks.as_mut_slice(), content.digest) else {
            continue;
        };
        let ChunkSource::Blob { compressed_size, .. } = chunk.source else {
            continue;
        };
        if chunk.size > CHUNK_MAX
            && chunk.size / ZEROS_RATIO > compressed_size
            && chunk.size <= left
            && let Some(is_zeros) = budget.is_zeros(digest, chunk.size)
        {
            left -= chunk.size;
            if is_zeros {
                chunk.source = ChunkSource::Zeros;
            }
        }
    }
}

/// Why the files of a layer cannot be fetched one by one although its TOC is right, if so.
pub(crate) fn unservable(index: &LayerIndex, payload_end: u64) -> Option<NotLazy> {
    let mut all_zeros: u64 = 0;
    for entry in &index.entries {
        let EntryKind::Regular(content) = &entry.kind else {
            continue;
        };
        let path = || entry.path.to_string();
        if !content.is_lazy() {
            return Some(NotLazy::Unverifiable { path: path() });
        }
        let is_zeros = |chunk: &&Chunk| matches!(chunk.source, ChunkSource::Zeros);
        let mut bytes = content.chunks.iter().filter(|chunk| !is_zeros(chunk));
        if bytes.any(|chunk| chunk.size > CHUNK_MAX) {
            return Some(NotLazy::ChunkTooLarge { path: path() });
        }
        let too_deep = content.chunks.iter().any(|chunk| match chunk.source {
            ChunkSource::Blob { inner_offset, .. } => inner_offset.saturating_add(chunk.size) > STREAM_MAX,
            ChunkSource::Zeros => false,
        });
        if too_deep {
            return Some(NotLazy::StreamTooLarge { path: path() });
        }
        // Holes need no memory, but what they are in is hashed while a read waits.
        let zeros = content.chunks.iter().filter(is_zeros).map(|chunk| chunk.size);
        let zeros = zeros.fold(0, u64::saturating_add);
        all_zeros = all_zeros.saturating_add(zeros);
        if zeros > ZEROS_MAX || all_zeros > LAYER_ZEROS_MAX {
            return Some(NotLazy::HolesTooLarge { path: path() });
        }
        let outside = content.chunks.iter().any(|chunk| match chunk.source {
            ChunkSource::Blob { offset, .. } => offset >= payload_end,
            ChunkSource::Zeros => false,
        });
        if outside {
            return Some(NotLazy::Outside { path: path() });
        }
        if let ([chunk], Some(digest)) = (content.chunks.as_slice(), content.digest)
            && chunk.digest != digest
        {
            return Some(NotLazy::TwoFileDigests { path: path() });
        }
    }
    None
}

#[cfg(test)]
mod tests;
