//! Telling and undoing gzip (RFC 1952) and zstd (RFC 8878): whole layers as streams, and single chunks from memory.
//!
//! Called by the whole-layer pull and the converter ([`decoder`]), the fetcher of lazy layers ([`decode_chunk`], [`ChunkReader`]), and the TOC
//! reader ([`inflate_member`]). Every output has a limit that the caller chooses; nothing is allocated by what the
//! compressed bytes merely claim.

mod chunks;

use std::cell::RefCell;
use std::fmt;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

pub use chunks::ChunkReader;

use crate::layer::Encoding;

/// Bytes read ahead of a decompressor.
const BUFFER: usize = 256 << 10;
/// Largest window that a zstd frame may ask for, as a power of two: 128 MiB, what `zstd -d` accepts by default.
const ZSTD_WINDOW_LOG_MAX: u32 = 27;
/// What libzstd calls a larger one (`ZSTD_getErrorName` of `ZSTD_error_frameParameter_windowTooLarge`).
const ZSTD_WINDOW_TOO_LARGE: &str = "Frame requires too much memory for decoding";
/// Deflate cannot do better than 1032 to 1, so a gzip trailer that claims more is not believed.
const DEFLATE_RATIO_MAX: u64 = 1032;

/// Why compressed bytes cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CompressionError {
    /// The bytes are no stream of this encoding, or a damaged one.
    #[error("damaged {encoding} data")]
    Damaged {
        /// What they should have been.
        encoding: Encoding,
        /// What the decompressor said.
        #[source]
        source: io::Error,
    },
    /// The same for a whole layer.
    #[error("damaged {encoding} data, somewhere in its first {read} bytes")]
    Stream {
        /// What they should have been.
        encoding: Encoding,
        /// Compressed bytes that the decompressor was given.
        read: u64,
        /// What it said.
        #[source]
        source: io::Error,
    },
    /// A layer that is compressed in a way which no image specification has.
    #[error(
        "it is compressed with {0}, which neither OCI nor Docker layers are: push the image anew with gzip or zstd"
    )]
    Unsupported(&'static str),
    /// The stream ends before the wanted bytes.
    #[error("the {encoding} data ends after {have} of {wanted} bytes")]
    Short {
        /// How it is compressed.
        encoding: Encoding,
        /// Uncompressed bytes from the stream's start that were wanted.
        wanted: u64,
        /// Uncompressed bytes that were there.
        have: u64,
    },
    /// More uncompressed bytes than the caller allows.
    #[error("the {encoding} data expands to more than {limit} bytes")]
    TooLarge {
        /// How it is compressed.
        encoding: Encoding,
        /// The limit in uncompressed bytes.
        limit: u64,
    },
    /// A frame that asks for more memory than any reader should give it.
    #[error(
        "a zstd frame asks for a window of more than {} MiB: compress it with a smaller one (`zstd --long={ZSTD_WINDOW_LOG_MAX}` at most)",
        1 << (ZSTD_WINDOW_LOG_MAX - 20)
    )]
    Window,
    /// A stream that expands far more than real data does.
    #[error("the {encoding} data expands to more than {ratio} times its size")]
    Ratio {
        /// How it is compressed.
        encoding: Encoding,
        /// The limit as uncompressed bytes per compressed byte.
        ratio: u64,
    },
}

impl fmt::Display for Encoding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
            Self::Plain => "uncompressed",
        })
    }
}

impl CompressionError {
    /// What a decompressor's error means.
    fn damaged(encoding: Encoding, source: io::Error) -> Self {
        if encoding == Encoding::Zstd && source.to_string() == ZSTD_WINDOW_TOO_LARGE {
            return Self::Window;
        }
        Self::Damaged { encoding, source }
    }
}

/// How much a stream may expand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Guard {
    /// Most uncompressed bytes.
    pub output_max: u64,
    /// Most uncompressed bytes per compressed byte, once [`Guard::free`] is used up.
    pub ratio_max: u64,
    /// Uncompressed bytes for which the ratio does not matter: a file of zeros is no attack.
    pub free: u64,
}

