//! Arguments of `peel convert` and `peel optimize`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::{NAMES, ProcessArgs, PullArgs, elsewhere};

/// Largest `--*-chunk-size`, in bytes: the writer's.
const CHUNK_MAX: u64 = peel_writer::MAX_CHUNK_SIZE;

/// Whose zstd:chunked is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DialectArg {
    /// That of Podman, Buildah, Skopeo and CRI-O
    Podman,
    /// That of stargz-snapshotter and nerdctl
    Stargz,
}

/// The lazy formats, and how their layers are written.
#[derive(Debug, Clone, Default, Args)]
pub struct LazyArgs {
    /// Write eStargz layers; the default
    #[arg(long)]
    pub estargz: bool,
    /// gzip level of eStargz layers, 1 (fast) to 12 (small) [default: 9]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=12))]
    pub estargz_compression_level: Option<i32>,
    /// Cut files into chunks of this many bytes; 0 is 4 MiB [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(0..=CHUNK_MAX))]
    pub estargz_chunk_size: Option<u64>,
    /// Put small files into one gzip stream until it holds this many bytes: smaller layers, more bytes per read; 0 is off [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(0..=CHUNK_MAX))]
    pub estargz_min_chunk_size: Option<u64>,
    /// Threads that compress a layer, whatever its format; 0 for one per core. The result does not depend on it
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub estargz_parallelism: usize,
    /// Keep the tables of contents out of the layers, in an image TAG-esgztoc beside the target
    #[arg(long)]
    pub estargz_external_toc: bool,
    /// Write zstd:chunked layers
    #[arg(long)]
    pub zstdchunked: bool,
    /// zstd level of zstd:chunked layers, 1 (fast) to 22 (small) [default: 3]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=22))]
    pub zstdchunked_compression_level: Option<i32>,
    /// Cut files into chunks of this many bytes, in the stargz dialect; 0 is 4 MiB [default: 0]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u64).range(0..=CHUNK_MAX))]
    pub zstdchunked_chunk_size: Option<u64>,
    /// Whose zstd:chunked: neither reads the other's lazily (peel reads both) [default: podman]
    #[arg(long, value_enum, value_name = "DIALECT")]
    pub dialect: Option<DialectArg>,
}

/// Which images of an index are written.
#[derive(Debug, Clone, Default, Args)]
pub struct PlatformArgs {
    /// Platform to take from a multi-platform image: os/architecture[/variant]; this machine's if not given. Of several, given
    /// one by one or joined by commas, an index is written
    #[arg(
        long,
        value_name = "PLATFORM",
        value_delimiter = ',',
        conflicts_with = "all_platforms"
    )]
    pub platform: Vec<String>,
    /// Take all platforms of a multi-platform image, and write an index. Attestations are left out: they describe the image that
    /// was
    #[arg(long)]
    pub all_platforms: bool,
}

/// Which layers need not be converted.
#[derive(Debug, Clone, Copy, Default, Args)]
pub struct ReuseArgs {
    /// Keep layers that have the format already and of which no file is put first; not with --estargz-external-toc
    #[arg(long)]
    pub reuse: bool,
    /// Convert every layer, also those that the image which TARGET names says were made of the same layers in the same way
    #[arg(long)]
    pub reconvert: bool,
}

/// `peel convert`
#[derive(Debug, Args)]
#[command(after_help = NAMES, after_long_help = convert_help())]
pub struct ConvertArgs {
    /// The lazy formats.
    #[command(flatten)]
    pub lazy: LazyArgs,
    /// Put the files that this record names first (JSON lines, as `optimize --record-out` writes them)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub estargz_record_in: Option<PathBuf>,
    /// Keep the layers' bytes, and so their DiffIDs; needs --estargz-external-toc, and no file can be put first
    #[arg(long)]
    pub estargz_keep_diff_id: bool,
    /// Put the files that this record names first
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub zstdchunked_record_in: Option<PathBuf>,
    /// Write ordinary gzip layers
    #[arg(long)]
    pub gzip: bool,
    /// gzip level of ordinary layers, 1 (fast) to 12 (small) [default: 7]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=12))]
    pub gzip_compression_level: Option<i32>,
    /// Write ordinary zstd layers
    #[arg(long)]
    pub zstd: bool,
    /// zstd level of ordinary layers, 1 (fast) to 22 (small) [default: 3]
    #[arg(long, value_name = "LEVEL", value_parser = clap::value_parser!(i32).range(1..=22))]
    pub zstd_compression_level: Option<i32>,
    /// Write layers that are not compressed
    #[arg(long)]
    pub uncompress: bool,
    /// Which layers need not be converted.
    #[command(flatten)]
    pub reuse: ReuseArgs,
    /// Write OCI media types; always so, because Docker's manifests have no room for what lazy formats need
    #[arg(long)]
    pub oci: bool,
    /// Which images of an index are written.
    #[command(flatten)]
    pub platforms: PlatformArgs,
    /// Image to read
    pub source: String,
    /// Image to write: a registry's or oci:DIR[:TAG]
    pub target: String,
}

