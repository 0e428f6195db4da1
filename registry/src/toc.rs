//! Fetches the TOC of a layer, wherever it is: one request where an annotation has its place or the guess of its length was right,
//! two where the guess was too short, and that of the footer and those of the image beside where it is kept there.
//!
//! Called by the loader of `fs` and by the commands that look at images. What the bytes are worth is decided by
//! [`peel_image::lazy`].

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

/// Fetches the compressed TOC of the layer `blob`. The outer error means that the layer's blob cannot be reached at all; the inner one
/// that the layer has no TOC. A TOC image that gives nothing is no error: its reason stands in [`TocBytes::bytes`].
pub async fn fetch_toc(
    blob: &Blob,
    candidate: &Candidate,
    beside: &TocImage,
) -> Result<Result<TocBytes, NotLazy>, Error> {
    let first = candidate.first_range();
    let bytes = blob.read(first.clone()).await?;
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
            let bytes = beside.read(&blob.digest(), TOC_MEMBER_MAX).await;
            let bytes = bytes.map_err(NotLazy::Beside);
            return Ok(Ok(TocBytes { located, bytes }));
        }
    };
    // What of it lies in the bytes that are here.
    let inside = |offset: u64| {
        usize::try_from(offset.saturating_sub(first.start))
            .unwrap_or(usize::MAX)
            .min(bytes.len())
    };
    let here = bytes.slice(inside(toc.start)..inside(toc.end));
    let bytes = if toc.start >= first.start {
        here
    } else {
        let mut whole = blob.read(toc.start..first.start.min(toc.end)).await?.to_vec();
        whole.extend_from_slice(&here);
        whole.into()
    };
    tracing::debug!(layer = %blob.digest(), format = %located.format, origin = %located.origin, bytes = bytes.len(), "TOC fetched");
    Ok(Ok(TocBytes {
        located,
        bytes: Ok(bytes),
    }))
}
