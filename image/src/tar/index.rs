//! Walks a whole plain layer: metadata into a [`LayerIndex`], contents into a sink.
//! Called where a layer cannot be lazy and is pulled whole.

use std::io::{self, Read};

use super::{Reader, TarEntry, TarError, TarKind, TarProblem, Trailer, len64};
use crate::layer::{Entry, EntryKind, FileContent, LayerIndex, XATTR_COST};
use crate::path::EntryPath;
use peel_hash::{Digest, Hasher};

/// Most entries of a layer. The largest images known have some hundred thousand; ten million entries of metadata still
/// fit into memory.
pub const ENTRIES_MAX: u64 = 10_000_000;
/// Most bytes of memory of all entries of a layer together: names, link targets and extended attributes, and what each of these takes
/// beside its bytes.
pub const METADATA_MAX: u64 = 2 << 30;
/// Bytes that are handed to the sink at once, at most.
const PIECE: usize = 128 << 10;

/// Takes the contents of a layer's regular files while they pass. Empty files are not announced to it.
pub trait FileSink {
    /// A file of `size` bytes begins; `size` is never 0.
    fn begin(&mut self, path: &EntryPath, size: u64) -> io::Result<()>;
    /// The next bytes of the file.
    fn write(&mut self, data: &[u8]) -> io::Result<()>;
    /// The file is complete; returns the sha256 of its content.
    fn finish(&mut self) -> io::Result<Digest>;
}

/// A sink that only hashes.
#[derive(Debug, Default)]
pub struct HashSink(Hasher);

impl FileSink for HashSink {
    fn begin(&mut self, _path: &EntryPath, _size: u64) -> io::Result<()> {
        self.0 = Hasher::new();
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.0.update(data);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<Digest> {
        Ok(std::mem::take(&mut self.0).finish())
    }
}

/// How much of a layer's metadata is kept in memory.
struct Limits {
    entries: u64,
    metadata: u64,
}

/// Reads an uncompressed layer to its last byte (so that a hash taken below covers all of it). Every regular file of the
/// index has its size and digest and no chunks.
pub fn index_tar<R: Read>(stream: R, sink: &mut dyn FileSink) -> Result<(LayerIndex, Trailer), TarError> {
    let limits = Limits {
        entries: ENTRIES_MAX,
        metadata: METADATA_MAX,
    };
    index_within(stream, sink, &limits)
}

fn index_within<R: Read>(
    stream: R,
    sink: &mut dyn FileSink,
    limits: &Limits,
) -> Result<(LayerIndex, Trailer), TarError> {
    let mut reader = Reader::new(stream);
    let mut buffer = vec![0; PIECE];
    let mut entries = Vec::new();
    let mut metadata = 0_u64;
    while let Some(tar) = reader.next_entry()? {
        let fail = |problem| TarError::new(&tar.name, tar.offset, problem);
        if len64_of(&entries) >= limits.entries {
            return Err(fail(TarProblem::TooManyEntries(limits.entries)));
        }
        metadata = metadata.saturating_add(weight(&tar));
        if metadata > limits.metadata {
            return Err(fail(TarProblem::TooLarge {
                what: "the metadata of all entries",
                limit: limits.metadata,
            }));
        }
        let kind = match &tar.kind {
            TarKind::Regular { size: 0 } => EntryKind::Regular(FileContent::empty()),
            TarKind::Regular { size } => {
                let digest = copy(&mut reader, &tar, *size, sink, &mut buffer)?;
                EntryKind::Regular(FileContent {
                    size: *size,
                    digest: Some(digest),
                    chunks: Vec::new(),
                })
            }
            TarKind::Directory => EntryKind::Directory,
            TarKind::Symlink(target) => EntryKind::Symlink(target.clone()),
            TarKind::Hardlink { target, .. } => EntryKind::Hardlink(target.clone()),
            TarKind::CharDevice(device) => EntryKind::CharDevice(*device),
            TarKind::BlockDevice(device) => EntryKind::BlockDevice(*device),
            TarKind::Fifo => EntryKind::Fifo,
        };
        entries.push(Entry {
            path: tar.path,
            metadata: tar.metadata,
            kind,
        });
    }
    let trailer = reader.finish()?;
    let index = LayerIndex {
        entries,
        prefetch_end: None,
    };
    Ok((index, trailer))
}

fn len64_of(entries: &[Entry]) -> u64 {
    u64::try_from(entries.len()).unwrap_or(u64::MAX)
}

/// Bytes that an entry keeps in memory.
fn weight(entry: &TarEntry) -> u64 {
    let link = match &entry.kind {
        TarKind::Symlink(target) => len64(target),
        TarKind::Hardlink { target, .. } => len64(target.as_bytes()),
        _ => 0,
    };
    let xattrs = entry.metadata.xattrs.iter();
    let xattrs: u64 = xattrs
        .map(|(name, value)| XATTR_COST + len64(name) + len64(value))
        .sum();
    size_of::<Entry>() as u64 + len64(entry.path.as_bytes()) + link + xattrs
}

/// Hands the current content of `reader` to the sink.
fn copy<R: Read>(
    reader: &mut Reader<R>,
    entry: &TarEntry,
    size: u64,
    sink: &mut dyn FileSink,
    buffer: &mut [u8],
) -> Result<Digest, TarError> {
    let write = |error| TarError::new(&entry.name, entry.offset, TarProblem::Write(error));
    sink.begin(&entry.path, size).map_err(write)?;
    loop {
        let count = match reader.read(buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                // The reader wraps its own errors to pass them through `Read`.
                return Err(error.downcast::<TarError>().unwrap_or_else(|error| {
                    TarError::new(&entry.name, entry.offset, TarProblem::Read(error))
                }));
            }
        };
        sink.write(buffer.get(..count).unwrap_or_default())
            .map_err(write)?;
    }
    sink.finish().map_err(write)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Metadata;
    use crate::tar::write::{NewEntry, Writer};

    /// A stream of these names, each with an attribute of ten bytes.
    fn stream(names: &[&str]) -> Vec<u8> {
        let xattr = (b"user.x".as_slice().into(), b"1234".as_slice().into());
        let metadata = Metadata {
            xattrs: [xattr].into_iter().collect(),
            ..Metadata::default()
        };
        let mut writer = Writer::new(Vec::new());
        for name in names {
            let entry = NewEntry {
                name: name.as_bytes(),
                metadata: &metadata,
                kind: &TarKind::Fifo,
                user_name: b"",
                group_name: b"",
            };
            writer.append(&entry, &mut io::empty()).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn more_entries_or_metadata_than_fit_into_memory_are_refused() {
        let stream = stream(&["a", "bb", "ccc"]);
        let read = |entries, metadata| {
            let limits = Limits { entries, metadata };
            index_within(stream.as_slice(), &mut HashSink::default(), &limits)
        };
        // Their names have six bytes.
        let most = 3 * (size_of::<Entry>() as u64 + XATTR_COST + 10) + 6;
        assert_eq!(read(3, most).unwrap().0.entries.len(), 3);
        let less = most - 1;
        for (entries, metadata, expected) in [
            (
                2,
                most,
                "tar entry \"ccc\" at byte 3072: more than 2 entries".to_owned(),
            ),
            (
                0,
                most,
                "tar entry \"a\" at byte 0: more than 0 entries".to_owned(),
            ),
            (
                3,
                less,
                format!(
                    "tar entry \"ccc\" at byte 3072: the metadata of all entries of more than {less} bytes"
                ),
            ),
        ] {
            let error = read(entries, metadata).unwrap_err();
            assert_eq!(error.to_string(), expected);
        }
    }
}
