//! The last bytes of a zstd:chunked blob: a skippable frame that says where the TOC is.
//!
//! ```text
//!            0       8                16        24    32                 40                    48               56
//! 64 bytes   offset, compressed size, size, type 1, tar-split's offset, its compressed size, its size, "GNUlInUx"
//! 40 bytes   offset, compressed size, size, type 1, "GnUlInUx"
//! ```
//!
//! All numbers are little-endian, 64 bits. containers/storage writes the first since 1.50 and wrote the second up to 1.46, as
//! stargz-snapshotter still does. What it wrote in between (1.47 to 1.49) has 56 bytes with the second magic in their middle and
//! nothing about the tar-split; its positions are taken from the annotations alone, as every reader does.

use std::ops::Range;

use crate::estargz::TOC_JSON_MAX;

use super::{Dialect, Position, SKIPPABLE_HEADER, SKIPPABLE_MAGIC, TOC_TYPE};

/// Length of the payload of Podman's footer in bytes.
const LONG_PAYLOAD: usize = 64;
/// Length of the payload of the other in bytes.
const SHORT_PAYLOAD: usize = 40;
/// Length of the payload of the broken one in bytes.
const BROKEN_PAYLOAD: usize = 56;
const LONG_MAGIC: &[u8; 8] = b"GNUlInUx";
const SHORT_MAGIC: &[u8; 8] = b"GnUlInUx";

/// Bytes of a blob's end that hold any of the footers, with the header of its frame.
pub const TAIL: usize = LONG_PAYLOAD + 8;
/// Length of the 40 bytes' frame.
pub const SHORT_FOOTER: usize = SHORT_PAYLOAD + 8;

/// What the end of a blob says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Footer {
    /// Where the TOC is.
    pub toc: Position,
    /// Where the tar-split is, in a footer of 64 bytes; 40 bytes have no room for it.
    pub tar_split: Option<Position>,
}

/// Where the TOC of a blob is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TocLocation {
    /// What the footer says.
    pub footer: Footer,
    /// The bytes of the compressed TOC.
    pub toc: Range<u64>,
    /// End of the files' bytes.
    pub payload_end: u64,
}

/// Why the end of a blob does not lead to a TOC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// No footer: an ordinary layer, or a truncated one.
    #[error("the last bytes of the blob are not the footer of a zstd:chunked layer")]
    NotZstdChunked,
    /// The footer that containers/storage 1.47 to 1.49 wrote.
    #[error(
        "the footer is the broken one of containers/storage 1.47 to 1.49, and no annotation says where the TOC is"
    )]
    Broken,
    /// A TOC of an unknown type.
    #[error("the footer says that the TOC has type {0}; only 1 is known")]
    Type(u64),
    /// No reader would take a TOC of this size.
    #[error(
        "the footer says that the TOC has {} compressed bytes and {} bytes of JSON; the limit is {TOC_JSON_MAX}",
        .0.compressed_size,
        .0.size
    )]
    TooLarge(Position),
    /// The place of the TOC is impossible.
    #[error("the footer puts the TOC at {position}, which cannot be before the footer at {end}")]
    Position {
        /// Offset and lengths.
        position: Position,
        /// First byte of the footer's frame.
        end: u64,
    },
}

impl Footer {
    /// The footer's frame, which ends the blob.
    pub fn encode(&self) -> Vec<u8> {
        let Position {
            offset,
            compressed_size,
            size,
        } = self.toc;
        let mut numbers = vec![offset, compressed_size, size, TOC_TYPE];
        let magic = match self.tar_split {
            Some(tar_split) => {
                numbers.extend([tar_split.offset, tar_split.compressed_size, tar_split.size]);
                LONG_MAGIC
            }
            None => SHORT_MAGIC,
        };
        let payload: Vec<u8> = numbers
            .into_iter()
            .flat_map(u64::to_le_bytes)
            .chain(*magic)
            .collect();
        // 40 or 64.
        let length = u32::try_from(payload.len()).unwrap_or(0).to_le_bytes();
        [&SKIPPABLE_MAGIC, &length[..], &payload].concat()
    }

