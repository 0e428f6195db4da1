//! The compressors, one of each per thread, and the names under which they stand in an annotation.
//!
//! Streams carry neither time nor name, and every call starts from nothing: equal data gives equal bytes.

use std::io;

use libdeflater::{CompressionLvl, Compressor, Decompressor};
use zstd::zstd_safe::{CParameter, Strategy};

use super::WriteError;
use super::sink::{GZIP_TOC_LEVEL, ZSTD_TOC_LEVEL};

/// Version of libdeflate, which [`libdeflater`] contains: its minor version is the library's.
const LIBDEFLATE: &str = "1.26";
/// Version of zlib-rs, which compresses the TOC of eStargz.
const ZLIB_RS: &str = "0.6.8";
/// Highest level of libdeflate.
pub(super) const GZIP_LEVEL_MAX: i32 = 12;
/// Highest level of zstd.
pub(super) const ZSTD_LEVEL_MAX: i32 = 22;

/// Lowest level of zstd whose windows exceed 4 MiB (`ZSTD_defaultCParameters` in zstd's `lib/compress/clevels.h`).
const ZSTD_LARGE_WINDOWS: i32 = 17;
/// Binary logarithm of the largest window, in bytes: the tables grow with it, to 500 MB at level 22.
const ZSTD_WINDOW_LOG_MAX: u32 = 22;
/// Level of zstd at which chunks of up to [`SMALL_CHUNK`] bytes are searched faster than zstd would: with one table of hashes instead of
/// two. That takes 17 % less time and makes the chunks of Debian's /usr 1 to 2 % larger, which is what Podman makes of them at
/// its own level 3. Higher levels are zstd's.
const FASTER_LEVEL: i32 = 3;
/// As many bytes as all but the last of zstd's tables of parameters are for (`lib/compress/clevels.h`).
const SMALL_CHUNK: usize = 256 << 10;
/// Binary logarithm of the table's entries: 256 KiB stay in a core's own cache.
const SMALL_HASH_LOG: u32 = 16;
/// Fewest bytes that a match has.
const SMALL_MATCH_MIN: u32 = 5;
/// Level for headers between chunks, up to [`FASTER_LEVEL`]. Nothing reads them by themselves, and what is left of them when matches
/// are taken out is so little that building a code for it takes most of the time: 12,000 headers take 24 ms instead of 58, for
/// 0.2 % more bytes in the blob.
const HEADERS_LEVEL: i32 = -1;
/// Largest buffer that each thread keeps to use it again, in bytes: more than a batch of small files needs, little beside a
/// compressor's own memory.
pub(super) const THREAD_ROOM_MAX: usize = 1 << 20;

/// How bytes are compressed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Coding {
    /// Gzip members.
    Gzip(CompressionLvl, i32),
    /// Zstd frames.
    Zstd(i32),
    /// Not at all.
    Plain,
}

impl Coding {
    pub(super) fn gzip(level: i32) -> Result<Self, WriteError> {
        let out_of_range = || WriteError::Level {
            level,
            max: GZIP_LEVEL_MAX,
        };
        match level {
            1..=GZIP_LEVEL_MAX => CompressionLvl::new(level)
                .map(|checked| Self::Gzip(checked, level))
                .map_err(|_| out_of_range()),
            _ => Err(out_of_range()),
        }
    }

    pub(super) fn zstd(level: i32) -> Result<Self, WriteError> {
        match level {
            1..=ZSTD_LEVEL_MAX => Ok(Self::Zstd(level)),
            _ => Err(WriteError::Level {
                level,
                max: ZSTD_LEVEL_MAX,
            }),
        }
    }

    /// Most threads that compress this way: memory is to stay below 256 MiB.
    pub(super) fn threads_max(self) -> usize {
        match self {
            // With windows of 4 MiB some 80, 60, 25 and 5 MB per thread.
            Self::Zstd(20..) => 1,
            Self::Zstd(12..) => 2,
            Self::Zstd(6..) => 4,
            _ => usize::MAX,
        }
    }

