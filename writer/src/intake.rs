//! The first half of the writer: takes the tar stream apart, has the chunks compressed and hashed, and hands everything to an
//! [`Outlet`], in the order of the input. On the way the stream is hashed that comes out if no entry moves.

use std::collections::VecDeque;
use std::io::{self, Read};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TryRecvError, bounded};

use super::hashing::{Extent, Part, Work};
use super::names::{Described, Kind};
use super::outlet::Outlet;
use super::pack::{Batch, Packed, Packer, Packing, Piece};
use super::pool::Pool;
use super::record::{Chunk, Entry, Record};
use super::room::Room;
use super::tape::{self, Recording};
use super::{HEADERS_PER_STREAM, Settings, Split, WriteError};
use peel_hash::Digest;
use peel_hash::rolling::{Cut, Splitter};
use peel_image::estargz::index::RECORDS_MAX;
use peel_image::estargz::{LANDMARK_CONTENT, TOC_NAME, is_reserved};
use peel_image::layer::Metadata;
use peel_image::tar::write::{NewEntry, encode_header, padding};
use peel_image::tar::{self, TarEntry, TarKind};
use peel_image::tar_split::Crc64;

/// Small files go to the workers together, up to this many bytes: handing over costs more than compressing one of them.
const BATCH: usize = 1 << 20;
/// A file of no more bytes is in one batch as a whole.
const SMALL: u64 = 128 << 10;
/// Bytes of a large file that are looked at together.
const BLOCK: usize = 128 << 10;
/// How long the digest of a file may take of which every byte was handed out: far longer than it does. The channel cannot tell
/// that the other thread is gone, since the other end lies in a batch.
const HASHING: Duration = Duration::from_secs(120);
/// Most memory of batches that is kept for others, in bytes: fresh memory costs more than what is copied into it.
const ROOMS_MAX: usize = 16 << 20;
/// Most bytes of headers that wait for the chunks before them to be compressed.
const WAITING_HEADERS_MAX: usize = 4 << 20;
/// Bytes after the end of the archive that are kept as one record.
const TRAILER: usize = 1 << 20;

/// An entry some of whose chunks are not compressed yet.
struct Draft {
    record: Record,
    /// Bytes of content that the outlet has.
    covered: u64,
    /// Where the digest of a large file comes from.
    digest: Option<Receiver<Digest>>,
}

/// Reads all of `input`; `unhashed` takes the stream, as it comes out if no entry moves.
pub(super) fn run<R: Read, O: Outlet>(
    input: R,
    outlet: O,
    unhashed: Sender<Work>,
    settings: &Settings,
) -> Result<O, WriteError> {
    std::thread::scope(|scope| {
        let (coding, crc, packing) = (settings.coding, settings.split_file, outlet.packing());
        let is_stream = matches!(packing, Packing::Stream(_));
        let worker = move || {
            let mut packer = Packer::new(coding, packing.clone(), crc);
            move |batch: Arc<Batch>| match &mut packer {
                Ok(packer) => packer.pack(batch),
                Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
            }
        };
        let pool = Pool::start(scope, "layer-pack", settings.threads, worker).map_err(WriteError::Thread)?;
        let mut intake = Running {
            settings,
            outlet,
            is_stream,
            pool,
            unhashed,
            batch: Batch::default(),
            rooms: Vec::new(),
            digests: VecDeque::new(),
            drafts: VecDeque::new(),
            waiting_headers: 0,
            records: 0,
        };
        intake.landmark()?;
        intake.read(input)?;
        intake.finish()
    })
}

struct Running<'s, O> {
    settings: &'s Settings,
    outlet: O,
    /// What stands between chunks goes through the pool too, and is cut as the assembly would cut it: not where batches end.
    is_stream: bool,
    pool: Pool<Arc<Batch>, io::Result<Packed>>,
    unhashed: Sender<Work>,
    batch: Batch,
    /// Room of batches that are done, for those to come.
    rooms: Vec<Room>,
    /// For each batch in the pool, where the digests of the whole files in it come from.
    digests: VecDeque<Receiver<Vec<Digest>>>,
    /// Entries whose records the outlet does not have yet, in the input's order.
    drafts: VecDeque<Draft>,
    /// Bytes of headers in them.
    waiting_headers: usize,
    /// Entries, chunks and attributes so far.
    records: usize,
}

