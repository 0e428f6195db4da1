//! The second half of the writer: puts what was spooled in its final order, adds TOC and footer, and hashes both the blob
//! and the tar stream inside it.

use std::collections::{HashMap, VecDeque};
use std::io::{Read, Seek, Write};
use std::thread::{self, ScopedJoinHandle};

use crossbeam_channel::{Sender, bounded};
use libdeflater::{CompressionLvl, Compressor, Decompressor};

use super::pool::Pool;
use super::spool::{Place, Record, SpoolReader};
use super::{Settings, WriteError, append_member};
use crate::digest::{Digest, Hasher};
use crate::estargz::{TOC_JSON_MAX, TOC_NAME, footer};
use crate::layer::Metadata;
use crate::tar::write::{END_OF_ARCHIVE, NewEntry, encode_header, padding};
use crate::tar::{BLOCK, TarKind};

/// Pieces go to the workers together, up to this many bytes.
const BATCH: usize = 1 << 20;
/// Headers of entries without content share a member up to this size, so that memory stays bounded.
const HEADERS_PER_MEMBER: usize = 1 << 20;
/// Buffers of tar stream that may wait to be hashed.
const UNHASHED: usize = 4;

/// What is known when all is written.
pub(super) struct Assembled {
    pub(super) diff_id: Digest,
    pub(super) blob_digest: Digest,
    pub(super) blob_size: u64,
    pub(super) toc_digest: Digest,
    pub(super) toc_offset: u64,
    pub(super) uncompressed_size: u64,
    /// Offset of the landmark's content.
    pub(super) landmark: u64,
}

/// One gzip member of the blob.
enum Piece {
    /// Bytes of the tar stream that are still to be compressed.
    Plain(Vec<u8>),
    /// A chunk that is compressed already, and its size uncompressed.
    Chunk(Vec<u8>, usize),
}

/// Several members, as they go to the blob and as they are in the tar stream.
struct Finished {
    blob: Vec<u8>,
    tar: Vec<u8>,
    /// Where in `blob` the chunks start.
    chunks: Vec<usize>,
}

/// Writes the blob: the entries of `first`, the landmark, the entries of `rest`.
pub(super) fn run<S, W>(
    spool: SpoolReader<S>,
    output: W,
    settings: &Settings,
    first: &[Place],
    landmark: Place,
    rest: &[Place],
) -> Result<Assembled, WriteError>
where
    S: Read + Seek,
    W: Write,
{
    thread::scope(|scope| {
        let level = settings.level;
        let worker = move || {
            let mut compressor = Compressor::new(level);
            let mut decompressor = Decompressor::new();
            move |pieces| finish_pieces(&mut compressor, &mut decompressor, pieces)
        };
        let pool = Pool::start(scope, "layer-join", settings.threads, worker).map_err(WriteError::Thread)?;
        let (unhashed, buffers) = bounded::<Vec<u8>>(UNHASHED);
        let hasher = thread::Builder::new()
            .name("layer-diffid".to_owned())
            .spawn_scoped(scope, move || {
                let mut hasher = Hasher::new();
                let mut size = 0;
                for buffer in buffers {
                    hasher.update(&buffer);
                    size += buffer.len() as u64;
                }
                (hasher.finish(), size)
            })
            .map_err(WriteError::Thread)?;
        let mut assembly = Assembly {
            spool,
            pool,
            pieces: Vec::new(),
            weight: 0,
            headers: Vec::new(),
            toc: Toc::default(),
            blob: Blob {
                output,
                hasher: Hasher::new(),
                size: 0,
            },
            unhashed,
        };
        for place in first {
            assembly.add(*place)?;
        }
        assembly.toc.landmark = Some(assembly.toc.chunks);
        assembly.add(landmark)?;
        for place in rest {
            assembly.add(*place)?;
        }
        assembly.finish(level, hasher)
    })
}

fn finish_pieces(
    compressor: &mut Compressor,
    decompressor: &mut Decompressor,
    pieces: Vec<Piece>,
) -> Result<Finished, WriteError> {
    let mut finished = Finished {
        blob: Vec::new(),
        tar: Vec::new(),
        chunks: Vec::new(),
    };
    for piece in pieces {
        match piece {
            Piece::Plain(data) => {
                append_member(compressor, &data, &mut finished.blob);
                finished.tar.extend_from_slice(&data);
            }
            Piece::Chunk(member, size) => {
                finished.chunks.push(finished.blob.len());
                finished.blob.extend_from_slice(&member);
                let start = finished.tar.len();
                finished.tar.resize(start + size, 0);
                let room = finished.tar.get_mut(start..).unwrap_or_default();
                if decompressor.gzip_decompress(&member, room) != Ok(size) {
                    return Err(WriteError::SpoolDamaged);
                }
            }
        }
    }
    Ok(finished)
}

