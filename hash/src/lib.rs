//! Content addresses and content-defined chunks. Every byte of an image passes through here once or more, so both have
//! vector instructions where the processor has them. No I/O, and no other crate of peel below it.
//!
//! * [`digest`]: sha256 digests, and hashing of one message or of two at once.
//! * [`rolling`]: where Podman's dialect of zstd:chunked cuts a file into chunks.

pub mod digest;
pub mod rolling;

pub use digest::{Digest, DigestError, Hasher};
