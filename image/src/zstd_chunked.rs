//! zstd:chunked layers: zstd blobs whose files can be fetched one by one.
//!
//! ```text
//! {zstd frames}            a tar stream; every chunk of a file starts a frame
//! skippable(TOC)           JSON, zstd-compressed
//! skippable(tar-split)     Podman's dialect only: the tar headers, zstd-compressed
//! skippable(footer)        where the others are
//! ```
//!
//! A skippable frame (RFC 8878, section 3.1.2) is a magic number, a length and bytes that decoders pass over, so the whole
//! blob is an ordinary zstd stream. Offsets always point behind the eight bytes of the frame's header. Two dialects share the
//! name, and no upstream tool reads both:
//!
//! | | Podman, Buildah, Skopeo (containers/storage) | stargz-snapshotter, nerdctl |
//! |---|---|---|
//! | footer | 64 bytes, `GNUlInUx`; before 1.50 that of the other | 40 bytes, `GnUlInUx` |
//! | vouched for | sha256 of the compressed TOC | sha256 of the JSON |
//! | chunks | by content; runs of zeros; digests only where a file has several | of one size; always a digest |
//! | landmarks | none; files of these names are files | as in eStargz |
//!
//! [`crate::lazy`] calls [`locate`], [`decompress_toc`] and [`read_index`]; the writer calls [`Footer::encode`] and makes
//! [`Position`]s. The format has no specification: containers/storage, `pkg/chunked/internal/minimal/compression.go` and
//! stargz-snapshotter, `estargz/zstdchunked/zstdchunked.go`.

mod footer;

use std::fmt;
use std::ops::Range;

pub(crate) use footer::payload_end;
pub use footer::{Footer, FooterError, SHORT_FOOTER, TAIL, TocLocation, locate};

use crate::compression::{CompressionError, decompress_zstd};
use crate::estargz::index::{Rules, read_index_by};
use crate::estargz::toc::TocError;
use crate::estargz::{TOC_JSON_MAX, TOC_MEMBER_MAX};
use crate::layer::{Encoding, LayerIndex};

/// Magic number of the skippable frames that all writers use.
pub const SKIPPABLE_MAGIC: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];
/// Bytes of a skippable frame before its payload: the magic number and the length.
pub const SKIPPABLE_HEADER: u64 = 8;
/// The only type of TOC there is (`ManifestTypeCRFS`).
pub const TOC_TYPE: u64 = 1;

/// The two kinds of zstd:chunked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// That of Podman, Buildah, Skopeo and CRI-O.
    #[default]
    Podman,
    /// That of stargz-snapshotter and nerdctl.
    Stargz,
}

/// Where something compressed is in a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// First byte of the payload.
    pub offset: u64,
    /// Compressed length in bytes.
    pub compressed_size: u64,
    /// Uncompressed length in bytes, as the writer says. A hint.
    pub size: u64,
}

impl Position {
    /// Parses the value of an annotation: `offset:compressed size:size` and, for a TOC, `:1`. `None` if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let mut numbers = text.split(':').map(|number| {
            let digits = !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit());
            number.parse::<u64>().ok().filter(|_| digits)
        });
        let position = Self {
            offset: numbers.next()??,
            compressed_size: numbers.next()??,
            size: numbers.next()??,
        };
        match (numbers.next(), numbers.next()) {
            (None, None) | (Some(Some(TOC_TYPE)), None) => Some(position),
            _ => None,
        }
    }

    /// The bytes of the blob.
    pub fn range(&self) -> Range<u64> {
        self.offset..self.offset.saturating_add(self.compressed_size)
    }

    /// Whether it is larger than a TOC may be.
    pub fn is_too_large(&self) -> bool {
        self.compressed_size > TOC_MEMBER_MAX || self.size > TOC_JSON_MAX
    }

    /// Whether it can be the position of a TOC in front of `end` that a reader takes.
    pub fn is_sane(&self, end: u64) -> bool {
        self.offset >= SKIPPABLE_HEADER
            && self.compressed_size > 0
            && self
                .offset
                .checked_add(self.compressed_size)
                .is_some_and(|toc_end| toc_end <= end)
            && !self.is_too_large()
    }
}

/// As in an annotation, without the type of the TOC.
impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}", self.offset, self.compressed_size, self.size)
    }
}

/// The JSON of a TOC from its compressed bytes: any number of frames, at most [`TOC_JSON_MAX`] bytes of JSON.
/// `size_hint`, the length of the JSON as [`Position::size`] tells it, saves memory and time where it is right.
pub fn decompress_toc(compressed: &[u8], size_hint: Option<u64>) -> Result<Vec<u8>, TocError> {
    let length = u64::try_from(compressed.len()).unwrap_or(u64::MAX);
    if length > TOC_MEMBER_MAX {
        return Err(TocError::MemberTooLarge(length));
    }
    decompress_zstd(compressed, size_hint, TOC_JSON_MAX).map_err(|error| match error {
        CompressionError::TooLarge { .. } => TocError::TooLarge(TOC_JSON_MAX + 1),
        error => TocError::Zstd(error),
    })
}

/// Reads a TOC. `payload_end` is where the files' bytes end in the blob.
///
/// What holds afterwards is what [`crate::estargz::read_index`] promises, with two differences: files may lie in the blob in
/// another order than in the TOC, and several may share their bytes. Where files' bytes overlap in part, the TOC is refused.
pub fn read_index(json: &[u8], payload_end: u64, dialect: Dialect) -> Result<LayerIndex, TocError> {
    read_index_by(json, &rules(payload_end, dialect))
}

/// What the dialects allow.
pub(crate) fn rules(payload_end: u64, dialect: Dialect) -> Rules {
    Rules {
        encoding: Encoding::Zstd,
        payload_end,
        landmarks: dialect == Dialect::Stargz,
        any_order: true,
    }
}

#[cfg(test)]
mod tests;
