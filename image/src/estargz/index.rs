//! The meaning of a TOC: JSON to [`LayerIndex`], with everything checked that can be checked before a byte is fetched.
//!
//! [`crate::lazy`] and [`crate::zstd_chunked`] call this after the TOC's digest was compared; both formats have the same JSON but
//! for some fields, and [`Rules`] says what else differs. What holds afterwards: every path is clean, the
//! chunks of every file cover it from 0 to its size without gaps, every stream lies inside the payload, streams follow
//! one another and chunks in one stream do not overlap (unless the rules allow it), and the chunk of a single-chunk file has the
//! file's digest. No name holds U+FFFD: JSON has no bytes that are not UTF-8, so that character stands for a name which
//! the TOC cannot tell.

use std::collections::BTreeMap;
use std::fmt;

use base64::Engine as _;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::toc::{TocEntry, TocError};
use super::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_JSON_MAX, time};
use crate::digest::Digest;
use crate::layer::{
    Chunk, ChunkSource, Device, Encoding, Entry, EntryKind, FileContent, LayerIndex, MODE_MASK, Metadata,
    Xattrs,
};
use crate::path::{EntryPath, PATH_MAX};
use crate::tar::{XATTR_NAME_MAX, XATTR_VALUE_MAX};

/// Most entries, chunks and extended attributes of one layer, counted together. The largest layers of public images have a
/// few hundred thousand; each costs a reader some hundred bytes of memory, whatever the length of its JSON.
pub const RECORDS_MAX: usize = 2_000_000;

/// 0001-01-01T00:00:00Z in seconds since the epoch.
const GO_ZERO_TIME: i64 = -62_135_596_800;
/// Compressed size of a chunk whose end is not known yet.
const UNKNOWN: u64 = u64::MAX;
/// A run of zeros as `chunkType`.
const ZEROS: &str = "zeros";

/// Reads a TOC. `payload_end` is where the files' bytes end in the blob ([`super::TocLocation::payload_end`]).
///
/// The landmarks are left out of the entries; a file whose chunks cannot be verified one by one (several chunks, but no
/// digests of them) is listed without chunks.
pub fn read_index(json: &[u8], payload_end: u64) -> Result<LayerIndex, TocError> {
    read_index_by(
        json,
        &Rules {
            encoding: Encoding::Gzip,
            payload_end,
            landmarks: true,
            any_order: false,
        },
    )
}

/// What a format allows in its TOC.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// How the chunks are compressed.
    pub(crate) encoding: Encoding,
    /// Where the files' bytes end in the blob.
    pub(crate) payload_end: u64,
    /// Whether files with the names of landmarks are landmarks and no files.
    pub(crate) landmarks: bool,
    /// Whether files may lie in the blob in another order than in the TOC, and share bytes.
    pub(crate) any_order: bool,
}

/// As [`read_index`], by the rules of a format.
pub(crate) fn read_index_by(json: &[u8], rules: &Rules) -> Result<LayerIndex, TocError> {
    let length = u64::try_from(json.len()).unwrap_or(u64::MAX);
    if length > TOC_JSON_MAX {
        return Err(TocError::TooLarge(length));
    }
    let mut builder = Builder {
        index: LayerIndex {
            entries: Vec::new(),
            prefetch_end: None,
        },
        rules: *rules,
        records: 0,
        file: None,
        stream: None,
        sharing: Vec::new(),
        starts: Vec::new(),
        error: None,
    };
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let outcome = Top(&mut builder)
        .deserialize(&mut deserializer)
        .and_then(|()| deserializer.end());
    match (outcome, builder.error.take()) {
        (_, Some(error)) => Err(error),
        (Err(error), None) => Err(error.into()),
        (Ok(()), None) => builder.finish(),
    }
}

/// The TOC's outermost object. Entries go to the builder one by one, so that memory follows what is kept of them.
struct Top<'b>(&'b mut Builder);

impl<'de> DeserializeSeed<'de> for Top<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Top<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a TOC object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let mut seen = false;
        while let Some(key) = map.next_key::<std::borrow::Cow<'de, str>>()? {
            if key == "entries" {
                if std::mem::replace(&mut seen, true) {
                    return Err(serde::de::Error::duplicate_field("entries"));
                }
                map.next_value_seed(Entries(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        if seen {
            Ok(())
        } else {
            Err(serde::de::Error::missing_field("entries"))
        }
    }
}

struct Entries<'b>(&'b mut Builder);

