//! The first half of the writer: takes the tar stream apart, has the chunks compressed, and spools everything.

use std::borrow::Cow;
use std::collections::VecDeque;
use std::io::{Read, Seek, Write};

use base64::Engine as _;
use libdeflater::Compressor;

use super::pool::Pool;
use super::spool::{Place, Record, Spool};
use super::{Settings, WriteError, append_member};
use crate::digest::{Digest, Hasher};
use crate::estargz::index::RECORDS_MAX;
use crate::estargz::toc::TocEntry;
use crate::estargz::{LANDMARK_CONTENT, NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, is_reserved, time};
use crate::layer::{Device, Metadata};
use crate::path::EntryPath;
use crate::tar::write::{NewEntry, encode_header};
use crate::tar::{self, TarEntry, TarKind};

/// Small files go to the workers together, up to this many bytes: handing over costs more than compressing one of them.
const BATCH: usize = 512 << 10;
/// Most bytes of headers that wait for the chunks before them to be compressed.
const WAITING_HEADERS_MAX: usize = 4 << 20;

/// What the first half leaves to the second.
pub(super) struct Intake<S: Write> {
    pub(super) spool: Spool<S>,
    /// Path and hard link target of each entry.
    pub(super) names: Vec<(EntryPath, Option<EntryPath>)>,
    /// The record of each entry.
    pub(super) places: Vec<Place>,
    /// The record of the landmark.
    pub(super) landmark: Place,
}

/// Chunks on their way to a worker, one after the other.
#[derive(Default)]
struct Batch {
    data: Vec<u8>,
    lengths: Vec<usize>,
}

/// What a worker made of a batch: gzip members one after the other.
struct Packed {
    data: Vec<u8>,
    chunks: Vec<PackedChunk>,
}

#[derive(Clone, Copy)]
struct PackedChunk {
    size: u64,
    compressed: usize,
    digest: Digest,
}

/// An entry some of whose chunks are not compressed yet.
struct Draft {
    toc: TocEntry<'static>,
    record: Record,
    size: u64,
    /// Bytes of content that are spooled.
    covered: u64,
    /// Digest of the whole file, where it has several chunks.
    digest: Option<Digest>,
    chunks: Vec<PackedChunk>,
}

/// Reads all of `input` into the spool.
pub(super) fn run<R, S>(
    input: R,
    spool: Spool<S>,
    settings: &Settings,
    prioritized: bool,
) -> Result<Intake<S>, WriteError>
where
    R: Read,
    S: Read + Write + Seek,
{
    std::thread::scope(|scope| {
        let level = settings.level;
        let worker = move || {
            let mut compressor = Compressor::new(level);
            move |batch: Batch| pack(&mut compressor, &batch)
        };
        let pool = Pool::start(scope, "layer-pack", settings.threads, worker).map_err(WriteError::Thread)?;
        let mut intake = Running {
            spool,
            chunk_size: settings.chunk_size,
            pool,
            batch: Batch::default(),
            drafts: VecDeque::new(),
            waiting_headers: 0,
            records: 0,
            names: Vec::new(),
            places: Vec::new(),
        };
        let mut reader = tar::Reader::new(input);
        intake.add(landmark(prioritized)?, &mut LANDMARK_CONTENT.as_slice())?;
        while let Some(entry) = reader.next_entry()? {
            if !is_reserved(&entry.path) {
                intake.add(entry, &mut reader)?;
            }
        }
        reader.finish()?;
        intake.finish()
    })
}

fn pack(compressor: &mut Compressor, batch: &Batch) -> Packed {
    let mut packed = Packed {
        data: Vec::new(),
        chunks: Vec::with_capacity(batch.lengths.len()),
    };
    let mut rest = batch.data.as_slice();
    for length in &batch.lengths {
        let (chunk, after) = rest.split_at_checked(*length).unwrap_or((rest, &[]));
        rest = after;
        let start = packed.data.len();
        append_member(compressor, chunk, &mut packed.data);
        packed.chunks.push(PackedChunk {
            size: chunk.len() as u64,
            compressed: packed.data.len() - start,
            digest: Digest::of(chunk),
        });
    }
    packed
}

/// The landmark as if it were an entry of the input. It has a name and nothing else.
fn landmark(prioritized: bool) -> Result<TarEntry, WriteError> {
    let name = if prioritized {
        PREFETCH_LANDMARK
    } else {
        NO_PREFETCH_LANDMARK
    };
    let metadata = Metadata::default();
    let kind = TarKind::Regular {
        size: LANDMARK_CONTENT.len() as u64,
    };
    let raw_headers = encode_header(&NewEntry {
        name: name.as_bytes(),
        metadata: &metadata,
        kind: &kind,
        user_name: b"",
        group_name: b"",
    })?;
    Ok(TarEntry {
        offset: 0,
        name: name.as_bytes().into(),
        path: EntryPath::default(),
        metadata,
        raw_mode: 0,
        access_time: None,
        change_time: None,
        kind,
        user_name: Box::default(),
        group_name: Box::default(),
        raw_headers,
        self_contained: true,
    })
}