    /// Compressor, version and level; `None` where nothing is compressed. `has_toc`: chunks are compressed each by itself.
    pub(super) fn name(self, has_toc: bool) -> Option<String> {
        match self {
            Self::Gzip(_, level) if has_toc => Some(format!(
                "libdeflate {LIBDEFLATE} level {level}, TOC zlib-rs {ZLIB_RS} level {GZIP_TOC_LEVEL}"
            )),
            Self::Gzip(_, level) => Some(format!("libdeflate {LIBDEFLATE} level {level}")),
            Self::Zstd(level) => {
                let window = if level >= ZSTD_LARGE_WINDOWS {
                    ", window 4 MiB"
                } else {
                    ""
                };
                let faster = if has_toc && level == FASTER_LEVEL {
                    ", chunks to 256 KiB fast"
                } else {
                    ""
                };
                let headers = if has_toc && level <= FASTER_LEVEL {
                    format!(", headers level {HEADERS_LEVEL}")
                } else {
                    String::new()
                };
                let toc = if has_toc {
                    format!(", TOC level {ZSTD_TOC_LEVEL}")
                } else {
                    String::new()
                };
                let version = zstd::zstd_safe::version_string();
                Some(format!(
                    "zstd {version} level {level}{window}{faster}{headers}{toc}"
                ))
            }
            Self::Plain => None,
        }
    }

    pub(super) fn start(self) -> io::Result<Coder> {
        Ok(match self {
            Self::Gzip(level, _) => Coder::Gzip(Compressor::new(level), Vec::new()),
            Self::Zstd(level) => {
                let mut compressor = zstd::bulk::Compressor::new(level)?;
                if level >= ZSTD_LARGE_WINDOWS {
                    compressor.window_log(ZSTD_WINDOW_LOG_MAX)?;
                }
                Coder::Zstd(compressor)
            }
            Self::Plain => Coder::Plain,
        })
    }

    /// A compressor for chunks and what stands between them.
    pub(super) fn start_chunks(self) -> io::Result<ChunkCoder> {
        let (small, headers) = match self {
            Self::Zstd(level) => {
                let mut small = None;
                if level == FASTER_LEVEL {
                    let mut compressor = zstd::bulk::Compressor::new(level)?;
                    compressor.set_parameter(CParameter::Strategy(Strategy::ZSTD_fast))?;
                    compressor.set_parameter(CParameter::HashLog(SMALL_HASH_LOG))?;
                    compressor.set_parameter(CParameter::MinMatch(SMALL_MATCH_MIN))?;
                    small = Some(Coder::Zstd(compressor));
                }
                let headers = match level {
                    ..=FASTER_LEVEL => Some(Coder::Zstd(zstd::bulk::Compressor::new(HEADERS_LEVEL)?)),
                    _ => None,
                };
                (small, headers)
            }
            Self::Gzip(..) | Self::Plain => (None, None),
        };
        Ok(ChunkCoder {
            usual: self.start()?,
            small,
            headers,
        })
    }

    pub(super) fn start_undoing(self) -> io::Result<Undo> {
        Ok(match self {
            Self::Gzip(..) => Undo::Gzip(Decompressor::new()),
            Self::Zstd(_) => Undo::Zstd(zstd::bulk::Decompressor::new()?),
            Self::Plain => Undo::Plain,
        })
    }
}

/// A compressor.
pub(super) enum Coder {
    Gzip(Compressor, Vec<u8>),
    Zstd(zstd::bulk::Compressor<'static>),
    Plain,
}

impl Coder {
    /// Appends `data` to `out` as one gzip member (libdeflate writes a fixed header: no time, no name, operating system 255) or
    /// one zstd frame.
    pub(super) fn append(&mut self, data: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Gzip(compressor, room) => {
                let lied = |_| io::Error::other("libdeflate needs more than it said");
                let bound = compressor.gzip_compress_bound(data.len());
                if bound > THREAD_ROOM_MAX {
                    let start = out.len();
                    out.resize(start + bound, 0);
                    let length = compressor
                        .gzip_compress(data, out.get_mut(start..).unwrap_or_default())
                        .map_err(lied)?;
                    out.truncate(start + length);
                    return Ok(());
                }
                if room.len() < bound {
                    room.resize(bound, 0);
                }
                let length = compressor.gzip_compress(data, room).map_err(lied)?;
                out.extend_from_slice(room.get(..length).unwrap_or_default());
            }
            Self::Zstd(compressor) => {
                out.reserve(zstd::compress_bound(data.len()));
                let end = out.len() as u64;
                let mut room = io::Cursor::new(out);
                room.set_position(end);
                compressor.compress_to_buffer(data, &mut room)?;
            }
            Self::Plain => out.extend_from_slice(data),
        }
        Ok(())
    }
}

/// Compressors for what a blob with a TOC consists of.
pub(super) struct ChunkCoder {
    usual: Coder,
    /// For chunks of no more than [`SMALL_CHUNK`] bytes, where that is another one.
    small: Option<Coder>,
    /// For what stands between chunks, where that is another one.
    headers: Option<Coder>,
}

impl ChunkCoder {
    /// The same for everything.
    pub(super) fn plain(usual: Coder) -> Self {
        Self {
            usual,
            small: None,
            headers: None,
        }
    }

