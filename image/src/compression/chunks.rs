//! Several chunks of one compressed stream, in one pass over it. Called by the decode threads, where a stream holds chunks that lie too
//! far apart to be uncompressed together, or breaks off.

use std::fmt;
use std::io::Read;

use super::{CompressionError, read_chunk, zstd_decoder};
use crate::layer::Encoding;

/// Chunks of one stream, uncompressed in one pass: what lies between them is passed over and not held.
pub struct ChunkReader<'a> {
    encoding: Encoding,
    compressed: &'a [u8],
    limit: u64,
    stream: Option<Box<dyn Read + 'a>>,
    /// Uncompressed bytes of the stream that were passed so far.
    position: u64,
    /// Uncompressed bytes in all, of every pass.
    produced: u64,
    /// Where the stream broke off, once it did.
    broken_at: Option<u64>,
}

impl<'a> ChunkReader<'a> {
    /// Of the stream at the start of `compressed`. No chunk may end more than `limit` uncompressed bytes into it.
    pub fn new(encoding: Encoding, compressed: &'a [u8], limit: u64) -> Self {
        Self {
            encoding,
            compressed,
            limit,
            stream: None,
            position: 0,
            produced: 0,
            broken_at: None,
        }
    }

    /// The chunk of `size` bytes that begins `inner_offset` bytes into the output, as [`decode_chunk`]. Chunks should come in their order:
    /// for one before the last one the stream is begun anew, which is an error when that happens too often. Chunks before a broken place
    /// are right whatever comes behind it.
    pub fn read(&mut self, inner_offset: u64, size: u64) -> Result<Vec<u8>, CompressionError> {
        let (encoding, limit) = (self.encoding, self.limit);
        let too_large = CompressionError::TooLarge { encoding, limit };
        let Some(end) = inner_offset.checked_add(size).filter(|end| *end <= limit) else {
            return Err(too_large);
        };
        if let Some(have) = self.broken_at.filter(|have| end > *have) {
            return Err(CompressionError::Short {
                encoding,
                wanted: end,
                have,
            });
        }
        let (mut stream, position) = match self.stream.take() {
            Some(stream) if self.position <= inner_offset => (stream, self.position),
            _ => (self.begin()?, 0),
        };
        // One pass, and what chunks that overlap may cost beside it.
        self.produced = self.produced.saturating_add(end - position);
        if self.produced > limit.saturating_mul(2) {
            return Err(too_large);
        }
        let outcome = read_chunk(encoding, &mut stream, inner_offset - position, size);
        match &outcome {
            Ok(_) => (self.stream, self.position) = (Some(stream), end),
            Err(CompressionError::Short { have, .. }) => {
                self.broken_at = Some(position.saturating_add(*have));
            }
            // It broke somewhere behind the chunk before this one.
            Err(_) => self.broken_at = Some(position),
        }
        outcome.map_err(|error| match error {
            CompressionError::Short { have, .. } => CompressionError::Short {
                encoding,
                wanted: end,
                have: position.saturating_add(have),
            },
            error => error,
        })
    }

    fn begin(&self) -> Result<Box<dyn Read + 'a>, CompressionError> {
        let encoding = self.encoding;
        Ok(match encoding {
            Encoding::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(self.compressed)),
            Encoding::Zstd => Box::new(
                zstd_decoder(self.compressed)
                    .map_err(|source| CompressionError::damaged(encoding, source))?,
            ),
            Encoding::Plain => Box::new(self.compressed),
        })
    }
}

impl fmt::Debug for ChunkReader<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChunkReader")
            .field("encoding", &self.encoding)
            .field("position", &self.position)
            .field("produced", &self.produced)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{ALL, compress};
    use super::*;

    #[test]
    fn chunks_of_a_stream_in_one_pass() {
        let data: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let part = |from: usize, size: usize| data.get(from..from + size).unwrap().to_vec();
        for encoding in ALL {
            let compressed = compress(encoding, &data);
            let mut chunks = ChunkReader::new(encoding, &compressed, 400_000);
            for (from, size) in [(0, 10), (10, 0), (5_000, 100_000), (399_990, 10), (3, 4)] {
                let read = chunks.read(from as u64, size as u64).unwrap();
                assert!(read == part(from, size), "{encoding} {from}");
            }
            assert!(matches!(
                chunks.read(399_990, 11),
                Err(CompressionError::TooLarge { limit: 400_000, .. })
            ));
            // Going back again and again costs too much.
            let outcomes: Vec<_> = (0..3).map(|_| chunks.read(300_000, 10).is_ok()).collect();
            assert_eq!(outcomes, [true, false, false], "{encoding}");
        }
    }

    #[test]
    fn chunks_before_a_broken_place_are_read() {
        let data = [7; 300_000];
        for encoding in ALL {
            let whole = compress(encoding, &data);
            let mut chunks = ChunkReader::new(encoding, &whole, 1 << 20);
            assert_eq!(chunks.read(0, 1000).unwrap(), [7; 1000]);
            for _ in 0..2 {
                assert!(matches!(
                    chunks.read(299_000, 2000),
                    Err(CompressionError::Short {
                        wanted: 301_000,
                        have: 300_000,
                        ..
                    })
                ));
            }
            assert_eq!(chunks.read(299_000, 1000).unwrap(), [7; 1000]);
        }
    }
}