/// What follows the flags in the long help of `peel convert`.
fn convert_help() -> String {
    format!(
        "One of --estargz, --zstdchunked, --gzip, --zstd and --uncompress says what is written. The last three go back to \
         ordinary layers; zstd:chunked in Podman's dialect and eStargz with --estargz-keep-diff-id kept the layers' bytes, so \
         those get their old DiffIDs again.\n\nPrints the digest of what TARGET names then, and `extra image: NAME` for an \
         image beside it.\n\n{}\n\n{NAMES}",
        elsewhere::help()
    )
}

/// What follows the flags in the long help of `peel optimize`.
fn optimize_help() -> String {
    format!("{}\n\n{NAMES}", elsewhere::help())
}

/// `peel optimize`
#[derive(Debug, Args)]
#[command(after_help = NAMES, after_long_help = optimize_help())]
pub struct OptimizeArgs {
    /// Seconds to watch the container for, it is killed then [default: 10, or 300 with --wait-on-line]
    #[arg(long, value_name = "SECONDS", conflicts_with = "wait_on_signal")]
    pub period: Option<u64>,
    /// Watch until a line of the container's output holds this text
    #[arg(long, value_name = "TEXT", conflicts_with = "wait_on_signal")]
    pub wait_on_line: Option<String>,
    /// Watch until SIGINT (Ctrl-C) instead of for a period
    #[arg(long)]
    pub wait_on_signal: bool,
    /// Do not run the image: convert it with no file first
    #[arg(long, conflicts_with_all = ["record_in", "prefetch_list", "record_out"])]
    pub no_optimize: bool,
    /// Write what was read, in order, as JSON lines
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub record_out: Option<PathBuf>,
    /// Use this record instead of running the image; several are merged
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "prefetch_list")]
    pub record_in: Vec<PathBuf>,
    /// Use this list of paths and patterns (* ? [] **, `#` comments) instead of running the image
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub prefetch_list: Option<PathBuf>,
    /// The lazy formats.
    #[command(flatten)]
    pub lazy: LazyArgs,
    /// Which layers need not be converted.
    #[command(flatten)]
    pub reuse: ReuseArgs,
    /// Write OCI media types; always so, because Docker's manifests have no room for what lazy formats need
    #[arg(long)]
    pub oci: bool,
    /// Pass standard input on
    #[arg(short)]
    pub interactive: bool,
    /// Network of the container
    #[arg(long, alias = "network", value_enum, default_value_t = super::run::Net::Host, value_name = "NET")]
    pub net: super::run::Net,
    /// Use the network of the host; the default
    #[arg(long, conflicts_with = "net")]
    pub net_host: bool,
    /// Working directory instead of the image's
    #[arg(long, value_name = "DIR")]
    pub cwd: Option<PathBuf>,
    /// Arguments instead of the image's command, as a JSON array
    #[arg(long, value_name = "JSON", conflicts_with = "command")]
    pub args: Option<String>,
    /// Entry point instead of the image's, as a JSON array or one program
    #[arg(long, value_name = "JSON")]
    pub entrypoint: Option<String>,
    /// What the process is given.
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Which images of an index are written. Only this machine's is run; the others are converted with no file first.
    #[command(flatten)]
    pub platforms: PlatformArgs,
    /// How the source is loaded.
    #[command(flatten)]
    pub how: PullArgs,
    /// Image to run and read
    pub source: String,
    /// Image to write: a registry's or oci:DIR[:TAG]
    pub target: String,
    /// Command and arguments to run instead of the image's
    #[arg(last = true)]
    pub command: Vec<OsString>,
}
