//! The work of the intake's threads: chunks compressed and hashed, batch by batch.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};

use super::coder::{ChunkCoder, Coding, THREAD_ROOM_MAX};
use super::hashing::Part;
use super::room::Room;
use peel_hash::{Digest, Hasher};
use peel_image::tar_split::Crc64;

/// Zeros that are compressed as one: a hole may be as long as a layer, and nobody needs its bytes.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];
/// Largest buffer that threads hand on to be used again, in bytes: room for a chunk of the usual size.
pub(super) const ROOM_MAX: usize = 8 << 20;
/// zstd's level for chunks that are compressed once more later.
const SHARED_LEVEL: i32 = 3;

/// A stretch of the tar stream, and the chunks in it.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The stream's bytes, headers and paddings included; zeros of long holes are left out.
    pub(super) data: Room,
    /// Where in `data` zeros are left out, and how many.
    pub(super) left_out: Vec<(usize, u64)>,
    pub(super) pieces: Vec<Piece>,
    /// Files and parts of files in it, in the stream's order.
    pub(super) files: Vec<Part>,
    /// Who waits for the digests of the files that are in this batch as a whole; `None` while it is filled.
    pub(super) digests: Option<Sender<Vec<Digest>>>,
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
    /// Whether it is hashed elsewhere: it is a whole file.
    pub(super) is_hashed: bool,
}

/// What becomes of a batch.
#[derive(Clone)]
pub(super) enum Packing {
    /// Its chunks, each compressed by itself.
    Chunks,
    /// Its chunks, compressed together, for the time being.
    Shared,
    /// All of it, in its order: each chunk, and what stands between two of them, compressed by itself. Buffers that may be used
    /// again come from there.
    Stream(Receiver<Vec<u8>>),
}

/// What became of a batch.
pub(super) struct Packed {
    /// Compressed bytes.
    pub(super) data: Vec<u8>,
    /// What was packed.
    pub(super) batch: Arc<Batch>,
    pub(super) chunks: Vec<PackedChunk>,
    /// Bytes that all chunks have together if they are in one zstd frame; else 0.
    pub(super) shared: usize,
}

pub(super) struct PackedChunk {
    pub(super) size: u64,
    /// Where it is in the compressed bytes or, where chunks are compressed together, in what they decompress to.
    pub(super) place: Range<usize>,
    /// `None` if it is hashed elsewhere.
    pub(super) digest: Option<Digest>,
    pub(super) is_hole: bool,
    /// CRC of the file that ends with this chunk, where the batch has all of it.
    pub(super) file: Option<u64>,
}

/// What a thread of the pool needs.
pub(super) struct Packer {
    coder: ChunkCoder,
    packing: Packing,
    crc: bool,
    /// Room that is used again and again: what is kept of it has its own length.
    room: Vec<u8>,
}

impl Packer {
    /// `crc`: files need their CRC.
    pub(super) fn new(coding: Coding, packing: Packing, crc: bool) -> io::Result<Self> {
        let coder = match packing {
            Packing::Shared => ChunkCoder::plain(Coding::Zstd(SHARED_LEVEL).start()?),
            Packing::Chunks | Packing::Stream(_) => coding.start_chunks()?,
        };
        Ok(Self {
            coder,
            packing,
            crc,
            room: Vec::new(),
        })
    }

    pub(super) fn pack(&mut self, batch: Arc<Batch>) -> io::Result<Packed> {
        let mut chunks = Vec::with_capacity(batch.pieces.len());
        let mut data = match &self.packing {
            Packing::Stream(rooms) => rooms.try_recv().unwrap_or_default(),
            Packing::Chunks | Packing::Shared => std::mem::take(&mut self.room),
        };
        data.clear();
        let (is_shared, is_stream) = (
            matches!(self.packing, Packing::Shared),
            matches!(self.packing, Packing::Stream(_)),
        );
        let mut together = Vec::new();
        let mut at = 0;
        let mut digests = digests(&batch).into_iter();
        let mut next_digest = || {
            digests
                .next()
                .ok_or_else(|| io::Error::other("a chunk has no digest"))
        };
        for piece in &batch.pieces {
            let bytes = batch.data.get(piece.start..piece.end).unwrap_or_default();
            if is_stream {
                self.between(&batch, at..piece.start, &mut data)?;
                at = piece.end;
            }
            let start = if is_shared { together.len() } else { data.len() };
            let digest = if piece.zeros > 0 {
                Some(self.zeros(piece.zeros, &mut data)?)
            } else {
                if is_shared {
                    together.extend_from_slice(bytes);
                } else {
                    self.coder.append(bytes, &mut data)?;
                }
                if piece.is_hashed {
                    None
                } else {
                    Some(next_digest()?)
                }
            };
            let file = piece.file.map(|start| {
                let file = batch.data.get(start..piece.end).unwrap_or_default();
                if self.crc { Crc64::of(file) } else { 0 }
            });
            chunks.push(PackedChunk {
                size: if piece.zeros > 0 {
                    piece.zeros
                } else {
                    bytes.len() as u64
                },
                place: start..if is_shared { together.len() } else { data.len() },
                digest,
                is_hole: piece.zeros > 0,
                file,
            });
        }
        if is_shared {
            self.coder.append(&together, &mut data)?;
        }
        if is_stream {
            self.between(&batch, at..batch.data.len(), &mut data)?;
        }
        let data = if is_stream {
            data
        } else if data.capacity() <= THREAD_ROOM_MAX {
            let copy = data.as_slice().to_vec();
            self.room = data;
            copy
        } else {
            data.shrink_to_fit();
            data
        };
        Ok(Packed {
            data,
            batch,
            chunks,
            shared: together.len(),
        })
    }

    /// Appends what stands between two chunks.
    fn between(&mut self, batch: &Batch, place: Range<usize>, out: &mut Vec<u8>) -> io::Result<()> {
        match batch.data.get(place) {
            Some(bytes) if !bytes.is_empty() => self.coder.append_headers(bytes, out),
            _ => Ok(()),
        }
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

/// The digests of the chunks of data.
fn digests(batch: &Batch) -> Vec<Digest> {
    let wanted = batch
        .pieces
        .iter()
        .filter(|piece| piece.zeros == 0 && !piece.is_hashed);
    Digest::of_each(wanted.map(|piece| batch.data.get(piece.start..piece.end).unwrap_or_default()))
}

/// Calls `f` with zeros, `count` of them together.
pub(super) fn each_zeros(mut count: u64, mut f: impl FnMut(&[u8])) {
    while count > 0 {
        let length = usize::try_from(count).map_or(ZEROS.len(), |count| count.min(ZEROS.len()));
        f(ZEROS.get(..length).unwrap_or_default());
        count -= length as u64;
    }
}
