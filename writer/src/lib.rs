//! Making layer blobs of every format: an uncompressed tar stream in, the blob out, in one pass over the input and on
//! several cores. Called by `peel convert` and `peel optimize`, and by tests that need layers.
//!
//! ```text
//! write -> intake:    tar entries; chunks -> pool (compress, hash) -> outlet
//!          straight:  output;   TOC, tar-split, DiffID, blob digest               no entry moves, none replaces another
//!          spooled:   spool                                                       the order of the entries is open
//!       -> normal     what is left where entries replace others (replay runs them)
//!       -> order      prioritized files first, with what they depend on
//!       -> assembly:  spool -> pool (compress headers) -> output;   TOC, tar-split, DiffID, blob digest
//! ```
//!
//! Every chunk is a gzip member or zstd frame of its own, so it can be compressed before its place is known; the headers
//! between chunks make up further streams. (Where chunks share streams, `min_chunk_size`, they are compressed once more when
//! the order is known.) Either way the blob has the same bytes: headers are cut into streams by their content alone. Work is cut by content alone and put together in the input's order, and streams carry no time: the
//! output is the same bytes for the same input and options, whatever the number of threads. Headers are copied byte for byte
//! wherever they mean the same at another place.
//!
//! | format | what becomes of the tar stream |
//! |---|---|
//! | eStargz, zstd:chunked (stargz) | a landmark is added, an eStargz TOC too, what follows the last entry is left out; what later entries replace, as `normal` says, and TOC and landmarks of the input are dropped |
//! | eStargz with `keep_diff_id` | kept byte for byte, or an error |
//! | zstd:chunked (Podman) | kept byte for byte, unless files move, or entries replace others (`normal`), or an entry means something else to Podman (GNU sparse files, global PAX headers, volume labels): such entries get new headers |
//! | gzip, zstd, plain | kept byte for byte, but for TOC and landmarks of an eStargz layer: [`mod@plain`] |
//!
//! Memory is bounded by the work in flight (below 100 MiB), the first 16 MiB of the spool where there is one (none of it with
//! chunks above 4 MiB), about 80 bytes per entry beside its path and as much again while the order is made, and the compressed TOC: with a
//! million entries below 256 MiB. The spool holds the compressed chunks and, compressed many at a time, the headers: less than
//! the blob.

mod assembly;
mod blob;
mod coder;
mod finish;
mod hashing;
mod intake;
mod names;
mod normal;
pub mod order;
mod outlet;
mod pack;
pub mod plain;
mod pool;
mod record;
mod replay;
mod room;
mod seen;
mod sink;
mod spool;
mod straight;
mod tables;
mod tape;
mod toc;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Seek, Write};
use std::thread;

use assembly::{Item, Sequence};
use coder::Coding;
use normal::{Normal, Rules};
use order::{Missing, Order, Orphans, sort};
use outlet::Spooled;
use peel_hash::Digest;
use peel_image::estargz::index::RECORDS_MAX;
use peel_image::estargz::{NO_PREFETCH_LANDMARK, PREFETCH_LANDMARK, TOC_JSON_MAX, TOC_NAME};
use peel_image::path::EntryPath;
use peel_image::tar::TarError;
use pool::WorkerLost;
use spool::Spool;
use toc::Shape;

pub use peel_image::zstd_chunked::Dialect;

