//! The work of the intake's threads: chunks compressed and hashed, batch by batch.

use std::io;
use std::sync::Arc;

use super::coder::{Coder, Coding};
use crate::digest::{Digest, Hasher};
use crate::tar_split::Crc64;

/// Zeros that are compressed as one: a hole may be as long as a layer, and nobody needs its bytes.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];
/// zstd's level for chunks that are compressed once more later.
const SHARED_LEVEL: i32 = 3;

/// A stretch of the tar stream, and the chunks in it.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The stream's bytes, headers and paddings included; zeros of long holes are left out.
    pub(super) data: Vec<u8>,
    /// Where in `data` zeros are left out, and how many.
    pub(super) left_out: Vec<(usize, u64)>,
    pub(super) pieces: Vec<Piece>,
}

/// A chunk in a batch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    /// Its bytes in the batch; for a hole, as far as they are there.
    pub(super) start: usize,
    pub(super) end: usize,
    /// Length of a hole; 0 for a chunk of data.
    pub(super) zeros: u64,
    /// For the last chunk of a file that is in this batch as a whole: where the file starts.
    pub(super) file: Option<usize>,
}

/// What became of a batch.
pub(super) struct Packed {
    /// Compressed chunks, one after the other.
    pub(super) data: Vec<u8>,
    pub(super) chunks: Vec<PackedChunk>,
    /// Bytes that all chunks have together if they are in one zstd frame; else 0.
    pub(super) shared: usize,
}

pub(super) struct PackedChunk {
    pub(super) size: u64,
    /// Compressed bytes; where chunks are compressed together, the place in what they decompress to.
    pub(super) stored: usize,
    pub(super) digest: Digest,
    pub(super) is_hole: bool,
    /// Digest and CRC of the file that ends with this chunk, where the batch has all of it.
    pub(super) file: Option<(Digest, u64)>,
}

/// What a thread of the pool needs.
pub(super) struct Packer {
    coder: Coder,
    is_shared: bool,
    crc: bool,
}

impl Packer {
    /// `is_shared`: the chunks of a batch are compressed together, for the time being. `crc`: files need their CRC.
    pub(super) fn new(coding: Coding, is_shared: bool, crc: bool) -> io::Result<Self> {
        let coding = if is_shared {
            Coding::Zstd(SHARED_LEVEL)
        } else {
            coding
        };
        Ok(Self {
            coder: coding.start()?,
            is_shared,
            crc,
        })
    }

    pub(super) fn pack(&mut self, batch: &Arc<Batch>) -> io::Result<Packed> {
        let mut packed = Packed {
            data: Vec::new(),
            chunks: Vec::with_capacity(batch.pieces.len()),
            shared: 0,
        };
        let mut together = Vec::new();
        for piece in &batch.pieces {
            let bytes = batch.data.get(piece.start..piece.end).unwrap_or_default();
            let start = packed.data.len();
            let digest = if piece.zeros > 0 {
                self.zeros(piece.zeros, &mut packed.data)?
            } else if self.is_shared {
                together.extend_from_slice(bytes);
                Digest::of(bytes)
            } else {
                self.coder.append(bytes, &mut packed.data)?;
                Digest::of(bytes)
            };
            let file = piece.file.map(|start| {
                let file = batch.data.get(start..piece.end).unwrap_or_default();
                let digest = if file.len() == bytes.len() {
                    digest
                } else {
                    Digest::of(file)
                };
                (digest, if self.crc { crc64(file) } else { 0 })
            });
            packed.chunks.push(PackedChunk {
                size: if piece.zeros > 0 {
                    piece.zeros
                } else {
                    bytes.len() as u64
                },
                stored: if self.is_shared {
                    together.len() - bytes.len()
                } else {
                    packed.data.len() - start
                },
                digest,
                is_hole: piece.zeros > 0,
                file,
            });
        }
        if self.is_shared {
            packed.shared = together.len();
            self.coder.append(&together, &mut packed.data)?;
        }
        Ok(packed)
    }

    /// Appends a hole and hashes it.
    fn zeros(&mut self, count: u64, out: &mut Vec<u8>) -> io::Result<Digest> {
        let mut hasher = Hasher::new();
        let mut full = Vec::new();
        let mut outcome = Ok(());
        each_zeros(count, |zeros| {
            hasher.update(zeros);
            // All but the last of these are equal.
            if zeros.len() == ZEROS.len() && !full.is_empty() {
                out.extend_from_slice(&full);
                return;
            }
            let start = out.len();
            if let Err(error) = self.coder.append(zeros, out) {
                outcome = Err(error);
            }
            if zeros.len() == ZEROS.len() {
                full = out.get(start..).unwrap_or_default().to_vec();
            }
        });
        outcome.map(|()| hasher.finish())
    }
}

/// Calls `f` with zeros, `count` of them together.
pub(super) fn each_zeros(mut count: u64, mut f: impl FnMut(&[u8])) {
    while count > 0 {
        let length = usize::try_from(count).map_or(ZEROS.len(), |count| count.min(ZEROS.len()));
        f(ZEROS.get(..length).unwrap_or_default());
        count -= length as u64;
    }
}

/// The CRC that tar-split has for a file.
pub(super) fn crc64(data: &[u8]) -> u64 {
    let mut crc = Crc64::new();
    crc.update(data);
    crc.finish()
}