impl<'de> DeserializeSeed<'de> for Entries<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of TOC entries")
    }

    // Go writes an empty list as null.
    fn visit_unit<E: serde::de::Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut sequence: A) -> Result<(), A::Error> {
        while let Some(entry) = sequence.next_element::<TocEntry<'de>>()? {
            if let Err(error) = self.0.add(&entry) {
                self.0.error = Some(error);
                return Err(serde::de::Error::custom("refused"));
            }
        }
        Ok(())
    }
}

struct Builder {
    index: LayerIndex,
    rules: Rules,
    records: usize,
    /// The regular file whose chunks are being read; it is not in the index yet.
    file: Option<OpenFile>,
    /// The stream of the chunk before.
    stream: Option<Stream>,
    /// The chunks in that stream, as (entry, chunk): their compressed size is known when the next stream starts.
    sharing: Vec<(usize, usize)>,
    /// With any order: where chunks begin in the blob.
    starts: Vec<u64>,
    error: Option<TocError>,
}

struct OpenFile {
    path: EntryPath,
    metadata: Metadata,
    content: FileContent,
    /// First byte that no chunk covers yet.
    covered: u64,
    /// Whether all chunks so far have digests.
    verifiable: bool,
    /// Where in the blob the file's bytes end; 0 if the TOC does not say.
    end_offset: u64,
}

#[derive(Clone, Copy)]
struct Stream {
    offset: u64,
    /// Where the last chunk in it ends, uncompressed.
    inner_end: u64,
}

/// An entry and the making of errors about it.
struct Fields<'e>(&'e TocEntry<'e>);

impl Fields<'_> {
    fn error(&self, field: &'static str, problem: impl Into<String>) -> TocError {
        TocError::Field {
            entry: shorten(&self.0.name),
            field,
            problem: problem.into(),
        }
    }

    fn number<T: TryFrom<i64>>(&self, field: &'static str, number: i64) -> Result<T, TocError> {
        T::try_from(number).map_err(|_| self.error(field, format!("{number} is out of range")))
    }

    fn path(&self, field: &'static str, name: &str) -> Result<EntryPath, TocError> {
        self.exact(field, name)?;
        EntryPath::clean(name.as_bytes()).map_err(|source| TocError::Name {
            entry: shorten(&self.0.name),
            field,
            source,
        })
    }

    /// Whether the JSON can have told the name as it is in the tar stream.
    fn exact(&self, field: &'static str, name: &str) -> Result<(), TocError> {
        if name.contains(char::REPLACEMENT_CHARACTER) {
            return Err(self.error(
                field,
                "the name is not UTF-8 and was replaced when the TOC was written",
            ));
        }
        Ok(())
    }

    fn digest(&self, field: &'static str, text: &str) -> Result<Option<Digest>, TocError> {
        if text.is_empty() {
            return Ok(None);
        }
        text.parse()
            .map(Some)
            .map_err(|error: crate::digest::DigestError| self.error(field, error.to_string()))
    }

    fn metadata(&self) -> Result<Metadata, TocError> {
        let entry = self.0;
        let mode: u64 = self.number("mode", entry.mode)?;
        let (mtime, mtime_nanoseconds) = if entry.modtime.is_empty() {
            (0, 0)
        } else {
            time::parse(&entry.modtime).ok_or_else(|| {
                self.error(
                    "modtime",
                    format!("{:?} is no RFC 3339 time", shorten(&entry.modtime)),
                )
            })?
        };
        // What Go makes of a time that nobody set.
        let mtime = if mtime == GO_ZERO_TIME { 0 } else { mtime };
        Ok(Metadata {
            // Some builders leave the file type in; the entry's type says it already.
            mode: u16::try_from(mode & u64::from(MODE_MASK)).unwrap_or(0),
            uid: self.number("uid", entry.uid)?,
            gid: self.number("gid", entry.gid)?,
            mtime,
            mtime_nanoseconds,
            xattrs: entry
                .xattrs
                .as_ref()
                .map_or(Ok(Xattrs::new()), |xattrs| self.xattrs(xattrs))?,
        })
    }

    fn xattrs(&self, xattrs: &BTreeMap<String, String>) -> Result<Xattrs, TocError> {
        xattrs
            .iter()
            .map(|(name, value)| {
                let problem = |what: &str| self.error("xattrs", format!("{:?} {what}", shorten(name)));
                if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains('\0') {
                    return Err(problem("is no name of an extended attribute"));
                }
                let value = base64::engine::general_purpose::STANDARD
                    .decode(value)
                    .map_err(|_| problem("has a value that is not base64"))?;
                if value.len() > XATTR_VALUE_MAX {
                    return Err(problem("has a value that is too long"));
                }
                Ok((name.as_bytes().into(), value.into_boxed_slice()))
            })
            .collect()
    }

    fn device(&self) -> Result<Device, TocError> {
        Ok(Device {
            major: self.number("devMajor", self.0.dev_major)?,
            minor: self.number("devMinor", self.0.dev_minor)?,
        })
    }

    fn symlink(&self) -> Result<EntryKind, TocError> {
        self.exact("linkName", &self.0.link_name)?;
        let target = self.0.link_name.as_bytes();
        if target.is_empty() || target.len() > PATH_MAX || target.contains(&0) {
            return Err(self.error("linkName", "the target is empty, too long, or holds a NUL byte"));
        }
        Ok(EntryKind::Symlink(target.into()))
    }

    fn hardlink(&self) -> Result<EntryKind, TocError> {
        if self.0.link_name.is_empty() {
            return Err(self.error("linkName", "a hard link without a target"));
        }
        self.path("linkName", &self.0.link_name).map(EntryKind::Hardlink)
    }
}

