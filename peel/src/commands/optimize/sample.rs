//! The run that `optimize` watches: the container, its output, and when it has been seen enough of.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use peel_analyzer::Recorder;
use peel_image::profile::{Profile, ProfileEntry};
use peel_sandbox::{Container, Isolation, Overrides, Process, Stdio};

use crate::cli::OptimizeArgs;
use crate::commands::run::standard_input;
use crate::protocol::Mounted;
use crate::run_config;
use crate::signals;

/// Seconds that a run is watched for, as in ctr-remote.
const PERIOD: u64 = 10;
/// Seconds that a line is waited for.
const LINE_PERIOD: u64 = 300;
/// How often the conditions are looked at.
const TICK: Duration = Duration::from_millis(20);
/// How much of a line is looked through at most.
const LINE_MAX: usize = 64 << 10;

/// Runs the image on its mount and returns what was read.
pub(super) fn run(args: &OptimizeArgs, mounted: &Mounted, root: OwnedFd) -> anyhow::Result<Profile> {
    let config = run_config::image_config(&mounted.config)?;
    let process = Process::from_image(config.as_ref(), &overrides(args)?)?;
    let isolation = Isolation {
        network: args.net.into(),
        hostname: mounted.id.clone(),
        binds: Vec::new(),
        read_only: false,
    };
    let found = Arc::new(AtomicBool::new(false));
    let (stdio, outputs) = stdio(args)?;
    let marked = root.try_clone().context("mount")?;
    let mut container = Container::create(root, &process, &isolation, stdio)?;
    for warning in container.warnings() {
        tracing::warn!("{warning}");
    }
    let recorder = Recorder::start(marked.as_fd())?;
    drop(marked);
    let interrupt = signals::interrupts()?;
    let relays = outputs
        .into_iter()
        .map(|output| spawn_relay(output, args.wait_on_line.clone(), Arc::clone(&found)))
        .collect::<anyhow::Result<Vec<_>>>()?;
    container.start()?;

    let begin = Instant::now();
    let default = if args.wait_on_line.is_some() {
        LINE_PERIOD
    } else {
        PERIOD
    };
    let period = (!args.wait_on_signal).then(|| Duration::from_secs(args.period.unwrap_or(default)));
    let why = loop {
        if let Some(exit) = container.wait_for(TICK)? {
            break format!("ended with status {}", exit.code());
        }
        if found.load(Ordering::Relaxed) {
            break "printed the line".to_owned();
        }
        if interrupt.arrived() {
            if args.wait_on_signal {
                break "was interrupted".to_owned();
            }
            container.kill()?;
            bail!("interrupted; nothing was written");
        }
        if period.is_some_and(|period| begin.elapsed() >= period) {
            if args.wait_on_line.is_some() {
                let _ = writeln!(
                    std::io::stderr(),
                    "peel: the line did not come; what was read until now counts"
                );
            }
            break format!("was watched for {} s", begin.elapsed().as_secs());
        }
    };
    // First its end: a program that reads on would keep the recorder from ever coming to one.
    container.kill()?;
    let accesses = recorder.finish()?;
    container.wait()?;
    for relay in relays {
        // A relay has no result.
        let _ = relay.join();
    }
    tracing::info!("the container {why}; {} files were accessed", accesses.len());
    let accesses = accesses.into_iter().map(|access| ProfileEntry {
        path: access.path,
        layer: None,
        at: u64::try_from(access.at.as_micros()).ok(),
        executed: access.executed,
    });
    Ok(Profile {
        accesses: accesses.collect(),
    })
}

fn overrides(args: &OptimizeArgs) -> anyhow::Result<Overrides> {
    let entrypoint = args
        .entrypoint
        .as_deref()
        .map(|text| run_config::json_strings("--entrypoint", text))
        .transpose()?;
    let command = match &args.args {
        Some(text) => run_config::json_strings("--args", text)?,
        None => args.command.clone(),
    };
    Ok(Overrides {
        entrypoint,
        args: command,
        env: run_config::variables(&args.process)?,
        cwd: args.cwd.clone(),
        user: args.process.user.clone(),
        ..Overrides::default()
    })
}

/// What the container prints goes to standard error: standard output is for the digest.
fn stdio(args: &OptimizeArgs) -> anyhow::Result<(Stdio, Vec<std::io::PipeReader>)> {
    let stdin = args.interactive.then(standard_input).transpose()?;
    let (out, stdout) = std::io::pipe().context("pipe")?;
    let (err, stderr) = std::io::pipe().context("pipe")?;
    let stdio = Stdio {
        stdin,
        stdout: stdout.into(),
        stderr: stderr.into(),
    };
    Ok((stdio, vec![out, err]))
}

/// Copies output to standard error and looks for the line.
fn spawn_relay(
    mut output: std::io::PipeReader,
    line: Option<String>,
    found: Arc<AtomicBool>,
) -> anyhow::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new()
        .name("output".to_owned())
        .spawn(move || {
            let mut search = line.map(|text| LineSearch::new(text.as_bytes()));
            let mut buffer = vec![0; LINE_MAX];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                let piece = buffer.get(..length).unwrap_or_default();
                // Nobody may be reading; the container must go on all the same.
                let _ = std::io::stderr().write_all(piece);
                if search.as_mut().is_some_and(|search| search.feed(piece)) {
                    found.store(true, Ordering::Relaxed);
                }
            }
        })
        .context("thread")
}

/// Looks for a text within the lines of a stream.
struct LineSearch {
    text: Vec<u8>,
    /// The line so far.
    line: Vec<u8>,
}

impl LineSearch {
    fn new(text: &[u8]) -> Self {
        Self {
            text: text.to_vec(),
            line: Vec::new(),
        }
    }

    /// Whether a line holds the text, the unfinished one at the end included.
    fn feed(&mut self, piece: &[u8]) -> bool {
        let mut found = false;
        for (index, part) in piece.split(|byte| *byte == b'\n').enumerate() {
            if index > 0 {
                self.line.clear();
            }
            self.line.extend_from_slice(part);
            found |= self.text.is_empty()
                || self
                    .line
                    .windows(self.text.len())
                    .any(|window| window == self.text);
            // A line without end must not fill the memory; enough stays for the text to be found across the cut.
            let excess = self.line.len().saturating_sub(LINE_MAX.max(self.text.len()));
            self.line.drain(..excess);
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_searched_across_pieces() {
        for (pieces, expected) in [
            (&["ready"][..], true),
            (&["not rea", "dy yet\n"], true),
            (&["rea\ndy"], false),
            (&["rea", "\n", "dy"], false),
            (&["x\ny\nis ready now\n"], true),
            (&[""], false),
        ] {
            let mut search = LineSearch::new(b"ready");
            let found = pieces
                .iter()
                .filter(|piece| search.feed(piece.as_bytes()))
                .count()
                > 0;
            assert_eq!(found, expected, "{pieces:?}");
        }
        let mut search = LineSearch::new(b"ready");
        assert!(!search.feed(&vec![b'x'; 3 * LINE_MAX]));
        assert!(search.line.len() <= LINE_MAX);
        assert!(search.feed(b"ready"));
    }
}
