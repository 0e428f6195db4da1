//! The second half of the writer: puts what was spooled in its final order, adds TOC and footer, and hashes the blob and,
//! where entries have moved, the tar stream inside it.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, Write};
use std::thread::{self, ScopedJoinHandle};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};

use super::blob::{self, Blob};
use super::coder::{ChunkCoder, Undo};
use super::normal::{Change, Normal};
use super::pack::each_zeros;
use super::pool::Pool;
use super::record::{Chunk, Entry, Record};
use super::sink::{self, Toc};
use super::spool::{Place, SpoolReader};
use super::tables::{self, Marks, Role, Tables};
use super::toc::Placed;
use super::{HEADERS_PER_STREAM, Settings, WriteError, hashing};
use peel_hash::{Digest, Hasher};
use peel_image::tar::write::padding;

/// Pieces go to the workers together, up to this many bytes.
const BATCH: usize = 1 << 20;

/// What is known when all is written.
pub(super) struct Assembled<W> {
    /// The blob, to which the TOC is still to be added.
    pub(super) blob: Blob<W>,
    pub(super) toc: Toc,
    /// Hash and length of the tar stream.
    pub(super) tar: (Hasher, u64),
    pub(super) marks: Marks,
}

/// Where a record is, and which entry of the input it was; the landmark and what follows the last entry are none.
pub(super) type Item = (Place, Option<u32>);

/// The records in their final order.
pub(super) struct Sequence<'a> {
    pub(super) first: &'a [Item],
    pub(super) landmark: Option<Place>,
    pub(super) rest: &'a [Item],
    /// How they differ from the input.
    pub(super) normal: &'a Normal,
    /// Hash and length of the tar stream, where they are known already.
    pub(super) hashed: Option<(Hasher, u64)>,
}

/// One compressed stream of the blob.
enum Piece {
    /// Bytes of the tar stream that are still to be compressed.
    Plain(Vec<u8>),
    /// A chunk that is compressed already.
    Ready(Bytes, Chunk),
    /// Chunks with what stands between them, still to be compressed, and where they start.
    Shared(Vec<u8>, Vec<usize>),
}

/// Several streams, as they go to the blob and as they are in the tar stream.
#[derive(Default)]
struct Finished {
    blob: Vec<u8>,
    tar: Vec<Stretch>,
    /// The chunks in it, their places counted from the start of `blob`.
    chunks: Vec<Placed>,
}

/// A stretch of the tar stream.
enum Stretch {
    Bytes(Vec<u8>),
    Zeros(u64),
}

/// Writes all but the TOC.
pub(super) fn run<S, W>(
    spool: SpoolReader<S>,
    output: W,
    settings: &Settings,
    sequence: Sequence<'_>,
) -> Result<Assembled<W>, WriteError>
where
    S: Read + Seek,
    W: Write + Send,
{
    thread::scope(|scope| {
        let coding = settings.coding;
        let needs_tar = sequence.hashed.is_none();
        // Whatever of the tar stream has moved is not hashed beside the blob: it takes another way.
        let hash = hashing::start(scope, false, settings.waiting())?;
        let blob = blob::start(scope, output, hash.work, settings.waiting())?;
        let (unwritten, rooms) = (blob.unwritten, hash.rooms);
        let worker = move || {
            let mut tools = coding
                .start_chunks()
                .and_then(|coder| Ok((coder, coding.start_undoing()?)));
            let rooms = rooms.clone();
            move |pieces| match &mut tools {
                Ok((coder, undo)) => {
                    let room = rooms.try_recv().unwrap_or_default();
                    finish_pieces(coder, undo, pieces, needs_tar, room)
                }
                Err(error) => Err(WriteError::Compressor(io::Error::new(
                    error.kind(),
                    error.to_string(),
                ))),
            }
        };
        let pool = Pool::start(scope, "layer-join", settings.threads, worker).map_err(WriteError::Thread)?;
        let has_split = settings.split_file && sequence.normal.has_one_view();
        let (messages, toc) = sink::start(scope, settings.shape, has_split)?;
        let (unhashed, hasher) = if needs_tar {
            let (unhashed, stretches) = bounded::<Vec<Stretch>>(settings.waiting());
            let hasher = thread::Builder::new()
                .name("layer-diffid".to_owned())
                .spawn_scoped(scope, move || hash_stretches(stretches))
                .map_err(WriteError::Thread)?;
            (Some(unhashed), Some(hasher))
        } else {
            (None, None)
        };
        let mut assembly = Assembly {
            settings,
            spool,
            pool,
            pieces: Vec::new(),
            weight: 0,
            headers: Vec::new(),
            shared: Vec::new(),
            shared_end: 0,
            waiting: VecDeque::new(),
            normal: sequence.normal,
            tables: Tables::new(settings, has_split, messages),
            unwritten,
            blob_size: 0,
            unhashed,
        };
        let outcome = assembly.add_all(&sequence);
        let Assembly {
            unwritten,
            tables,
            unhashed,
            ..
        } = assembly;
        let marks = outcome.and_then(|()| tables.finish());
        drop((unwritten, unhashed));
        // An error of these threads is why others cannot reach them.
        let mut blob = blob.thread.join().map_err(|_| WriteError::ThreadLost)??;
        let (_, hash) = hash.thread.join().map_err(|_| WriteError::ThreadLost)?;
        blob.set_hash(hash);
        let toc = toc.join().map_err(|_| WriteError::ThreadLost)??;
        Ok(Assembled {
            blob,
            toc,
            tar: tar_hash(sequence.hashed, hasher)?,
            marks: marks?,
        })
    })
}