impl Builder {
    fn add(&mut self, entry: &TocEntry<'_>) -> Result<(), TocError> {
        self.records += 1 + entry.xattrs.as_ref().map_or(0, BTreeMap::len);
        if self.records > RECORDS_MAX {
            return Err(TocError::TooMany(RECORDS_MAX));
        }
        let fields = Fields(entry);
        let path = fields.path("name", &entry.name)?;
        if entry.kind == "chunk" {
            return self.add_chunk(&fields, &path);
        }
        self.close_file()?;
        if entry.kind == "reg" {
            return self.open_file(&fields, path);
        }
        let kind = match &*entry.kind {
            "dir" => EntryKind::Directory,
            "symlink" => fields.symlink()?,
            "hardlink" => fields.hardlink()?,
            "char" => EntryKind::CharDevice(fields.device()?),
            "block" => EntryKind::BlockDevice(fields.device()?),
            "fifo" => EntryKind::Fifo,
            other => return Err(fields.error("type", format!("{:?} is unknown", shorten(other)))),
        };
        let metadata = fields.metadata()?;
        self.index.entries.push(Entry { path, metadata, kind });
        Ok(())
    }

    fn open_file(&mut self, fields: &Fields<'_>, path: EntryPath) -> Result<(), TocError> {
        let entry = fields.0;
        let metadata = fields.metadata()?;
        let size: u64 = fields.number("size", entry.size)?;
        let digest = fields.digest("digest", &entry.digest)?;
        if size == 0 {
            if digest.is_some_and(|digest| digest != Digest::EMPTY) {
                return Err(fields.error("digest", "an empty file has another digest"));
            }
            self.file = Some(OpenFile::new(path, metadata, FileContent::empty()));
            return Ok(());
        }
        let content = FileContent {
            size,
            digest,
            chunks: Vec::new(),
        };
        if entry.chunk_offset != 0 {
            return Err(fields.error("chunkOffset", "a file must start with its first chunk"));
        }
        if self.rules.landmarks
            && path.as_bytes() == PREFETCH_LANDMARK.as_bytes()
            && self.index.prefetch_end.is_none()
        {
            self.index.prefetch_end = Some(fields.number("offset", entry.offset)?);
        }
        let end_offset: u64 = fields.number("endOffset", entry.end_offset)?;
        if end_offset > self.rules.payload_end {
            let problem = format!(
                "{end_offset} is behind the end of the payload at {}",
                self.rules.payload_end
            );
            return Err(fields.error("endOffset", problem));
        }
        self.file = Some(OpenFile {
            end_offset,
            ..OpenFile::new(path, metadata, content)
        });
        self.take_chunk(fields)
    }

    fn add_chunk(&mut self, fields: &Fields<'_>, path: &EntryPath) -> Result<(), TocError> {
        if self.file.as_ref().is_none_or(|file| file.path != *path) {
            return Err(fields.error("type", "a chunk that does not follow its file"));
        }
        self.take_chunk(fields)
    }