impl<O: Outlet> Running<'_, O> {
    /// Adds the landmark as if it were an entry of the input. It has a name and nothing else.
    fn landmark(&mut self) -> Result<(), WriteError> {
        let Some(name) = self.settings.landmark() else {
            return Ok(());
        };
        let size = LANDMARK_CONTENT.len() as u64;
        let headers = encode_header(&NewEntry {
            name: name.as_bytes(),
            metadata: &Metadata::default(),
            kind: &TarKind::Regular { size },
            user_name: b"",
            group_name: b"",
        })?;
        self.begin(headers, About::Headers, size)?;
        self.read_content(size, &mut LANDMARK_CONTENT.as_slice(), name.as_bytes())?;
        self.end(padding(size))
    }

    fn read<R: Read>(&mut self, input: R) -> Result<(), WriteError> {
        if !self.settings.is_exact {
            let mut reader = tar::Reader::new(input);
            while let Some(entry) = reader.next_entry()? {
                if !is_reserved(entry.path.as_bytes()) {
                    let size = entry.kind.size();
                    self.add(entry, &mut reader)?;
                    self.end(padding(size))?;
                }
            }
            reader.finish()?;
            return Ok(());
        }
        let (tape, mut recording) = tape::record(input);
        let mut reader = tar::Reader::new(tape);
        let mut bytes = Vec::new();
        while let Some(entry) = reader.next_entry()? {
            bytes.clear();
            recording.take(reader.position(), &mut bytes);
            if is_reserved(entry.path.as_bytes()) {
                if self.settings.keeps_diff_id && entry.path.as_bytes() == TOC_NAME.as_bytes() {
                    return Err(WriteError::AlreadyEstargz);
                }
                if !self.settings.keeps_diff_id {
                    recording.skip(reader.content_end());
                    reader.end_entry()?;
                    recording.skip(reader.position());
                    continue;
                }
            }
            let size = entry.kind.size();
            let start = reader.position();
            let name = entry.name.clone();
            let is_as_it_was = bytes == entry.raw_headers;
            let entry = self.exactly(entry, is_as_it_was)?;
            let stored = reader.content_end() - start;
            recording.skip(reader.content_end());
            self.add(entry, &mut reader)?;
            reader.end_entry()?;
            bytes.clear();
            recording.take(reader.position(), &mut bytes);
            if bytes.len() != padding(size).len() || stored != size {
                if self.settings.keeps_diff_id {
                    return Err(not_lossless(&name));
                }
                bytes.clear();
                bytes.extend_from_slice(padding(size));
            }
            self.end(&bytes)?;
        }
        self.read_trailer(&mut reader, &mut recording)
    }

    /// Keeps what follows the last entry.
    fn read_trailer<R: Read>(
        &mut self,
        reader: &mut tar::Reader<tape::Tape<R>>,
        recording: &mut Recording,
    ) -> Result<(), WriteError> {
        // The end of the archive by itself, as in tar-split data by Podman.
        let mut more = true;
        loop {
            let mut bytes = Vec::new();
            recording.take(reader.position(), &mut bytes);
            if !bytes.is_empty() {
                self.begin(bytes, About::Nothing, 0)?;
                self.end(&[])?;
            }
            if !more {
                return Ok(());
            }
            more = reader.read_trailer(TRAILER)?;
        }
    }

    /// Sees to it that headers which are copied mean to other readers what they mean here.
    fn exactly(&self, mut entry: TarEntry, is_as_it_was: bool) -> Result<TarEntry, WriteError> {
        if self.settings.keeps_diff_id {
            // What belongs to no entry (the label of a volume) would be lost.
            return if is_as_it_was {
                Ok(entry)
            } else {
                Err(not_lossless(&entry.name))
            };
        }
        entry.self_contained &= is_as_it_was && is_usual(&entry);
        if !entry.self_contained {
            entry.raw_mode = entry.metadata.mode.into();
            entry.raw_owner = (entry.metadata.uid.into(), entry.metadata.gid.into());
            (entry.access_time, entry.change_time) = (None, None);
        }
        Ok(entry)
    }

    fn add(&mut self, entry: TarEntry, content: &mut dyn Read) -> Result<(), WriteError> {
        let size = entry.kind.size();
        self.count(1 + entry.metadata.xattrs.len())?;
        // Also where nobody needs it yet: what cannot be described is an error as soon as possible.
        let described = Entry::describe(&entry)?;
        let about = if entry.self_contained || !self.settings.keeps_diff_id {
            About::Headers
        } else {
            About::Entry(Box::new(described))
        };
        let headers = if entry.self_contained || self.settings.keeps_diff_id {
            entry.raw_headers
        } else {
            encode_header(&NewEntry {
                name: &entry.name,
                metadata: &entry.metadata,
                kind: &entry.kind,
                user_name: &entry.user_name,
                group_name: &entry.group_name,
            })?
        };
        let kind = match &entry.kind {
            TarKind::Directory => Kind::Directory {
                xattrs: number_of(&entry.metadata),
            },
            TarKind::Symlink(target) => Kind::Symlink(target),
            TarKind::Hardlink { target, .. } => Kind::Hardlink(target.as_bytes()),
            _ => Kind::Other,
        };
        self.outlet
            .append_name(&entry.path, kind, comparable(&entry.metadata))?;
        self.begin(headers, about, size)?;
        self.read_content(size, content, &entry.name)
    }

    fn begin(&mut self, headers: Vec<u8>, about: About, size: u64) -> Result<(), WriteError> {
        self.batch.data.extend_from_slice(&headers);
        self.waiting_headers += headers.len();
        self.drafts.push_back(Draft {
            record: Record {
                headers,
                is_entry: !matches!(about, About::Nothing),
                entry: match about {
                    About::Entry(entry) => Some(entry),
                    About::Headers | About::Nothing => None,
                },
                size,
                ..Record::default()
            },
            covered: 0,
            digest: None,
        });
        if self.waiting_headers > WAITING_HEADERS_MAX {
            self.send(if self.is_stream {
                self.chunks_end()
            } else {
                self.batch.data.len()
            })?;
            self.collect_all()?;
        }
        Ok(())
    }

    /// Ends the entry that was begun last.
    fn end(&mut self, padding: &[u8]) -> Result<(), WriteError> {
        self.batch.data.extend_from_slice(padding);
        if padding.iter().any(|byte| *byte != 0)
            && let Some(draft) = self.drafts.back_mut()
        {
            draft.record.padding = Some(padding.to_vec());
        }
        let (length, chunks_end) = (self.batch.data.len(), self.chunks_end());
        if !self.is_stream && length >= BATCH || length - chunks_end >= HEADERS_PER_STREAM {
            self.send(length)?;
        } else if length >= BATCH && !self.batch.pieces.is_empty() {
            self.send(chunks_end)?;
        }
        self.pass_complete(0, false)
    }

    /// Where in the batch its last chunk ends.
    fn chunks_end(&self) -> usize {
        self.batch.pieces.last().map_or(0, |piece| piece.end)
    }

    fn count(&mut self, records: usize) -> Result<(), WriteError> {
        let sum = self.records.checked_add(records);
        self.records = sum.filter(|sum| *sum <= RECORDS_MAX).ok_or(WriteError::TooMany)?;
        Ok(())
    }

    /// Cuts a file into chunks.
    fn read_content(&mut self, size: u64, content: &mut dyn Read, name: &[u8]) -> Result<(), WriteError> {
        if size == 0 {
            return Ok(());
        }
        if size > SMALL {
            let is_one_chunk =
                matches!(self.settings.split, Split::Fixed(chunk_size) if size <= chunk_size as u64);
            return self.read_large(size, content, name, is_one_chunk);
        }
        let start = self.batch.data.len();
        let length = usize::try_from(size).map_err(|_| WriteError::ChunkSize(size))?;
        let file = self.batch.data.grow(length);
        content
            .read_exact(file)
            .map_err(|source| content_error(name, source))?;
        let before = self.batch.pieces.len();
        let pieces = &mut self.batch.pieces;
        let mut at = start;
        let mut cut = |cut: Cut| {
            let (length, zeros) = match cut {
                Cut::Data(length) => (length, 0),
                Cut::Hole(zeros) => (usize::try_from(zeros).unwrap_or(usize::MAX), zeros),
            };
            pieces.push(Piece {
                start: at,
                end: at + length,
                zeros,
                file: None,
                is_hashed: false,
            });
            at += length;
        };
        match self.settings.split {
            Split::Rolling => {
                let mut splitter = Splitter::new();
                splitter.push(file, &mut cut);
                splitter.finish(&mut cut);
            }
            Split::Fixed(chunk_size) => file
                .chunks(chunk_size)
                .for_each(|chunk| cut(Cut::Data(chunk.len()))),
        }
        if let Some(last) = pieces.last_mut() {
            last.file = Some(start);
            // The digest of the file is that of its chunk.
            last.is_hashed = last.start == start;
        }
        self.batch.files.push(Part {
            start,
            end: start + length,
            extent: Extent::Whole,
        });
        let added = self.batch.pieces.len() - before;
        self.count(added)
    }

    /// The same for a file whose chunks go to the workers as they come. `is_one_chunk`: its digest is that of its chunk.
    fn read_large(
        &mut self,
        size: u64,
        content: &mut dyn Read,
        name: &[u8],
        is_one_chunk: bool,
    ) -> Result<(), WriteError> {
        let mut crc = Crc64::new();
        let mut cutter = match self.settings.split {
            Split::Rolling => Cutter::Rolling(Splitter::new()),
            Split::Fixed(chunk_size) => Cutter::Fixed(chunk_size, 0),
        };
        // The piece that is open starts here; what is behind it in the batch belongs to it.
        let mut start = self.batch.data.len();
        self.batch.files.push(Part {
            start,
            ..Part::default()
        });
        let mut rest = size;
        let mut cuts = Vec::new();
        while rest > 0 {
            let length = usize::try_from(rest).map_or(BLOCK, |rest| rest.min(BLOCK));
            let block = self.batch.data.grow(length);
            content
                .read_exact(block)
                .map_err(|source| content_error(name, source))?;
            rest -= length as u64;
            if self.settings.split_file {
                crc.update(block);
            }
            cutter.push(block, rest == 0, &mut |cut| cuts.push(cut));
            self.count(cuts.len())?;
            for cut in cuts.drain(..) {
                start = self.cut_large(start, cut, is_one_chunk)?;
            }
            // Zeros that will be a hole need not lie around, however many they are.
            let zeros = cutter.pending_hole();
            let open = self.batch.data.len() - start;
            if let Some(kept) = zeros.and_then(|zeros| open.checked_sub(zeros)) {
                self.batch.data.truncate(start + kept);
                cutter.forget_pending();
            }
        }
        let (answer, digest) = bounded(1);
        if let Some(part) = self.batch.files.last_mut() {
            part.end = self.batch.data.len();
            part.extent = Extent::Last(answer);
        }
        if let Some(draft) = self.drafts.back_mut() {
            draft.record.crc64 = crc.finish();
            draft.digest = Some(digest);
        }
        Ok(())
    }

    /// Ends a piece that starts at `start` in the batch, and says where the next one does.
    fn cut_large(&mut self, start: usize, cut: Cut, is_hashed: bool) -> Result<usize, WriteError> {
        let (end, zeros) = match cut {
            Cut::Data(length) => (start + length, 0),
            Cut::Hole(zeros) => (start, zeros),
        };
        if let Cut::Hole(zeros) = cut {
            // Some of them may be there still.
            let there = self
                .batch
                .data
                .get(start..)
                .map_or(0, |rest| rest.iter().take_while(|byte| **byte == 0).count())
                .min(usize::try_from(zeros).unwrap_or(usize::MAX));
            self.batch.data.remove(start..start + there);
            self.batch.left_out.push((start, zeros));
        }
        self.batch.pieces.push(Piece {
            start,
            end,
            zeros,
            file: None,
            is_hashed,
        });
        if end >= BATCH {
            self.send(end)?;
            return Ok(0);
        }
        Ok(end)
    }

    /// Hands the first `length` bytes of the batch to the pool, after making room for them.
    fn send(&mut self, length: usize) -> Result<(), WriteError> {
        let mut next = Batch {
            data: self
                .rooms
                .pop()
                .unwrap_or_else(|| Room::with_capacity(BATCH + BLOCK)),
            ..Batch::default()
        };
        next.data
            .extend_from_slice(self.batch.data.get(length..).unwrap_or_default());
        self.batch.data.truncate(length);
        if let Some(open) = self.batch.files.last_mut()
            && matches!(open.extent, Extent::Open)
        {
            open.end = length;
            next.files.push(Part::default());
        }
        let mut batch = std::mem::replace(&mut self.batch, next);
        let (answer, digests) = bounded(1);
        batch.digests = Some(answer);
        let batch = Arc::new(batch);
        if !(batch.data.is_empty() && batch.left_out.is_empty() && batch.files.is_empty()) {
            self.unhashed
                .send(Work::Batch(Arc::clone(&batch)))
                .map_err(|_| WriteError::ThreadLost)?;
        }
        self.push(batch, digests)
    }

    fn push(&mut self, batch: Arc<Batch>, digests: Receiver<Vec<Digest>>) -> Result<(), WriteError> {
        let has_more = self.is_stream && !batch.data.is_empty();
        if batch.pieces.is_empty() && !has_more {
            return Ok(());
        }
        let weight = batch.data.len() * 2;
        while self.pool.is_full(weight) {
            self.collect()?;
        }
        self.pool.push(batch, weight)?;
        self.digests.push_back(digests);
        // Soon, so that its memory can be used again.
        while self.pool.is_ready() {
            self.collect()?;
        }
        Ok(())
    }

    /// Waits for everything that was handed out so far.
    fn collect_all(&mut self) -> Result<(), WriteError> {
        while self.collect()? {}
        self.pass_complete(1, true)
    }

    /// Passes the oldest result of the pool on; `false` if there is none.
    fn collect(&mut self) -> Result<bool, WriteError> {
        let Some(packed) = self.pool.pop()? else {
            return Ok(false);
        };
        let packed = packed.map_err(WriteError::Compressor)?;
        let digests = self.digests.pop_front().ok_or(WriteError::ThreadLost)?;
        let mut digests = digests
            .recv_timeout(HASHING)
            .map_err(|_| WriteError::ThreadLost)?
            .into_iter();
        let length = packed.data.len();
        let start = self.outlet.append(packed.data)?;
        for chunk in packed.chunks {
            // What comes before this chunk was handed out before it.
            self.pass_complete(1, true)?;
            let is_shared = packed.shared > 0;
            if let Some(draft) = self.drafts.front_mut() {
                draft.covered += chunk.size;
                if let Some(crc64) = chunk.file {
                    draft.record.digest = Some(digests.next().ok_or(WriteError::ThreadLost)?);
                    draft.record.crc64 = crc64;
                }
                draft.record.chunks.push(Chunk {
                    size: chunk.size,
                    // Where it is hashed elsewhere, it is that of the file; a large one's comes before the record is complete.
                    digest: chunk.digest.or(draft.record.digest).unwrap_or(Digest::EMPTY),
                    is_hole: chunk.is_hole,
                    at: if is_shared {
                        start
                    } else {
                        start + chunk.place.start as u64
                    },
                    stored: if is_shared { length } else { chunk.place.len() },
                    inner: if is_shared { chunk.place.start } else { 0 },
                    shared: packed.shared,
                });
            }
        }
        if let Some(batch) = Arc::into_inner(packed.batch) {
            let mut room = batch.data;
            room.truncate(0);
            let kept: usize = self.rooms.iter().map(Room::capacity).sum();
            if kept + room.capacity() <= ROOMS_MAX {
                self.rooms.push(room);
            }
        }
        self.pass_complete(1, false)?;
        Ok(true)
    }

    /// Passes on the records of the entries at the front that miss nothing any more. The last `open` of them may still get
    /// their padding. `waits`: for digests too, all of which must be under way.
    fn pass_complete(&mut self, open: usize, waits: bool) -> Result<(), WriteError> {
        while self.drafts.len() > open
            && let Some(draft) = self.drafts.front_mut()
            && draft.covered == draft.record.size
        {
            if let Some(digest) = &draft.digest {
                let digest = match digest.try_recv() {
                    Err(TryRecvError::Empty) if waits => {
                        digest.recv_timeout(HASHING).map_err(|_| WriteError::ThreadLost)?
                    }
                    Err(TryRecvError::Empty) => return Ok(()),
                    Err(TryRecvError::Disconnected) => return Err(WriteError::ThreadLost),
                    Ok(digest) => digest,
                };
                draft.record.digest = Some(digest);
                if let [chunk] = draft.record.chunks.as_mut_slice() {
                    chunk.digest = digest;
                }
            }
            let record = std::mem::take(&mut draft.record);
            self.drafts.pop_front();
            self.waiting_headers -= record.headers.len();
            self.outlet.append_record(record)?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<O, WriteError> {
        self.send(self.batch.data.len())?;
        self.collect_all()?;
        self.pass_complete(0, true)?;
        if !self.drafts.is_empty() {
            return Err(WriteError::ThreadLost);
        }
        Ok(self.outlet)
    }
}

/// What is known of an entry.
enum About {
    /// What its headers say.
    Headers,
    Entry(Box<Entry>),
    /// It is none.
    Nothing,
}

/// How a large file is cut.
enum Cutter {
    /// Bytes per chunk, and bytes of the chunk that is open.
    Fixed(usize, usize),
    Rolling(Splitter),
}

impl Cutter {
    fn push(&mut self, block: &[u8], is_last: bool, cut: &mut impl FnMut(Cut)) {
        match self {
            Self::Fixed(chunk_size, open) => {
                let mut rest = block.len();
                while rest > 0 {
                    let taken = rest.min(*chunk_size - *open);
                    rest -= taken;
                    *open += taken;
                    if open == chunk_size || (rest == 0 && is_last) {
                        cut(Cut::Data(std::mem::take(open)));
                    }
                }
            }
            Self::Rolling(splitter) => {
                splitter.push(block, cut);
                if is_last {
                    std::mem::replace(splitter, Splitter::new()).finish(cut);
                }
            }
        }
    }

    /// Zeros at the end that are kept and surely a hole.
    fn pending_hole(&self) -> Option<usize> {
        match self {
            Self::Fixed(..) => None,
            Self::Rolling(splitter) => splitter.pending_hole(),
        }
    }

    fn forget_pending(&mut self) {
        if let Self::Rolling(splitter) = self {
            splitter.forget_pending();
        }
    }
}

fn comparable(metadata: &Metadata) -> Described {
    let mut crc = Crc64::new();
    crc.update(&metadata.uid.to_le_bytes());
    crc.update(&metadata.gid.to_le_bytes());
    crc.update(&metadata.mtime.to_le_bytes());
    crc.update(&metadata.mtime_nanoseconds.to_le_bytes());
    for (name, value) in &metadata.xattrs {
        for part in [name, value] {
            crc.update(&(part.len() as u64).to_le_bytes());
            crc.update(part);
        }
    }
    Described {
        mode: metadata.mode,
        rest: crc.finish(),
    }
}

/// Stands for the names of the attributes; 0 for none.
fn number_of(metadata: &Metadata) -> u64 {
    if metadata.xattrs.is_empty() {
        return 0;
    }
    let mut crc = Crc64::new();
    for name in metadata.xattrs.keys() {
        crc.update(name);
        crc.update(&[0]);
    }
    crc.finish().max(1)
}

/// Whether other readers see the same entry in these headers: some take a file whose name ends in `/` for a directory, do not know
/// type `7`, or look for a content behind links that claim one.
fn is_usual(entry: &TarEntry) -> bool {
    let Some(header) = entry.raw_headers.last_chunk::<{ tar::BLOCK }>() else {
        return false;
    };
    let (kind, size) = (header[156], header.get(124..136).unwrap_or_default());
    match entry.kind {
        TarKind::Regular { .. } => matches!(kind, 0 | b'0') && !entry.name.ends_with(b"/"),
        _ => matches!(kind, b'1'..=b'6') && size.iter().all(|byte| matches!(byte, b'0' | b' ' | 0)),
    }
}

fn content_error(name: &[u8], source: io::Error) -> WriteError {
    WriteError::Content {
        entry: String::from_utf8_lossy(name).into_owned(),
        source,
    }
}

fn not_lossless(name: &[u8]) -> WriteError {
    WriteError::NotLossless {
        entry: String::from_utf8_lossy(name).into_owned(),
    }
}
