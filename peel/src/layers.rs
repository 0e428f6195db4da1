//! Layers looked at where they are: which format a blob has, whether it can be served lazily, and single files of it. No
//! store and no server: `inspect`, `ls`, `cat` and `convert` use this.

use std::io::{self, Read};
use std::ops::Range;

use anyhow::{Context, bail};
use bytes::Bytes;
use oci_spec::image::Descriptor;
use peel_image::estargz::footer::{ESTARGZ_FOOTER, Footer};
use peel_image::estargz::{FooterError, TOC_MEMBER_MAX, TocLocation, extract_toc, locate, read_index};
use peel_image::layer::{Chunk, ChunkSource, EntryKind, LayerIndex};
use peel_image::{Digest, annotations, compression, media};
use peel_registry::{Blob, ByteStream};
use serde::Serialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

/// How much of a blob's end is fetched first: most TOCs fit, and it costs little more than a round trip.
const TAIL: u64 = 128 << 10;
/// Most bytes that one chunk may uncompress to together with what stands before it in its stream.
const CHUNK_MAX: u64 = 256 << 20;
/// Pieces of a stream that wait for their reader; a piece has at most some hundred KiB.
const PIECES: usize = 16;
/// Magic of stargz-snapshotter's zstd:chunked footer, its last 8 bytes.
const ZSTD_CHUNKED_STARGZ: &[u8] = b"GnUlInUx";
/// Magic of containers/storage's zstd:chunked footer, its last 8 bytes.
const ZSTD_CHUNKED_CONTAINERS: &[u8] = b"GNUlInUx";

/// What a layer blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Format {
    /// eStargz: gzip members and a TOC.
    #[serde(rename = "eStargz")]
    Estargz,
    /// stargz, its predecessor.
    #[serde(rename = "stargz")]
    Stargz,
    /// eStargz whose TOC is in another image.
    #[serde(rename = "eStargz with external TOC")]
    ExternalToc,
    /// zstd:chunked as stargz-snapshotter writes it.
    #[serde(rename = "zstd:chunked (stargz)")]
    ZstdChunkedStargz,
    /// zstd:chunked as Podman, Buildah and skopeo write it.
    #[serde(rename = "zstd:chunked (containers)")]
    ZstdChunkedContainers,
    /// tar in gzip.
    #[serde(rename = "tar+gzip")]
    Gzip,
    /// tar in zstd.
    #[serde(rename = "tar+zstd")]
    Zstd,
    /// tar.
    #[serde(rename = "tar")]
    Tar,
    /// Not a layer by its media type.
    #[serde(rename = "unknown")]
    Unknown,
}

/// How a TOC stands to what the manifest says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub enum TocState {
    /// The layer has none.
    None,
    /// It is the one that the manifest vouches for.
    Verified {
        /// sha256 of the TOC JSON.
        digest: Digest,
    },
    /// The manifest says nothing about it.
    NotVouchedFor {
        /// sha256 of the TOC JSON.
        digest: Digest,
    },
    /// The manifest says something else.
    Differs {
        /// sha256 of the TOC JSON.
        digest: Digest,
        /// What the manifest says it is.
        annotated: Digest,
    },
}

/// All that the end of a blob says about a layer.
#[derive(Debug)]
pub struct Examined {
    /// What it is.
    pub format: Format,
    /// Its TOC.
    pub toc: TocState,
    /// Offset of the TOC in the blob, where it has one.
    pub toc_offset: Option<u64>,
    /// Its entries, or in one sentence why it cannot be served lazily.
    pub index: Result<LayerIndex, String>,
}

impl Examined {
    fn plain(format: Format, reason: impl Into<String>) -> Self {
        Self {
            format,
            toc: TocState::None,
            toc_offset: None,
            index: Err(reason.into()),
        }
    }
}

/// Looks at the end of a layer blob: one request, or two when the TOC is long.
pub async fn examine(blob: &Blob, descriptor: &Descriptor) -> Result<Examined, peel_registry::Error> {
    let media_type = descriptor.media_type().to_string();
    let Some(encoding) = media::layer_encoding(&media_type) else {
        return Ok(Examined::plain(
            Format::Unknown,
            format!("its media type {media_type} is not that of a layer"),
        ));
    };
    let hint = annotation(descriptor, annotations::TOC_OFFSET)
        .and_then(|text| text.parse::<u64>().ok())
        .and_then(|offset| blob.size().checked_sub(offset))
        .filter(|length| *length <= TOC_MEMBER_MAX)
        .unwrap_or(TAIL);
    let footer = u64::try_from(ESTARGZ_FOOTER).unwrap_or(u64::MAX);
    let start = blob.size().saturating_sub(hint.max(footer));
    let tail = blob.read(start..blob.size()).await?;
    match locate(&tail, blob.size()) {
        Ok(location) => examine_toc(blob, descriptor, location, start, &tail).await,
        Err(FooterError::NotEstargz) => Ok(match encoding {
            _ if tail.ends_with(ZSTD_CHUNKED_STARGZ) => Examined::plain(
                Format::ZstdChunkedStargz,
                "it is zstd:chunked, which this version reads only whole",
            ),
            _ if tail.ends_with(ZSTD_CHUNKED_CONTAINERS) => Examined::plain(
                Format::ZstdChunkedContainers,
                "it is zstd:chunked, which this version reads only whole",
            ),
            peel_image::layer::Encoding::Gzip => {
                Examined::plain(Format::Gzip, "it is one gzip stream without a table of contents")
            }
            peel_image::layer::Encoding::Zstd => {
                Examined::plain(Format::Zstd, "it is one zstd stream without a table of contents")
            }
            peel_image::layer::Encoding::Plain => {
                Examined::plain(Format::Tar, "it is a tar file without a table of contents")
            }
        }),
        Err(error) => Ok(Examined::plain(
            Format::Estargz,
            format!("its footer is damaged: {error}"),
        )),
    }
}

