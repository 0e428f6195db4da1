//! What tests of every crate, the end-to-end tests and the benchmarks share. Nothing of the product depends on it.
//!
//! * [`vectors`]: one small image in many encodings, made by the upstream tools.
//!
//! Functions here fail by panicking: their callers are tests.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

pub mod vectors;
