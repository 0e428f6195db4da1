//! The writer's temporary file: compressed chunks, and for each entry a record of everything else about it, so that
//! memory holds no more than names and places while the order of the entries is still open.
//!
//! First only [`Spool::append`] and [`Spool::append_record`] are called, then, after [`Spool::rewind`], only the methods of
//! [`SpoolReader`]. The first bytes ([`MEMORY`]) stay in memory, which is all of most layers. Records are compressed many at a
//! time: headers and names repeat so much that the file stays below the size of the blob, in which each file's headers are
//! compressed by themselves. Nothing in the file is meant to outlive the writer.

use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use bytes::Bytes;

use super::record::{Chunk, Record};

/// Most bytes that stay in memory: all of many small layers, and little beside the work in flight, since two layers may be
/// under way. Few in unit tests, whose layers are small and shall get into the file.
pub(super) const MEMORY: u64 = if cfg!(test) { 4 << 10 } else { 16 << 20 };
/// What a piece in memory costs beside its bytes.
const PIECE_COST: u64 = 64;
/// Bytes gathered before the file is touched.
const BUFFER: usize = 256 << 10;
/// Bytes of records that are compressed together. A prioritized file costs one such batch to be read.
const RECORDS: usize = 1 << 20;
/// Bytes before each record: its length, and start and length of its headers.
const PREFIX: usize = 12;
/// zstd's level for records: close to what deflate makes of them at its best, and several times faster.
const RECORD_LEVEL: i32 = 3;

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    batch: u32,
    start: u32,
}

/// Records that were compressed together.
#[derive(Debug, Clone, Copy)]
struct Batch {
    offset: u64,
    compressed: usize,
    /// Bytes of headers, and of everything.
    headers: usize,
    length: usize,
}

/// The file while it is written.
pub(super) struct Spool<S: Write> {
    memory: Memory,
    file: BufWriter<S>,
    /// Bytes so far, those in memory included.
    position: u64,
    compressor: zstd::bulk::Compressor<'static>,
    batches: Vec<Batch>,
    /// Records that are not in the file yet, each behind its length and the place of its headers. The headers of all of them
    /// come first: like and like compress better.
    records: Vec<u8>,
    headers: Vec<u8>,
}

/// The file while it is read.
pub(super) struct SpoolReader<S> {
    memory: Memory,
    file: BufReader<S>,
    /// Where in the file the next byte is read.
    position: u64,
    decompressor: zstd::bulk::Decompressor<'static>,
    batches: Vec<Batch>,
    /// The batch that was read last: most records are asked for in order.
    records: Vec<u8>,
    loaded: Option<u32>,
    /// The chunks that are compressed together and were read last, and where they are.
    shared: Vec<u8>,
    shared_at: Option<u64>,
}

impl<S: Read + Write + Seek> Spool<S> {
    /// `memory`: how many bytes stay there.
    pub(super) fn new(mut file: S, memory: u64) -> io::Result<Self> {
        file.seek(SeekFrom::Start(0))?;
        Ok(Self {
            memory: Memory {
                limit: memory,
                ..Memory::default()
            },
            file: BufWriter::with_capacity(BUFFER, file),
            position: 0,
            compressor: zstd::bulk::Compressor::new(RECORD_LEVEL)?,
            batches: Vec::new(),
            records: Vec::new(),
            headers: Vec::new(),
        })
    }

    /// Appends `data` and says where it starts.
    pub(super) fn append(&mut self, data: Vec<u8>) -> io::Result<u64> {
        let start = self.position;
        self.position += data.len() as u64;
        if self.position + self.memory.cost() <= self.memory.limit && self.memory.end == start {
            self.memory.push(data);
        } else {
            self.file.write_all(&data)?;
        }
        Ok(start)
    }

    /// Appends a record.
    pub(super) fn append_record(&mut self, record: &mut Record) -> io::Result<Place> {
        let number = |number: usize| u32::try_from(number).map_err(io::Error::other);
        let place = Place {
            batch: number(self.batches.len())?,
            start: number(self.records.len())?,
        };
        let headers = std::mem::take(&mut record.headers);
        let (at, count) = (number(self.headers.len())?, number(headers.len())?);
        self.headers.extend_from_slice(&headers);
        let start = self.records.len();
        self.records.extend_from_slice(&[0; PREFIX]);
        self.records =
            postcard::to_extend(record, std::mem::take(&mut self.records)).map_err(io::Error::other)?;
        let length = number(self.records.len() - start - PREFIX)?;
        let prefix = [length.to_le_bytes(), at.to_le_bytes(), count.to_le_bytes()].concat();
        if let Some(room) = self.records.get_mut(start..start + PREFIX) {
            room.copy_from_slice(&prefix);
        }
        if self.records.len() + self.headers.len() >= RECORDS {
            self.end_batch()?;
        }
        Ok(place)
    }

    fn end_batch(&mut self) -> io::Result<()> {
        if self.records.is_empty() {
            return Ok(());
        }
        let headers = self.headers.len();
        self.headers.append(&mut self.records);
        let data = self.compressor.compress(&self.headers)?;
        let compressed = data.len();
        let batch = Batch {
            offset: self.append(data)?,
            compressed,
            headers,
            length: self.headers.len(),
        };
        self.batches.push(batch);
        self.headers.clear();
        Ok(())
    }

