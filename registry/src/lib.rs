//! How image bytes come and go: OCI distribution client, OCI layouts, archives.
//!
//! * [`ImageName`]: what users type.
//! * [`Source`]: a place to read an image from; [`Source::resolve`] finds the manifest for a platform, [`Source::blob`] gives
//!   [`Blob`]s, whose ranges come as [`ByteStream`]s.
//! * [`fetch_toc`]: the table of contents of a layer, wherever it is; [`TocImage`]: the image beside an image that may hold it.
//! * [`Target`]: a place to write an image to.
//! * [`ClientOptions`]: how registries are reached; sources and targets with the same options share connections, tokens and
//!   credentials.
//!
//! Nothing that comes from a registry is trusted: manifests, indexes and configurations are checked against their digests, sizes
//! are limited, and ranges are what was asked for or an error. A range of a blob cannot be verified here; its reader does that.
//! All of it runs in a tokio runtime with I/O and time enabled; every wait ends.

mod archive;
mod auth;
mod client;
pub mod document;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod layout;
mod name;
mod nameless;
mod options;
mod source;
mod target;
mod toc;
mod transfer;

pub use error::{Error, Place};
pub use name::{ImageName, Reference};
pub use options::{ClientOptions, Counters};
pub use source::Source;
pub use source::beside::TocImage;
pub use source::blob::Blob;
pub use source::platform::{is_artifact, is_statement};
pub use source::resolve::{ResolvedImage, ResolvedIndex};
pub use target::{BlobUpload, Target, Upload};
pub use toc::{IMAGE_TOCS_MAX, Room, TocBytes, TocRoom, fetch_toc, fetch_toc_into};
pub use transfer::ByteStream;