    /// Length of the footer's frame in bytes.
    pub const fn size(&self) -> usize {
        match self.tar_split {
            Some(_) => TAIL,
            None => SHORT_FOOTER,
        }
    }

    /// Whose it is, as far as the footer tells: 40 bytes may be an old one of Podman, too.
    pub const fn dialect(&self) -> Dialect {
        match self.tar_split {
            Some(_) => Dialect::Podman,
            None => Dialect::Stargz,
        }
    }
}

/// Recognizes the footer at the end of `tail`; what comes before it does not matter.
pub(super) fn parse(tail: &[u8]) -> Result<Footer, FooterError> {
    if let Some(payload) = payload::<LONG_PAYLOAD>(tail)
        && payload.ends_with(LONG_MAGIC)
    {
        let tar_split = Position {
            offset: number(payload, 4),
            compressed_size: number(payload, 5),
            size: number(payload, 6),
        };
        return Ok(Footer {
            toc: toc(payload)?,
            tar_split: Some(tar_split),
        });
    }
    // stargz-snapshotter looks at these 40 bytes alone, so a frame around them is not asked for.
    if let Some(payload) = tail.last_chunk::<SHORT_PAYLOAD>()
        && payload.ends_with(SHORT_MAGIC)
    {
        return Ok(Footer {
            toc: toc(payload)?,
            tar_split: None,
        });
    }
    match payload::<BROKEN_PAYLOAD>(tail) {
        Some(payload) if payload.get(32..40) == Some(SHORT_MAGIC) => Err(FooterError::Broken),
        _ => Err(FooterError::NotZstdChunked),
    }
}

/// The payload of the skippable frame of this length that ends `tail`.
fn payload<const LENGTH: usize>(tail: &[u8]) -> Option<&[u8]> {
    let start = tail.len().checked_sub(LENGTH)?;
    let (before, payload) = tail.split_at_checked(start)?;
    let length = u32::try_from(LENGTH).ok()?.to_le_bytes();
    before.strip_suffix(&length)?.strip_suffix(&SKIPPABLE_MAGIC)?;
    Some(payload)
}

/// The number at `index` of a payload; all callers stay inside it.
fn number(payload: &[u8], index: usize) -> u64 {
    let bytes = payload.get(index * 8..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
}

fn toc(payload: &[u8]) -> Result<Position, FooterError> {
    match number(payload, 3) {
        TOC_TYPE => Ok(Position {
            offset: number(payload, 0),
            compressed_size: number(payload, 1),
            size: number(payload, 2),
        }),
        other => Err(FooterError::Type(other)),
    }
}

/// Finds the TOC of a blob of `blob_size` bytes from its last bytes: at least [`TAIL`] of them, or all there are. More bytes do
/// no harm, so that one request can bring the footer and the TOC.
pub fn locate(tail: &[u8], blob_size: u64) -> Result<TocLocation, FooterError> {
    let footer = parse(tail)?;
    // A footer of 40 bytes may stand without its frame.
    let payload = footer.size() as u64 - SKIPPABLE_HEADER;
    let end = blob_size
        .checked_sub(payload)
        .ok_or(FooterError::NotZstdChunked)?;
    if footer.toc.is_too_large() {
        return Err(FooterError::TooLarge(footer.toc));
    }
    if !footer.toc.is_sane(end) {
        return Err(FooterError::Position {
            position: footer.toc,
            end,
        });
    }
    let toc = footer.toc.range();
    Ok(TocLocation {
        footer,
        payload_end: payload_end(footer.toc, footer.tar_split),
        toc,
    })
}

/// End of the files' bytes: the frame of the TOC, or that of the tar-split where it comes first.
pub(crate) fn payload_end(toc: Position, tar_split: Option<Position>) -> u64 {
    let tar_split = tar_split.map(|tar_split| tar_split.offset);
    let first = tar_split.filter(|offset| *offset > 0).unwrap_or(u64::MAX);
    toc.offset.min(first).saturating_sub(SKIPPABLE_HEADER)
}
