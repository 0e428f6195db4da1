//! Fetches the TOC of an eStargz layer: one request, two if the guess of its size was too small.

use peel_image::Digest;
use peel_image::estargz::{self, TocLocation, footer::Footer};
use peel_image::layer::LayerIndex;
use peel_registry::Blob;

use super::blocking;
use crate::fetch::early::Brake;

/// Smallest guess of the length of TOC and footer.
const GUESS_MIN: u64 = 64 << 10;
/// Largest guess.
const GUESS_MAX: u64 = 4 << 20;
/// Blob bytes per byte of TOC: images of many small files come near 1 in 40.
const GUESS_RATIO: u64 = 40;

/// A verified TOC.
#[derive(Debug)]
pub(super) struct Toc {
    pub(super) index: LayerIndex,
}

/// Why there is no TOC.
#[derive(Debug)]
pub(super) enum TocFailure {
    /// The bytes could not be had: an error for the whole image.
    Registry(peel_registry::Error),
    /// The layer cannot be served lazily, for this reason.
    NotLazy(String),
    /// The service is stopping.
    Stopping,
}

impl From<peel_registry::Error> for TocFailure {
    fn from(error: peel_registry::Error) -> Self {
        Self::Registry(error)
    }
}

fn not_lazy(reason: impl std::fmt::Display) -> TocFailure {
    TocFailure::NotLazy(reason.to_string())
}

/// Fetches the TOC, whose digest must be `expected`. `offset` is where the manifest says that it begins. The brake is let
/// go when the bytes are here.
pub(super) async fn fetch(
    blob: &Blob,
    offset: Option<u64>,
    expected: &Digest,
    brake: Brake,
) -> Result<Toc, TocFailure> {
    let size = blob.size();
    let hinted = offset.filter(|offset| size - offset <= estargz::TOC_MEMBER_MAX);
    let start =
        hinted.unwrap_or_else(|| size.saturating_sub((size / GUESS_RATIO).clamp(GUESS_MIN, GUESS_MAX)));
    let tail = blob.read(start..size).await?;
    let location = locate(&tail, size)?;
    let end = location.payload_end.saturating_add(location.toc_size);
    if location.toc_size > estargz::TOC_MEMBER_MAX || end > size {
        return Err(not_lazy("its footer points to an impossible table of contents"));
    }
    let member = if location.payload_end >= start {
        slice(&tail, location.payload_end - start, location.toc_size)
            .ok_or_else(|| not_lazy("its footer points outside the layer"))?
            .to_vec()
    } else {
        let mut member = blob.read(location.payload_end..start.min(end)).await?.to_vec();
        let rest = slice(&tail, 0, end.saturating_sub(start))
            .ok_or_else(|| not_lazy("its footer points outside the layer"))?;
        member.extend_from_slice(rest);
        member
    };
    drop(brake);
    let expected = *expected;
    tracing::debug!(layer = %blob.digest(), bytes = member.len(), "TOC fetched");
    blocking(move || parse(&member, &location, &expected))
        .await
        .map_err(|_| TocFailure::Stopping)?
}

fn slice(bytes: &[u8], from: u64, length: u64) -> Option<&[u8]> {
    let from = usize::try_from(from).ok()?;
    bytes.get(from..from.checked_add(usize::try_from(length).ok()?)?)
}

fn locate(tail: &[u8], size: u64) -> Result<TocLocation, TocFailure> {
    let location = estargz::locate(tail, size).map_err(not_lazy)?;
    if location.footer == Footer::External {
        return Err(not_lazy(
            "its table of contents is kept in another image, which is not supported yet",
        ));
    }
    Ok(location)
}

fn parse(member: &[u8], location: &TocLocation, expected: &Digest) -> Result<Toc, TocFailure> {
    let toc = estargz::extract_toc(member).map_err(not_lazy)?;
    if toc.digest != *expected {
        return Err(not_lazy(format!(
            "its table of contents has the digest {}, but the manifest vouches for {expected}",
            toc.digest
        )));
    }
    let index = estargz::read_index(&toc.json, location.payload_end).map_err(not_lazy)?;
    tracing::debug!(toc = %toc.digest, entries = index.entries.len(), "TOC parsed");
    Ok(Toc { index })
}
