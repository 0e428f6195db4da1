//! Layers looked at where they are: which format a blob has, whether it can be served lazily, and single files of it. No
//! store and no server: `inspect`, `ls`, `cat` and `convert` use this.

use std::io::{self, Read};

use bytes::Bytes;
use oci_spec::image::Descriptor;
use peel_image::layer::{Chunk, ChunkSource, LayerIndex};
use peel_image::lazy::{CHUNK_MAX, Candidate, STREAM_MAX};
use peel_image::tar::TarError;
use peel_image::{Digest, compression};
use peel_registry::{Blob, ByteStream, TocBytes, TocImage, fetch_toc};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

pub use peel_image::lazy::{Format, NotLazy, Origin, TocState};

/// Pieces of a stream that wait for their reader; a piece has at most some hundred KiB.
const PIECES: usize = 16;

/// Why a layer, or a chunk of it, cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The bytes do not come.
    #[error(transparent)]
    Registry(#[from] peel_registry::Error),
    /// A chunk is not compressed as it says.
    #[error(transparent)]
    Compression(#[from] compression::CompressionError),
    /// The beginning of a layer cannot be read.
    #[error(transparent)]
    Read(#[from] io::Error),
    /// They are no tar stream.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// A chunk is larger than [`CHUNK_MAX`].
    #[error("a chunk of {size} bytes is too large to be read")]
    ChunkTooLarge {
        /// Its size in bytes, compressed or not, whichever is larger.
        size: u64,
    },
    /// A chunk has another digest than the TOC says.
    #[error(
        "layer {layer}: the chunk at {offset} is {found}, not {expected}: the registry holds other bytes than the image was made of"
    )]
    OtherBytes {
        /// Digest of the blob.
        layer: Digest,
        /// Offset of the compressed chunk in the blob.
        offset: u64,
        /// Digest of what came.
        found: Digest,
        /// Digest by the TOC.
        expected: Digest,
    },
}

/// All that can be said of a layer without its files.
#[derive(Debug)]
pub struct Examined {
    /// What it is.
    pub format: Format,
    /// What told where its TOC is.
    pub origin: Option<Origin>,
    /// Its TOC.
    pub toc: TocState,
    /// Offset of the TOC in the blob, where it has one there.
    pub toc_offset: Option<u64>,
    /// Its entries, or why it cannot be served lazily.
    pub index: Result<LayerIndex, NotLazy>,
}

/// Finds out what a layer is: one request, or two when its TOC is long, or those for the TOC in the image beside. Agrees with what
/// a mount does, and also looks at TOCs that nobody vouches for.
pub async fn examine(
    blob: &Blob,
    descriptor: &Descriptor,
    beside: &TocImage,
) -> Result<Examined, peel_registry::Error> {
    let media_type = descriptor.media_type().to_string();
    let candidate = Candidate::new(&media_type, blob.size(), |name| annotation(descriptor, name));
    let plain = |format, reason| Examined {
        format,
        origin: None,
        toc: TocState::None,
        toc_offset: None,
        index: Err(reason),
    };
    let format = candidate.plain_format();
    if format == Format::Unknown {
        return Ok(plain(format, NotLazy::MediaType(media_type)));
    }
    let TocBytes { located, bytes } = match fetch_toc(&blob.only_ranges(), &candidate, beside).await? {
        Ok(fetched) => fetched,
        Err(reason) => return Ok(plain(format, reason)),
    };
    let without = |reason| Examined {
        origin: Some(located.origin),
        toc_offset: located.toc.as_ref().map(|toc| toc.start),
        ..plain(located.format, reason)
    };
    let toc = match bytes.and_then(|bytes| located.open(&bytes)) {
        Ok(toc) => toc,
        Err(reason) => return Ok(without(reason)),
    };
    Ok(Examined {
        toc: candidate.state(&toc),
        index: candidate.index(&located, &toc),
        ..without(NotLazy::NotVouchedFor)
    })
}

/// An annotation of a descriptor.
pub fn annotation<'a>(descriptor: &'a Descriptor, name: &str) -> Option<&'a str> {
    descriptor.annotations().as_ref()?.get(name).map(String::as_str)
}

/// The whole blob as a blocking reader that fails at its end if the bytes are not the blob's. The stream is read a little
/// ahead. Must not be read in an asynchronous context.
pub async fn reader(blob: &Blob, runtime: &Handle) -> Result<StreamReader, peel_registry::Error> {
    let stream = blob.stream_verified().await?;
    Ok(StreamReader::new(stream, runtime))
}

/// A [`ByteStream`] as [`Read`].
#[derive(Debug)]
pub struct StreamReader {
    /// An empty piece is the end; a queue that closes without it was cut off.
    pieces: mpsc::Receiver<Result<Bytes, peel_registry::Error>>,
    current: Bytes,
    ended: bool,
}

impl StreamReader {
    fn new(mut stream: ByteStream, runtime: &Handle) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES);
        runtime.spawn(async move {
            while let Some(piece) = stream.next().await {
                let last = piece.is_err();
                let nothing = piece.as_ref().is_ok_and(Bytes::is_empty);
                if !nothing && (sender.send(piece).await.is_err() || last) {
                    return;
                }
            }
            // Whoever does not read to the end does not want to know of it.
            let _ = sender.send(Ok(Bytes::new())).await;
        });
        Self {
            pieces,
            current: Bytes::new(),
            ended: false,
        }
    }
}

impl Read for StreamReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            if self.ended {
                return Ok(0);
            }
            let piece = self.pieces.blocking_recv().ok_or(io::ErrorKind::UnexpectedEof)?;
            self.current = piece.map_err(io::Error::other)?;
            self.ended = self.current.is_empty();
        }
        let length = buffer.len().min(self.current.len());
        let piece = self.current.split_to(length);
        buffer
            .get_mut(..length)
            .unwrap_or_default()
            .copy_from_slice(&piece);
        Ok(length)
    }
}

/// Reads a layer to its end: metadata and the digest of every file.
///
/// # Errors
///
/// The bytes do not come, are not compressed as they say, or are no tar stream.
pub fn index_whole(stream: StreamReader) -> Result<LayerIndex, Error> {
    let (_, tar) = compression::decoder(stream, compression::Guard::default())?;
    let mut sink = peel_image::tar::index::HashSink::default();
    Ok(peel_image::tar::index_tar(tar, &mut sink)?.0)
}

/// Fetches one chunk and verifies it.
///
/// # Errors
///
/// The chunk is larger than [`CHUNK_MAX`], its bytes do not come, or they are others than its digest says.
pub async fn fetch_chunk(blob: &Blob, chunk: &Chunk) -> Result<Vec<u8>, Error> {
    let ChunkSource::Blob {
        encoding,
        offset,
        compressed_size,
        inner_offset,
    } = &chunk.source
    else {
        let size = usize::try_from(chunk.size).map_err(|_| Error::ChunkTooLarge { size: chunk.size })?;
        return Ok(vec![0; size]);
    };
    let size = chunk.size.max(*compressed_size);
    if size > CHUNK_MAX {
        return Err(Error::ChunkTooLarge { size });
    }
    let end = offset.saturating_add(*compressed_size);
    let compressed = blob.read(*offset..end).await?;
    let bytes = compression::decode_chunk(*encoding, &compressed, *inner_offset, chunk.size, STREAM_MAX)?;
    let found = Digest::of(&bytes);
    if found != chunk.digest {
        return Err(Error::OtherBytes {
            layer: blob.digest(),
            offset: *offset,
            found,
            expected: chunk.digest,
        });
    }
    Ok(bytes)
}