struct Running<S: Write> {
    spool: Spool<S>,
    chunk_size: u64,
    pool: Pool<Batch, Packed>,
    batch: Batch,
    /// Entries whose records are not spooled yet, in the input's order.
    drafts: VecDeque<Draft>,
    /// Bytes of headers in them.
    waiting_headers: usize,
    /// Entries, chunks and attributes so far.
    records: usize,
    names: Vec<(EntryPath, Option<EntryPath>)>,
    /// The landmark's comes first.
    places: Vec<Place>,
}

impl<S: Read + Write + Seek> Running<S> {
    fn add(&mut self, mut entry: TarEntry, content: &mut dyn Read) -> Result<(), WriteError> {
        let size = entry.kind.size();
        self.count(1 + entry.metadata.xattrs.len() as u64 + size.div_ceil(self.chunk_size))?;
        if !entry.self_contained {
            entry.raw_headers = encode_header(&NewEntry {
                name: &entry.name,
                metadata: &entry.metadata,
                kind: &entry.kind,
                user_name: &entry.user_name,
                group_name: &entry.group_name,
            })?;
        }
        let toc = describe(&entry)?;
        let link = match entry.kind {
            TarKind::Hardlink { target, .. } => Some(target),
            _ => None,
        };
        self.waiting_headers += entry.raw_headers.len();
        self.names.push((entry.path, link));
        self.drafts.push_back(Draft {
            toc,
            record: Record {
                headers: entry.raw_headers,
                uid: entry.metadata.uid,
                gid: entry.metadata.gid,
                // A name that is no text helps nobody; the ids say the same.
                user_name: String::from_utf8(entry.user_name.into_vec()).unwrap_or_default(),
                group_name: String::from_utf8(entry.group_name.into_vec()).unwrap_or_default(),
                ..Record::default()
            },
            size,
            covered: 0,
            digest: None,
            chunks: Vec::new(),
        });
        self.read_content(size, content, &entry.name)?;
        self.spool_complete()?;
        if self.waiting_headers > WAITING_HEADERS_MAX {
            self.drain()?;
        }
        Ok(())
    }

    fn count(&mut self, records: u64) -> Result<(), WriteError> {
        let sum = usize::try_from(records)
            .ok()
            .and_then(|records| self.records.checked_add(records));
        self.records = sum.filter(|sum| *sum <= RECORDS_MAX).ok_or(WriteError::TooMany)?;
        Ok(())
    }

    /// Cuts a file into chunks and hands them to the pool.
    fn read_content(&mut self, size: u64, content: &mut dyn Read, name: &[u8]) -> Result<(), WriteError> {
        let mut whole = (size > self.chunk_size).then(Hasher::new);
        let mut rest = size;
        while rest > 0 {
            let length = rest.min(self.chunk_size);
            rest -= length;
            let start = self.batch.data.len();
            let length = usize::try_from(length).map_err(|_| WriteError::ChunkSize(length))?;
            self.batch.data.resize(start + length, 0);
            let chunk = self.batch.data.get_mut(start..).unwrap_or_default();
            content.read_exact(chunk).map_err(|source| WriteError::Content {
                entry: String::from_utf8_lossy(name).into_owned(),
                source,
            })?;
            if let Some(hasher) = &mut whole {
                hasher.update(chunk);
            }
            self.batch.lengths.push(length);
            if rest == 0
                && let Some(draft) = self.drafts.back_mut()
            {
                draft.digest = whole.take().map(Hasher::finish);
            }
            if self.batch.data.len() >= BATCH {
                self.send()?;
            }
        }
        Ok(())
    }

    /// Hands the batch to the pool, after making room for it.
    fn send(&mut self) -> Result<(), WriteError> {
        let weight = self.batch.data.len() * 2;
        if weight == 0 {
            return Ok(());
        }
        while self.pool.is_full(weight) {
            self.collect()?;
        }
        let batch = std::mem::take(&mut self.batch);
        self.pool.push(batch, weight)?;
        Ok(())
    }

    /// Waits for everything that was handed out so far.
    fn drain(&mut self) -> Result<(), WriteError> {
        self.send()?;
        while self.collect()? {}
        Ok(())
    }

