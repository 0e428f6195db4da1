//! Arguments of `peel convert` and `peel optimize`.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueHint};

use super::{LoadArgs, NAMES, ProcessArgs};

/// How eStargz layers are written.
#[derive(Debug, Clone, Copy, Args)]
pub struct EstargzArgs {
    /// Cut files into chunks of this many bytes; 0 is 4 MiB
    #[arg(long, value_name = "BYTES", default_value_t = 0)]
    pub estargz_chunk_size: u64,
    /// gzip level of the layers, 1 (fast) to 12 (small)
    #[arg(long, value_name = "LEVEL", default_value_t = 9, value_parser = clap::value_parser!(i32).range(1..=12))]
    pub estargz_compression_level: i32,
}

/// `peel convert`
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
pub struct ConvertArgs {
    /// Write eStargz layers; the default
    #[arg(long)]
    pub estargz: bool,
    /// Put the files that this record names first (JSON lines, as `optimize --record-out` writes them)
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub estargz_record_in: Option<PathBuf>,
    /// How layers are written.
    #[command(flatten)]
    pub layers: EstargzArgs,
    /// Write OCI media types; always so
    #[arg(long)]
    pub oci: bool,
    /// Platform to take from a multi-platform image: os/architecture[/variant]; this machine's if not given
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Image to read
    pub source: String,
    /// Image to write: a registry's or oci:DIR[:TAG]
    pub target: String,
}

/// `peel optimize`
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
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
    /// Write what was read, in order, as JSON lines
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub record_out: Option<PathBuf>,
    /// Use this record instead of running the image; several are merged
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath, conflicts_with = "prefetch_list")]
    pub record_in: Vec<PathBuf>,
    /// Use this list of paths and patterns (* ? [] **, `#` comments) instead of running the image
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub prefetch_list: Option<PathBuf>,
    /// How layers are written.
    #[command(flatten)]
    pub layers: EstargzArgs,
    /// Keep layers that are valid eStargz already and of which nothing was read
    #[arg(long)]
    pub reuse: bool,
    /// Write OCI media types; always so
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
    /// How the source is loaded.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Image to run and read
    pub source: String,
    /// Image to write: a registry's or oci:DIR[:TAG]
    pub target: String,
    /// Command and arguments to run instead of the image's
    #[arg(last = true)]
    pub command: Vec<OsString>,
}
