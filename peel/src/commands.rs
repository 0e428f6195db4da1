//! One module per command, and what they share: how a command line becomes a call and an error becomes an exit status.

mod cat;
mod checks;
mod completions;
mod convert;
mod daemon;
mod demo;
mod doctor;
mod inspect;
mod look;
mod ls;
mod man;
mod mount;
mod optimize;
mod record;
mod run;
mod umount;

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Parser;
use peel_fs::PullPolicy;
use peel_registry::{ClientOptions, ImageName};

use crate::cli::{Cli, Command, Global, LoadArgs, Pull, Verify, elsewhere};
use crate::describe::describe;
use crate::logging;
use crate::protocol::{MountRequest, WritableLayer};

/// Exit status of `peel run` when peel itself failed, as Docker has it.
const RUN_FAILED: u8 = 125;

/// The whole program: parses the command line of this process and does what it says.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and versions go to standard output and are no failure.
            let _ = error.print();
            if let Some(instead) = elsewhere::instead(&error) {
                let _ = writeln!(std::io::stderr(), "\n{instead}");
            }
            let failed = error.use_stderr();
            return match (failed, asks_to_run(std::env::args_os())) {
                (false, _) => ExitCode::SUCCESS,
                (true, true) => ExitCode::from(RUN_FAILED),
                (true, false) => ExitCode::from(2),
            };
        }
    };
    let global = &cli.global;
    if !matches!(cli.command, Command::Daemon(_)) {
        logging::to_stderr(global.verbose, global.log_format);
    }
    let result = match &cli.command {
        Command::Run(args) => run::run(global, args),
        Command::Mount(args) => mount::run(global, args).map(done),
        Command::Umount(args) => umount::run(global, args).map(done),
        Command::Optimize(args) => optimize::run(global, args).map(done),
        Command::Convert(args) => convert::run(global, args).map(done),
        Command::Inspect(args) => inspect::run(global, args).map(done),
        Command::Ls(args) => ls::run(global, args).map(done),
        Command::Cat(args) => cat::run(global, args).map(done),
        Command::Demo(args) => demo::run(global, args),
        Command::Doctor => doctor::run(global),
        Command::Daemon(args) => daemon::run(global, args),
        Command::Completions(args) => completions::run(args).map(done),
        Command::Man(args) => man::run(args).map(done),
    };
    match result {
        Ok(code) => code,
        Err(error) if is_broken_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "peel: {}", describe(&error));
            ExitCode::from(if matches!(cli.command, Command::Run(_)) {
                RUN_FAILED
            } else {
                1
            })
        }
    }
}

fn done((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

/// Whether a command line that could not be parsed was one of `peel run`.
fn asks_to_run(args: impl Iterator<Item = OsString>) -> bool {
    args.skip(1)
        .find(|arg| !arg.to_string_lossy().starts_with('-'))
        .is_some_and(|arg| arg == "run")
}

/// `peel ls IMAGE | head` is not a failure.
fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

/// An image's name as the user wrote it, relative paths resolved here: the server has another working directory.
fn image_name(text: &str) -> anyhow::Result<ImageName> {
    let name: ImageName = text.parse()?;
    Ok(name.absolute(&std::env::current_dir().context("working directory")?))
}

/// How registries are reached, from the flags and the environment.
fn client_options(global: &Global) -> anyhow::Result<ClientOptions> {
    let mut options = ClientOptions::from_env();
    options.plain_http = global.plain_http;
    options.tls_ca = global
        .tls_ca
        .as_deref()
        .map(readable)
        .transpose()
        .context("--tls-ca")?;
    if let Some(file) = &global.authfile {
        options.auth_files = vec![readable(file).context("--authfile")?];
    }
    for file in &mut options.auth_files {
        *file = std::path::absolute(&*file).context("credential file")?;
    }
    Ok(options)
}

/// A file that a flag names must be there; a default one need not.
fn readable(path: &Path) -> anyhow::Result<PathBuf> {
    std::fs::File::open(path).with_context(|| path.display().to_string())?;
    std::path::absolute(path).context("path")
}

/// What the server is asked for by the flags of `run`, `mount` and `optimize`.
fn mount_request(
    global: &Global,
    image: &str,
    load: &LoadArgs,
    layer: WritableLayer,
) -> anyhow::Result<MountRequest> {
    Ok(MountRequest {
        image: image_name(image)?.to_string(),
        platform: load.platform.clone(),
        pull: match load.how.pull {
            Pull::Always => PullPolicy::Always,
            Pull::Missing => PullPolicy::Missing,
            Pull::Never => PullPolicy::Never,
        },
        client: client_options(global)?,
        prefetch: !load.how.no_prefetch,
        eager: load.how.verify == Verify::Full,
        check_by_download: load.how.verify == Verify::Background,
        layer,
    })
}

/// Says so if an image is for another platform than was asked for. As everywhere else, what is not in an index is taken all the same.
fn warn_of_platform(image: &str, config: &str, platform: Option<&str>) {
    let other = peel_registry::document::configuration(config.as_bytes())
        .ok()
        .and_then(|config| config.mismatch(platform));
    if let Some(other) = other {
        let other = crate::describe::printable(other.as_bytes());
        let wanted = platform.unwrap_or("this machine's");
        let _ = writeln!(
            std::io::stderr(),
            "peel: {image} is for the platform {other}, not {wanted}; its programs may not run"
        );
    }
}

/// Prints one JSON object and a newline on standard output.
fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    serde_json::to_writer(&mut out, value).map_err(std::io::Error::from)?;
    writeln!(out)?;
    Ok(())
}

/// A runtime for commands that talk to registries themselves.
fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("runtime")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_is_recognised_among_flags() {
        let asks = |line: &str| asks_to_run(line.split(' ').map(OsString::from));
        assert!(asks("peel --json run --bad"));
        assert!(!asks("peel mount run"));
        assert!(!asks("peel"));
    }
}
