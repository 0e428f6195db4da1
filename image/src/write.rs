//! Making layer blobs of every format: an uncompressed tar stream in, the blob out, in one pass over the input and on
//! several cores. Called by `peel convert` and `peel optimize`, and by tests that need layers.
//!
//! ```text
//! write -> intake:    tar entries; chunks -> pool (compress, hash) -> spool;   order of the entries is open
//!       -> order      prioritized files first
//!       -> assembly:  spool -> pool (compress headers, inflate chunks) -> output;   TOC, DiffID, blob digest
//! ```
//!
//! Every chunk is a gzip member of its own, so it can be compressed before its place is known; the headers between chunks
//! make up further members. Work is cut by content alone and put together in the input's order, and members carry no time:
//! the output is the same bytes for the same input and options, whatever the number of threads. Headers are copied byte
//! for byte wherever they mean the same at another place.
//!
//! Memory is bounded by the work in flight (tens of MiB), a hundred-odd bytes per entry, and the TOC.

mod assembly;
mod intake;
pub mod order;
mod pool;
mod spool;

use std::collections::{BTreeMap, HashMap};
use std::io::{self, Read, Seek, Write};
use std::thread;

use libdeflater::{CompressionLvl, Compressor};

use crate::digest::Digest;
use crate::estargz::index::RECORDS_MAX;
use crate::estargz::{TOC_JSON_MAX, TOC_NAME};
use crate::path::EntryPath;
use crate::tar::TarError;
use crate::{annotations, media};
use order::{Item, Missing, Order, Orphans, sort};
use pool::WorkerLost;
use spool::Spool;

/// Upstream's chunk size, for a `chunk_size` of 0.
pub const DEFAULT_CHUNK_SIZE: u64 = 4 << 20;
/// Largest chunk size: a reader holds a chunk in memory, compressed and not, and so does the writer several times.
pub const MAX_CHUNK_SIZE: u64 = 32 << 20;
/// Level of gzip and eStargz. On 300 MB of Debian's /usr in 12,000 files eStargz takes 0.6 of the CPU time of `pigz -6` and gives 1.06
/// of its size (level 6: 0.45 and 1.065; 8: 0.9 and 1.055; 9: 1.2 and 1.054): what is missing is the context across files, which no
/// level brings back.
pub const DEFAULT_GZIP_LEVEL: i32 = 7;
/// Level of zstd and zstd:chunked: that of zstd itself.
pub const DEFAULT_ZSTD_LEVEL: i32 = 3;
/// Most threads: beyond that the one that reads the input is the bottleneck.
const MAX_THREADS: usize = 32;

/// How a blob is made.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// What is made.
    pub format: Format,
    /// Files that come first, in this order; see [`order`]. Formats without a table of contents ignore it.
    pub prioritized: Vec<Vec<u8>>,
    /// Whether prioritized files move although the layer has no entries for their parent directories.
    pub orphans: Orphans,
    /// Threads that compress; 0 for one per core. The output does not depend on it.
    pub threads: usize,
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