/// Upstream's chunk size, for a `chunk_size` of 0.
pub const DEFAULT_CHUNK_SIZE: u64 = 4 << 20;
/// Largest chunk size: a reader holds a chunk in memory, compressed and not, and so does the writer several times.
pub const MAX_CHUNK_SIZE: u64 = 32 << 20;
/// Level of gzip and eStargz. On 300 MB of Debian's /usr in 12,000 files eStargz takes 0.6 of the CPU time of `pigz -6` and gives 1.06
/// of its size (level 6: 0.45 and 1.065; 8: 0.9 and 1.055; 9: 1.2 and 1.054): what is missing is the context across files, which no
/// level brings back. Sharing members does: with `min_chunk_size` 256 KiB the size is that of `pigz -6`, for 0.75 of its CPU time.
pub const DEFAULT_GZIP_LEVEL: i32 = 7;
/// Level of zstd and zstd:chunked: that of zstd itself.
pub const DEFAULT_ZSTD_LEVEL: i32 = 3;
/// Headers of entries without content share a stream up to this size in bytes, so that memory stays bounded.
const HEADERS_PER_STREAM: usize = 1 << 20;
/// Most threads where chunks are large: fewer of those are in flight.
const LARGE_CHUNK_THREADS_MAX: usize = 8;
/// Most threads: beyond that the one that reads the input is the bottleneck, and each has buffers for a chunk.
const MAX_THREADS: usize = 16;

/// How a blob is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// What is made.
    pub format: Format,
    /// Files that come first, in this order; see [`order`]. Formats without a table of contents ignore it.
    pub prioritized: Vec<Vec<u8>>,
    /// Whether prioritized files move although the layer has no entries for their parent directories.
    pub orphans: Orphans,
    /// What becomes of entries that others replace.
    pub duplicates: Duplicates,
    /// Threads that compress; 0 for one per core. The output does not depend on it.
    pub threads: usize,
}

/// What is done about entries of formats with a TOC that others replace, or lead through. The bytes of a blob do not depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Duplicates {
    /// The blob says what is left in the end. Nothing comes out before the input has ended.
    #[default]
    Drop,
    /// The first one is an error, [`WriteError::Duplicate`], if no files are prioritized and chunks share no streams. The blob comes
    /// out while the input is read then, and nothing is spooled. A caller that has the input once more begins again.
    Refuse,
}

/// The format of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Gzip members with a TOC of their places.
    Estargz {
        /// Most bytes of a file in one chunk; 0 for [`DEFAULT_CHUNK_SIZE`].
        chunk_size: u64,
        /// Least bytes, uncompressed, after which a new gzip member may begin: small files share one. 0: none do.
        min_chunk_size: u64,
        /// libdeflate's compression level, 1 to 12.
        level: i32,
        /// The TOC is no part of the blob but goes to an image beside it: [`Written::external_toc`].
        external_toc: bool,
        /// The tar stream stays what it is, byte for byte, and so does the DiffID. Needs `external_toc` and allows no
        /// prioritized files.
        keep_diff_id: bool,
    },
    /// Zstd frames with a TOC of their places.
    ZstdChunked {
        /// Whose TOC.
        dialect: Dialect,
        /// Most bytes of a file in one chunk, in the stargz dialect; 0 for [`DEFAULT_CHUNK_SIZE`]. Podman's dialect cuts by
        /// content and wants 0.
        chunk_size: u64,
        /// Zstd's compression level, 1 to 22.
        level: i32,
    },
    /// An ordinary layer in gzip.
    Gzip {
        /// libdeflate's compression level, 1 to 12.
        level: i32,
    },
    /// An ordinary layer in zstd.
    Zstd {
        /// Zstd's compression level, 1 to 22.
        level: i32,
    },
    /// An ordinary layer, not compressed.
    Plain,
}

impl Format {
    /// eStargz with nothing out of the ordinary.
    pub const ESTARGZ: Self = Self::Estargz {
        chunk_size: 0,
        min_chunk_size: 0,
        level: DEFAULT_GZIP_LEVEL,
        external_toc: false,
        keep_diff_id: false,
    };

    /// zstd:chunked at the usual level.
    pub const fn zstd_chunked(dialect: Dialect) -> Self {
        Self::ZstdChunked {
            dialect,
            chunk_size: 0,
            level: DEFAULT_ZSTD_LEVEL,
        }
    }
}