    /// Spools the oldest result of the pool; `false` if there is none.
    fn collect(&mut self) -> Result<bool, WriteError> {
        let Some(packed) = self.pool.pop()? else {
            return Ok(false);
        };
        let mut rest = packed.data.as_slice();
        for chunk in packed.chunks {
            self.spool_complete()?;
            let (member, after) = rest.split_at_checked(chunk.compressed).unwrap_or((rest, &[]));
            rest = after;
            let start = self.spool.append(member).map_err(WriteError::Spool)?;
            if let Some(draft) = self.drafts.front_mut() {
                if draft.chunks.is_empty() {
                    draft.record.start = start;
                }
                draft.covered += chunk.size;
                draft.chunks.push(chunk);
            }
        }
        self.spool_complete()?;
        Ok(true)
    }

    /// Spools the records of the entries at the front that miss no chunk any more.
    fn spool_complete(&mut self) -> Result<(), WriteError> {
        while let Some(draft) = self.drafts.pop_front_if(|draft| draft.covered == draft.size) {
            self.waiting_headers -= draft.record.headers.len();
            let record = draft.into_record(self.chunk_size)?;
            let place = self.spool.append_record(&record).map_err(WriteError::Spool)?;
            self.places.push(place);
        }
        Ok(())
    }

    fn finish(mut self) -> Result<Intake<S>, WriteError> {
        self.drain()?;
        if !self.drafts.is_empty() || self.places.len() != self.names.len() || self.places.is_empty() {
            return Err(WriteError::ThreadLost);
        }
        self.names.remove(0);
        let landmark = self.places.remove(0);
        Ok(Intake {
            spool: self.spool,
            names: self.names,
            places: self.places,
            landmark,
        })
    }
}

impl Draft {
    /// The record, with the TOC entries that upstream's writer would make: the size of a chunk stands there only if it is
    /// the full chunk size.
    fn into_record(self, chunk_size: u64) -> Result<Record, WriteError> {
        let Self {
            mut toc,
            mut record,
            digest,
            chunks,
            ..
        } = self;
        let (name, kind) = (toc.name.clone(), toc.kind.clone());
        if kind == "reg" {
            let only = chunks.first().map_or(Digest::EMPTY, |chunk| chunk.digest);
            toc.digest = digest.unwrap_or(only).to_string().into();
        }
        if chunks.is_empty() {
            record.json.push(open_json(&toc)?);
        }
        let mut position = 0;
        for chunk in chunks {
            toc.chunk_offset = signed(position);
            toc.chunk_size = if chunk.size == chunk_size {
                signed(chunk.size)
            } else {
                0
            };
            toc.chunk_digest = chunk.digest.to_string().into();
            record.json.push(open_json(&toc)?);
            record.chunks.push((chunk.size, chunk.compressed as u64));
            position += chunk.size;
            toc = TocEntry {
                name: name.clone(),
                kind: Cow::Borrowed("chunk"),
                ..TocEntry::default()
            };
        }
        Ok(record)
    }
}

/// A JSON object without its closing brace.
fn open_json(toc: &TocEntry<'_>) -> Result<String, WriteError> {
    let mut json = serde_json::to_string(toc)?;
    json.pop();
    Ok(json)
}

/// Sizes of tar entries fit: the tar format has no larger ones.
fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

/// The TOC entry of a tar entry, as far as it is known without the content.
fn describe(entry: &TarEntry) -> Result<TocEntry<'static>, WriteError> {
    let text = |field: &'static str, bytes: &[u8]| {
        String::from_utf8(bytes.to_vec()).map_err(|_| WriteError::NotUtf8 {
            entry: String::from_utf8_lossy(&entry.name).into_owned(),
            field,
        })
    };
    let metadata = &entry.metadata;
    let mut xattrs = None;
    for (name, value) in &metadata.xattrs {
        let value = base64::engine::general_purpose::STANDARD.encode(value);
        let name = text("the name of an extended attribute", name)?;
        xattrs
            .get_or_insert_with(std::collections::BTreeMap::new)
            .insert(name, value);
    }
    let mut toc = TocEntry {
        name: text("the name", &entry.name)?.into(),
        size: signed(entry.kind.size()),
        modtime: time::format(metadata.mtime, metadata.mtime_nanoseconds).into(),
        mode: metadata.mode.into(),
        uid: metadata.uid.into(),
        gid: metadata.gid.into(),
        xattrs,
        ..TocEntry::default()
    };
    let mut device = |kind, device: &Device| {
        toc.dev_major = device.major.into();
        toc.dev_minor = device.minor.into();
        kind
    };
    toc.kind = Cow::Borrowed(match &entry.kind {
        TarKind::Directory => "dir",
        TarKind::Regular { .. } => "reg",
        TarKind::Symlink(target) => {
            toc.link_name = text("the target", target)?.into();
            "symlink"
        }
        TarKind::Hardlink { raw, .. } => {
            toc.link_name = text("the target", raw)?.into();
            "hardlink"
        }
        TarKind::CharDevice(number) => device("char", number),
        TarKind::BlockDevice(number) => device("block", number),
        TarKind::Fifo => "fifo",
    });
    Ok(toc)
}
