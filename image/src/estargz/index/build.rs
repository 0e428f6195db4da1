//! Entries to an index, one after the other: chunks join their files, and streams get their ends. Called by [`super::parts`] and
//! [`super::whole`] with the [`Record`]s of a TOC in its order.

use super::super::toc::TocError;
use super::super::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK};
use super::record::{Body, File, Piece, Record, shorten};
use super::{RECORDS_MAX, Rules};
use crate::layer::{Chunk, ChunkSource, Entry, EntryKind, FileContent, LayerIndex, Metadata};
use crate::path::EntryPath;
use peel_hash::Digest;

/// Compressed size of a chunk whose end is not known yet.
const UNKNOWN: u64 = u64::MAX;

/// Why a record cannot be part of the index.
#[derive(Debug)]
pub(super) enum Refusal {
    /// A field of the record contradicts what came before.
    Field(&'static str, String),
    /// Something else is wrong.
    Toc(TocError),
}

impl Refusal {
    /// The error about the record of this name.
    pub(super) fn about(self, name: &str) -> TocError {
        match self {
            Self::Field(field, problem) => TocError::Field {
                entry: shorten(name),
                field,
                problem,
            },
            Self::Toc(error) => error,
        }
    }
}

pub(super) struct Builder {
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

impl Builder {
    pub(super) fn new(rules: &Rules) -> Self {
        Self {
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
        }
    }

    /// Takes the next record.
    pub(super) fn add(&mut self, record: Record) -> Result<(), Refusal> {
        self.records += record.count();
        if self.records > RECORDS_MAX {
            return Err(Refusal::Toc(TocError::TooMany(RECORDS_MAX)));
        }
        let Record { path, body } = record;
        match body {
            Body::Chunk(piece) => {
                if self.file.as_ref().is_none_or(|file| file.path != path) {
                    return Err(refusal("type", "a chunk that does not follow its file"));
                }
                self.take_chunk(&piece)
            }
            Body::File(file) => {
                self.close_file()?;
                self.open_file(path, file)
            }
            Body::Node(metadata, kind) => {
                self.close_file()?;
                self.index.entries.push(Entry { path, metadata, kind });
                Ok(())
            }
        }
    }

    fn open_file(&mut self, path: EntryPath, file: File) -> Result<(), Refusal> {
        let File {
            metadata,
            size,
            digest,
            piece,
            end_offset,
        } = file;
        let Some(piece) = piece else {
            self.file = Some(OpenFile::new(path, metadata, FileContent::empty()));
            return Ok(());
        };
        if self.rules.landmarks
            && path.as_bytes() == PREFETCH_LANDMARK.as_bytes()
            && self.index.prefetch_end.is_none()
        {
            self.index.prefetch_end = Some(piece.offset);
        }
        let payload_end = self.rules.payload_end;
        if end_offset > payload_end {
            let problem = format!("{end_offset} is behind the end of the payload at {payload_end}");
            return Err(refusal("endOffset", problem));
        }
        let content = FileContent {
            size,
            digest,
            // One is all that most files have.
            chunks: Vec::with_capacity(1),
        };
        self.file = Some(OpenFile {
            end_offset,
            ..OpenFile::new(path, metadata, content)
        });
        self.take_chunk(&piece)
    }

    /// Adds a chunk to the open file.
    fn take_chunk(&mut self, piece: &Piece) -> Result<(), Refusal> {
        let Some(file) = self.file.as_mut() else {
            return Err(refusal("type", "a chunk without a file"));
        };
        let file_offset = piece.file_offset;
        if file_offset != file.covered {
            let expected = file.covered;
            let problem = format!("the chunk starts at {file_offset}; the one before ends at {expected}");
            return Err(refusal("chunkOffset", problem));
        }
        let rest = file.content.size - file.covered;
        let size = match piece.size {
            0 => rest,
            size => size,
        };
        if size > rest || size == 0 {
            let file_size = file.content.size;
            let problem = format!("a chunk of {size} bytes at {file_offset} of a file of {file_size} bytes");
            return Err(refusal("chunkSize", problem));
        }
        let digest = if size == file.content.size {
            match (file.content.digest, piece.digest) {
                (Some(whole), Some(chunk)) if whole != chunk => {
                    return Err(refusal(
                        "chunkDigest",
                        "the only chunk has another digest than the file",
                    ));
                }
                (whole, chunk) => {
                    file.content.digest = whole.or(chunk);
                    file.content.digest
                }
            }
        } else {
            piece.digest
        };
        // What a run of zeros holds needs no digest.
        file.verifiable &= digest.is_some() || piece.zeros;
        file.covered += size;
        if self.rules.any_order {
            file.end_last_chunk(piece.offset);
        }
        let source = if piece.zeros {
            ChunkSource::Zeros
        } else {
            ChunkSource::Blob {
                encoding: self.rules.encoding,
                offset: piece.offset,
                compressed_size: UNKNOWN,
                inner_offset: piece.inner_offset,
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
        if piece.zeros {
            return Ok(());
        }
        if self.rules.any_order {
            self.check_place(piece.offset, piece.inner_offset, size)?;
            self.starts.push(piece.offset);
        } else {
            self.place(piece.offset, piece.inner_offset, size)?;
            self.sharing.push(position);
        }
        Ok(())
    }

    /// Checks that a chunk begins in the payload. Returns where it ends in its stream.
    fn check_place(&self, offset: u64, inner: u64, size: u64) -> Result<u64, Refusal> {
        if offset >= self.rules.payload_end {
            let problem = format!(
                "{offset} is not before the end of the payload at {}",
                self.rules.payload_end
            );
            return Err(refusal("offset", problem));
        }
        inner
            .checked_add(size)
            .ok_or_else(|| refusal("innerOffset", "out of range"))
    }

    /// Checks that a chunk comes after all before it, in the same stream or in a later one.
    fn place(&mut self, offset: u64, inner: u64, size: u64) -> Result<(), Refusal> {
        let inner_end = self.check_place(offset, inner, size)?;
        match self.stream {
            Some(before) if offset < before.offset => {
                let problem = format!("{offset} runs back behind the chunk before, at {}", before.offset);
                return Err(refusal("offset", problem));
            }
            Some(before) if offset == before.offset && inner < before.inner_end => {
                let problem = format!(
                    "the chunk overlaps the one before, which ends at {} of the same stream",
                    before.inner_end
                );
                return Err(refusal("innerOffset", problem));
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
    fn close_file(&mut self) -> Result<(), Refusal> {
        let Some(mut file) = self.file.take() else {
            return Ok(());
        };
        let (covered, size) = (file.covered, file.content.size);
        if covered != size {
            return Err(Refusal::Toc(TocError::Field {
                entry: shorten(&String::from_utf8_lossy(file.path.as_bytes())),
                field: "chunkSize",
                problem: format!("the chunks cover {covered} of {size} bytes"),
            }));
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

    /// The index of all records.
    pub(super) fn finish(mut self) -> Result<LayerIndex, TocError> {
        self.close_file().map_err(|refusal| refusal.about(""))?;
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

fn refusal(field: &'static str, problem: impl Into<String>) -> Refusal {
    Refusal::Field(field, problem.into())
}