impl Format {
    /// Compressor, version and level, as the annotation of a written layer names them; `None` if nothing is compressed, or if the level
    /// is out of range.
    pub fn compressor(self) -> Option<String> {
        let (coding, has_toc) = match self {
            Self::Estargz { level, .. } => (Coding::gzip(level), true),
            Self::Gzip { level } => (Coding::gzip(level), false),
            Self::ZstdChunked { level, .. } => (Coding::zstd(level), true),
            Self::Zstd { level } => (Coding::zstd(level), false),
            Self::Plain => return None,
        };
        coding.ok()?.name(has_toc)
    }
}

impl Default for Format {
    fn default() -> Self {
        Self::ESTARGZ
    }
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// sha256 of the uncompressed blob, which is a tar stream: the layer's DiffID.
    pub diff_id: Digest,
    /// sha256 of the blob.
    pub blob_digest: Digest,
    /// Length of the blob in bytes.
    pub blob_size: u64,
    /// Length of the uncompressed blob in bytes.
    pub uncompressed_size: u64,
    /// OCI's media type of the blob.
    pub media_type: &'static str,
    /// Everything that the layer's descriptor must say for readers of this format.
    pub annotations: BTreeMap<String, String>,
    /// The gzip blob with the TOC that belongs into the image beside this one; only with `external_toc`.
    pub external_toc: Option<Vec<u8>>,
    /// sha256 of the TOC's JSON, in formats that have one.
    pub toc_digest: Option<Digest>,
    /// First byte of the compressed TOC in the blob, in formats where it is there.
    pub toc_offset: Option<u64>,
    /// End of the prioritized files in the blob; `None` if the list was empty.
    pub prefetch_end: Option<u64>,
    /// Prioritized paths that were not moved to the front.
    pub not_found: Vec<Missing>,
    /// Entries of the input that are in the blob.
    pub entries: u64,
    /// Entries of the input that are not in the blob because later ones took their places.
    pub dropped: u64,
    /// Entries of the blob that its TOC does not list because later ones took their places.
    pub hidden: u64,
    /// Where in the blob the bytes of each prioritized file end, parents and link targets included; files without bytes
    /// are not here.
    pub file_ends: HashMap<EntryPath, u64>,
}