impl Default for Guard {
    /// 128 GiB, which is beyond the largest images in use, and 2000 to 1 beyond the first GiB: gzip stays below by its
    /// nature, and only zstd frames of pure repetition exceed it.
    fn default() -> Self {
        Self {
            output_max: 128 << 30,
            ratio_max: 2000,
            free: 1 << 30,
        }
    }
}

/// Tells the encoding by the first bytes; four are enough. What is neither gzip nor zstd is plain.
pub fn detect(start: &[u8]) -> Encoding {
    match start {
        [0x1f, 0x8b, 0x08, ..] => Encoding::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Encoding::Zstd,
        // A skippable frame may come first.
        [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Encoding::Zstd,
        _ => Encoding::Plain,
    }
}

/// Compressions that some tools read in layers although no specification has them, by their first bytes: long enough that no name of
/// a file at the start of a tar stream looks like them.
const UNSUPPORTED: [(&[u8], &str); 4] = [
    (b"BZh91AY&SY", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"LZIP\x01", "lzip"),
];

/// Looks at the first bytes of `stream` and gives the uncompressed stream: all gzip members and all zstd frames one after
/// the other. A stream that ends inside a member or frame fails with `UnexpectedEof`; it, a damaged one, one that breaks the guard
/// and one that is compressed in another way fail with a [`CompressionError`] inside the [`io::Error`].
pub fn decoder<R: Read + Send + 'static>(
    stream: R,
    guard: Guard,
) -> io::Result<(Encoding, Box<dyn Read + Send>)> {
    let input = Arc::new(AtomicU64::new(0));
    let has_failed = Arc::new(AtomicBool::new(false));
    let mut stream = Counted {
        stream,
        count: Arc::clone(&input),
        has_failed: Arc::clone(&has_failed),
    };
    let mut start = Vec::new();
    stream.by_ref().take(10).read_to_end(&mut start)?;
    if let Some((_, name)) = UNSUPPORTED.iter().find(|(magic, _)| start.starts_with(magic)) {
        return Err(io::Error::other(CompressionError::Unsupported(name)));
    }
    let encoding = detect(&start);
    let stream = BufReader::with_capacity(BUFFER, Cursor::new(start).chain(stream));
    let output: Box<dyn Read + Send> = match encoding {
        Encoding::Gzip => Box::new(flate2::bufread::MultiGzDecoder::new(stream)),
        Encoding::Zstd => Box::new(zstd_decoder(stream)?),
        Encoding::Plain => Box::new(stream),
    };
    let guarded = Guarded {
        output,
        written: 0,
        input,
        has_failed,
        encoding,
        guard,
    };
    Ok((encoding, Box::new(guarded)))
}

fn zstd_decoder<R: BufRead>(stream: R) -> io::Result<zstd::stream::read::Decoder<'static, R>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(stream)?;
    decoder.window_log_max(ZSTD_WINDOW_LOG_MAX)?;
    Ok(decoder)
}

/// Counts what passes, and tells whether the stream itself failed.
struct Counted<R> {
    stream: R,
    count: Arc<AtomicU64>,
    has_failed: Arc<AtomicBool>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer).inspect_err(|error| {
            if error.kind() != io::ErrorKind::Interrupted {
                self.has_failed.store(true, Ordering::Relaxed);
            }
        })?;
        self.count.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }
}

/// Fails once a stream expands more than allowed.
struct Guarded {
    output: Box<dyn Read + Send>,
    written: u64,
    input: Arc<AtomicU64>,
    has_failed: Arc<AtomicBool>,
    encoding: Encoding,
    guard: Guard,
}

impl Guarded {
    /// What an error of the decompressor means.
    fn error(&self, error: io::Error) -> io::Error {
        if self.has_failed.load(Ordering::Relaxed) || error.kind() == io::ErrorKind::Interrupted {
            return error;
        }
        match CompressionError::damaged(self.encoding, error) {
            CompressionError::Damaged { encoding, source } => {
                let read = self.input.load(Ordering::Relaxed);
                // The kind tells a stream that is cut short from a damaged one.
                io::Error::new(
                    source.kind(),
                    CompressionError::Stream {
                        encoding,
                        read,
                        source,
                    },
                )
            }
            error => io::Error::other(error),
        }
    }
}

