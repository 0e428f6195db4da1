//! Where the bytes of a lazy layer lie: its compressed streams in blob order, and the files that they belong to.
//!
//! Built by the loader from a verified index; read by the planner and the decoder. Immutable but for the readahead
//! cursors.

use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use peel_image::Digest;
use peel_image::layer::{Chunk, ChunkSource, Encoding, EntryKind, LayerIndex};
use peel_image::path::EntryPath;
use peel_registry::Blob;

use crate::lock;
use crate::object::{ListId, Table};

/// First window after a miss in an image without a profile, in blob bytes: the files of a package lie side by side, and a
/// start that imports one reads many of them. Measured with `import numpy, scipy, pandas` at 500 Mbit/s and 20 ms: 127
/// requests and 46 MB in 4.1 s with 256 KiB, 66 and 57 MB in 3.3 s with 1 MiB, 49 and 71 MB in 2.6 s with 2 MiB.
const WINDOW_FIRST: u64 = 1 << 20;
/// The same in an image with a profile: what is read together was put together, and the prefetch brings it. A miss is
/// an exception then.
const WINDOW_FIRST_PROFILED: u64 = 256 << 10;
/// Largest window. At 500 Mbit/s and 20 ms, 1.25 MB take as long as the round trip that they save; a few of them keep
/// the link busy without fetching much that nobody wants.
const WINDOW_MAX: u64 = 4 << 20;
/// How many readers of one layer are told apart.
const CURSORS: usize = 16;

/// One layer of one loaded image, as a source of chunks.
#[derive(Debug)]
pub(crate) struct Layer {
    /// The image that it belongs to.
    pub(crate) image: u64,
    /// Blob digest, for messages.
    pub(crate) digest: Digest,
    /// Where the bytes come from.
    pub(crate) blob: Blob,
    /// Its files, in the order of the index. Only files of at least one byte.
    pub(crate) files: Vec<LayerFile>,
    /// Its compressed streams by ascending offset.
    pub(crate) streams: Vec<Stream>,
    /// File and chunk numbers, grouped by stream, ascending by place in the stream.
    positions: Vec<Position>,
    first_window: u64,
    cursors: Mutex<Vec<Cursor>>,
    closed: AtomicBool,
}

/// A regular file of a layer.
#[derive(Debug)]
pub(crate) struct LayerFile {
    /// Its object, as a number of the [`Table`].
    pub(crate) object: u32,
    /// Where it stands in the layer, for messages.
    pub(crate) path: EntryPath,
    /// Its chunks in file order; empty where only the whole layer can bring it.
    pub(crate) chunks: Vec<Chunk>,
    /// Which chunk list this is.
    pub(crate) list: ListId,
}

impl LayerFile {
    /// Whether some of its chunks are runs of zeros.
    pub(crate) fn has_zeros(&self) -> bool {
        self.chunks.iter().any(|chunk| chunk.source == ChunkSource::Zeros)
    }

    /// Length in bytes, by its chunks.
    pub(crate) fn size(&self) -> u64 {
        self.chunks.iter().map(|chunk| chunk.size).sum()
    }
}

/// One compressed stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Stream {
    /// Bytes of the blob.
    pub(crate) range: Range<u64>,
    /// How it is compressed.
    pub(crate) encoding: Encoding,
    positions: Range<usize>,
}

/// A chunk of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    /// Index into [`Layer::files`].
    pub(crate) file: u32,
    /// Index into [`LayerFile::chunks`].
    pub(crate) chunk: u32,
}

#[derive(Debug, Clone)]
struct Cursor {
    range: Range<u64>,
    window: u64,
}

impl Stream {
    /// A stream without chunks.
    #[cfg(test)]
    pub(crate) fn for_test(range: Range<u64>, encoding: Encoding) -> Self {
        Self {
            range,
            encoding,
            positions: 0..0,
        }
    }
}

impl Layer {
    /// Lays the files of an index out by their place in the blob. Objects that the table does not know are added to it.
    /// `profiled`: the image has prioritized files.
    pub(crate) fn new(image: u64, blob: Blob, index: &LayerIndex, profiled: bool, table: &Table) -> Self {
        let contents: Vec<_> = index
            .entries
            .iter()
            .filter_map(|entry| match &entry.kind {
                EntryKind::Regular(content) if content.size > 0 => {
                    Some((entry, content, content.digest.as_ref()?))
                }
                _ => None,
            })
            .collect();
        let numbers = table.add_all(
            contents
                .iter()
                .map(|(_, content, digest)| (*digest, content.size)),
        );
        let files: Vec<LayerFile> = contents
            .into_iter()
            .zip(numbers)
            .map(|((entry, content, _), object)| LayerFile {
                object,
                path: entry.path.clone(),
                list: ListId::of(content.size, &content.chunks),
                chunks: content.chunks.clone(),
            })
            .collect();
        let (streams, positions) = lay_out(&files, blob.size());
        Self {
            image,
            digest: blob.digest(),
            blob,
            files,
            streams,
            positions,
            first_window: if profiled {
                WINDOW_FIRST_PROFILED
            } else {
                WINDOW_FIRST
            },
            cursors: Mutex::default(),
            closed: AtomicBool::new(false),
        }
    }

    /// The chunks of a stream.
    pub(crate) fn positions(&self, stream: &Stream) -> &[Position] {
        self.positions.get(stream.positions.clone()).unwrap_or_default()
    }

    /// The chunk at a position and its file.
    pub(crate) fn chunk(&self, position: Position) -> Option<(&LayerFile, &Chunk)> {
        let file = self.files.get(position.file as usize)?;
        Some((file, file.chunks.get(position.chunk as usize)?))
    }

