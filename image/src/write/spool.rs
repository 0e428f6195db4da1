//! The writer's temporary file: compressed chunks, and for each entry a record of everything else about it, so that
//! memory holds no more than names and positions while the order of the entries is still open.
//!
//! First only [`Spool::append`] is called, then, after [`Spool::rewind`], only [`Spool::read`]. Nothing in the file is meant
//! to outlive the writer.

use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};

use serde::{Deserialize, Serialize};

/// Bytes gathered before the file is touched.
const BUFFER: usize = 256 << 10;

/// What is kept of one entry beside its chunks.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// Every header block.
    pub(super) headers: Vec<u8>,
    /// The entry's TOC entries, one per chunk (one for an entry without content): JSON objects that lack the names of
    /// user and group, the offset, and the closing brace.
    pub(super) json: Vec<String>,
    /// Owner.
    pub(super) uid: u32,
    /// Owning group.
    pub(super) gid: u32,
    /// Name of the owner, may be empty.
    pub(super) user_name: String,
    /// Name of the group, may be empty.
    pub(super) group_name: String,
    /// Where the first chunk lies in the spool; the others follow without gaps.
    pub(super) start: u64,
    /// The chunks: bytes uncompressed and compressed.
    pub(super) chunks: Vec<(u64, u64)>,
}

/// Where a record lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    offset: u64,
    compressed: u32,
    length: u32,
}

/// The file while it is written.
pub(super) struct Spool<S: Write> {
    file: BufWriter<S>,
    position: u64,
    compressor: zstd::bulk::Compressor<'static>,
}

/// The file while it is read.
pub(super) struct SpoolReader<S> {
    file: BufReader<S>,
    position: u64,
    decompressor: zstd::bulk::Decompressor<'static>,
}

impl<S: Read + Write + Seek> Spool<S> {
    pub(super) fn new(mut file: S) -> io::Result<Self> {
        file.seek(SeekFrom::Start(0))?;
        Ok(Self {
            file: BufWriter::with_capacity(BUFFER, file),
            position: 0,
            compressor: zstd::bulk::Compressor::new(1)?,
        })
    }

    /// Appends `data` and says where it starts.
    pub(super) fn append(&mut self, data: &[u8]) -> io::Result<u64> {
        let start = self.position;
        self.file.write_all(data)?;
        self.position += data.len() as u64;
        Ok(start)
    }

    /// Appends a record. It is compressed, because headers are mostly zeros and the file should not outgrow the blob.
    pub(super) fn append_record(&mut self, record: &Record) -> io::Result<Place> {
        let plain = postcard::to_stdvec(record).map_err(io::Error::other)?;
        let data = self.compressor.compress(&plain)?;
        let length = |data: &[u8]| u32::try_from(data.len()).map_err(io::Error::other);
        Ok(Place {
            compressed: length(&data)?,
            length: length(&plain)?,
            offset: self.append(&data)?,
        })
    }

    /// Ends the writing.
    pub(super) fn rewind(self) -> io::Result<SpoolReader<S>> {
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(SpoolReader {
            file: BufReader::with_capacity(BUFFER, file),
            position: 0,
            decompressor: zstd::bulk::Decompressor::new()?,
        })
    }
}

impl<S: Read + Seek> SpoolReader<S> {
    /// Reads `length` bytes at `offset`.
    pub(super) fn read(&mut self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let away = i64::try_from(i128::from(offset) - i128::from(self.position)).map_err(io::Error::other)?;
        // Stays inside the buffer where it can: most reads are near the one before.
        self.file.seek_relative(away)?;
        self.position = offset;
        let mut data = vec![0; usize::try_from(length).map_err(io::Error::other)?];
        self.file.read_exact(&mut data)?;
        self.position += length;
        Ok(data)
    }

    pub(super) fn read_record(&mut self, place: Place) -> io::Result<Record> {
        let data = self.read(place.offset, u64::from(place.compressed))?;
        let length = usize::try_from(place.length).map_err(io::Error::other)?;
        let plain = self.decompressor.decompress(&data, length)?;
        postcard::from_bytes(&plain).map_err(io::Error::other)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_appended_is_read_back_in_any_order() {
        let record = |index: u32| Record {
            headers: vec![u8::try_from(index % 251).unwrap(); 1024],
            json: vec![format!("{{\"name\":\"{index}\"")],
            uid: index,
            user_name: "me".into(),
            chunks: vec![(u64::from(index), 3)],
            ..Record::default()
        };
        let mut spool = Spool::new(tempfile::tempfile().unwrap()).unwrap();
        let mut places = Vec::new();
        for index in 0..1000 {
            let data = vec![b'x'; usize::try_from(index).unwrap() * 7];
            let start = spool.append(&data).unwrap();
            places.push((start, data, spool.append_record(&record(index)).unwrap()));
        }
        let mut spool = spool.rewind().unwrap();
        for step in [1, 7, 999] {
            for index in (0..1000).map(|index| index * step % 1000) {
                let (start, data, place) = &places[index];
                assert_eq!(
                    spool.read_record(*place).unwrap(),
                    record(u32::try_from(index).unwrap())
                );
                assert_eq!(spool.read(*start, data.len() as u64).unwrap(), *data);
            }
        }
        assert!(spool.read(u64::from(u32::MAX), 1).is_err());
    }
}