impl Read for Guarded {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.output.read(buffer).map_err(|error| self.error(error))?;
        self.written = self.written.saturating_add(count as u64);
        let (encoding, guard) = (self.encoding, self.guard);
        if self.written > guard.output_max {
            let limit = guard.output_max;
            return Err(io::Error::other(CompressionError::TooLarge { encoding, limit }));
        }
        let input = self.input.load(Ordering::Relaxed);
        if self.written > guard.free && self.written / guard.ratio_max.max(1) > input {
            let ratio = guard.ratio_max;
            return Err(io::Error::other(CompressionError::Ratio { encoding, ratio }));
        }
        Ok(count)
    }
}

/// Uncompresses the one gzip member at the start of `data` (other bytes may follow), at most `limit` bytes.
/// `size_hint` saves memory and time where the caller knows about how long the output is.
pub fn inflate_member(data: &[u8], size_hint: Option<u64>, limit: u64) -> Result<Vec<u8>, CompressionError> {
    let encoding = Encoding::Gzip;
    for size in [size_hint, gzip_trailer(data)].into_iter().flatten() {
        if size <= limit
            && let Some(output) = inflate_at_once(data, size)
        {
            return Ok(output);
        }
    }
    let mut output = Vec::new();
    let member = flate2::bufread::GzDecoder::new(data);
    let count = member.take(limit.saturating_add(1)).read_to_end(&mut output);
    count.map_err(|source| CompressionError::damaged(encoding, source))?;
    if u64::try_from(output.len()).is_ok_and(|length| length <= limit) {
        Ok(output)
    } else {
        Err(CompressionError::TooLarge { encoding, limit })
    }
}

/// The uncompressed size of the last gzip member in `data`, if its trailer is believable (RFC 1952, ISIZE).
fn gzip_trailer(data: &[u8]) -> Option<u64> {
    let size = u64::from(u32::from_le_bytes(*data.last_chunk()?));
    Some(size).filter(|size| believable(data, *size))
}

/// Whether deflate can make `size` bytes of `data`.
fn believable(data: &[u8], size: u64) -> bool {
    u64::try_from(data.len()).is_ok_and(|length| size <= length.saturating_mul(DEFLATE_RATIO_MAX))
}

/// The first member of `data` if it uncompresses to `size` bytes or fewer.
fn inflate_at_once(data: &[u8], size: u64) -> Option<Vec<u8>> {
    let mut output = vec![0; usize::try_from(size).ok()?];
    let length = libdeflater::Decompressor::new()
        .gzip_decompress(data, &mut output)
        .ok()?;
    output.truncate(length);
    Some(output)
}

/// Uncompresses one chunk: `size` bytes that begin `inner_offset` bytes into the output of the stream at the start of
/// `compressed`. Bytes that follow the stream (the next members, frames, headers) do no harm; a chunk may go on over
/// several members or frames. `inner_offset + size` must not exceed `limit`. The bytes are not verified here. Little more than `size`
/// bytes are ever held, however many come before them.
pub fn decode_chunk(
    encoding: Encoding,
    compressed: &[u8],
    inner_offset: u64,
    size: u64,
    limit: u64,
) -> Result<Vec<u8>, CompressionError> {
    let too_large = || CompressionError::TooLarge { encoding, limit };
    let end = inner_offset
        .checked_add(size)
        .filter(|end| *end <= limit)
        .ok_or_else(too_large)?;
    match encoding {
        Encoding::Gzip => {
            // Whole members at once are by far the fastest. Upstream's member holds the chunk and the headers after it,
            // and ends the slice, so that its trailer tells its size. Ours holds the chunk alone, and a small member
            // of headers follows it.
            let most = size.saturating_add(BESIDE_MAX);
            let at_once = gzip_trailer(compressed)
                .filter(|length| (end..=most).contains(length))
                .or(Some(end).filter(|length| *length <= most && believable(compressed, *length)))
                .and_then(|length| inflate_at_once(compressed, length));
            if let Some(mut output) = at_once
                && let Some(chunk) = usize::try_from(end).ok().filter(|end| *end <= output.len())
            {
                output.truncate(chunk);
                output.drain(..chunk.min(usize::try_from(inner_offset).map_err(|_| too_large())?));
                return Ok(output);
            }
            read_chunk(
                encoding,
                flate2::bufread::MultiGzDecoder::new(compressed),
                inner_offset,
                size,
            )
        }
        Encoding::Zstd => {
            if let Some(chunk) = zstd_at_once(compressed, inner_offset, size) {
                return Ok(chunk);
            }
            let decoder =
                zstd_decoder(compressed).map_err(|source| CompressionError::damaged(encoding, source))?;
            read_chunk(encoding, decoder, inner_offset, size)
        }
        Encoding::Plain => read_chunk(encoding, compressed, inner_offset, size),
    }
}

