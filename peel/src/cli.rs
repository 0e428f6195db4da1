//! What can be written on a command line. This is the only definition: help, shell completions and man pages are
//! generated from it.
//!
//! Flags that `docker`, `podman` or `ctr-remote` have too carry the same names and meanings here.

mod convert;
pub mod elsewhere;
mod run;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum, ValueHint};

pub use convert::{ConvertArgs, DialectArg, LazyArgs, OptimizeArgs, PlatformArgs, ReuseArgs};
pub use run::{ProcessArgs, RunArgs};

/// How image names are written; shown below the help of every command that takes one.
const NAMES: &str = "\
Image names:
  [docker://]REGISTRY/REPOSITORY[:TAG][@DIGEST]   in a registry; short names mean docker.io
  oci:DIR[:TAG]                                   in an OCI image layout
  oci-archive:FILE[:TAG]                          in a tar file of such a layout
  docker-archive:FILE[:NAME:TAG]                  in a tar file that `docker save` wrote";

/// Starts containers before their images have arrived.
#[derive(Debug, Parser)]
#[command(
    name = "peel",
    version,
    about,
    max_term_width = 100,
    after_help = NAMES,
    long_about = "Starts containers before their images have arrived.\n\n\
        `peel run` and `peel mount` serve an image lazily: files are fetched from the registry when they are read, \
        verified, and kept in the store. `peel optimize` runs an image once, records what it reads while it starts, \
        and writes it anew with those files first, so that the next start needs few requests."
)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags that every command has. Without a heading of their own, help mixes them with those of the command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Options of every command")]
pub struct Global {
    /// Directory that keeps objects, images and the writable layers of mounts; private to root
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "PEEL_STORE",
        default_value = "/var/lib/peel",
        value_hint = ValueHint::DirPath
    )]
    pub store: PathBuf,
    /// Print one JSON object on standard output instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// Speak http instead of https to every registry
    #[arg(long, global = true)]
    pub plain_http: bool,
    /// PEM file of certificate authorities to trust beside the system's
    #[arg(long, global = true, value_name = "FILE", value_hint = ValueHint::FilePath)]
    pub tls_ca: Option<PathBuf>,
    /// Credentials to use instead of Docker's and Podman's own files
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        env = "REGISTRY_AUTH_FILE",
        hide_env_values = true,
        value_hint = ValueHint::FilePath
    )]
    pub authfile: Option<PathBuf>,
    /// Say more on standard error; twice for everything. After `run`, -v is Docker's short form of --volume
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Form of log lines on standard error
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text, value_name = "FORMAT")]
    pub log_format: LogFormat,
}

/// Form of log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object per line.
    Json,
}

/// When an image's name is looked up in its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pull {
    /// Always
    Always,
    /// Only when the store does not know the name
    Missing,
    /// Never: an unknown name is an error
    Never,
}

/// How far an image is verified before it is used. Every chunk is verified before a byte of it is read in any case.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Verify {
    /// Each chunk when it is needed; a layer that is here in full is checked as a whole where that needs no second download
    #[value(alias = "chunks")]
    Lazy,
    /// The same, and a layer that is here in full may be downloaded a second time for its check
    Background,
    /// Every layer downloaded and checked whole first
    Full,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a container from an image, lazily
    Run(Box<RunArgs>),
    /// Mount the root file system of an image
    Mount(MountArgs),
    /// Unmount what `peel mount` mounted and remove its writable layer
    Umount(UmountArgs),
    /// Run an image, record what it reads, write it anew with those files first
    Optimize(Box<OptimizeArgs>),
    /// Write an image anew in a lazy format, or back in an ordinary one, without running it
    Convert(Box<ConvertArgs>),
    /// Tell per layer how it is kept and whether it can be served lazily
    Inspect(InspectArgs),
    /// List a directory of an image without pulling it
    Ls(LsArgs),
    /// Print a file of an image without pulling it
    Cat(CatArgs),
    /// Show the main job on one machine: cold starts compared over a slow link
    Demo(peel_demo::Args),
    /// Tell what this machine lacks to serve images lazily, and what to do about it
    Doctor,
    /// Serve a store; started by the other commands when they need it
    Daemon(DaemonArgs),
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Write the manual pages into a directory
    Man(ManArgs),
}

