//! `peel run`: a container from an image that need not have arrived.
//!
//! The server loads and mounts the image and hands its detached mount over; this process makes the container around it,
//! passes signals and the terminal on, and waits. The mount is leased to the connection, so whatever happens to this
//! process, the server removes what belonged to the container.

mod relay;
mod terminal;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use peel_fs::Progress;
use peel_sandbox::{Container, Isolation, Overrides, Process, Stdio};
use rustix::fs::FileType;
use serde::Serialize;

use crate::cli::{Global, RunArgs};
use crate::client::Client;
use crate::describe::describe;
use crate::progress::LoadProgress;
use crate::protocol::WritableLayer;
use crate::run_config;
use crate::signals;
use relay::FirstByte;

/// What `--timing-file` writes. Times are seconds since this process began.
#[derive(Debug, Serialize)]
struct Timing {
    /// Until the manifest was known.
    resolve_s: f64,
    /// Until the root file system was mounted.
    mount_s: f64,
    /// Until the first byte of output; `None` when there was none.
    ready_s: Option<f64>,
    /// Until the container had ended.
    total_s: f64,
    /// Requests to registries.
    requests: u64,
    /// Body bytes received.
    bytes: u64,
}

/// Runs the container; the exit status is the container's.
pub(super) fn run(global: &Global, args: &RunArgs) -> anyhow::Result<ExitCode> {
    let begin = Instant::now();
    if args.tty && args.interactive && !std::io::stdin().is_terminal() {
        bail!("-t with -i needs a terminal on standard input; leave -t out to pass other input on");
    }
    // A read-only root has places to make before it is read-only: mount points, the working directory.
    let layer = if args.read_only {
        WritableLayer::Optional
    } else {
        WritableLayer::Required
    };
    let request = super::mount_request(global, &args.image, &args.load, layer)?;
    let overrides = overrides(args)?;
    let binds = args
        .volume
        .iter()
        .map(|text| run_config::volume(text))
        .collect::<anyhow::Result<Vec<_>>>()?;

    let mut client = Client::connect(global)?;
    let mut progress = LoadProgress::new(&args.image);
    let mut resolved = None;
    let (mounted, root) = client.mount(request, &mut |step| {
        if matches!(step, Progress::Resolved { .. }) {
            resolved.get_or_insert_with(|| begin.elapsed());
        }
        progress.update(&step);
    })?;
    progress.finish();
    let mount = begin.elapsed();
    super::warn_of_platform(&args.image, &mounted.config, args.load.platform.as_deref());

    let isolation = Isolation {
        network: args.net.into(),
        hostname: args
            .hostname
            .clone()
            .or_else(|| args.name.clone())
            .unwrap_or_else(|| mounted.id.clone()),
        binds,
        read_only: args.read_only,
    };
    let process = Process::from_image(run_config::image_config(&mounted.config)?.as_ref(), &overrides)?;
    let first_byte = FirstByte::new(begin);
    let code = match contain(root, &process, &isolation, args, &first_byte) {
        Ok(code) => code,
        Err(error) => match error.downcast_ref::<peel_sandbox::Error>() {
            Some(failure) => {
                let _ = writeln!(std::io::stderr(), "peel: {}", describe(&error));
                failure.exit_code()
            }
            None => return Err(error),
        },
    };

    let total = begin.elapsed();
    // The status is the container's from here on, whatever became of the server meanwhile: it cleans up after a lost
    // connection, and so does the next server after a lost server.
    if let Some(path) = &args.timing_file {
        let stats = client.stats().unwrap_or_else(|error| {
            tracing::warn!(
                "the counters of the timing file are missing: {}",
                describe(&error)
            );
            mounted.stats_before
        });
        let timing = Timing {
            resolve_s: resolved.unwrap_or(mount).as_secs_f64(),
            mount_s: mount.as_secs_f64(),
            ready_s: first_byte.get().map(|ready| ready.as_secs_f64()),
            total_s: total.as_secs_f64(),
            requests: stats.requests.saturating_sub(mounted.stats_before.requests),
            bytes: stats.bytes.saturating_sub(mounted.stats_before.bytes),
        };
        write_timing(path, &timing)?;
    }
    if let Err(error) = client.release(&mounted.id) {
        tracing::warn!("the container's mount was not released: {}", describe(&error));
    }
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)))
}

fn overrides(args: &RunArgs) -> anyhow::Result<Overrides> {
    Ok(Overrides {
        entrypoint: args.entrypoint.clone().map(|program| vec![program]),
        args: args.command.clone(),
        env: run_config::variables(&args.process)?,
        cwd: args.workdir.clone(),
        user: args.process.user.clone(),
        terminal: args.tty,
        stop_signal: args.stop_signal.clone(),
    })
}

fn write_timing(path: &Path, timing: &Timing) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec(timing)?;
    text.push(b'\n');
    std::fs::write(path, text).with_context(|| format!("{}: cannot be written", path.display()))
}

