//! What tests of every crate, the end-to-end tests, the benchmarks and `peel demo` share. No library crate of the product
//! depends on it but for its own tests.
//!
//! * [`registry`]: an embedded OCI registry with counters, and with faults on demand.
//! * [`link`]: a TCP relay that makes a server on the loopback interface look as far away as a real one.
//! * [`vectors`]: one small image in many encodings, made by the upstream tools.

pub mod link;
pub mod registry;
pub mod vectors;
