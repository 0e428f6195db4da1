//! CRC-64/GO-ISO, the checksum of contents in tar-split: the polynomial of ISO 3309 (x^64 + x^4 + x^3 + x + 1), bits
//! reflected, all ones before and after (Go's `hash/crc64` with the table `ISO`).
//!
//! Whole layers pass through it; the crate that computes it multiplies without carry where the processor can.

use crc_fast::CrcAlgorithm;

/// A checksum that is being computed.
#[derive(Debug, Clone)]
pub struct Crc64(crc_fast::Digest);

impl Default for Crc64 {
    fn default() -> Self {
        Self::new()
    }
}

impl Crc64 {
    /// The checksum of no bytes.
    pub fn new() -> Self {
        Self(crc_fast::Digest::new(CrcAlgorithm::Crc64GoIso))
    }

    /// The checksum of `data`.
    pub fn of(data: &[u8]) -> u64 {
        crc_fast::checksum(CrcAlgorithm::Crc64GoIso, data)
    }

    /// Takes the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    /// The checksum of all bytes so far.
    pub fn finish(&self) -> u64 {
        self.0.finalize()
    }
}