/// Makes the container, runs it to its end and returns its exit status.
fn contain(
    root: OwnedFd,
    process: &Process,
    isolation: &Isolation,
    args: &RunArgs,
    first_byte: &FirstByte,
) -> anyhow::Result<i32> {
    let stop_signal = process.stop_signal_number().unwrap_or_else(|| {
        tracing::warn!(
            "the stop signal {:?} is none that this system knows",
            process.stop_signal
        );
        libc::SIGTERM
    });
    let stdin = (args.interactive && !args.tty).then(standard_input).transpose()?;
    // Whoever measures wants to see the first byte go by.
    let watched = args.timing_file.is_some() && !args.tty;
    let (stdout, output) = Way::of(std::io::stdout().as_fd(), watched)?.ends();
    let (stderr, errors) = Way::of(std::io::stderr().as_fd(), false)?.ends();
    let stdio = Stdio {
        stdin,
        stdout,
        stderr,
    };
    let mut container = Container::create(root, process, isolation, stdio)?;
    for warning in container.warnings() {
        tracing::warn!("{warning}");
    }
    signals::forward(container.signaller(), stop_signal)?;
    let screen = container
        .console()
        .map(|console| {
            duplicate(console).and_then(|console| terminal::attach(console, args.interactive, first_byte))
        })
        .transpose()?;
    if let Some(screen) = &screen {
        screen.follow_size(&container)?;
    }
    let unused = FirstByte::new(Instant::now());
    let output = output
        .map(|from| relay::spawn("stdout", File::from(from), std::io::stdout(), first_byte))
        .transpose()?;
    let errors = errors
        .map(|from| relay::spawn("stderr", File::from(from), std::io::stderr(), &unused))
        .transpose()?;
    container.start()?;
    let exit = match &screen {
        Some(screen) => screen.wait(&mut container)?,
        None => container.wait()?,
    };
    // Everything of the container is gone, so both relays come to their end.
    for relay in [output, errors].into_iter().flatten() {
        relay.join();
    }
    if let Some(screen) = screen {
        screen.detach();
    }
    Ok(exit.code())
}

/// What a container reads on standard input: this process', or a pipe that a thread fills from it.
pub(super) fn standard_input() -> anyhow::Result<OwnedFd> {
    let (inside, outside) = Way::of(std::io::stdin().as_fd(), false)?.ends();
    if let Some(to) = outside {
        let unused = FirstByte::new(Instant::now());
        // Not joined: it ends with this process, or earlier with its input.
        relay::spawn("stdin", std::io::stdin(), File::from(to), &unused)?;
    }
    Ok(inside)
}

/// How one of the standard streams reaches the container.
enum Way {
    /// The same descriptor.
    Direct(OwnedFd),
    /// A pipe, which this process copies.
    Through {
        /// The container's end.
        inside: OwnedFd,
        /// This process' end.
        outside: OwnedFd,
    },
}

impl Way {
    /// Pipes and sockets are handed on. A terminal, a device, a file or a named pipe of the host is not: the program could
    /// read what is typed, change the terminal's settings, give the file another mode or owner, or open it anew through
    /// /proc/self/fd and truncate it. `copy`: not even a pipe.
    fn of(stream: BorrowedFd<'_>, copy: bool) -> anyhow::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(stream).context("standard stream")?.st_mode);
        let anonymous = kind == FileType::Socket || kind == FileType::Fifo && !is_named(stream)?;
        if !copy && anonymous {
            return Ok(Self::Direct(duplicate(stream)?));
        }
        let (reader, writer) = std::io::pipe().context("pipe")?;
        let (reader, writer) = (OwnedFd::from(reader), OwnedFd::from(writer));
        Ok(if stream.as_raw_fd() == rustix::stdio::raw_stdin() {
            Self::Through {
                inside: reader,
                outside: writer,
            }
        } else {
            Self::Through {
                inside: writer,
                outside: reader,
            }
        })
    }

    /// The container's end, and this process' where it has to copy.
    fn ends(self) -> (OwnedFd, Option<OwnedFd>) {
        match self {
            Self::Direct(fd) => (fd, None),
            Self::Through { inside, outside } => (inside, Some(outside)),
        }
    }
}

/// Whether a pipe has a name in a file system.
fn is_named(pipe: BorrowedFd<'_>) -> anyhow::Result<bool> {
    /// Magic number of the file system of the others (linux/magic.h).
    const PIPEFS_MAGIC: u64 = 0x5049_5045;
    let found = rustix::fs::fstatfs(pipe).context("standard stream")?;
    Ok(u64::try_from(found.f_type) != Ok(PIPEFS_MAGIC))
}

fn duplicate(fd: BorrowedFd<'_>) -> anyhow::Result<OwnedFd> {
    fd.try_clone_to_owned().context("descriptor")
}