/// Most bytes before and behind a chunk in its gzip member that are held for a moment, because that is faster than passing over them.
const BESIDE_MAX: u64 = 16 << 20;

/// Bytes that may follow a chunk in its zstd frame and still let it be decompressed at once: padding and a few headers.
const ZSTD_SLACK: u64 = 16 << 10;
/// Most output of a chunk that is decompressed at once: the memory is claimed before the bytes are known to be there.
const ZSTD_AT_ONCE_MAX: u64 = 16 << 20;

/// The chunk, if all frames of `compressed` are whole and hold little else. A streaming decompressor allocates the frame's window,
/// up to 8 MiB for chunks of some KiB; this one writes where the bytes are wanted.
fn zstd_at_once(compressed: &[u8], inner_offset: u64, size: u64) -> Option<Vec<u8>> {
    thread_local! {
        static DECOMPRESSOR: RefCell<Option<zstd::bulk::Decompressor<'static>>> = RefCell::new(new_decompressor());
    }
    let end = inner_offset
        .checked_add(size)
        .filter(|end| *end <= ZSTD_AT_ONCE_MAX)?;
    let capacity = usize::try_from(end + ZSTD_SLACK).ok()?;
    let mut output = DECOMPRESSOR.with_borrow_mut(|decompressor| {
        let decompressor = decompressor.as_mut()?;
        decompressor.decompress(compressed, capacity).ok()
    })?;
    let end = usize::try_from(end).ok().filter(|end| *end <= output.len())?;
    output.truncate(end);
    output.drain(..usize::try_from(inner_offset).ok()?);
    Some(output)
}

fn new_decompressor() -> Option<zstd::bulk::Decompressor<'static>> {
    let mut decompressor = zstd::bulk::Decompressor::new().ok()?;
    decompressor.window_log_max(ZSTD_WINDOW_LOG_MAX).ok()?;
    Some(decompressor)
}

/// Whether `data` is one frame with a window that is allowed, which libzstd checks only where it needs memory for one (RFC 8878,
/// section 3.1.1.1).
fn is_modest_frame(data: &[u8]) -> bool {
    let &[0x28, 0xb5, 0x2f, 0xfd, descriptor, window, ..] = data else {
        return false;
    };
    let window = if descriptor & 0x20 != 0 {
        // Without a window descriptor, all of the content is the window.
        zstd::zstd_safe::get_frame_content_size(data).ok().flatten()
    } else {
        let base = 1_u64 << (10 + (window >> 3));
        Some(base + base / 8 * u64::from(window & 7))
    };
    window.is_some_and(|window| window <= 1 << ZSTD_WINDOW_LOG_MAX)
        && zstd::zstd_safe::find_frame_compressed_size(data) == Ok(data.len())
}

/// Uncompresses all of `data`: any number of zstd frames, at most `limit` bytes. `size_hint` saves memory and time where the
/// caller knows how long the output is.
pub fn decompress_zstd(data: &[u8], size_hint: Option<u64>, limit: u64) -> Result<Vec<u8>, CompressionError> {
    let encoding = Encoding::Zstd;
    let capacity = size_hint.filter(|size| *size <= limit && is_modest_frame(data));
    if let Some(capacity) = capacity.and_then(|size| usize::try_from(size).ok())
        && let Some(mut decompressor) = new_decompressor()
        && let Ok(output) = decompressor.decompress(data, capacity)
    {
        return Ok(output);
    }
    let damaged = |source| CompressionError::damaged(encoding, source);
    let mut output = Vec::new();
    let stream = zstd_decoder(data).map_err(damaged)?;
    stream
        .take(limit.saturating_add(1))
        .read_to_end(&mut output)
        .map_err(damaged)?;
    if u64::try_from(output.len()).is_ok_and(|length| length <= limit) {
        Ok(output)
    } else {
        Err(CompressionError::TooLarge { encoding, limit })
    }
}

