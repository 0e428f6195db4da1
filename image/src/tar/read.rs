//! The streaming tar reader. Called by [`super::index_tar`] and the eStargz writer.
//!
//! Between two calls of [`Reader::next_entry`] the stream stands somewhere inside the content of the entry returned
//! last; what is left of it, and its padding, is skipped by the next call.

use std::io::{self, BufReader, ErrorKind, Read};

use super::header::{self, BLOCK, Block, Field, until_nul};
use super::pax::{self, Records};
use super::sparse::{self, DataMap, Map};
use super::{EXTENSION_MAX, HEADERS_MAX, HOLES_MAX, TarEntry, TarError, TarKind, TarProblem};
use crate::layer::{self, Device, MODE_MASK, Metadata, SYMLINK_MODE};
use crate::path::{EntryPath, PATH_MAX};

/// Bytes read ahead: headers are 512 bytes, and the stream below is often a decompressor.
const BUFFER: usize = 64 << 10;

/// Takes a tar stream apart, entry by entry. As a [`Read`] it gives the content of the current entry, holes expanded.
#[derive(Debug)]
pub struct Reader<R> {
    stream: BufReader<R>,
    /// Bytes taken from the stream so far.
    position: u64,
    /// Stored bytes of the current content that were not taken yet, and the padding after them.
    remaining: u64,
    padding: u64,
    sparse: Option<Expansion>,
    holes: u64,
    /// Whether there was a global PAX header. It changes nothing here.
    has_globals: bool,
    /// Name and offset of the current entry, for messages.
    name: Vec<u8>,
    offset: u64,
    end: Option<End>,
}

/// Where a sparse content stands.
#[derive(Debug)]
struct Expansion {
    map: Map,
    next: usize,
    position: u64,
}

#[derive(Debug, Clone, Copy)]
struct End {
    offset: u64,
}

/// What follows the last entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Trailer {
    /// Offset of the end-of-archive marker: all entries end here.
    pub offset: u64,
    /// Bytes from there to the end of the stream: the marker, the padding of the last record, anything else.
    pub size: u64,
    /// Whether some of them are not 0. They belong to the stream's digest, but no reader unpacks them.
    pub has_data: bool,
}

/// The extensions that stand before an entry's own header.
#[derive(Default)]
struct Extensions {
    raw: Vec<u8>,
    /// Whether some of them wait for the entry that they are about.
    is_pending: bool,
    local: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

impl<R: Read> Reader<R> {
    /// A reader at the start of an uncompressed tar stream.
    pub fn new(stream: R) -> Self {
        Self {
            stream: BufReader::with_capacity(BUFFER, stream),
            position: 0,
            remaining: 0,
            padding: 0,
            sparse: None,
            holes: 0,
            has_globals: false,
            name: Vec::new(),
            offset: 0,
            end: None,
        }
    }

    /// Bytes of the stream that were consumed so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Offset in the stream at which the stored content of the current entry ends.
    pub fn content_end(&self) -> u64 {
        self.position.saturating_add(self.remaining)
    }

    /// The next entry, `None` at the end-of-archive marker or where the stream ends between entries.
    pub fn next_entry(&mut self) -> Result<Option<TarEntry>, TarError> {
        if self.end.is_some() {
            return Ok(None);
        }
        self.skip_content().map_err(|problem| self.fail(problem))?;
        self.name.clear();
        self.offset = self.position;
        let entry = self.parse_entry().map_err(|problem| self.fail(problem))?;
        if entry.is_none() {
            self.end = Some(End { offset: self.offset });
        }
        Ok(entry)
    }

    /// Skips what is left of the content of the current entry, and its padding.
    pub fn end_entry(&mut self) -> Result<(), TarError> {
        self.skip_content().map_err(|problem| self.fail(problem))
    }