/// The two kinds of zstd:chunked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Dialect {
    /// That of Podman, Buildah, Skopeo and CRI-O.
    #[default]
    Podman,
    /// That of stargz-snapshotter and nerdctl.
    Stargz,
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
    /// Entries of the input that are not in the blob because a later one has the same path.
    pub dropped: u64,
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
    /// zstd refused to compress.
    #[error("zstd failed")]
    Zstd(#[source] io::Error),
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
    /// Readers would refuse the layer.
    #[error("the layer has more than {RECORDS_MAX} entries, chunks and extended attributes")]
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

/// Turns the uncompressed tar stream `input` into a blob. `spool` is an empty temporary file; it grows at most to the size of
/// the blob, holds nothing of use afterwards, and is not touched by formats that keep the stream as it is. The whole of `input`
/// is read, bytes after the end of the archive included. `output` is written from first to last byte while the blob is made
/// and never read.
pub fn write<R, S, W>(input: R, spool: S, output: W, options: &Options) -> Result<Written, WriteError>
where
    R: Read,
    S: Read + Write + Seek,
    W: Write + Send,
{
    let settings = Settings::new(options)?;
    let spool = Spool::new(spool).map_err(WriteError::Spool)?;
    let intake = intake::run(input, spool, &settings, !options.prioritized.is_empty())?;
    let Order { first, rest, missing } = {
        let items: Vec<Item<'_>> = intake
            .names
            .iter()
            .map(|(path, link)| Item {
                path,
                link: link.as_ref(),
            })
            .collect();
        sort(&items, &options.prioritized, options.orphans)
    };
    drop(intake.names);
    let places = |indices: &[usize]| -> Vec<_> {
        let place = |index: &usize| intake.places.get(*index).copied();
        indices.iter().filter_map(place).collect()
    };
    let (first, rest) = (places(&first), places(&rest));
    let entries = (first.len() + rest.len()) as u64;
    let dropped = intake.places.len() as u64 - entries;
    drop(intake.places);
    let spool = intake.spool.rewind().map_err(WriteError::Spool)?;
    let assembled = assembly::run(spool, output, &settings, &first, intake.landmark, &rest)?;
    let prefetch_end = (!options.prioritized.is_empty()).then_some(assembled.landmark);
    let mut annotations = BTreeMap::from([
        (
            annotations::TOC_DIGEST.to_owned(),
            assembled.toc_digest.to_string(),
        ),
        (
            annotations::TOC_OFFSET.to_owned(),
            assembled.toc_offset.to_string(),
        ),
        (
            annotations::UNCOMPRESSED_SIZE.to_owned(),
            assembled.uncompressed_size.to_string(),
        ),
    ]);
    if let Some(end) = prefetch_end.filter(|_| !first.is_empty()) {
        annotations.insert(annotations::PREFETCH_END.to_owned(), end.to_string());
    }
    Ok(Written {
        diff_id: assembled.diff_id,
        blob_digest: assembled.blob_digest,
        blob_size: assembled.blob_size,
        uncompressed_size: assembled.uncompressed_size,
        media_type: media::OCI_LAYER_GZIP,
        annotations,
        external_toc: None,
        toc_digest: Some(assembled.toc_digest),
        toc_offset: Some(assembled.toc_offset),
        prefetch_end,
        not_found: missing,
        entries,
        dropped,
        file_ends: HashMap::new(),
    })
}

/// The options, checked.
struct Settings {
    chunk_size: u64,
    level: CompressionLvl,
    threads: usize,
}

impl Settings {
    fn new(options: &Options) -> Result<Self, WriteError> {
        let Format::Estargz {
            chunk_size, level, ..
        } = options.format
        else {
            return Err(WriteError::Options("only eStargz is written so far"));
        };
        let chunk_size = match chunk_size {
            0 => DEFAULT_CHUNK_SIZE,
            size @ 1..=MAX_CHUNK_SIZE => size,
            size => return Err(WriteError::ChunkSize(size)),
        };
        let out_of_range = || WriteError::Level { level, max: 12 };
        let level = match level {
            level @ 1..=12 => CompressionLvl::new(level).map_err(|_| out_of_range())?,
            _ => return Err(out_of_range()),
        };
        let threads = match options.threads {
            0 => thread::available_parallelism().map_or(1, usize::from),
            threads => threads,
        };
        Ok(Self {
            chunk_size,
            level,
            threads: threads.min(MAX_THREADS),
        })
    }
}

/// Appends `data` to `out` as one gzip member. libdeflate writes a fixed header: no time, no name, operating system 255.
fn append_member(compressor: &mut Compressor, data: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    let mut room = compressor.gzip_compress_bound(data.len());
    loop {
        out.resize(start + room, 0);
        if let Some(space) = out.get_mut(start..)
            && let Ok(length) = compressor.gzip_compress(data, space)
        {
            out.truncate(start + length);
            return;
        }
        // Not reached while the bound holds.
        room = room.saturating_mul(2);
    }
}

#[cfg(test)]
mod tests;