/// How an image is found and loaded: shared by `run` and `mount`.
#[derive(Debug, Clone, Args)]
pub struct LoadArgs {
    /// Platform to take from a multi-platform image: os/architecture[/variant]; this machine's if not given
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// How it is loaded once it is found.
    #[command(flatten)]
    pub how: PullArgs,
}

/// How the image of one platform is loaded: `optimize` chooses platforms in its own way.
#[derive(Debug, Clone, Args)]
pub struct PullArgs {
    /// When to look the name up in the registry
    #[arg(long, value_enum, default_value_t = Pull::Missing, value_name = "POLICY")]
    pub pull: Pull,
    /// Fetch only what is read, not the files that the image marks as needed at its start
    #[arg(long)]
    pub no_prefetch: bool,
    /// Verify each chunk when it is needed, or download and check the whole image before the start
    #[arg(long, value_enum, default_value_t = Verify::Lazy, value_name = "HOW")]
    pub verify: Verify,
}

/// `peel mount`
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
pub struct MountArgs {
    /// Mount without a writable layer
    #[arg(long)]
    pub read_only: bool,
    /// Let set-user-id and set-group-id programs and file capabilities give their rights (the mount is nosuid otherwise)
    #[arg(long)]
    pub suid: bool,
    /// Let device nodes be opened (the mount is nodev otherwise)
    #[arg(long)]
    pub dev: bool,
    /// How the image is loaded.
    #[command(flatten)]
    pub load: LoadArgs,
    /// Image to mount
    pub image: String,
    /// Directory to mount it on
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

/// `peel umount`
#[derive(Debug, Args)]
pub struct UmountArgs {
    /// Take the mount away now, let it end when nobody uses it any more
    #[arg(short, long)]
    pub lazy: bool,
    /// Directory that was given to `peel mount`
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

/// `peel inspect`
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
pub struct InspectArgs {
    /// Platform to take from a multi-platform image: os/architecture[/variant]; this machine's if not given
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Image to look at
    pub image: String,
}

/// `peel ls`
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
pub struct LsArgs {
    /// Show type, mode, owner, size and time as well
    #[arg(short)]
    pub long: bool,
    /// List everything below the directory too
    #[arg(short = 'R', long)]
    pub recursive: bool,
    /// Platform to take from a multi-platform image: os/architecture[/variant]; this machine's if not given
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Image to look into
    pub image: String,
    /// Directory or file in it
    #[arg(default_value = "/")]
    pub path: OsString,
}

/// `peel cat`
#[derive(Debug, Args)]
#[command(after_help = NAMES)]
pub struct CatArgs {
    /// Platform to take from a multi-platform image: os/architecture[/variant]; this machine's if not given
    #[arg(long, value_name = "PLATFORM")]
    pub platform: Option<String>,
    /// Image to look into
    pub image: String,
    /// Regular file in it; symbolic links are followed
    pub path: OsString,
}

/// `peel daemon`
#[derive(Debug, Args)]
pub struct DaemonArgs {
    /// End this many seconds after the last mount and connection are gone; 0 to stay
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    pub idle_exit: u64,
    /// Detach from the terminal and log into the store; the command that starts the server sets this
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// `peel completions`
#[derive(Debug, Args)]
pub struct CompletionsArgs {
    /// The shell
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

/// `peel man`
#[derive(Debug, Args)]
pub struct ManArgs {
    /// Directory to write peel.1, peel-run.1 and so on into; made if it is not there
    #[arg(value_hint = ValueHint::DirPath)]
    pub dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_command_after_the_image_keeps_its_own_flags() {
        let cli = Cli::try_parse_from([
            "peel", "run", "-e", "A=1", "-it", "img", "ls", "-l", "--json", "-e",
        ])
        .unwrap();
        let Command::Run(run) = cli.command else {
            panic!("not run")
        };
        assert_eq!(run.process.env, ["A=1"]);
        assert!(run.tty && run.interactive && !cli.global.json);
        assert_eq!(run.command, ["ls", "-l", "--json", "-e"]);
    }