    /// Ends the writing.
    pub(super) fn rewind(mut self) -> io::Result<SpoolReader<S>> {
        self.end_batch()?;
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(SpoolReader {
            memory: self.memory,
            file: BufReader::with_capacity(BUFFER, file),
            position: 0,
            decompressor: zstd::bulk::Decompressor::new()?,
            batches: self.batches,
            records: Vec::new(),
            loaded: None,
            shared: Vec::new(),
            shared_at: None,
        })
    }
}

impl<S: Read + Seek> SpoolReader<S> {
    /// Reads `length` bytes at `offset`.
    pub(super) fn read(&mut self, offset: u64, length: usize) -> io::Result<Bytes> {
        let Some(offset) = offset.checked_sub(self.memory.end) else {
            return self.memory.read(offset, length);
        };
        let away = i64::try_from(i128::from(offset) - i128::from(self.position)).map_err(io::Error::other)?;
        // Stays inside the buffer where it can: most reads are near the one before.
        self.file.seek_relative(away)?;
        self.position = offset;
        let mut data = vec![0; length];
        self.file.read_exact(&mut data)?;
        self.position += length as u64;
        Ok(data.into())
    }

    /// Reads a chunk that was compressed together with others.
    pub(super) fn read_shared(&mut self, chunk: &Chunk) -> io::Result<&[u8]> {
        if self.shared_at != Some(chunk.at) {
            let data = self.read(chunk.at, chunk.stored)?;
            self.shared = self.decompressor.decompress(&data, chunk.shared)?;
            self.shared_at = Some(chunk.at);
        }
        let size = usize::try_from(chunk.size).map_err(io::Error::other)?;
        let bytes = self.shared.get(chunk.inner..).and_then(|rest| rest.get(..size));
        bytes.ok_or_else(|| io::Error::other("a chunk is not where it was written"))
    }

    pub(super) fn read_record(&mut self, place: Place) -> io::Result<Record> {
        let damaged = || io::Error::other("no record where one was written");
        let index = usize::try_from(place.batch).map_err(io::Error::other)?;
        let batch = *self.batches.get(index).ok_or_else(damaged)?;
        if self.loaded != Some(place.batch) {
            let data = self.read(batch.offset, batch.compressed)?;
            self.records = self.decompressor.decompress(&data, batch.length)?;
            self.loaded = Some(place.batch);
        }
        let (headers, records) = self.records.split_at_checked(batch.headers).ok_or_else(damaged)?;
        let number = |bytes: &[u8; 4]| usize::try_from(u32::from_le_bytes(*bytes)).map_err(io::Error::other);
        let rest = usize::try_from(place.start)
            .ok()
            .and_then(|start| records.get(start..))
            .ok_or_else(damaged)?;
        let (prefix, rest) = rest.split_first_chunk::<PREFIX>().ok_or_else(damaged)?;
        let ([length, at, count], []) = prefix.as_chunks::<4>() else {
            return Err(damaged());
        };
        let record = rest.get(..number(length)?).ok_or_else(damaged)?;
        let mut record: Record = postcard::from_bytes(record).map_err(io::Error::other)?;
        let (at, count) = (number(at)?, number(count)?);
        record.headers = headers
            .get(at..)
            .and_then(|headers| headers.get(..count))
            .ok_or_else(damaged)?
            .to_vec();
        Ok(record)
    }
}

/// What stays in memory: the first pieces that were appended.
#[derive(Default)]
struct Memory {
    /// Each behind where it starts.
    pieces: Vec<(u64, Bytes)>,
    end: u64,
    /// Most bytes.
    limit: u64,
}

impl Memory {
    fn push(&mut self, mut data: Vec<u8>) {
        data.shrink_to_fit();
        let start = self.end;
        self.end += data.len() as u64;
        self.pieces.push((start, data.into()));
    }

    fn cost(&self) -> u64 {
        self.pieces.len() as u64 * PIECE_COST
    }

    /// Nothing that is read at once was appended in pieces.
    fn read(&self, offset: u64, length: usize) -> io::Result<Bytes> {
        let index = self.pieces.partition_point(|(start, _)| *start <= offset);
        let piece = index.checked_sub(1).and_then(|index| self.pieces.get(index));
        piece
            .and_then(|(start, data)| {
                let at = usize::try_from(offset - start).ok()?;
                let end = at.checked_add(length).filter(|end| *end <= data.len())?;
                Some(data.slice(at..end))
            })
            .ok_or_else(|| io::Error::other("no bytes where some were written"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_read_back_in_any_order() {
        let record = |index: u32| Record {
            headers: vec![u8::try_from(index % 251).unwrap(); 1024],
            size: u64::from(index),
            chunks: vec![Chunk {
                size: u64::from(index),
                ..Chunk::default()
            }],
            ..Record::default()
        };
        let mut spool = Spool::new(tempfile::tempfile().unwrap(), MEMORY).unwrap();
        let mut places = Vec::new();
        for index in 0..1000 {
            let data = vec![b'x'; usize::try_from(index).unwrap() * 7];
            let start = spool.append(data.clone()).unwrap();
            places.push((start, data, spool.append_record(&mut record(index)).unwrap()));
        }
        let mut spool = spool.rewind().unwrap();
        for step in [1, 7, 999] {
            for index in (0..1000).map(|index| index * step % 1000) {
                let (start, data, place) = &places[index];
                assert_eq!(
                    spool.read_record(*place).unwrap(),
                    record(u32::try_from(index).unwrap())
                );
                assert_eq!(spool.read(*start, data.len()).unwrap(), *data);
            }
        }
        assert!(spool.read(u64::from(u32::MAX), 1).is_err());
    }
}
