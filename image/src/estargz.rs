//! eStargz and stargz layers: gzip blobs whose files can be fetched one by one.
//!
//! ```text
//! [gzip member]...[gzip member]   a tar stream; every chunk of a file starts a member
//! [gzip member]                   the TOC: a tar entry `stargz.index.json`, then the end of the archive
//! [footer]                        an empty gzip member that holds the TOC's offset
//! ```
//!
//! The whole blob is an ordinary `.tar.gz`. Reading goes [`locate`] (the blob's tail), [`extract_toc`] (its TOC member; the
//! digest of the JSON is what the manifest vouches for), [`read_index`]. The crate `writer` makes
//! them. The format is specified in
//! stargz-snapshotter, `docs/estargz.md` and `docs/stargz-estargz.md`.
//!
//! * [`footer`]: the three footers. * [`toc`]: the JSON as it stands, and the member that holds it.
//! * [`index`]: JSON to [`LayerIndex`](crate::layer::LayerIndex), everything checked.

pub mod footer;
pub mod index;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod time;
pub mod toc;

pub use footer::{FooterError, TocLocation, locate};
pub use index::read_index;
pub use toc::{TocBytes, TocError, extract_toc};

/// Name of the tar entry that holds the TOC.
pub const TOC_NAME: &str = "stargz.index.json";
/// Name of the file in the root directory that ends the prioritized files of a layer.
pub const PREFETCH_LANDMARK: &str = ".prefetch.landmark";
/// Name of the file in the root directory of a layer without prioritized files.
pub const NO_PREFETCH_LANDMARK: &str = ".no.prefetch.landmark";
/// Content of a landmark.
pub const LANDMARK_CONTENT: [u8; 1] = [0x0f];

/// Longest TOC JSON in bytes. containers/storage reads no longer one (`maxTocSize`), so a longer one would not be
/// portable, and a reader must hold it in memory.
pub const TOC_JSON_MAX: u64 = 150 << 20;
/// Longest TOC member in bytes: JSON that does not compress at all, and the tar headers around it.
pub const TOC_MEMBER_MAX: u64 = TOC_JSON_MAX + (1 << 20);

/// Whether this clean path is part of the format and not of the image: the TOC and the landmarks in the root directory. A layer
/// that is unpacked as a tar stream shows them; its TOC lists the landmarks, and [`read_index`] leaves them out.
pub fn is_reserved(path: &[u8]) -> bool {
    [TOC_NAME, PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK]
        .iter()
        .any(|name| path == name.as_bytes())
}