/// Skips `inner_offset` bytes of `stream` and reads `size`.
fn read_chunk(
    encoding: Encoding,
    mut stream: impl Read,
    inner_offset: u64,
    size: u64,
) -> Result<Vec<u8>, CompressionError> {
    let damaged = |source| CompressionError::damaged(encoding, source);
    let wanted = inner_offset.saturating_add(size);
    let skipped = io::copy(&mut stream.by_ref().take(inner_offset), &mut io::sink()).map_err(damaged)?;
    let mut output = Vec::new();
    if skipped == inner_offset {
        stream.take(size).read_to_end(&mut output).map_err(damaged)?;
    }
    let have = skipped.saturating_add(output.len() as u64);
    if have < wanted {
        return Err(CompressionError::Short {
            encoding,
            wanted,
            have,
        });
    }
    Ok(output)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn gzip(data: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(data).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(data: &[u8]) -> Vec<u8> {
        zstd::encode_all(data, 3).unwrap()
    }

    pub(super) fn compress(encoding: Encoding, data: &[u8]) -> Vec<u8> {
        match encoding {
            Encoding::Gzip => gzip(data),
            Encoding::Zstd => zstd(data),
            Encoding::Plain => data.to_vec(),
        }
    }

    fn skippable(payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
        [&[0x50, 0x2a, 0x4d, 0x18], &length[..], payload].concat()
    }

    fn decode(stream: Vec<u8>, guard: Guard) -> io::Result<(Encoding, Vec<u8>)> {
        let (encoding, mut decoder) = decoder(Cursor::new(stream), guard)?;
        let mut output = Vec::new();
        decoder.read_to_end(&mut output)?;
        Ok((encoding, output))
    }

    #[test]
    fn what_comes_before_a_chunk_is_not_held() {
        // 8 to 64 KiB that expand to 64 MiB, of which only the end is wanted.
        let data = vec![0; 64 << 20];
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let compressed = compress(encoding, &data);
            let end = data.len() as u64;
            let chunk = decode_chunk(encoding, &compressed, end - 10, 10, end).unwrap();
            assert_eq!(chunk, [0; 10]);
            assert!(chunk.capacity() < 1 << 20, "{encoding}");
        }
    }

    pub(super) const ALL: [Encoding; 3] = [Encoding::Gzip, Encoding::Zstd, Encoding::Plain];

    #[test]
    fn streams_of_several_members_and_frames() {
        let (a, b) = (&b"first "[..], &b"second"[..]);
        for (stream, encoding, output) in [
            (Vec::new(), Encoding::Plain, &b""[..]),
            (b"abc".to_vec(), Encoding::Plain, b"abc"),
            (
                [gzip(a), gzip(b""), gzip(b)].concat(),
                Encoding::Gzip,
                b"first second",
            ),
            ([zstd(a), zstd(b)].concat(), Encoding::Zstd, b"first second"),
            (
                [
                    skippable(b"x"),
                    zstd(a),
                    skippable(b""),
                    zstd(b),
                    skippable(&[7; 99]),
                ]
                .concat(),
                Encoding::Zstd,
                b"first second",
            ),
        ] {
            assert_eq!(
                decode(stream, Guard::default()).unwrap(),
                (encoding, output.to_vec())
            );
        }
    }

    #[test]
    fn truncated_streams_fail() {
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let stream = compress(encoding, &[7; 5000]);
            for length in 4..stream.len() {
                let error = decode(stream[..length].to_vec(), Guard::default()).unwrap_err();
                assert_eq!(
                    error.kind(),
                    io::ErrorKind::UnexpectedEof,
                    "{encoding} {length}: {error}"
                );
            }
        }
        assert!(decode([gzip(b"x"), b"garbage".to_vec()].concat(), Guard::default()).is_err());
    }

    #[test]
    fn what_is_wrong_with_a_stream_is_told() {
        let chain = |error: io::Error| {
            let source = error.get_ref().and_then(std::error::Error::source);
            format!("{error}: {}", source.map(ToString::to_string).unwrap_or_default())
        };
        let data: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        let whole = gzip(&data);
        let length = whole.len();
        let garbage = [&whole[..], b"garbage, garbage"].concat();
        for (stream, expected) in [
            (
                garbage,
                format!(
                    "damaged gzip data, somewhere in its first {} bytes: invalid gzip header",
                    length + 16
                ),
            ),
            (
                whole[..length - 1].to_vec(),
                format!("damaged gzip data, somewhere in its first {} bytes: ", length - 1),
            ),
            (
                b"BZh91AY&SY\0\0".to_vec(),
                "it is compressed with bzip2, which".to_owned(),
            ),
            (
                b"\xfd7zXZ\0\0\x04".to_vec(),
                "it is compressed with xz, which".to_owned(),
            ),
            (
                vec![4, 0x22, 0x4d, 0x18, 0x40],
                "it is compressed with lz4, which".to_owned(),
            ),
            (
                b"LZIP\x01".to_vec(),
                "it is compressed with lzip, which".to_owned(),
            ),
        ] {
            let error = chain(decode(stream, Guard::default()).unwrap_err());
            assert!(error.starts_with(&expected), "{error} is not {expected}");
        }
        // These are names of files in a tar stream.
        for start in ["BZh9", "BZh91AY", "LZIP", "7zXZ"] {
            assert_eq!(decode(start.into(), Guard::default()).unwrap().0, Encoding::Plain);
        }
    }

    /// The network breaks off after a part of the stream.
    struct Breaks(Cursor<Vec<u8>>);

    impl Read for Breaks {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            match self.0.read(buffer)? {
                0 => Err(io::Error::new(
                    io::ErrorKind::ConnectionReset,
                    "reset by the registry",
                )),
                count => Ok(count),
            }
        }
    }

    #[test]
    fn a_stream_that_cannot_be_read_is_not_called_damaged() {
        for encoding in ALL {
            let mut stream = compress(encoding, &[7; 100_000]);
            stream.truncate(stream.len() - 9);
            let (_, mut output) = decoder(Breaks(Cursor::new(stream)), Guard::default()).unwrap();
            let error = output.read_to_end(&mut Vec::new()).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
            assert_eq!(error.to_string(), "reset by the registry");
        }
    }

    #[test]
    fn bombs_are_stopped() {
        let zeros = vec![0; 4 << 20];
        let guard = Guard {
            output_max: 1 << 20,
            ratio_max: 500,
            free: 1 << 21,
        };
        for encoding in ALL {
            let error = decode(compress(encoding, &zeros), guard).unwrap_err();
            assert!(error.to_string().contains("more than 1048576 bytes"), "{error}");
        }
        let guard = Guard {
            output_max: 1 << 30,
            ..guard
        };
        for encoding in [Encoding::Gzip, Encoding::Zstd] {
            let error = decode(compress(encoding, &zeros), guard).unwrap_err();
            assert!(error.to_string().contains("more than 500 times"), "{error}");
        }
        decode(zeros, guard).unwrap();
    }

    #[test]
    fn windows_beyond_the_limit_are_refused() {
        // RFC 8878, section 3.1.1: no single segment, window 1 << log, one raw block of one byte.
        let frame = |log: u8| vec![0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3, 0x09, 0, 0, b'x'];
        assert_eq!(decode(frame(27), Guard::default()).unwrap().1, b"x");
        for hint in [None, Some(1)] {
            assert_eq!(decompress_zstd(&frame(27), hint, 1).unwrap(), b"x");
            let error = decompress_zstd(&frame(28), hint, 1).unwrap_err();
            assert!(matches!(error, CompressionError::Window), "{hint:?}: {error}");
        }
        let error = decode(frame(28), Guard::default()).unwrap_err();
        assert!(
            error.to_string().contains("a window of more than 128 MiB"),
            "{error}"
        );
    }

    #[test]
    fn members_are_inflated_with_and_without_a_hint() {
        let data = vec![b'x'; 100_000];
        let member = gzip(&data);
        let followed = [&member[..], &gzip(b"next"), b"junk"].concat();
        for input in [&member, &followed] {
            for hint in [
                None,
                Some(0),
                Some(99_999),
                Some(100_000),
                Some(200_000),
                Some(u64::MAX),
            ] {
                assert_eq!(inflate_member(input, hint, 100_000).unwrap(), data, "{hint:?}");
                let error = inflate_member(input, hint, 99_999).unwrap_err();
                assert!(matches!(error, CompressionError::TooLarge { .. }), "{error}");
            }
        }
        assert!(inflate_member(&member[..member.len() - 9], None, 1 << 20).is_err());
        assert!(inflate_member(b"", None, 10).is_err());
        assert_eq!(inflate_member(&gzip(b""), None, 0).unwrap(), b"");
    }

    #[test]
    fn frames_are_uncompressed_with_and_without_a_hint() {
        let data = vec![b'x'; 100_000];
        let (head, tail) = data.split_at(70_000);
        let (whole, known) = (zstd(&data), zstd::bulk::compress(&data, 3).unwrap());
        let pieces = [zstd(head), skippable(b"between"), zstd(tail)].concat();
        assert!(is_modest_frame(&whole) && is_modest_frame(&known) && !is_modest_frame(&pieces));
        for input in [whole, known, pieces] {
            for hint in [
                None,
                Some(0),
                Some(99_999),
                Some(100_000),
                Some(200_000),
                Some(u64::MAX),
            ] {
                assert_eq!(decompress_zstd(&input, hint, 100_000).unwrap(), data, "{hint:?}");
                let error = decompress_zstd(&input, hint, 99_999).unwrap_err();
                assert!(matches!(error, CompressionError::TooLarge { .. }), "{error}");
                assert!(decompress_zstd(&input[..input.len() - 1], hint, 100_000).is_err());
            }
        }
        assert!(decompress_zstd(b"", Some(5), 10).is_err() && decompress_zstd(b"", None, 10).is_err());
    }

    #[test]
    fn chunks_inside_a_stream() {
        let data: Vec<u8> = (0..50_000_u32).flat_map(u32::to_le_bytes).collect();
        let (head, tail) = data.split_at(60_000);
        for encoding in ALL {
            let one = compress(encoding, &data);
            let two = [compress(encoding, head), compress(encoding, tail)].concat();
            let mut followed = one.clone();
            followed.extend_from_slice(&[0xff; 40]);
            for stream in [&one, &two, &followed] {
                for (offset, size) in [
                    (0, data.len()),
                    (0, 1),
                    (70_000, 100),
                    (59_000, 2000),
                    (data.len() - 1, 1),
                ] {
                    let chunk = decode_chunk(encoding, stream, offset as u64, size as u64, 1 << 20).unwrap();
                    assert!(chunk == data[offset..offset + size], "{encoding} {offset} {size}");
                }
            }
            let error = decode_chunk(encoding, &one, 1, data.len() as u64, 1 << 20).unwrap_err();
            assert!(matches!(error, CompressionError::Short { .. }), "{error}");
            for (offset, size) in [(0, 1001), (1000, 1), (u64::MAX, 1), (1, u64::MAX)] {
                let error = decode_chunk(encoding, &one, offset, size, 1000).unwrap_err();
                assert!(matches!(error, CompressionError::TooLarge { .. }), "{error}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_an_answer_or_an_error(
            mut data in proptest::collection::vec(any::<u8>(), 0..300),
            encoding in prop_oneof![Just(Encoding::Gzip), Just(Encoding::Zstd)],
            magic in any::<bool>(),
            offset in 0..400_u64,
            size in 0..400_u64,
        ) {
            if magic {
                let valid = compress(encoding, &data);
                for (to, from) in data.iter_mut().zip(valid).take(20) {
                    *to = from;
                }
            }
            if let Ok(chunk) = decode_chunk(encoding, &data, offset, size, 500) {
                prop_assert_eq!(chunk.len() as u64, size);
            }
            let _ = inflate_member(&data, Some(size), 500).is_ok_and(|output| output.len() <= 500);
            let _ = decode(data, Guard { output_max: 1 << 20, ..Guard::default() });
        }
    }
}