    /// Adds the chunk that `fields` describe to the open file.
    fn take_chunk(&mut self, fields: &Fields<'_>) -> Result<(), TocError> {
        let entry = fields.0;
        let Some(file) = self.file.as_mut() else {
            return Err(fields.error("type", "a chunk without a file"));
        };
        let file_offset: u64 = fields.number("chunkOffset", entry.chunk_offset)?;
        if file_offset != file.covered {
            let expected = file.covered;
            let problem = format!("the chunk starts at {file_offset}; the one before ends at {expected}");
            return Err(fields.error("chunkOffset", problem));
        }
        let rest = file.content.size - file.covered;
        let size = match fields.number::<u64>("chunkSize", entry.chunk_size)? {
            0 => rest,
            size => size,
        };
        if size > rest || size == 0 {
            let file_size = file.content.size;
            let problem = format!("a chunk of {size} bytes at {file_offset} of a file of {file_size} bytes");
            return Err(fields.error("chunkSize", problem));
        }
        let stated = if file.covered == 0 && entry.chunk_digest == entry.digest {
            // The usual case, a file of one chunk; nothing is gained by parsing the text twice.
            file.content.digest
        } else {
            fields.digest("chunkDigest", &entry.chunk_digest)?
        };
        let digest = if size == file.content.size {
            match (file.content.digest, stated) {
                (Some(whole), Some(chunk)) if whole != chunk => {
                    return Err(
                        fields.error("chunkDigest", "the only chunk has another digest than the file")
                    );
                }
                (whole, chunk) => {
                    file.content.digest = whole.or(chunk);
                    file.content.digest
                }
            }
        } else {
            stated
        };
        let zeros = match &*entry.chunk_type {
            "" => false,
            ZEROS => true,
            other => {
                return Err(fields.error("chunkType", format!("{:?} is unknown", shorten(other))));
            }
        };
        // What a run of zeros holds needs no digest.
        file.verifiable &= digest.is_some() || zeros;
        file.covered += size;
        let offset: u64 = fields.number("offset", entry.offset)?;
        let inner_offset = fields.number("innerOffset", entry.inner_offset)?;
        if self.rules.any_order {
            file.end_last_chunk(offset);
        }
        let source = if zeros {
            ChunkSource::Zeros
        } else {
            ChunkSource::Blob {
                encoding: self.rules.encoding,
                offset,
                compressed_size: UNKNOWN,
                inner_offset,
            }
        };
        let chunk = Chunk {
            file_offset,
            size,
            digest: digest.unwrap_or(Digest::EMPTY),
            source,
        };
        let position = (self.index.entries.len(), file.content.chunks.len());
        file.content.chunks.push(chunk);
        if zeros {
            return Ok(());
        }
        if self.rules.any_order {
            self.check_place(fields, offset, inner_offset, size)?;
            self.starts.push(offset);
        } else {
            self.place(fields, offset, inner_offset, size)?;
            self.sharing.push(position);
        }
        Ok(())
    }

    /// Checks that a chunk begins in the payload. Returns where it ends in its stream.
    fn check_place(&self, fields: &Fields<'_>, offset: u64, inner: u64, size: u64) -> Result<u64, TocError> {
        if offset >= self.rules.payload_end {
            let problem = format!(
                "{offset} is not before the end of the payload at {}",
                self.rules.payload_end
            );
            return Err(fields.error("offset", problem));
        }
        inner
            .checked_add(size)
            .ok_or_else(|| fields.error("innerOffset", "out of range"))
    }

    /// Checks that a chunk comes after all before it, in the same stream or in a later one.
    fn place(&mut self, fields: &Fields<'_>, offset: u64, inner: u64, size: u64) -> Result<(), TocError> {
        let inner_end = self.check_place(fields, offset, inner, size)?;
        match self.stream {
            Some(before) if offset < before.offset => {
                let problem = format!("{offset} runs back behind the chunk before, at {}", before.offset);
                return Err(fields.error("offset", problem));
            }
            Some(before) if offset == before.offset && inner < before.inner_end => {
                let problem = format!(
                    "the chunk overlaps the one before, which ends at {} of the same stream",
                    before.inner_end
                );
                return Err(fields.error("innerOffset", problem));
            }
            Some(before) if offset > before.offset => self.close_stream(before, offset),
            _ => {}
        }
        self.stream = Some(Stream { offset, inner_end });
        Ok(())
    }

    /// Gives the chunks of a stream their compressed size, now that its end is known.
    fn close_stream(&mut self, stream: Stream, end: u64) {
        let next_entry = self.index.entries.len();
        for (entry, chunk) in self.sharing.drain(..) {
            let content = if entry == next_entry {
                self.file.as_mut().map(|file| &mut file.content)
            } else {
                self.index
                    .entries
                    .get_mut(entry)
                    .and_then(|entry| match &mut entry.kind {
                        EntryKind::Regular(content) => Some(content),
                        _ => None,
                    })
            };
            let chunk = content.and_then(|content| content.chunks.get_mut(chunk));
            if let Some(Chunk {
                source: ChunkSource::Blob { compressed_size, .. },
                ..
            }) = chunk
            {
                *compressed_size = end - stream.offset;
            }
        }
    }

