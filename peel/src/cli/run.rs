//! Arguments of `peel run`, and those about the process that `peel optimize` shares with it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, ValueEnum, ValueHint};

use super::{LoadArgs, NAMES};

/// Network of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// That of the host
    Host,
    /// Only loopback
    None,
}

impl From<Net> for peel_sandbox::Network {
    fn from(net: Net) -> Self {
        match net {
            Net::Host => Self::Host,
            Net::None => Self::None,
        }
    }
}

/// What the process in a container is given instead of, or beside, what the image says.
#[derive(Debug, Clone, Default, Args)]
pub struct ProcessArgs {
    /// Set a variable: NAME=VALUE, or NAME to pass it on from here
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    pub env: Vec<OsString>,
    /// Read variables from a file, one NAME=VALUE or NAME per line, `#` begins a comment line
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub env_file: Vec<PathBuf>,
    /// User and group, by name or id, instead of the image's
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,
}

/// `peel run`
#[derive(Debug, Args)]
#[command(
    after_help = NAMES,
    after_long_help = "Exit status: that of the container; 128+N when signal N ended it; 125 when peel itself \
        failed, 126 when the command could not be executed, 127 when it was not found.\n\nImage names:\n  \
        [docker://]REGISTRY/REPOSITORY[:TAG][@DIGEST]   in a registry; short names mean docker.io\n  \
        oci:DIR[:TAG]                                   in an OCI image layout\n  \
        oci-archive:FILE[:TAG]                          in a tar file of such a layout\n  \
        docker-archive:FILE[:NAME:TAG]                  in a tar file that `docker save` wrote"
)]
pub struct RunArgs {
    /// Allocate a terminal
    #[arg(short, long)]
    pub tty: bool,
    /// Pass standard input on
    #[arg(short, long)]
    pub interactive: bool,
    /// Remove the container when it ends; always so
    #[arg(long)]
    pub rm: bool,
    /// Network of the container
    #[arg(long, alias = "network", value_enum, default_value_t = Net::Host, value_name = "NET")]
    pub net: Net,
    /// Program to run instead of the image's entry point
    #[arg(long, value_name = "PROGRAM")]
    pub entrypoint: Option<OsString>,
    /// Working directory instead of the image's
    #[arg(short, long, value_name = "DIR")]
    pub workdir: Option<PathBuf>,
    /// Signal that SIGTERM is passed on as, instead of the image's
    #[arg(long, value_name = "SIGNAL", value_parser = signal)]
    pub stop_signal: Option<String>,
    /// What the process is given.
    #[command(flatten)]
    pub process: ProcessArgs,
    /// Bind a host path into the container
    #[arg(short, long, value_name = "SOURCE:DESTINATION[:ro]")]
    pub volume: Vec<OsString>,
    /// Name of the container: its host name unless --hostname is given
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Host name of the container
    #[arg(long, value_name = "NAME")]
    pub hostname: Option<String>,
    /// Make the root file system read-only for the program; binds, /dev and /etc/hosts and its kind stay as they are
    #[arg(long)]
    pub read_only: bool,
    /// How the image is loaded.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Write when it was resolved, mounted, ready and done, and what was fetched, as JSON
    #[arg(long, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub timing_file: Option<PathBuf>,
    /// Say more on standard error; twice for everything
    // The global flag without its short form, which is --volume here.
    #[arg(long, action = clap::ArgAction::Count, help_heading = "Options of every command")]
    pub verbose: u8,
    /// Image to run
    pub image: String,
    /// Command and arguments instead of the image's
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    pub command: Vec<OsString>,
}

/// A signal's name or number.
fn signal(text: &str) -> Result<String, String> {
    match peel_sandbox::signal_number(text) {
        Some(_) => Ok(text.to_owned()),
        None => {
            Err("no such signal; SIGTERM, TERM, 15 and SIGRTMIN+3 are known ways to write one".to_owned())
        }
    }
}