    /// The flags that a help text lists, one or two a line: two spaces before a short one, six before a long one alone.
    fn listed(help: &str) -> Vec<String> {
        let short = |line: &str| line.starts_with("  -") && !line.starts_with("  --");
        help.lines()
            .filter(|line| short(line) || line.starts_with("      --"))
            .flat_map(|line| {
                let names = line.trim_start().split("  ").next().unwrap_or_default();
                names
                    .split([' ', ','])
                    .filter(|word| word.starts_with('-'))
                    .map(|word| {
                        word.trim_end_matches('.')
                            .split('[')
                            .next()
                            .unwrap_or_default()
                            .to_owned()
                    })
                    .collect::<Vec<_>>()
            })
            .collect()
    }

    #[test]
    fn every_flag_that_help_shows_is_taken() {
        let mut cli = Cli::command();
        cli.build();
        let taken = |words: &[&str]| {
            let parsed = Cli::try_parse_from(std::iter::once("peel").chain(words.iter().copied()));
            parsed.map_or_else(
                |error| error.kind() != clap::error::ErrorKind::UnknownArgument,
                |_| true,
            )
        };
        let of_every_command = listed(&cli.clone().render_long_help().to_string());
        assert!(of_every_command.len() > 8, "{of_every_command:?}");
        for flag in &of_every_command {
            assert!(taken(&[flag]), "peel {flag}");
        }
        let commands = cli
            .get_subcommands_mut()
            .filter(|command| command.get_name() != "help");
        for command in commands {
            let name = command.get_name().to_owned();
            for help in [command.render_help(), command.render_long_help()] {
                let own = listed(&help.to_string());
                assert!(own.contains(&"--verbose".to_owned()), "{name}: {own:?}");
                for flag in own {
                    assert!(taken(&[&name, &flag]), "peel {name} {flag}");
                }
            }
            for flag in of_every_command
                .iter()
                .filter(|flag| !["-V", "--version"].contains(&flag.as_str()))
            {
                assert!(taken(&[&name, flag]), "peel {name} {flag}");
            }
        }
    }

    #[test]
    fn verbose_is_v_but_after_run() {
        for (line, verbose) in [
            ("peel -v mount img dir", 1),
            ("peel mount -v img dir", 1),
            ("peel mount -vv img dir", 2),
            ("peel mount img dir -v --verbose", 2),
            ("peel --verbose mount img dir", 1),
            ("peel doctor -vvv", 3),
            ("peel -v run img", 1),
            ("peel -vv run img", 2),
            ("peel run --verbose --verbose img", 2),
            ("peel run -v /a:/b img", 0),
            ("peel -v run -v /a:/b img sh -v", 1),
            ("peel run --verbose -v /a:/b img", 1),
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.verbose, verbose, "{line}");
            if let Command::Run(run) = &cli.command {
                let binds = line.matches("-v /a:/b").count();
                assert_eq!(run.volume.len(), binds, "{line}");
            }
        }
    }

    #[test]
    fn every_flag_has_help() {
        fn check(command: &clap::Command) {
            for arg in command.get_arguments() {
                assert!(
                    arg.get_help().is_some(),
                    "{} {}",
                    command.get_name(),
                    arg.get_id()
                );
            }
            for sub in command.get_subcommands() {
                assert!(sub.get_about().is_some(), "{}", sub.get_name());
                check(sub);
            }
        }
        check(&Cli::command());
    }
}