struct Assembly<S, W> {
    spool: SpoolReader<S>,
    pool: Pool<Vec<Piece>, Result<Finished, WriteError>>,
    /// The next batch, and its bytes.
    pieces: Vec<Piece>,
    weight: usize,
    /// Padding and headers since the last chunk.
    headers: Vec<u8>,
    toc: Toc,
    blob: Blob<W>,
    unhashed: Sender<Vec<u8>>,
}

impl<S: Read + Seek, W: Write> Assembly<S, W> {
    fn add(&mut self, place: Place) -> Result<(), WriteError> {
        let mut record = self.spool.read_record(place).map_err(WriteError::Spool)?;
        // First of all: the first chunks of a large file may be placed before its last ones are handed out.
        self.toc.add(&mut record)?;
        self.headers.extend_from_slice(&record.headers);
        let mut offset = record.start;
        let mut size = 0;
        for (length, compressed) in &record.chunks {
            self.end_headers()?;
            let member = self.spool.read(offset, *compressed).map_err(WriteError::Spool)?;
            offset += compressed;
            size += length;
            let length = usize::try_from(*length).map_err(|_| WriteError::SpoolDamaged)?;
            self.push(Piece::Chunk(member, length), length)?;
        }
        self.headers.extend_from_slice(padding(size));
        if self.headers.len() >= HEADERS_PER_MEMBER {
            self.end_headers()?;
        }
        Ok(())
    }

    /// Makes a member of the headers so far.
    fn end_headers(&mut self) -> Result<(), WriteError> {
        if self.headers.is_empty() {
            return Ok(());
        }
        let headers = std::mem::take(&mut self.headers);
        let weight = headers.len();
        self.push(Piece::Plain(headers), weight)
    }

    fn push(&mut self, piece: Piece, weight: usize) -> Result<(), WriteError> {
        self.pieces.push(piece);
        self.weight += weight;
        if self.weight >= BATCH { self.send() } else { Ok(()) }
    }

    fn send(&mut self) -> Result<(), WriteError> {
        let weight = std::mem::take(&mut self.weight) * 2;
        while self.pool.is_full(weight) {
            self.collect()?;
        }
        self.pool.push(std::mem::take(&mut self.pieces), weight)?;
        Ok(())
    }

    /// Writes the oldest result of the pool; `false` if there is none.
    fn collect(&mut self) -> Result<bool, WriteError> {
        let Some(finished) = self.pool.pop()? else {
            return Ok(false);
        };
        let finished = finished?;
        for start in &finished.chunks {
            self.toc.place(self.blob.size + *start as u64)?;
        }
        self.blob.write(&finished.blob)?;
        self.hash(finished.tar)?;
        Ok(true)
    }

    fn hash(&self, tar: Vec<u8>) -> Result<(), WriteError> {
        self.unhashed.send(tar).map_err(|_| WriteError::ThreadLost)
    }

    /// Writes what is left, the TOC and the footer.
    fn finish(
        mut self,
        level: CompressionLvl,
        hasher: ScopedJoinHandle<'_, (Digest, u64)>,
    ) -> Result<Assembled, WriteError> {
        self.end_headers()?;
        self.send()?;
        while self.collect()? {}
        let landmark = self.toc.landmark_offset;
        let toc_offset = self.blob.size;
        let (tar, toc_digest) = std::mem::take(&mut self.toc).finish()?;
        let mut member = Vec::new();
        append_member(&mut Compressor::new(level), &tar, &mut member);
        self.hash(tar)?;
        self.blob.write(&member)?;
        self.blob.write(&footer::encode(toc_offset))?;
        self.blob.output.flush().map_err(WriteError::Output)?;
        drop(self.unhashed);
        let (diff_id, uncompressed_size) = hasher.join().map_err(|_| WriteError::ThreadLost)?;
        Ok(Assembled {
            diff_id,
            blob_digest: self.blob.hasher.finish(),
            blob_size: self.blob.size,
            toc_digest,
            toc_offset,
            uncompressed_size,
            landmark,
        })
    }
}