    /// Index of the stream that holds a chunk; `None` for a run of zeros.
    pub(crate) fn stream_of(&self, chunk: &Chunk) -> Option<usize> {
        match chunk.source {
            ChunkSource::Blob { offset, .. } => self
                .streams
                .binary_search_by_key(&offset, |stream| stream.range.start)
                .ok(),
            ChunkSource::Zeros => None,
        }
    }

    /// The streams that begin in a range of the blob.
    pub(crate) fn streams_in(&self, range: &Range<u64>) -> Range<usize> {
        let at = |offset| self.streams.partition_point(|stream| stream.range.start < offset);
        at(range.start)..at(range.end)
    }

    /// How many bytes of the blob to fetch from `offset` on, where a read found its chunk missing. Grows while the
    /// misses follow each other through the blob.
    pub(crate) fn window(&self, offset: u64) -> u64 {
        let mut cursors = lock(&self.cursors);
        let known = cursors.iter().position(|cursor| {
            offset >= cursor.range.start && offset <= cursor.range.end.saturating_add(cursor.window)
        });
        let window = match known {
            Some(position) => (cursors.remove(position).window * 2).min(WINDOW_MAX),
            None => self.first_window,
        };
        if cursors.len() >= CURSORS {
            cursors.remove(0);
        }
        cursors.push(Cursor {
            range: offset..offset.saturating_add(window),
            window,
        });
        window
    }

    /// No new fetch uses this layer from now on.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
    }

    /// Whether [`Layer::close`] was called.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

/// Groups the chunks of all files by the stream that holds them.
fn lay_out(files: &[LayerFile], blob_size: u64) -> (Vec<Stream>, Vec<Position>) {
    struct Place {
        offset: u64,
        end: u64,
        inner: u64,
        size: u64,
        encoding: Encoding,
        position: Position,
    }
    let mut places = Vec::new();
    for (file, number) in files.iter().zip(0_u32..) {
        for (chunk, index) in file.chunks.iter().zip(0_u32..) {
            let ChunkSource::Blob {
                encoding,
                offset,
                compressed_size,
                inner_offset,
            } = chunk.source
            else {
                continue;
            };
            places.push(Place {
                offset,
                end: offset.saturating_add(compressed_size).min(blob_size),
                inner: inner_offset,
                size: chunk.size,
                encoding,
                position: Position {
                    file: number,
                    chunk: index,
                },
            });
        }
    }
    places.sort_by_key(|place| (place.offset, place.inner));
    let mut streams: Vec<Stream> = Vec::new();
    let mut reach = 0_u64;
    for (place, index) in places.iter().zip(0_usize..) {
        match streams.last_mut() {
            Some(stream) if stream.range.start == place.offset => {
                stream.range.end = stream.range.end.max(place.end);
                stream.positions.end = index + 1;
                reach = reach.max(place.inner.saturating_add(place.size));
            }
            _ => {
                streams.push(Stream {
                    range: place.offset..place.end.max(place.offset),
                    encoding: place.encoding,
                    positions: index..index + 1,
                });
                reach = place.inner.saturating_add(place.size);
            }
        }
        // What lies behind the last chunk of a stream (tar headers, padding) is small; a stream that claims far more
        // of the blob than its chunks can need is cut.
        if let Some(stream) = streams.last_mut() {
            let most = reach.saturating_mul(2).saturating_add(SLACK);
            stream.range.end = stream.range.end.min(stream.range.start.saturating_add(most));
        }
    }
    (streams, places.iter().map(|place| place.position).collect())
}

/// Compressed bytes that a stream may have beyond twice its uncompressed chunks: headers, stored blocks, flushes, and the rest of the
/// last zstd block that the chunks need, which is decompressed whole and has up to 128 KiB.
const SLACK: u64 = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk(offset: u64, compressed_size: u64, inner_offset: u64, size: u64) -> Chunk {
        Chunk {
            file_offset: 0,
            size,
            digest: Digest::EMPTY,
            source: ChunkSource::Blob {
                encoding: Encoding::Gzip,
                offset,
                compressed_size,
                inner_offset,
            },
        }
    }

    fn file(chunks: Vec<Chunk>) -> LayerFile {
        LayerFile {
            object: 0,
            path: EntryPath::root(),
            list: ListId::of(1, &chunks),
            chunks,
        }
    }

    #[test]
    fn chunks_are_grouped_by_stream_in_blob_order() {
        let files = [
            file(vec![chunk(500, 100, 0, 400)]),
            file(vec![chunk(0, 500, 300, 200), chunk(600, 50, 0, 100)]),
            file(vec![chunk(0, 500, 0, 300)]),
        ];
        let (streams, positions) = lay_out(&files, 640);
        let ranges: Vec<_> = streams.iter().map(|stream| stream.range.clone()).collect();
        assert_eq!(
            ranges,
            [0..500, 500..600, 600..640],
            "the last one ends with the blob"
        );
        let first: Vec<_> = positions[streams[0].positions.clone()]
            .iter()
            .map(|position| (position.file, position.chunk))
            .collect();
        assert_eq!(first, [(2, 0), (1, 0)], "ordered by place in the stream");
    }

    #[test]
    fn a_stream_does_not_reach_far_beyond_its_chunks() {
        let (streams, _) = lay_out(&[file(vec![chunk(10, 1 << 40, 0, 100)])], u64::MAX);
        assert_eq!(streams[0].range, 10..10 + 200 + SLACK);
    }

    #[test]
    fn lying_offsets_do_not_overflow() {
        let (streams, _) = lay_out(&[file(vec![chunk(u64::MAX, u64::MAX, u64::MAX, u64::MAX)])], 100);
        assert!(streams[0].range.is_empty());
    }
}