    /// After the last entry: reads up to `most` bytes of what follows. `false` at the end of the stream.
    pub fn read_trailer(&mut self, most: usize) -> Result<bool, TarError> {
        let most = u64::try_from(most).unwrap_or(u64::MAX);
        let count = io::copy(&mut self.stream.by_ref().take(most), &mut io::sink())
            .map_err(|error| self.fail(TarProblem::Read(error)))?;
        self.position += count;
        Ok(count == most)
    }

    /// Reads what is left of the stream, entries included, and tells what follows the last of them.
    pub fn finish(&mut self) -> Result<Trailer, TarError> {
        while self.next_entry()?.is_some() {}
        let offset = self.end.map_or(self.position, |end| end.offset);
        let mut has_data = false;
        let mut buffer = vec![0; BUFFER];
        loop {
            let count = match self.stream.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.fail(TarProblem::Read(error))),
            };
            self.position += count as u64;
            has_data |= buffer.iter().take(count).any(|byte| *byte != 0);
        }
        Ok(Trailer {
            offset,
            size: self.position - offset,
            has_data,
        })
    }

    fn fail(&self, problem: TarProblem) -> TarError {
        TarError::new(&self.name, self.offset, problem)
    }

    fn parse_entry(&mut self) -> Result<Option<TarEntry>, TarProblem> {
        let mut extensions = Extensions::default();
        loop {
            let Some(block) = self.read_block()? else {
                return if extensions.is_pending {
                    Err(TarProblem::Truncated("an extended header"))
                } else {
                    Ok(None)
                };
            };
            if block.is_zero() {
                if extensions.is_pending {
                    return Err(TarProblem::Truncated("an extended header"));
                }
                return match self.read_block()? {
                    Some(second) if !second.is_zero() => Err(TarProblem::LoneZeroBlock),
                    _ => Ok(None),
                };
            }
            if extensions.long_name.is_none() {
                self.name = block.name();
            }
            block.verify()?;
            push_raw(&mut extensions.raw, &block.0)?;
            extensions.is_pending = true;
            match block.kind() {
                b'x' | b'X' => {
                    let data = self.read_extension(&block, &mut extensions.raw)?;
                    extensions.local.parse(&data)?;
                }
                b'g' => {
                    let data = self.read_extension(&block, &mut extensions.raw)?;
                    Records::default().parse(&data)?;
                    self.has_globals = true;
                    // Go's reader gives it to its caller as an entry of its own: what came before it belongs to that.
                    extensions = Extensions {
                        raw: std::mem::take(&mut extensions.raw),
                        ..Extensions::default()
                    };
                }
                b'L' => {
                    let data = self.read_extension(&block, &mut extensions.raw)?;
                    let name = until_nul(&data).to_vec();
                    self.name.clone_from(&name);
                    extensions.long_name = Some(name);
                }
                b'K' => {
                    let data = self.read_extension(&block, &mut extensions.raw)?;
                    extensions.long_link = Some(until_nul(&data).to_vec());
                }
                // The label of a volume (GNU tar -V) names no file.
                b'V' => {
                    self.read_extension(&block, &mut extensions.raw)?;
                    extensions = Extensions::default();
                    self.offset = self.position;
                }
                _ => return self.assemble(&block, extensions).map(Some),
            }
        }
    }

    fn assemble(&mut self, block: &Block, mut extensions: Extensions) -> Result<TarEntry, TarProblem> {
        let records = Fields {
            local: &extensions.local,
        };
        let holes = sparse::pax(&extensions.local)?;
        let name = records
            .local
            .map
            .get(&b"GNU.sparse.name"[..])
            .filter(|name| !name.is_empty())
            .map(|name| name.to_vec())
            .or_else(|| extensions.long_name.take())
            .or_else(|| records.get(b"path").map(<[u8]>::to_vec))
            .unwrap_or_else(|| block.name());
        self.name.clone_from(&name);
        let path = EntryPath::clean(&name)?;
        let link = extensions
            .long_link
            .take()
            .or_else(|| records.get(b"linkpath").map(<[u8]>::to_vec))
            .unwrap_or_else(|| block.text(header::LINK).to_vec());
        let raw_owner = records.owner(block)?;
        let metadata = records.metadata(block, raw_owner)?;
        let raw_mode = block.number(header::MODE)?;
        let access_time = records.time(block, b"atime", header::GNU_ACCESS_TIME)?;
        let change_time = records.time(block, b"ctime", header::GNU_CHANGE_TIME)?;
        let (user_name, group_name) = records.names(block);
        let stored = records.number(b"size", "size", || block.unsigned(header::SIZE))?;
        if i64::try_from(stored).is_err() {
            return Err(TarProblem::Number("size"));
        }

        let mut map = None;
        let kind = match block.kind() {
            // Before POSIX there was no type for directories, only their names told them.
            0 if name.ends_with(b"/") => {
                if stored > 0 {
                    return Err(TarProblem::DirectoryContent);
                }
                TarKind::Directory
            }
            b'0' | b'7' | 0 => {
                self.begin(stored);
                map = self.pax_sparse(holes, stored)?;
                let size = map.as_ref().map_or(stored, |map| map.real_size);
                TarKind::Regular { size }
            }
            b'S' => {
                let (real_size, mut numbers, mut more) = sparse::old_header(block)?;
                while more {
                    let next = self.read_block()?.ok_or(TarProblem::Truncated("a sparse map"))?;
                    push_raw(&mut extensions.raw, &next.0)?;
                    more = sparse::old_extension(&next, &mut numbers)?;
                }
                self.begin(stored);
                map = Some(Map::new(&numbers, real_size, stored)?);
                TarKind::Regular { size: real_size }
            }
            b'1' => {
                let target = EntryPath::clean(&link)?;
                let raw = link.into_boxed_slice();
                TarKind::Hardlink { raw, target }
            }
            b'2' => {
                if link.is_empty() || link.len() > PATH_MAX || link.contains(&0) {
                    return Err(TarProblem::SymlinkTarget);
                }
                TarKind::Symlink(link.into_boxed_slice())
            }
            b'3' => TarKind::CharDevice(device(block)?),
            b'4' => TarKind::BlockDevice(device(block)?),
            b'5' => TarKind::Directory,
            // GNU tar's incremental directories list their names as content.
            b'D' => {
                self.begin(stored);
                TarKind::Directory
            }
            b'6' => TarKind::Fifo,
            other => return Err(TarProblem::Type(char::from(other))),
        };
        let self_contained = map.is_none() && !self.has_globals && block.kind() != b'D';
        if let Some(map) = map {
            self.holes = self.holes.saturating_add(map.holes());
            if self.holes > HOLES_MAX {
                return Err(TarProblem::TooLarge {
                    what: "holes of sparse files",
                    limit: HOLES_MAX,
                });
            }
            self.sparse = Some(Expansion {
                map,
                next: 0,
                position: 0,
            });
        }
        Ok(TarEntry {
            offset: self.offset,
            name: name.into_boxed_slice(),
            path,
            metadata,
            raw_mode,
            raw_owner,
            access_time,
            change_time,
            kind,
            user_name,
            group_name,
            raw_headers: extensions.raw,
            self_contained,
        })
    }

    /// The expansion that PAX records ask for; takes the map of format 1.0 from the content.
    fn pax_sparse(&mut self, holes: sparse::Pax, stored: u64) -> Result<Option<Map>, TarProblem> {
        match holes {
            sparse::Pax::None => Ok(None),
            sparse::Pax::Records { real_size, numbers } => Map::new(&numbers, real_size, stored).map(Some),
            sparse::Pax::InData { real_size } => {
                let mut map = DataMap::default();
                let mut taken = 0;
                loop {
                    if self.remaining < BLOCK as u64 {
                        return Err(TarProblem::Sparse("the map does not end"));
                    }
                    if taken >= EXTENSION_MAX {
                        return Err(TarProblem::TooLarge {
                            what: "a sparse map",
                            limit: EXTENSION_MAX,
                        });
                    }
                    let block = self.read_block()?.ok_or(TarProblem::Truncated("a sparse map"))?;
                    self.remaining -= BLOCK as u64;
                    taken += BLOCK as u64;
                    if map.push(&block.0)? {
                        return Map::new(&map.finish(), real_size, stored - taken).map(Some);
                    }
                }
            }
        }
    }

    /// Notes that `size` bytes of content, then padding, come next.
    fn begin(&mut self, size: u64) {
        self.remaining = size;
        self.padding = padding(size);
    }

    /// The payload of an extension, with its padding taken, both also appended to `raw`.
    fn read_extension(&mut self, block: &Block, raw: &mut Vec<u8>) -> Result<Vec<u8>, TarProblem> {
        let size: u64 = block.unsigned(header::SIZE)?;
        if size > EXTENSION_MAX {
            return Err(TarProblem::TooLarge {
                what: "an extended header",
                limit: EXTENSION_MAX,
            });
        }
        let mut data = Vec::new();
        let count = self
            .stream
            .by_ref()
            .take(size + padding(size))
            .read_to_end(&mut data);
        let count = count.map_err(TarProblem::Read)? as u64;
        self.position += count;
        if count != size + padding(size) {
            return Err(TarProblem::Truncated("an extended header"));
        }
        push_raw(raw, &data)?;
        data.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok(data)
    }

    /// One block, `None` where the stream ends exactly before it.
    fn read_block(&mut self) -> Result<Option<Block>, TarProblem> {
        let mut block = Block([0; BLOCK]);
        let mut have = 0;
        while let Some(rest) = block.0.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match self.stream.read(rest) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(TarProblem::Truncated("a header block")),
                Ok(count) => {
                    have += count;
                    self.position += count as u64;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(TarProblem::Read(error)),
            }
        }
        Ok(Some(block))
    }

    /// Skips what is left of the current content and its padding.
    fn skip_content(&mut self) -> Result<(), TarProblem> {
        self.sparse = None;
        let skip = self.remaining.saturating_add(self.padding);
        if skip == 0 {
            return Ok(());
        }
        let skipped =
            io::copy(&mut self.stream.by_ref().take(skip), &mut io::sink()).map_err(TarProblem::Read)?;
        self.position += skipped;
        // A stream may end where the padding of its last file would begin: some tools leave it out, and readers take it.
        if skipped < self.remaining {
            return Err(TarProblem::Truncated("a file's content"));
        }
        self.remaining = 0;
        self.padding = 0;
        Ok(())
    }

    /// Takes stored bytes of the current content.
    fn read_stored(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.remaining)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let Some(buffer) = buffer.get_mut(..limit).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        let count = self.stream.read(buffer)?;
        if count == 0 {
            let error = self.fail(TarProblem::Truncated("a file's content"));
            return Err(io::Error::new(ErrorKind::UnexpectedEof, error));
        }
        self.position += count as u64;
        self.remaining -= count as u64;
        Ok(count)
    }

    fn read_sparse(&mut self, mut state: Expansion, buffer: &mut [u8]) -> io::Result<usize> {
        let region = state.map.regions.get(state.next).copied();
        let (hole_end, data_end) = region.map_or((state.map.real_size, state.map.real_size), |region| {
            (region.offset, region.offset + region.size)
        });
        let end = if state.position < hole_end {
            hole_end
        } else {
            data_end
        };
        let limit = usize::try_from(end - state.position)
            .unwrap_or(usize::MAX)
            .min(buffer.len());
        let buffer = buffer.get_mut(..limit).unwrap_or_default();
        let result = if state.position < hole_end {
            buffer.fill(0);
            Ok(limit)
        } else {
            self.read_stored(buffer)
        };
        if let Ok(count) = &result {
            state.position += *count as u64;
            if region.is_some() && state.position >= data_end {
                state.next += 1;
            }
        }
        self.sparse = Some(state);
        result
    }
}

impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        match self.sparse.take() {
            Some(state) => self.read_sparse(state, buffer),
            None => self.read_stored(buffer),
        }
    }
}

/// Bytes of zeros after `size` bytes of content.
pub(super) fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

fn push_raw(raw: &mut Vec<u8>, bytes: &[u8]) -> Result<(), TarProblem> {
    if super::len64(raw) + super::len64(bytes) > HEADERS_MAX {
        return Err(TarProblem::TooLarge {
            what: "all headers of an entry",
            limit: HEADERS_MAX,
        });
    }
    raw.extend_from_slice(bytes);
    Ok(())
}

fn device(block: &Block) -> Result<Device, TarProblem> {
    if block.is_v7() {
        return Err(TarProblem::Number("device major"));
    }
    Ok(Device {
        major: block.unsigned(header::DEVICE_MAJOR)?,
        minor: block.unsigned(header::DEVICE_MINOR)?,
    })
}

/// Records over the header. An empty value stands for none.
struct Fields<'a> {
    local: &'a Records,
}

impl<'a> Fields<'a> {
    fn get(&self, key: &[u8]) -> Option<&'a [u8]> {
        let value = self.local.map.get(key)?;
        Some(value.as_ref()).filter(|value| !value.is_empty())
    }

    fn number<T: TryFrom<u64>>(
        &self,
        key: &[u8],
        name: &'static str,
        header: impl FnOnce() -> Result<T, TarProblem>,
    ) -> Result<T, TarProblem> {
        match self.get(key) {
            None => header(),
            Some(text) => pax::decimal(text)
                .and_then(|number| T::try_from(number).ok())
                .ok_or(TarProblem::Number(name)),
        }
    }

    /// Owning user and group as the headers have them.
    fn owner(&self, block: &Block) -> Result<(i64, i64), TarProblem> {
        let id = |key: &[u8], field: Field| match self.get(key) {
            None => block.number(field),
            Some(text) => pax::signed(text).ok_or(TarProblem::Number(field.name)),
        };
        Ok((id(b"uid", header::UID)?, id(b"gid", header::GID)?))
    }

    fn metadata(&self, block: &Block, (uid, gid): (i64, i64)) -> Result<Metadata, TarProblem> {
        let mode = match block.kind() {
            b'2' => i64::from(SYMLINK_MODE),
            _ => block.number(header::MODE)? & i64::from(MODE_MASK),
        };
        let (mtime, mtime_nanoseconds) = match self.get(b"mtime") {
            None => (block.number(header::MTIME)?, 0),
            Some(text) => pax::parse_time(text).ok_or(TarProblem::Number("mtime"))?,
        };
        let mut metadata = Metadata {
            mode: u16::try_from(mode).map_err(|_| TarProblem::Number("mode"))?,
            uid: layer::owner(uid).ok_or(TarProblem::Number(header::UID.name))?,
            gid: layer::owner(gid).ok_or(TarProblem::Number(header::GID.name))?,
            mtime,
            mtime_nanoseconds,
            ..Metadata::default()
        };
        self.local.xattrs(&mut metadata.xattrs)?;
        Ok(metadata)
    }

    /// A time that only some headers hold: of PAX, else of GNU tar's incremental archives.
    fn time(&self, block: &Block, key: &[u8], field: Field) -> Result<Option<(i64, u32)>, TarProblem> {
        if let Some(text) = self.get(key) {
            let time = pax::parse_time(text).ok_or(TarProblem::Number(field.name))?;
            return Ok(Some(time));
        }
        let is_there = block.is_gnu() && block.bytes(field).first() != Some(&0);
        // Go reads on without a time that is malformed; nobody needs one.
        Ok(block
            .number(field)
            .ok()
            .filter(|_| is_there)
            .map(|seconds| (seconds, 0)))
    }

    fn names(&self, block: &Block) -> (Box<[u8]>, Box<[u8]>) {
        let name = |key: &[u8], field| match self.get(key) {
            Some(name) => name.into(),
            None if block.is_v7() => Box::default(),
            None => block.text(field).into(),
        };
        (name(b"uname", header::USER), name(b"gname", header::GROUP))
    }
}
