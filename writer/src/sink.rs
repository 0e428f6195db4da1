//! The thread that compresses the TOC, and the tar-split data beside it, while the blob is made: only compressed bytes are
//! kept, so a TOC of the largest size needs little memory.

use std::io::{self, Read, Write};
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};
use flate2::Crc;
use flate2::write::DeflateEncoder;

use super::WriteError;
use super::toc::Shape;
use peel_hash::{Digest, Hasher};
use peel_image::estargz::{TOC_JSON_MAX, TOC_NAME};
use peel_image::layer::Metadata;
use peel_image::tar::write::{END_OF_ARCHIVE, NewEntry, encode_header, padding};
use peel_image::tar::{BLOCK, TarKind};
use peel_image::tar_split;

/// Level of the deflate streams that hold a TOC, of zlib's nine.
pub(super) const GZIP_TOC_LEVEL: u32 = 6;
/// Level of zstd for a TOC and for tar-split data. Both are names and digests, in which the longer searches of levels 3 to 12 find
/// nothing: TOCs of 12,000 files have 0.62 MB at level 1, 0.66 at level 3 and 0.61 at level 12.
pub(super) const ZSTD_TOC_LEVEL: i32 = 1;
/// Messages that may wait.
const WAITING: usize = 256;

/// What the thread is told.
pub(super) enum Message {
    /// The next bytes of the TOC's entries.
    Json(Vec<u8>),
    /// The next bytes of the tar stream that belong to no content.
    Segment(Vec<u8>),
    /// The TOC cannot tell a time of the entry that comes next as its headers do.
    Inexact,
    /// The content of a file comes next, or an entry without one.
    File { name: String, size: u64, crc64: u64 },
}

/// A TOC.
pub(super) struct Toc {
    /// Compressed: for eStargz a whole gzip member, else the zstd frame.
    pub(super) data: Vec<u8>,
    /// Length of the JSON.
    pub(super) length: u64,
    /// sha256 of the JSON.
    pub(super) digest: Digest,
    pub(super) tar_split: Option<TarSplit>,
}

/// Compressed tar-split data.
pub(super) struct TarSplit {
    pub(super) data: Vec<u8>,
    /// Length before compression.
    pub(super) length: u64,
}

pub(super) type Thread<'scope> = ScopedJoinHandle<'scope, Result<Toc, WriteError>>;

/// Starts the thread. `has_split`: it makes tar-split data too.
pub(super) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    shape: Shape,
    has_split: bool,
) -> Result<(Sender<Message>, Thread<'scope>), WriteError> {
    let (sender, messages) = bounded(WAITING);
    let thread = Builder::new()
        .name("layer-toc".to_owned())
        .spawn_scoped(scope, move || run(&messages, shape, has_split))
        .map_err(WriteError::Thread)?;
    Ok((sender, thread))
}

fn run(messages: &Receiver<Message>, shape: Shape, has_split: bool) -> Result<Toc, WriteError> {
    let mut json = Json::new(shape).map_err(WriteError::Compressor)?;
    json.write(shape.start())?;
    let split = || -> io::Result<_> {
        let encoder = zstd::stream::write::Encoder::new(Vec::new(), ZSTD_TOC_LEVEL)?;
        Ok(tar_split::Writer::new(Counted(encoder, 0)))
    };
    let mut split = match has_split {
        true => Some(split().map_err(WriteError::Compressor)?),
        false => None,
    };
    let mut is_exact = true;
    for message in messages {
        match (message, &mut split) {
            (Message::Inexact, _) => is_exact = false,
            (Message::Json(data), _) => json.write(&data)?,
            (Message::Segment(data), Some(split)) => {
                split.segment(&data).map_err(WriteError::Compressor)?;
            }
            (Message::File { name, size, crc64 }, Some(split)) => {
                let crc64 = Some(crc64).filter(|_| size > 0);
                split
                    .file(name.as_bytes(), size, crc64)
                    .map_err(WriteError::Compressor)?;
            }
            (_, None) => {}
        }
    }
    let tar_split = match split {
        None => None,
        Some(split) => {
            let Counted(encoder, length) = split.finish().map_err(WriteError::Compressor)?;
            let data = encoder.finish().map_err(WriteError::Compressor)?;
            Some(TarSplit { data, length })
        }
    };
    // Podman refuses a layer whose TOC and tar-split data disagree. Without the digest it does not look at the latter, and pulls the layer
    // as an ordinary one (containers/storage, `pkg/chunked/compression_linux.go`, `readZstdChunkedManifest`).
    let vouched = tar_split.as_ref().filter(|_| is_exact);
    json.write(&shape.end(vouched.map(|split| Digest::of(&split.data))))?;
    let length = json.length;
    let digest = json.hasher.finish();
    let data = match json.encoder {
        Encoder::Zstd(encoder) => encoder.finish().map_err(WriteError::Compressor)?,
        Encoder::Deflate(encoder, crc) => gzip_member(encoder, crc, length)?,
    };
    Ok(Toc {
        data,
        length,
        digest,
        tar_split,
    })
}

