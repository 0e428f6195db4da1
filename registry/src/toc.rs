//! Fetches the TOC of a layer, wherever it is: one request where an annotation has its place or the guess of its length was right,
//! two where the guess was too short, and that of the footer and those of the image beside where it is kept there.
//!
//! Called by the loader of `fs` and by the commands that look at images. What the bytes are worth is decided by
//! [`peel_image::lazy`].

use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use peel_image::estargz::TOC_MEMBER_MAX;
use peel_image::lazy::{Candidate, Located, NotLazy};

use crate::error::Error;
use crate::source::beside::TocImage;
use crate::source::blob::Blob;

/// A compressed TOC and where it was; nothing of it is verified.
#[derive(Debug, Clone)]
pub struct TocBytes {
    /// Format of the layer and place of the TOC.
    pub located: Located,
    /// The compressed TOC, or why it could not be had.
    pub bytes: Result<Bytes, NotLazy>,
}

/// Compressed bytes of TOCs that one image may have in memory: as much as two of the largest. An image may have 1000 layers.
pub const IMAGE_TOCS_MAX: u64 = 2 * TOC_MEMBER_MAX;

/// Longest first request that is not counted as a TOC: a guess, which is mostly bytes of files. The caller bounds how many are made
/// at once.
const GUESS: u64 = 4 << 20;

/// Room in memory for the compressed TOCs of one image, or of those of its layers that are read together.
#[derive(Debug)]
pub struct TocRoom {
    left: AtomicU64,
    limit: u64,
}

/// Something that may refuse to have so many bytes of compressed TOCs in memory.
pub trait Room: Sync {
    /// Takes room; false when there is not so much left.
    fn take(&self, bytes: u64) -> bool;
    /// Why there is no room, as the end of a sentence.
    fn refusal(&self) -> String;
}

impl Default for TocRoom {
    fn default() -> Self {
        Self::new(IMAGE_TOCS_MAX)
    }
}

impl TocRoom {
    /// Room for so many bytes.
    pub fn new(limit: u64) -> Self {
        Self {
            left: AtomicU64::new(limit),
            limit,
        }
    }

    /// Gives back some of what was taken.
    pub fn give_back(&self, bytes: u64) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Room for TocRoom {
    fn take(&self, bytes: u64) -> bool {
        let taken = self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(bytes)
            });
        taken.is_ok()
    }

    fn refusal(&self) -> String {
        format!(
            "with those of the image's other layers it takes more than {} bytes",
            self.limit
        )
    }
}

fn reserve(room: &dyn Room, bytes: u64) -> Result<(), NotLazy> {
    if room.take(bytes) {
        Ok(())
    } else {
        Err(NotLazy::Toc(room.refusal()))
    }
}

/// As [`fetch_toc_into`], for a single layer.
pub async fn fetch_toc(
    blob: &Blob,
    candidate: &Candidate,
    beside: &TocImage,
) -> Result<Result<TocBytes, NotLazy>, Error> {
    fetch_toc_into(&TocRoom::default(), blob, candidate, beside).await
}

/// Fetches the compressed TOC of the layer `blob` if there is `room` for it. The outer error means that the layer's blob cannot be reached at all; the inner one
/// that the layer has no TOC, or that its registry sends no parts of it to a blob that wants [`Blob::only_ranges`]. A TOC image that gives nothing is no error: its reason stands in [`TocBytes::bytes`].
pub async fn fetch_toc_into(
    room: &dyn Room,
    blob: &Blob,
    candidate: &Candidate,
    beside: &TocImage,
) -> Result<Result<TocBytes, NotLazy>, Error> {
    let first = candidate.first_range();
    let counted = Some(first.end.saturating_sub(first.start))
        .filter(|length| *length > GUESS)
        .unwrap_or(0);
    if let Err(reason) = reserve(room, counted) {
        return Ok(Err(reason));
    }
    let bytes = match blob.read(first.clone()).await {
        Ok(bytes) => bytes,
        Err(Error::NoRanges { .. }) => return Ok(Err(NotLazy::NoRanges)),
        Err(error) => return Err(error),
    };
    let located = match candidate.locate(&bytes) {
        Ok(located) => located,
        Err(reason) => return Ok(Err(reason)),
    };
    let toc = match located.toc.clone() {
        Some(toc) if toc.end > candidate.size() || toc.start > toc.end => {
            return Ok(Err(NotLazy::Footer(format!(
                "it puts the table of contents at {} to {} of {} bytes",
                toc.start,
                toc.end,
                candidate.size()
            ))));
        }
        Some(toc) => toc,
        None => {
            let bytes = beside.read(&blob.digest(), TOC_MEMBER_MAX, room).await;
            let bytes = bytes.map_err(NotLazy::Beside);
            return Ok(Ok(TocBytes { located, bytes }));
        }
    };
    if let Err(reason) = reserve(room, (toc.end - toc.start).saturating_sub(counted)) {
        return Ok(Err(reason));
    }
    // What of it lies in the bytes that are here.
    let inside = |offset: u64| {
        usize::try_from(offset.saturating_sub(first.start))
            .unwrap_or(usize::MAX)
            .min(bytes.len())
    };
    let here = bytes.slice(inside(toc.start)..inside(toc.end));
    let bytes = if toc.start >= first.start {
        if here.len() < bytes.len() / 2 {
            // What the guess brought beside it is not kept: nobody counts that.
            Bytes::copy_from_slice(&here)
        } else {
            here
        }
    } else {
        let mut whole = match blob.read(toc.start..first.start.min(toc.end)).await {
            Ok(bytes) => bytes.to_vec(),
            Err(Error::NoRanges { .. }) => return Ok(Err(NotLazy::NoRanges)),
            Err(error) => return Err(error),
        };
        whole.extend_from_slice(&here);
        whole.into()
    };
    tracing::debug!(layer = %blob.digest(), format = %located.format, origin = %located.origin, bytes = bytes.len(), "TOC fetched");
    Ok(Ok(TocBytes {
        located,
        bytes: Ok(bytes),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_taken_until_there_is_none() {
        let room = TocRoom::new(100);
        assert!(room.take(60) && !room.take(41) && room.take(40) && room.take(0) && !room.take(1));
        room.give_back(1);
        assert!(room.take(1));
        let reason = reserve(&room, 1).map_err(|reason| reason.to_string());
        assert_eq!(
            reason.as_ref().map_err(String::as_str),
            Err(
                "its table of contents cannot be used: with those of the image's other layers it takes more than 100 bytes"
            )
        );
    }
}