    /// Moves the open file to the index.
    fn close_file(&mut self) -> Result<(), TocError> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        let (covered, size) = (file.covered, file.content.size);
        if covered != size {
            return Err(TocError::Field {
                entry: shorten(&String::from_utf8_lossy(file.path.as_bytes())),
                field: "chunkSize",
                problem: format!("the chunks cover {covered} of {size} bytes"),
            });
        }
        let listed = !(self.rules.landmarks && is_landmark(&file.path));
        if self.rules.any_order {
            file.end_last_chunk(file.end_offset);
        }
        file.join_zeros();
        if !listed || !file.verifiable {
            // Its chunks, the last ones of the stream so far, are not kept: nothing may refer to them.
            let place = self.index.entries.len();
            while self.sharing.pop_if(|(entry, _)| *entry == place).is_some() {}
            file.content.chunks.clear();
        }
        if !listed {
            return Ok(());
        }
        file.content.chunks.shrink_to_fit();
        self.index.entries.push(Entry {
            path: file.path,
            metadata: file.metadata,
            kind: EntryKind::Regular(file.content),
        });
        Ok(())
    }

    fn finish(mut self) -> Result<LayerIndex, TocError> {
        self.close_file()?;
        if let Some(stream) = self.stream {
            self.close_stream(stream, self.rules.payload_end);
        }
        if self.rules.any_order {
            self.end_streams()?;
        }
        Ok(self.index)
    }

    /// Ends every chunk where the next stream of the blob begins, if nothing said where it ends. What was said must not reach
    /// into the bytes of others.
    fn end_streams(&mut self) -> Result<(), TocError> {
        let starts = &mut self.starts;
        if !starts.is_sorted() {
            starts.sort_unstable();
        }
        let payload_end = self.rules.payload_end;
        let mut at = 0;
        for entry in &mut self.index.entries {
            let EntryKind::Regular(content) = &mut entry.kind else {
                continue;
            };
            for chunk in &mut content.chunks {
                let ChunkSource::Blob {
                    offset,
                    compressed_size,
                    ..
                } = &mut chunk.source
                else {
                    continue;
                };
                let behind = |at: usize| starts.get(at).is_none_or(|start| *start > *offset);
                let first_behind = |at: usize| behind(at) && at.checked_sub(1).is_some_and(|at| !behind(at));
                // Nearly always the next one.
                if first_behind(at + 1) {
                    at += 1;
                } else if !first_behind(at) {
                    at = starts.partition_point(|start| *start <= *offset);
                }
                let next = starts.get(at).copied().unwrap_or(payload_end);
                if *compressed_size == UNKNOWN {
                    *compressed_size = next - *offset;
                    continue;
                }
                match offset.saturating_add(*compressed_size) {
                    end if end > next => {
                        return Err(TocError::Field {
                            entry: shorten(&String::from_utf8_lossy(entry.path.as_bytes())),
                            field: "endOffset",
                            problem: format!("the bytes from {offset} to {end} reach into those at {next}"),
                        });
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

impl OpenFile {
    fn new(path: EntryPath, metadata: Metadata, content: FileContent) -> Self {
        Self {
            path,
            metadata,
            content,
            covered: 0,
            verifiable: true,
            end_offset: 0,
        }
    }

    /// The last chunk so far ends at `end`, if it begins before it. 0 stands for a place that the TOC does not tell.
    fn end_last_chunk(&mut self, end: u64) {
        if let Some(ChunkSource::Blob {
            offset,
            compressed_size,
            ..
        }) = self.content.chunks.last_mut().map(|chunk| &mut chunk.source)
            && end > *offset
        {
            *compressed_size = end - *offset;
        }
    }

    /// A file of nothing but zeros has one chunk: its digest is then that of the file, which can be checked.
    fn join_zeros(&mut self) {
        let zeros = |chunk: &Chunk| matches!(chunk.source, ChunkSource::Zeros);
        if let (Some(digest), true) = (self.content.digest, self.content.chunks.iter().all(zeros))
            && self.content.size > 0
        {
            self.content.chunks = vec![Chunk {
                file_offset: 0,
                size: self.content.size,
                digest,
                source: ChunkSource::Zeros,
            }];
        }
    }
}

fn is_landmark(path: &EntryPath) -> bool {
    [PREFETCH_LANDMARK, NO_PREFETCH_LANDMARK]
        .iter()
        .any(|name| path.as_bytes() == name.as_bytes())
}

/// Keeps a message readable when a name is hostile.
fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}

#[cfg(test)]
mod tests;
