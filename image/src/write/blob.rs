//! The output, counted and hashed.

use std::io::Write;

use super::WriteError;
use crate::digest::{Digest, Hasher};

/// zstd's skippable frame (RFC 8878, section 3.1.2), of the sixteen kinds the one that zstd:chunked uses.
const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];

/// A blob in the making.
pub(super) struct Blob<W> {
    output: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Blob<W> {
    pub(super) fn new(output: W) -> Self {
        Self {
            output,
            hasher: Hasher::new(),
            size: 0,
        }
    }

    /// Bytes so far.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn write(&mut self, data: &[u8]) -> Result<(), WriteError> {
        self.output.write_all(data).map_err(WriteError::Output)?;
        self.hasher.update(data);
        self.size += data.len() as u64;
        Ok(())
    }

    /// Writes `data` as a frame that zstd skips; returns where `data` is.
    pub(super) fn write_skippable(&mut self, data: &[u8]) -> Result<u64, WriteError> {
        let length = u32::try_from(data.len()).map_err(|_| WriteError::TocTooLarge)?;
        self.write(&SKIPPABLE)?;
        self.write(&length.to_le_bytes())?;
        let start = self.size;
        self.write(data)?;
        Ok(start)
    }

    /// Digest and length.
    pub(super) fn finish(mut self) -> Result<(Digest, u64), WriteError> {
        self.output.flush().map_err(WriteError::Output)?;
        Ok((self.hasher.finish(), self.size))
    }
}
