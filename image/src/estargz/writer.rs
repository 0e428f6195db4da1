//! Making an eStargz blob: an uncompressed tar stream in, the blob out, in one pass over the input and on several cores.
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

use std::io::{self, Read, Seek, Write};
use std::thread;

use libdeflater::{CompressionLvl, Compressor};

use super::index::RECORDS_MAX;
use super::order::{Item, Missing, Order, Orphans, sort};
use super::pool::WorkerLost;
use super::spool::Spool;
use super::{TOC_JSON_MAX, TOC_NAME};
use crate::digest::Digest;
use crate::tar::TarError;

/// Upstream's chunk size, for [`Options::chunk_size`] 0.
pub const DEFAULT_CHUNK_SIZE: u64 = 4 << 20;
/// Largest chunk size: a reader holds a chunk in memory, compressed and not, and so does the writer several times.
pub const MAX_CHUNK_SIZE: u64 = 32 << 20;
/// See [`Options::level`]. On 300 MB of Debian's /usr in 12,000 files it takes 0.6 of the CPU time of `pigz -6` and gives 1.06 of its
/// size (level 6: 0.45 and 1.065; 8: 0.9 and 1.055; 9: 1.2 and 1.054): what is missing is the context across files, which no
/// level brings back.
pub const DEFAULT_LEVEL: i32 = 7;
/// Most threads: beyond that the one that reads the input is the bottleneck.
const MAX_THREADS: usize = 32;

/// How a blob is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Bytes per chunk; 0 for [`DEFAULT_CHUNK_SIZE`].
    pub chunk_size: u64,
    /// libdeflate's compression level, 1 to 12.
    pub level: i32,
    /// Files that come first, in this order; see [`super::order`]. With an empty list the layer says that there is nothing
    /// to prefetch.
    pub prioritized: Vec<Vec<u8>>,
    /// Whether prioritized files move although the layer has no entries for their parent directories.
    pub orphans: Orphans,
    /// Threads that compress; 0 for one per core. The output does not depend on it.
    pub threads: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            chunk_size: 0,
            level: DEFAULT_LEVEL,
            prioritized: Vec::new(),
            orphans: Orphans::default(),
            threads: 0,
        }
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
    /// sha256 of the TOC's JSON, for the annotation.
    pub toc_digest: Digest,
    /// First byte of the TOC in the blob.
    pub toc_offset: u64,
    /// End of the prioritized files in the blob; `None` if the list was empty.
    pub prefetch_end: Option<u64>,
    /// Length of the uncompressed blob in bytes, for the annotation.
    pub uncompressed_size: u64,
    /// Prioritized paths that were not moved to the front.
    pub not_found: Vec<Missing>,
    /// Entries of the input that are in the blob.
    pub entries: u64,
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
    /// The temporary file failed.
    #[error("the temporary file of the eStargz writer failed; is its disk full?")]
    Spool(#[source] io::Error),
    /// The output failed.
    #[error("writing the eStargz blob failed")]
    Output(#[source] io::Error),
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
    #[error(
        "the file {TOC_NAME} would have more than {TOC_JSON_MAX} bytes; use a larger chunk size or fewer files"
    )]
    TocTooLarge,
    /// The chunk size is out of range.
    #[error("chunk size {0}: give 1 to {MAX_CHUNK_SIZE}, or 0 for {DEFAULT_CHUNK_SIZE}")]
    ChunkSize(u64),
    /// The level is out of range.
    #[error("compression level {0}: give 1 to 12")]
    Level(i32),
    /// A thread could not be started.
    #[error("a compression thread could not be started")]
    Thread(#[source] io::Error),
    /// A thread ended without a result.
    #[error("a compression thread was lost")]
    ThreadLost,
    /// A gzip member of our own did not inflate to what went in: broken memory or disk.
    #[error("the temporary file of the eStargz writer returned other bytes than were written")]
    SpoolDamaged,
}

impl From<WorkerLost> for WriteError {
    fn from(_: WorkerLost) -> Self {
        Self::ThreadLost
    }
}

/// Turns the uncompressed tar stream `input` into an eStargz blob. `spool` is an empty temporary file; it grows to about
/// the size of the blob and holds nothing of use afterwards. The whole of `input` is read, bytes after the end of the
/// archive included.
pub fn write<R, S, W>(input: R, spool: S, output: W, options: &Options) -> Result<Written, WriteError>
where
    R: Read,
    S: Read + Write + Seek,
    W: Write,
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
    drop(intake.places);
    let spool = intake.spool.rewind().map_err(WriteError::Spool)?;
    let assembled = assembly::run(spool, output, &settings, &first, intake.landmark, &rest)?;
    Ok(Written {
        diff_id: assembled.diff_id,
        blob_digest: assembled.blob_digest,
        blob_size: assembled.blob_size,
        toc_digest: assembled.toc_digest,
        toc_offset: assembled.toc_offset,
        prefetch_end: (!options.prioritized.is_empty()).then_some(assembled.landmark),
        uncompressed_size: assembled.uncompressed_size,
        not_found: missing,
        entries,
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
        let chunk_size = match options.chunk_size {
            0 => DEFAULT_CHUNK_SIZE,
            size @ 1..=MAX_CHUNK_SIZE => size,
            size => return Err(WriteError::ChunkSize(size)),
        };
        let level = match options.level {
            level @ 1..=12 => CompressionLvl::new(level).map_err(|_| WriteError::Level(level))?,
            level => return Err(WriteError::Level(level)),
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