/// The JSON on its way into a compressor.
struct Json {
    encoder: Encoder,
    hasher: Hasher,
    length: u64,
}

enum Encoder {
    Zstd(zstd::stream::write::Encoder<'static, Vec<u8>>),
    Deflate(DeflateEncoder<Vec<u8>>, Crc),
}

impl Json {
    fn new(shape: Shape) -> io::Result<Self> {
        let encoder = match shape {
            Shape::Estargz => {
                let level = flate2::Compression::new(GZIP_TOC_LEVEL);
                Encoder::Deflate(DeflateEncoder::new(Vec::new(), level), Crc::new())
            }
            Shape::StargzZstd | Shape::Podman => {
                Encoder::Zstd(zstd::stream::write::Encoder::new(Vec::new(), ZSTD_TOC_LEVEL)?)
            }
        };
        Ok(Self {
            encoder,
            hasher: Hasher::new(),
            length: 0,
        })
    }

    fn write(&mut self, data: &[u8]) -> Result<(), WriteError> {
        self.length += data.len() as u64;
        if self.length > TOC_JSON_MAX {
            return Err(WriteError::TocTooLarge);
        }
        self.hasher.update(data);
        let outcome = match &mut self.encoder {
            Encoder::Zstd(encoder) => encoder.write_all(data),
            Encoder::Deflate(encoder, crc) => {
                crc.update(data);
                encoder.write_all(data)
            }
        };
        outcome.map_err(WriteError::Compressor)
    }
}

/// The header of the tar entry that holds the TOC.
fn toc_header(length: u64) -> Result<Vec<u8>, WriteError> {
    Ok(encode_header(&NewEntry {
        name: TOC_NAME.as_bytes(),
        metadata: &Metadata::default(),
        kind: &TarKind::Regular { size: length },
        user_name: b"",
        group_name: b"",
    })?)
}

/// What follows the JSON in the tar stream.
fn after(length: u64) -> Vec<u8> {
    [padding(length), &END_OF_ARCHIVE].concat()
}

/// A gzip member with the TOC's tar entry and the end of the archive. The entry's header holds the length of the JSON, which
/// is compressed already: it goes into a stored block before it.
fn gzip_member(mut encoder: DeflateEncoder<Vec<u8>>, json: Crc, length: u64) -> Result<Vec<u8>, WriteError> {
    let header = toc_header(length)?;
    let after = after(length);
    encoder.write_all(&after).map_err(WriteError::Compressor)?;
    let deflated = encoder.finish().map_err(WriteError::Compressor)?;
    let mut crc = Crc::new();
    crc.update(&header);
    crc.combine(&json);
    let mut tail = Crc::new();
    tail.update(&after);
    crc.combine(&tail);
    let block = u16::try_from(header.len()).map_err(|_| WriteError::TocTooLarge)?;
    let size = header.len() as u64 + length + after.len() as u64;
    let size = u32::try_from(size).map_err(|_| WriteError::TocTooLarge)?;

    // RFC 1952: deflate, no flags, no time, no operating system. RFC 1951, section 3.2.4: a stored block that is not final.
    let mut member = vec![0x1f, 0x8b, 0x08, 0, 0, 0, 0, 0, 0, 0xff, 0];
    member.extend_from_slice(&block.to_le_bytes());
    member.extend_from_slice(&(!block).to_le_bytes());
    member.extend_from_slice(&header);
    member.extend_from_slice(&deflated);
    member.extend_from_slice(&crc.sum().to_le_bytes());
    member.extend_from_slice(&size.to_le_bytes());
    Ok(member)
}

impl Toc {
    /// Calls `f` with the tar stream that an eStargz TOC is, piece by piece.
    pub(super) fn each_tar_byte(&self, mut f: impl FnMut(&[u8])) -> Result<(), WriteError> {
        let mut stream = flate2::bufread::GzDecoder::new(self.data.as_slice());
        let mut buffer = vec![0; 64 << 10];
        loop {
            let count = stream.read(&mut buffer).map_err(WriteError::Compressor)?;
            if count == 0 {
                return Ok(());
            }
            f(buffer.get(..count).unwrap_or_default());
        }
    }

    /// Length of that tar stream.
    pub(super) fn tar_length(&self) -> u64 {
        BLOCK as u64 + self.length + after(self.length).len() as u64
    }
}

/// Counts what is written.
struct Counted<W>(W, u64);

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.0.write(data)?;
        self.1 += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}