fn tar_hash(
    known: Option<(Hasher, u64)>,
    thread: Option<ScopedJoinHandle<'_, (Hasher, u64)>>,
) -> Result<(Hasher, u64), WriteError> {
    let hashed = thread.map(ScopedJoinHandle::join);
    match (known, hashed) {
        (Some(known), _) => Ok(known),
        (None, Some(Ok(hashed))) => Ok(hashed),
        (None, _) => Err(WriteError::ThreadLost),
    }
}

fn hash_stretches(stretches: Receiver<Vec<Stretch>>) -> (Hasher, u64) {
    let (mut hasher, mut size) = (Hasher::new(), 0);
    for stretch in stretches.into_iter().flatten() {
        match stretch {
            Stretch::Bytes(bytes) => {
                hasher.update(&bytes);
                size += bytes.len() as u64;
            }
            Stretch::Zeros(zeros) => {
                each_zeros(zeros, |zeros| hasher.update(zeros));
                size += zeros;
            }
        }
    }
    (hasher, size)
}

fn finish_pieces(
    coder: &mut ChunkCoder,
    undo: &mut Undo,
    pieces: Vec<Piece>,
    needs_tar: bool,
    room: Vec<u8>,
) -> Result<Finished, WriteError> {
    let mut finished = Finished {
        blob: room,
        ..Finished::default()
    };
    let stored = |piece: &Piece| match piece {
        Piece::Ready(stored, _) => stored.len(),
        Piece::Plain(_) | Piece::Shared(..) => 0,
    };
    finished.blob.reserve(pieces.iter().map(stored).sum());
    for piece in pieces {
        let start = finished.blob.len() as u64;
        let mut starts = Vec::new();
        let stretch = match piece {
            Piece::Plain(data) => {
                coder
                    .append_headers(&data, &mut finished.blob)
                    .map_err(WriteError::Compressor)?;
                Stretch::Bytes(data)
            }
            Piece::Ready(stored, chunk) => {
                finished.blob.extend_from_slice(&stored);
                starts.push(0);
                if chunk.is_hole || !needs_tar {
                    Stretch::Zeros(chunk.size)
                } else {
                    let mut bytes = Vec::new();
                    let size = usize::try_from(chunk.size).map_err(|_| WriteError::SpoolDamaged)?;
                    if !undo.append(&stored, size, &mut bytes) {
                        return Err(WriteError::SpoolDamaged);
                    }
                    Stretch::Bytes(bytes)
                }
            }
            Piece::Shared(data, chunks) => {
                coder
                    .append(&data, &mut finished.blob)
                    .map_err(WriteError::Compressor)?;
                starts = chunks;
                Stretch::Bytes(data)
            }
        };
        let end = finished.blob.len() as u64;
        finished.chunks.extend(starts.into_iter().map(|inner| Placed {
            offset: start,
            inner: inner as u64,
            end,
        }));
        if needs_tar {
            finished.tar.push(stretch);
        }
    }
    Ok(finished)
}

/// An entry some of whose chunks have no place yet.
struct Waiting {
    /// `None` if the TOC does not list it.
    entry: Option<Box<Entry>>,
    record: Record,
    role: Role,
    places: Vec<Placed>,
}

struct Assembly<'s, S> {
    settings: &'s Settings,
    spool: SpoolReader<S>,
    pool: Pool<Vec<Piece>, Result<Finished, WriteError>>,
    /// The next batch, and its bytes.
    pieces: Vec<Piece>,
    weight: usize,
    /// What goes into the next stream: padding and headers since the last chunk and, where chunks share streams, chunks.
    headers: Vec<u8>,
    /// Where the chunks in `headers` start, and where the last of them ends.
    shared: Vec<usize>,
    shared_end: usize,
    waiting: VecDeque<Waiting>,
    normal: &'s Normal,
    tables: Tables,
    unwritten: Sender<Vec<u8>>,
    /// Bytes of the blob so far.
    blob_size: u64,
    unhashed: Option<Sender<Vec<Stretch>>>,
}