/// The output, counted and hashed.
struct Blob<W> {
    output: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Blob<W> {
    fn write(&mut self, data: &[u8]) -> Result<(), WriteError> {
        self.output.write_all(data).map_err(WriteError::Output)?;
        self.hasher.update(data);
        self.size += data.len() as u64;
        Ok(())
    }
}

/// The TOC in the making: a tar entry whose header is filled in last.
struct Toc {
    tar: Vec<u8>,
    /// JSON objects in the TOC's order that are not in `tar` yet; those that are chunks wait for their offset.
    waiting: VecDeque<(String, bool)>,
    users: Names,
    groups: Names,
    /// Chunks handed to the pool, and those of them whose offset is known.
    chunks: u64,
    placed: u64,
    /// The landmark's place among the chunks.
    landmark: Option<u64>,
    landmark_offset: u64,
}

const TOC_START: &[u8] = b"{\"version\":1,\"entries\":[";
const TOC_END: &[u8] = b"]}\n";

impl Default for Toc {
    fn default() -> Self {
        let mut tar = vec![0; BLOCK];
        tar.extend_from_slice(TOC_START);
        Self {
            tar,
            waiting: VecDeque::new(),
            users: Names::default(),
            groups: Names::default(),
            chunks: 0,
            placed: 0,
            landmark: None,
            landmark_offset: 0,
        }
    }
}

impl Toc {
    fn add(&mut self, record: &mut Record) -> Result<(), WriteError> {
        let user_name = std::mem::take(&mut record.user_name);
        let group_name = std::mem::take(&mut record.group_name);
        let names = [
            ("userName", self.users.changed(record.uid, user_name)),
            ("groupName", self.groups.changed(record.gid, group_name)),
        ];
        let is_chunk = !record.chunks.is_empty();
        for (index, mut json) in record.json.drain(..).enumerate() {
            for (key, name) in names.iter().filter(|_| index == 0) {
                if let Some(name) = name {
                    json += &format!(",\"{key}\":{}", serde_json::to_string(name)?);
                }
            }
            self.waiting.push_back((json, is_chunk));
        }
        self.chunks += record.chunks.len() as u64;
        self.settle(None)
    }

    /// Says where the next chunk is in the blob.
    fn place(&mut self, offset: u64) -> Result<(), WriteError> {
        if self.landmark == Some(self.placed) {
            self.landmark_offset = offset;
        }
        self.placed += 1;
        self.settle(Some(offset))
    }

    /// Moves JSON objects that are complete to the TOC; the first chunk among them takes `offset`.
    fn settle(&mut self, mut offset: Option<u64>) -> Result<(), WriteError> {
        while let Some((json, is_chunk)) = self.waiting.front() {
            let offset = match (is_chunk, offset.take()) {
                (false, kept) => {
                    offset = kept;
                    None
                }
                (true, Some(offset)) => Some(offset),
                (true, None) => return Ok(()),
            };
            if self.tar.len() > BLOCK + TOC_START.len() {
                self.tar.push(b',');
            }
            self.tar.extend_from_slice(json.as_bytes());
            if let Some(offset) = offset {
                self.tar
                    .extend_from_slice(format!(",\"offset\":{offset}").as_bytes());
            }
            self.tar.push(b'}');
            if self.tar.len() as u64 > TOC_JSON_MAX {
                return Err(WriteError::TocTooLarge);
            }
            self.waiting.pop_front();
        }
        match offset {
            Some(_) => Err(WriteError::SpoolDamaged),
            None => Ok(()),
        }
    }

    /// The tar entry with the end of the archive after it, and the digest of the JSON.
    fn finish(mut self) -> Result<(Vec<u8>, Digest), WriteError> {
        if !self.waiting.is_empty() {
            return Err(WriteError::ThreadLost);
        }
        self.tar.extend_from_slice(TOC_END);
        let json = self.tar.get(BLOCK..).unwrap_or_default();
        let (digest, size) = (Digest::of(json), json.len() as u64);
        let header = encode_header(&NewEntry {
            name: TOC_NAME.as_bytes(),
            metadata: &Metadata::default(),
            kind: &TarKind::Regular { size },
            user_name: b"",
            group_name: b"",
        })?;
        match self.tar.first_chunk_mut::<BLOCK>().zip(header.as_array()) {
            Some((room, header)) => *room = *header,
            None => return Err(WriteError::TocTooLarge),
        }
        self.tar.extend_from_slice(padding(size));
        self.tar.extend_from_slice(&END_OF_ARCHIVE);
        Ok((self.tar, digest))
    }
}

/// The last name of each id: a TOC repeats it only where it changed.
#[derive(Default)]
struct Names(HashMap<u32, String>);

impl Names {
    fn changed(&mut self, id: u32, name: String) -> Option<String> {
        if name.is_empty() || self.0.get(&id) == Some(&name) {
            return None;
        }
        self.0.insert(id, name.clone());
        Some(name)
    }
}
