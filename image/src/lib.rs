//! What an image is, without any I/O of its own: bytes come in as slices or `Read`, and go out as values or `Write`.
//!
//! * [`layer`]: the format-independent model of one layer: entries, file chunks and where they lie in the blob.
//! * [`tar`]: reading and writing tar streams; [`compression`]: telling and undoing gzip and zstd.
//! * [`tar_split`]: a tar stream without its contents, and made again from them.
//! * [`estargz`], [`zstd_chunked`]: footers and TOCs. [`lazy`]: from a descriptor to a verified index, whatever the format.
//! * [`tree`]: layers merged into one file tree (whiteouts applied).
//! * [`views`]: what a TOC and what a tar stream say of one layer, compared.
//! * [`profile`]: what an image touched while it started.
//! * [`annotations`], [`media`]: names that stand in manifests.
//!
//! Everything in here parses bytes from strangers: no panic, no unbounded allocation; limits are constants with
//! their reason beside them.

pub mod annotations;
pub mod compression;
pub mod estargz;
pub mod layer;
pub mod lazy;
pub mod media;
pub mod path;
pub mod profile;
pub mod tar;
pub mod tar_split;
pub mod tree;
pub mod views;
pub mod zstd_chunked;

pub use estargz::time::format as format_time;
pub use peel_hash::{Digest, DigestError, Hasher};