impl<S: Read + Seek> Assembly<'_, S> {
    fn add_all(&mut self, sequence: &Sequence<'_>) -> Result<(), WriteError> {
        for item in sequence.first {
            self.add(*item, Role::Prioritized)?;
        }
        if let Some(landmark) = sequence.landmark {
            self.add((landmark, None), Role::Landmark)?;
        }
        for item in sequence.rest {
            self.add(*item, Role::Other)?;
        }
        self.end_stream()?;
        self.send()?;
        while self.collect()? {}
        if !self.waiting.is_empty() {
            return Err(WriteError::SpoolDamaged);
        }
        for path in &self.normal.whiteouts {
            let mut record = Record::listed(path)?;
            if let Some(entry) = tables::describe(&mut record)? {
                self.tables.add(&entry, &record, &[], Role::Other)?;
            }
        }
        Ok(())
    }

    fn add(&mut self, (place, index): Item, role: Role) -> Result<(), WriteError> {
        let mut record = self.spool.read_record(place).map_err(WriteError::Spool)?;
        let change = index.and_then(|index| self.normal.changes.get(&usize::try_from(index).ok()?));
        if let Some(Change::Renamed { path, link }) = change
            && !self.normal.keeps_stream
        {
            record.rename(path, link.as_deref())?;
        }
        let mut entry = tables::describe(&mut record)?;
        let after = record.padding.take();
        let after = after.as_deref().unwrap_or_else(|| padding(record.size));
        let chunks = record.chunks.clone();
        self.tables.split(entry.as_deref(), &record, after)?;
        self.headers.append(&mut record.headers);
        if record.is_entry {
            match change {
                Some(Change::Hidden) => entry = None,
                Some(Change::Renamed { path, link }) if self.normal.keeps_stream => {
                    if let Some(entry) = &mut entry {
                        entry.rename(path, link.as_deref())?;
                    }
                }
                _ => {}
            }
            // First of all: the first chunks of a large file may be placed before its last ones are handed out.
            self.waiting.push_back(Waiting {
                entry,
                record,
                role,
                places: Vec::new(),
            });
        }
        for chunk in chunks {
            if self.settings.min_chunk_size > 0 {
                self.share(&chunk, role)?;
            } else {
                self.end_stream()?;
                let stored = self
                    .spool
                    .read(chunk.at, chunk.stored)
                    .map_err(WriteError::Spool)?;
                let in_memory = if chunk.is_hole { 0 } else { chunk.size };
                let weight = usize::try_from(in_memory).map_err(|_| WriteError::SpoolDamaged)?;
                let weight = weight + stored.len();
                self.push(Piece::Ready(stored, chunk), weight)?;
            }
        }
        self.headers.extend_from_slice(after);
        if self.headers.len() - self.shared_end >= HEADERS_PER_STREAM {
            self.end_stream()?;
        }
        self.settle()
    }

    /// Adds a chunk to the stream that is open, or to a new one where the format wants that.
    fn share(&mut self, chunk: &Chunk, role: Role) -> Result<(), WriteError> {
        let has_enough = match self.shared.first() {
            Some(first) => (self.headers.len() - first) as u64 >= self.settings.min_chunk_size,
            None => true,
        };
        if has_enough || role == Role::Landmark {
            self.end_stream()?;
        }
        let bytes = self.spool.read_shared(chunk).map_err(WriteError::Spool)?;
        self.shared.push(self.headers.len());
        self.headers.extend_from_slice(bytes);
        self.shared_end = self.headers.len();
        Ok(())
    }

    /// Ends the stream that is open.
    fn end_stream(&mut self) -> Result<(), WriteError> {
        if self.headers.is_empty() {
            return Ok(());
        }
        let data = std::mem::take(&mut self.headers);
        let chunks = std::mem::take(&mut self.shared);
        self.shared_end = 0;
        let weight = data.len();
        if chunks.is_empty() {
            self.push(Piece::Plain(data), weight)
        } else {
            self.push(Piece::Shared(data, chunks), weight)
        }
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
        let start = self.blob_size;
        self.blob_size += finished.blob.len() as u64;
        self.unwritten
            .send(finished.blob)
            .map_err(|_| WriteError::ThreadLost)?;
        for chunk in finished.chunks {
            self.settle()?;
            let front = self.waiting.front_mut().ok_or(WriteError::SpoolDamaged)?;
            front.places.push(Placed {
                offset: start + chunk.offset,
                inner: chunk.inner,
                end: start + chunk.end,
            });
        }
        if let Some(unhashed) = &self.unhashed {
            unhashed.send(finished.tar).map_err(|_| WriteError::ThreadLost)?;
        }
        self.settle()?;
        Ok(true)
    }

    /// Hands over the TOC of the entries at the front whose chunks all have their places.
    fn settle(&mut self) -> Result<(), WriteError> {
        let is_done = |waiting: &mut Waiting| waiting.places.len() == waiting.record.chunks.len();
        while let Some(done) = self.waiting.pop_front_if(is_done) {
            if let Some(entry) = &done.entry {
                self.tables.add(entry, &done.record, &done.places, done.role)?;
            }
        }
        Ok(())
    }
}

impl<W: Write> Assembled<W> {
    /// Adds the TOC of eStargz to the tar stream's hash.
    pub(super) fn hash_toc(&mut self) -> Result<(), WriteError> {
        let (hasher, size) = &mut self.tar;
        self.toc.each_tar_byte(|bytes| hasher.update(bytes))?;
        *size += self.toc.tar_length();
        Ok(())
    }

    /// Digest and length of the tar stream.
    pub(super) fn diff_id(&self) -> (Digest, u64) {
        (self.tar.0.clone().finish(), self.tar.1)
    }
}