/// Why a blob cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The input is no tar stream that a layer can have.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// The input broke off inside a file.
    #[error("reading the content of {entry:?} from the tar stream failed")]
    Content {
        /// The file's name.
        entry: String,
        /// What happened.
        #[source]
        source: io::Error,
    },
    /// The input failed.
    #[error("reading the tar stream failed")]
    Input(#[source] io::Error),
    /// The temporary file failed.
    #[error("the temporary file of the layer writer failed; is its disk full?")]
    Spool(#[source] io::Error),
    /// The output failed.
    #[error("writing the layer blob failed")]
    Output(#[source] io::Error),
    /// A compressor failed, for lack of memory as a rule.
    #[error("compressing the layer failed")]
    Compressor(#[source] io::Error),
    /// A layer whose DiffID is to be kept has an entry whose bytes cannot be kept.
    #[error(
        "entry {entry:?} is sparse, or stands beside bytes that belong to no entry: the DiffID of this layer cannot be kept"
    )]
    NotLossless {
        /// The entry's name.
        entry: String,
    },
    /// JSON texts are UTF-8; a name that is not cannot stand in a TOC.
    #[error("entry {entry:?}: {field} is not UTF-8, which a TOC cannot hold; leave this layer as it is")]
    NotUtf8 {
        /// The entry's name, with replacement characters.
        entry: String,
        /// What is not UTF-8.
        field: &'static str,
    },
    /// An entry's TOC cannot be written as JSON.
    #[error("the TOC cannot be written as JSON")]
    Json(#[from] serde_json::Error),
    /// The layer has to be run to its end to know what it leaves, which [`Duplicates::Refuse`] does not allow.
    #[error("{entry:?} takes the place of an earlier entry of the layer, or leads through one")]
    Duplicate {
        /// The path.
        entry: String,
    },
    /// No tool can unpack the layer.
    #[error(
        "entry {entry:?}: {what}; unpackers would refuse this layer, and no table of contents can describe it"
    )]
    Impossible {
        /// The entry's path.
        entry: String,
        /// What is wrong.
        what: &'static str,
    },
    /// Tools unpack the layer, but no table of contents can say what it leaves.
    #[error(
        "entry {entry:?}: {what}; no table of contents can describe that: convert this layer to gzip or zstd instead"
    )]
    Indescribable {
        /// The entry's path.
        entry: String,
        /// What is in the way.
        what: &'static str,
    },
    /// The table of contents would not mean what the layer does: a fault of this writer.
    #[error(
        "entry {entry:?}: the table of contents would show something else than the layer leaves; convert this layer to gzip or \
         zstd instead, and report this fault"
    )]
    Meaning {
        /// The path that would differ.
        entry: String,
    },
    /// Readers would refuse the layer.
    #[error(
        "the layer has more than {RECORDS_MAX} entries, chunks and extended attributes, or its paths lead through more directories \
         than readers take; use a larger chunk size, or fewer files and directories"
    )]
    TooMany,
    /// Readers would refuse the TOC.
    #[error("the TOC would have more than {TOC_JSON_MAX} bytes; use a larger chunk size or fewer files")]
    TocTooLarge,
    /// A layer whose DiffID is to be kept holds what this writer would have to add.
    #[error(
        "the layer holds a file {TOC_NAME}: it is eStargz already, and its DiffID cannot be kept; convert it without keep_diff_id"
    )]
    AlreadyEstargz,
    /// The chunk size is out of range.
    #[error("chunk size {0}: give 1 to {MAX_CHUNK_SIZE}, or 0 for {DEFAULT_CHUNK_SIZE}")]
    ChunkSize(u64),
    /// The level is out of range.
    #[error("compression level {level}: give 1 to {max}")]
    Level {
        /// What was given.
        level: i32,
        /// The highest one.
        max: i32,
    },
    /// Two options exclude each other.
    #[error("{0}")]
    Options(&'static str),
    /// A thread could not be started.
    #[error("a compression thread could not be started")]
    Thread(#[source] io::Error),
    /// A thread ended without a result.
    #[error("a compression thread was lost")]
    ThreadLost,
    /// What the spool gave back did not inflate to what went in: broken memory or disk.
    #[error("the temporary file of the layer writer returned other bytes than were written")]
    SpoolDamaged,
}

impl From<WorkerLost> for WriteError {
    fn from(_: WorkerLost) -> Self {
        Self::ThreadLost
    }
}

/// Turns the uncompressed tar stream `input` into a blob. `spool` is an empty temporary file; it stays smaller than the blob,
/// holds nothing of use afterwards, and is not touched where nothing has to wait in it: by formats without a TOC, and with
/// [`Duplicates::Refuse`] as it says there. The whole of `input` is read, bytes after the end of the
/// archive included. `output` is written from first to last byte while the blob is made and never read; after an error it may
/// hold any part of a blob.
pub fn write<R, S, W>(input: R, spool: S, output: W, options: &Options) -> Result<Written, WriteError>
where
    R: Read,
    S: Read + Write + Seek,
    W: Write + Send,
{
    let threads = match options.threads {
        0 => thread::available_parallelism().map_or(1, usize::from),
        threads => threads,
    }
    .min(MAX_THREADS);
    match options.format {
        Format::Gzip { level } => plain::write(input, output, Coding::gzip(level)?, threads),
        Format::Zstd { level } => plain::write(input, output, Coding::zstd(level)?, threads),
        Format::Plain => plain::write(input, output, Coding::Plain, threads),
        Format::Estargz { .. } | Format::ZstdChunked { .. } => {
            let settings = Settings::new(options, threads)?;
            let stays = options.duplicates == Duplicates::Refuse;
            if stays && !settings.prioritized && settings.min_chunk_size == 0 {
                let (assembled, entries) = straight::run(input, output, &settings)?;
                let mut written = finish::finish(assembled, &settings, false)?;
                written.entries = entries;
                return Ok(written);
            }
            chunked(input, spool, output, options, &settings)
        }
    }
}

/// Writes the formats that have a TOC, through the spool.
fn chunked<R, S, W>(
    input: R,
    spool: S,
    output: W,
    options: &Options,
    settings: &Settings,
) -> Result<Written, WriteError>
where
    R: Read,
    S: Read + Write + Seek,
    W: Write + Send,
{
    let memory = if settings.has_large_chunks() {
        0
    } else {
        spool::MEMORY
    };
    let spool = Spool::new(spool, memory).map_err(WriteError::Spool)?;
    let spooled = Spooled::new(spool, settings.min_chunk_size > 0);
    let (mut spooled, hashed) = thread::scope(|scope| {
        let hash = hashing::start(scope, !settings.prioritized, settings.waiting())?;
        let spooled = intake::run(input, spooled, hash.work, settings)?;
        let (hashed, _) = hash.thread.join().map_err(|_| WriteError::ThreadLost)?;
        Ok::<_, WriteError>((spooled, hashed))
    })?;
    let found = spooled.take_places(settings.landmark().is_some())?;
    let count = spooled.names.len();
    let rules = Rules {
        keeps_stream: settings.keeps_diff_id,
        compares_names: settings.split_file,
    };
    let mut normal = Normal::of(&spooled.names, rules)?;
    let order = {
        let renamed = normal.names.take();
        let names = renamed.as_ref().unwrap_or(&spooled.names);
        if normal.is_movable && !settings.keeps_diff_id {
            sort(names, &options.prioritized, options.orphans)
        } else {
            Order::unmoved(names.len(), &options.prioritized)
        }
    };
    let records = order.first.iter().chain(&order.rest);
    normal.check(&spooled.names, records.filter_map(|index| normal.record(*index)))?;
    drop(spooled.names);
    let items = |indices: &[usize]| -> Result<Vec<Item>, WriteError> {
        let item = |index: &usize| {
            let record = normal.record(*index)?;
            Some((found.entries.get(record).copied()?, u32::try_from(record).ok()))
        };
        indices
            .iter()
            .map(|index| item(index).ok_or(WriteError::ThreadLost))
            .collect()
    };
    let (first, mut rest) = (items(&order.first)?, items(&order.rest)?);
    let entries = first.len() + rest.len();
    rest.extend(found.trailer.iter().map(|place| (*place, None)));
    let missing = order.missing;
    drop((order.first, order.rest, found.entries));
    let sequence = Sequence {
        first: &first,
        landmark: found.landmark,
        rest: &rest,
        normal: &normal,
        hashed: hashed.filter(|_| first.is_empty() && entries == count && normal.keeps_all()),
    };
    let spool = spooled.spool.rewind().map_err(WriteError::Spool)?;
    let assembled = assembly::run(spool, output, settings, sequence)?;
    let mut written = finish::finish(assembled, settings, !first.is_empty())?;
    written.not_found = missing;
    written.entries = entries as u64;
    written.dropped = (count - entries) as u64;
    written.hidden = normal.hidden;
    Ok(written)
}

/// How files are cut.
#[derive(Debug, Clone, Copy)]
enum Split {
    /// Into chunks of so many bytes.
    Fixed(usize),
    /// As Podman does.
    Rolling,
}

/// The options of a format with a TOC, checked.
struct Settings {
    coding: Coding,
    shape: Shape,
    split: Split,
    min_chunk_size: u64,
    has_external_toc: bool,
    keeps_diff_id: bool,
    /// What is not rewritten stays as it was to the last byte.
    is_exact: bool,
    /// Tar-split data is written.
    split_file: bool,
    /// There is a list of files that come first.
    prioritized: bool,
    threads: usize,
}

impl Settings {
    fn new(options: &Options, threads: usize) -> Result<Self, WriteError> {
        let fixed = |size: u64| {
            let size = if size == 0 { DEFAULT_CHUNK_SIZE } else { size };
            usize::try_from(size)
                .ok()
                .filter(|_| size <= MAX_CHUNK_SIZE)
                .map(Split::Fixed)
                .ok_or(WriteError::ChunkSize(size))
        };
        let prioritized = !options.prioritized.is_empty();
        let mut settings = match options.format {
            Format::Estargz {
                chunk_size,
                min_chunk_size,
                level,
                external_toc,
                keep_diff_id,
            } => {
                if keep_diff_id && !external_toc {
                    return Err(WriteError::Options(
                        "a TOC in the blob changes the DiffID; to keep the DiffID, the TOC must be external",
                    ));
                }
                if keep_diff_id && prioritized {
                    return Err(WriteError::Options(
                        "files that move change the DiffID; to keep the DiffID, prioritize none",
                    ));
                }
                if min_chunk_size > MAX_CHUNK_SIZE {
                    return Err(WriteError::ChunkSize(min_chunk_size));
                }
                Self {
                    coding: Coding::gzip(level)?,
                    shape: Shape::Estargz,
                    split: fixed(chunk_size)?,
                    min_chunk_size,
                    has_external_toc: external_toc,
                    keeps_diff_id: keep_diff_id,
                    is_exact: keep_diff_id,
                    split_file: false,
                    prioritized,
                    threads,
                }
            }
            Format::ZstdChunked {
                dialect,
                chunk_size,
                level,
            } => {
                let coding = Coding::zstd(level)?;
                let is_podman = dialect == Dialect::Podman;
                if is_podman && chunk_size != 0 {
                    return Err(WriteError::Options(
                        "Podman's dialect of zstd:chunked cuts files by their content; a chunk size is for the stargz dialect",
                    ));
                }
                Self {
                    coding,
                    shape: dialect.into(),
                    split: if is_podman {
                        Split::Rolling
                    } else {
                        fixed(chunk_size)?
                    },
                    min_chunk_size: 0,
                    has_external_toc: false,
                    keeps_diff_id: false,
                    is_exact: is_podman,
                    split_file: is_podman,
                    prioritized,
                    threads: threads.min(coding.threads_max()),
                }
            }
            Format::Gzip { .. } | Format::Zstd { .. } | Format::Plain => {
                return Err(WriteError::Options("this format has no TOC"));
            }
        };
        if settings.has_large_chunks() {
            settings.threads = settings.threads.min(LARGE_CHUNK_THREADS_MAX);
        }
        Ok(settings)
    }

    /// The landmark that the format wants.
    fn landmark(&self) -> Option<&'static str> {
        match (self.shape, self.prioritized) {
            (Shape::Podman, _) => None,
            _ if self.keeps_diff_id => None,
            (_, true) => Some(PREFETCH_LANDMARK),
            (_, false) => Some(NO_PREFETCH_LANDMARK),
        }
    }

    /// Whether chunks are so large that few of them may lie around if memory is to stay below 256 MiB.
    fn has_large_chunks(&self) -> bool {
        let chunk_size = match self.split {
            Split::Fixed(size) => size as u64,
            Split::Rolling => 0,
        };
        chunk_size.max(self.min_chunk_size) > DEFAULT_CHUNK_SIZE
    }

    /// Buffers that may wait between two threads, where each holds a chunk or more: each of them is in memory beside the work in
    /// flight, also when the output is slow.
    fn waiting(&self) -> usize {
        if self.has_large_chunks() { 0 } else { 2 }
    }

    /// Length of a full chunk.
    fn chunk_size(&self) -> u64 {
        match self.split {
            Split::Fixed(size) => size as u64,
            Split::Rolling => u64::MAX,
        }
    }
}

#[cfg(test)]
mod tests;