async fn examine_toc(
    blob: &Blob,
    descriptor: &Descriptor,
    location: TocLocation,
    start: u64,
    tail: &Bytes,
) -> Result<Examined, peel_registry::Error> {
    let format = match location.footer {
        Footer::Estargz { .. } => Format::Estargz,
        Footer::Stargz { .. } => Format::Stargz,
        Footer::External => {
            return Ok(Examined::plain(
                Format::ExternalToc,
                "its table of contents is in another image, where this version does not look for it",
            ));
        }
    };
    let member = location.payload_end..location.payload_end.saturating_add(location.toc_size);
    let member = part(blob, member, start, tail).await?;
    let broken = |reason: String| Examined {
        toc_offset: Some(location.payload_end),
        ..Examined::plain(format, reason)
    };
    let toc = match extract_toc(&member) {
        Ok(toc) => toc,
        Err(error) => return Ok(broken(format!("its table of contents cannot be read: {error}"))),
    };
    let digest = toc.digest;
    let annotated = annotation(descriptor, annotations::TOC_DIGEST).map(str::parse::<Digest>);
    let (state, distrust) = match annotated {
        Some(Ok(annotated)) if annotated == digest => (TocState::Verified { digest }, None),
        Some(Ok(annotated)) => (
            TocState::Differs { digest, annotated },
            Some(format!(
                "its table of contents is {digest}, but the manifest says {annotated}"
            )),
        ),
        Some(Err(error)) => (
            TocState::NotVouchedFor { digest },
            Some(format!(
                "the manifest's annotation {} is not a digest: {error}",
                annotations::TOC_DIGEST
            )),
        ),
        None => (
            TocState::NotVouchedFor { digest },
            Some(format!(
                "the manifest does not vouch for its table of contents (no annotation {})",
                annotations::TOC_DIGEST
            )),
        ),
    };
    let index = match (distrust, read_index(&toc.json, location.payload_end)) {
        (Some(reason), _) => Err(reason),
        (None, Err(error)) => Err(format!("its table of contents cannot be used: {error}")),
        (None, Ok(index)) => match index.entries.iter().find(|entry| !is_lazy(&entry.kind)) {
            Some(entry) => Err(format!(
                "its table of contents has no digests of the chunks of {}",
                entry.path
            )),
            None => Ok(index),
        },
    };
    Ok(Examined {
        format,
        toc: state,
        toc_offset: Some(location.payload_end),
        index,
    })
}

fn is_lazy(kind: &EntryKind) -> bool {
    match kind {
        EntryKind::Regular(content) => content.is_lazy(),
        _ => true,
    }
}

/// The bytes of `range`, taken from `tail` (which begins at `start`) as far as they are there.
async fn part(
    blob: &Blob,
    range: Range<u64>,
    start: u64,
    tail: &Bytes,
) -> Result<Bytes, peel_registry::Error> {
    let inside = |offset: u64| {
        usize::try_from(offset.saturating_sub(start))
            .unwrap_or(usize::MAX)
            .min(tail.len())
    };
    let here = tail.slice(inside(range.start)..inside(range.end));
    if range.start >= start {
        return Ok(here);
    }
    let mut whole = blob.read(range.start..start.min(range.end)).await?.to_vec();
    whole.extend_from_slice(&here);
    Ok(whole.into())
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
    pieces: mpsc::Receiver<Result<Bytes, peel_registry::Error>>,
    current: Bytes,
}

impl StreamReader {
    fn new(mut stream: ByteStream, runtime: &Handle) -> Self {
        let (sender, pieces) = mpsc::channel(PIECES);
        runtime.spawn(async move {
            while let Some(piece) = stream.next().await {
                let last = piece.is_err();
                if sender.send(piece).await.is_err() || last {
                    break;
                }
            }
        });
        Self {
            pieces,
            current: Bytes::new(),
        }
    }
}

impl Read for StreamReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.pieces.blocking_recv() {
                Some(piece) => self.current = piece.map_err(io::Error::other)?,
                None => return Ok(0),
            }
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
pub fn index_whole(stream: StreamReader) -> anyhow::Result<LayerIndex> {
    let (_, tar) = compression::decoder(stream, compression::Guard::default())?;
    let mut sink = peel_image::tar::index::HashSink::default();
    Ok(peel_image::tar::index_tar(tar, &mut sink)?.0)
}

/// Fetches one chunk and verifies it.
pub async fn fetch_chunk(blob: &Blob, chunk: &Chunk) -> anyhow::Result<Vec<u8>> {
    let ChunkSource::Blob {
        encoding,
        offset,
        compressed_size,
        inner_offset,
    } = &chunk.source
    else {
        return Ok(vec![0; usize::try_from(chunk.size).context("chunk of zeros")?]);
    };
    if chunk.size > CHUNK_MAX || *compressed_size > CHUNK_MAX {
        bail!(
            "a chunk of {} bytes is too large to be read",
            chunk.size.max(*compressed_size)
        );
    }
    let end = offset.saturating_add(*compressed_size);
    let compressed = blob.read(*offset..end).await?;
    let bytes = compression::decode_chunk(*encoding, &compressed, *inner_offset, chunk.size, CHUNK_MAX)?;
    let found = Digest::of(&bytes);
    if found != chunk.digest {
        bail!(
            "layer {}: the chunk at {offset} is {found}, not {}: the registry holds other bytes than the image was made of",
            blob.digest(),
            chunk.digest
        );
    }
    Ok(bytes)
}