    /// Appends a chunk, see [`Coder::append`].
    pub(super) fn append(&mut self, chunk: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        let small = self.small.as_mut().filter(|_| chunk.len() <= SMALL_CHUNK);
        small.unwrap_or(&mut self.usual).append(chunk, out)
    }

    /// Appends what stands between two chunks.
    pub(super) fn append_headers(&mut self, headers: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        self.headers
            .as_mut()
            .unwrap_or(&mut self.usual)
            .append(headers, out)
    }
}

/// The other way.
pub(super) enum Undo {
    Gzip(Decompressor),
    Zstd(zstd::bulk::Decompressor<'static>),
    Plain,
}

impl Undo {
    /// Appends the `size` bytes that `data` holds to `out`; `false` if it holds something else.
    pub(super) fn append(&mut self, data: &[u8], size: usize, out: &mut Vec<u8>) -> bool {
        let start = out.len();
        out.resize(start + size, 0);
        let room = out.get_mut(start..).unwrap_or_default();
        match self {
            Self::Gzip(decompressor) => decompressor.gzip_decompress(data, room) == Ok(size),
            Self::Zstd(decompressor) => decompressor
                .decompress_to_buffer(data, room)
                .is_ok_and(|length| length == size),
            Self::Plain if data.len() == size => {
                room.copy_from_slice(data);
                true
            }
            Self::Plain => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the workspace is built with.
    fn locked(package: &str) -> String {
        let lock = include_str!("../../Cargo.lock");
        let at = lock.find(&format!("name = \"{package}\"\n")).unwrap();
        let version = lock[at..].split("version = \"").nth(1).unwrap();
        version.split('"').next().unwrap().to_owned()
    }

    #[test]
    fn the_annotation_names_what_was_built() {
        assert!(locked("libdeflate-sys").starts_with(&format!("{LIBDEFLATE}.")));
        assert_eq!(locked("zlib-rs"), ZLIB_RS);
        assert!(locked("zstd-sys").ends_with(&format!("+zstd.{}", zstd::zstd_safe::version_string())));
        let names = [
            (Coding::gzip(7).unwrap().name(false), "libdeflate 1.26 level 7"),
            (
                Coding::gzip(7).unwrap().name(true),
                "libdeflate 1.26 level 7, TOC zlib-rs 0.6.8 level 6",
            ),
            (Coding::zstd(3).unwrap().name(false), "zstd 1.5.7 level 3"),
            (
                Coding::zstd(19).unwrap().name(false),
                "zstd 1.5.7 level 19, window 4 MiB",
            ),
            (
                Coding::zstd(9).unwrap().name(true),
                "zstd 1.5.7 level 9, TOC level 1",
            ),
            (
                Coding::zstd(3).unwrap().name(true),
                "zstd 1.5.7 level 3, chunks to 256 KiB fast, headers level -1, TOC level 1",
            ),
            (
                Coding::zstd(2).unwrap().name(true),
                "zstd 1.5.7 level 2, headers level -1, TOC level 1",
            ),
            (
                Coding::zstd(17).unwrap().name(true),
                "zstd 1.5.7 level 17, window 4 MiB, TOC level 1",
            ),
        ];
        for (name, expected) in names {
            assert_eq!(name.as_deref(), Some(expected));
        }
    }

    #[test]
    fn what_was_compressed_comes_back() {
        let data = b"some text, some text, some other text".repeat(100);
        let large = data.repeat(100);
        for level in [1, 3, 9] {
            let coding = Coding::zstd(level).unwrap();
            let (mut coder, mut undo) = (coding.start_chunks().unwrap(), coding.start_undoing().unwrap());
            for data in [&data[..], b"", &large] {
                let (mut chunk, mut headers) = (Vec::new(), Vec::new());
                coder.append(data, &mut chunk).unwrap();
                coder.append_headers(data, &mut headers).unwrap();
                for packed in [chunk, headers] {
                    let mut out = Vec::new();
                    assert!(undo.append(&packed, data.len(), &mut out));
                    assert_eq!(out, data);
                }
            }
        }
        for coding in [Coding::gzip(1).unwrap(), Coding::zstd(19).unwrap(), Coding::Plain] {
            let (mut coder, mut undo) = (coding.start().unwrap(), coding.start_undoing().unwrap());
            for data in [&data[..], b"", b"x"] {
                let (mut packed, mut out) = (b"before".to_vec(), b"before".to_vec());
                coder.append(data, &mut packed).unwrap();
                assert!(undo.append(&packed[6..], data.len(), &mut out));
                assert_eq!(out[6..], *data);
                assert!(!undo.append(&packed[6..], data.len() + 1, &mut out));
            }
        }
    }
}
