//! The meaning of a TOC: JSON to [`LayerIndex`], with everything checked that can be checked before a byte is fetched.
//!
//! [`crate::lazy`] calls this with the digest that the TOC must have, or after it was compared; both formats have the same JSON but
//! for some fields, and [`Rules`] says what else differs. What holds afterwards: every path is clean, the
//! chunks of every file cover it from 0 to its size without gaps, every stream lies inside the payload, streams follow
//! one another and chunks in one stream do not overlap (unless the rules allow it), and the chunk of a single-chunk file has the
//! file's digest. No name is one that the TOC cannot tell: JSON has no bytes that are not UTF-8, and
//! writers put an escaped U+FFFD in their place.
//!
//! * [`parts`]: the usual TOC, quickly, on several threads. * [`scan`]: the usual entry, quickly.
//! * [`whole`]: any JSON from its beginning to its end, and what is wrong with it.
//! * [`record`]: one entry by itself. * [`build`]: entries to an index.

mod build;
mod parts;
mod record;
mod scan;
mod whole;

use parts::Plan;

use super::TOC_JSON_MAX;
use super::toc::TocError;
use crate::layer::{Encoding, LayerIndex};
use peel_hash::Digest;

/// Most entries, chunks and extended attributes of one layer, counted together. The largest layers of public images have a
/// few hundred thousand; each costs a reader some hundred bytes of memory, whatever the length of its JSON.
pub const RECORDS_MAX: usize = 2_000_000;

/// Reads a TOC. `payload_end` is where the files' bytes end in the blob ([`super::TocLocation::payload_end`]).
///
/// The landmarks are left out of the entries; a file whose chunks cannot be verified one by one (several chunks, but no
/// digests of them) is listed without chunks.
pub fn read_index(json: &[u8], payload_end: u64) -> Result<LayerIndex, TocError> {
    read_index_by(json, &rules(payload_end))
}

/// What eStargz and stargz allow.
pub(crate) fn rules(payload_end: u64) -> Rules {
    Rules {
        encoding: Encoding::Gzip,
        payload_end,
        landmarks: true,
        any_order: false,
    }
}

/// What a format allows in its TOC.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// How the chunks are compressed.
    pub(crate) encoding: Encoding,
    /// Where the files' bytes end in the blob.
    pub(crate) payload_end: u64,
    /// Whether files with the names of landmarks are landmarks and no files.
    pub(crate) landmarks: bool,
    /// Whether files may lie in the blob in another order than in the TOC, and share bytes.
    pub(crate) any_order: bool,
}

/// As [`read_index`], by the rules of a format.
pub(crate) fn read_index_by(json: &[u8], rules: &Rules) -> Result<LayerIndex, TocError> {
    check_length(json)?;
    let (index, _) = parts::read(json, rules, Plan::new(json.len(), false));
    index.map_or_else(|| whole::read(json, rules), Ok)
}

/// Why a TOC that somebody vouches for cannot be used.
#[derive(Debug)]
pub(crate) enum Unusable {
    /// It is another one: this is the sha256 of its JSON.
    Other(Digest),
    /// What is wrong with the right one.
    Toc(TocError),
}

/// As [`read_index_by`], of a TOC whose JSON must have this sha256. It is read and hashed at the same time, but nothing of what was
/// read, not even an error, gets out if the digest is another.
pub(crate) fn read_verified(json: &[u8], rules: &Rules, expected: Digest) -> Result<LayerIndex, Unusable> {
    check_length(json).map_err(Unusable::Toc)?;
    let (index, found) = parts::read(json, rules, Plan::new(json.len(), true));
    let found = found.unwrap_or_else(|| Digest::of(json));
    if found != expected {
        return Err(Unusable::Other(found));
    }
    index
        .map_or_else(|| whole::read(json, rules), Ok)
        .map_err(Unusable::Toc)
}

/// Whether reading in short parts gives what reading the whole gives, for every TOC that is read in parts at all. For the fuzz
/// targets.
#[doc(hidden)]
pub fn parts_agree(json: &[u8], payload_end: u64) -> bool {
    [false, true].into_iter().all(|any_order| {
        let rules = Rules {
            any_order,
            ..rules(payload_end)
        };
        let whole = whole::read(json, &rules).ok();
        [100, 1000, json.len().max(1)].into_iter().all(|part| {
            let plan = Plan {
                helpers: 0,
                part,
                hash: false,
            };
            let (index, _) = parts::read(json, &rules, plan);
            index.is_none() || index == whole
        })
    })
}

fn check_length(json: &[u8]) -> Result<(), TocError> {
    match u64::try_from(json.len()) {
        Ok(length) if length <= TOC_JSON_MAX => Ok(()),
        length => Err(TocError::TooLarge(length.unwrap_or(u64::MAX))),
    }
}

#[cfg(test)]
mod tests;
