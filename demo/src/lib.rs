//! `peel demo`: the main job on one machine, offline. An image made here is pushed to an embedded registry, optimized,
//! and started cold in three ways over a shaped link.
//!
//! Called by the command alone, which runs as a process of its own for every start that is measured.
//!
//! ```text
//! image -> registry <- link <- full_pull, `peel run`      run drives all of them, report says what came out
//! ```

mod full_pull;
pub mod image;
mod report;
mod run;

use std::process::ExitCode;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::ValueHint;

use image::Origin;

/// `peel demo`
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Round trip time of the shaped link in milliseconds
    #[arg(long, value_name = "MS", default_value_t = 20)]
    pub rtt: u32,
    /// Bandwidth of the shaped link in Mbit/s
    #[arg(long, value_name = "MBIT", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    pub bandwidth: u32,
    /// How often each way is measured; the median is shown
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub runs: u32,
    /// Where the files of the image that is made here come from
    #[arg(long, value_enum, default_value_t = Origin::Auto, value_name = "ORIGIN")]
    pub origin: Origin,
    /// Directory that keeps the image that is made here for the next time [default: /var/cache/peel/demo]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub cache_dir: Option<PathBuf>,
    /// Directory in which a temporary one for registry and stores is made [default: /var/tmp]
    #[arg(long, value_name = "DIR", value_hint = ValueHint::DirPath)]
    pub work_dir: Option<PathBuf>,
    /// Keep that temporary directory
    #[arg(long)]
    pub keep: bool,
    /// A real image from its own registry instead of one made here
    pub image: Option<String>,
    /// What to run in it instead of its own command
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// What the command gives beside the arguments.
#[expect(missing_debug_implementations, reason = "it holds a function")]
pub struct Host<'a> {
    /// Print one JSON object instead of the table.
    pub json: bool,
    /// Talk to the registry of a given image without TLS.
    pub plain_http: bool,
    /// Certificates that vouch for that registry beside the machine's own.
    pub tls_ca: Option<&'a Path>,
    /// File with credentials for it.
    pub authfile: Option<&'a Path>,
    /// The process id of the server of a store; `None` if none runs.
    pub server_pid: &'a dyn Fn(&Path) -> anyhow::Result<Option<u32>>,
}

/// Runs `peel demo`.
///
/// # Errors
///
/// A step cannot be done: no root, no image, a start that fails.
pub fn run(host: &Host<'_>, args: &Args) -> anyhow::Result<ExitCode> {
    run::run(host, args)
}
