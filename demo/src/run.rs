//! The demo from beginning to end: make or fetch the image, push it, optimize it, start it cold in three ways.
//!
//! Called by the command. `peel optimize`, `peel convert` and `peel run` are run as processes of this same program, so
//! what is measured is what a user gets. Every cold start has a fresh store and a server process of its own; before it
//! everything is written out and the page cache is dropped. The blobs of the registry are then read again: a
//! registry is another machine. So is this program's file, which is installed wherever it is used.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use peel_registry::{ClientOptions, ImageName, Source, Target, Upload};

use super::full_pull::{self, Started, read_output};
use super::image::{self, TAG};
use super::report::{Report, Start, Starts, median};
use super::{Args, Host};
use peel_testkit::link::{Link, Shape};
use peel_testkit::registry::Registry;

/// Where the image that was made is kept for the next run.
const CACHE: &str = "/var/cache/peel/demo";

/// How long a server may take to end after SIGTERM.
const END: Duration = Duration::from_secs(30);

/// Most a single start may take; beyond it something hangs.
const START_LIMIT: Duration = Duration::from_secs(600);

/// Starts of the same program that fill the page cache before warm ones are measured.
const WARM_UP: usize = 1;

/// Everything that the steps need.
struct Demo<'a> {
    host: &'a Host<'a>,
    /// This program.
    peel: PathBuf,
    /// Where stores and unpacked images go.
    work: PathBuf,
    registry: Registry,
    link: Link,
    /// What runs in the image.
    command: Vec<String>,
}

/// Runs `peel demo`.
pub(super) fn run(host: &Host<'_>, args: &Args) -> Result<ExitCode> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "the demo mounts file systems: run it as root"
    );
    let say = |text: &str| {
        // Nobody may be listening; that is no reason to stop.
        let _ = writeln!(std::io::stderr(), "{text}");
    };
    let parent = args.work_dir.clone().unwrap_or_else(|| "/var/tmp".into());
    let mut work = tempfile::Builder::new()
        .prefix("peel-demo-")
        .tempdir_in(&parent)
        .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
    work.disable_cleanup(args.keep);
    let shape = Shape {
        rtt: Duration::from_millis(args.rtt.into()),
        bits_per_second: u64::from(args.bandwidth) * 1_000_000,
    };
    let registry = Registry::start(&work.path().join("registry"))?;
    let link = Link::start(registry.addr(), shape)?;
    say(&format!(
        "Registry at {}, behind a link at {}.",
        registry.addr(),
        link.addr()
    ));
    let peel = std::env::current_exe().context("this program's own file")?;
    let mut demo = Demo {
        host,
        peel,
        work: work.path().to_path_buf(),
        registry,
        link,
        command: Vec::new(),
    };

    let mut report = Report {
        rtt_ms: args.rtt,
        bandwidth_mbit_s: args.bandwidth,
        ..Report::default()
    };
    match &args.image {
        Some(name) => demo.fetch(name, args, &mut report, &say)?,
        None => demo.make(args, &mut report, &say)?,
    }
    demo.prepare(&mut report, &say)?;
    demo.measure(args.runs.max(1), args.image.is_some(), &mut report, &say)?;
    report.conclude();
    if args.keep {
        say(&format!("Everything is kept in {}.", demo.work.display()));
    }
    let mut out = std::io::stdout().lock();
    if host.json {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
    } else {
        report.print(&mut out)?;
    }
    Ok(ExitCode::SUCCESS)
}

impl Demo<'_> {
    /// An image made here, pushed to the embedded registry.
    fn make(&mut self, args: &Args, report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
        let cache = args.cache_dir.clone().unwrap_or_else(|| CACHE.into());
        let made = image::make(&cache, args.origin, say)?;
        report.image = made.description;
        self.command = made.workload;
        say("Pushing it.");
        let source = format!("oci:{}:{TAG}", made.layout.display());
        self.push(&source, &ClientOptions::default(), report)?;
        Ok(())
    }

    /// A real image, copied from its own registry to the embedded one, so that all three ways use the same link.
    fn fetch(&mut self, name: &str, args: &Args, report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
        say(&format!("Pulling {name} from its own registry."));
        let mut options = ClientOptions::from_env();
        options.plain_http = self.host.plain_http;
        options.tls_ca = self.host.tls_ca.map(Path::to_owned);
        options
            .auth_files
            .splice(0..0, self.host.authfile.map(Path::to_owned));
        let begin = Instant::now();
        self.push(name, &options, report)?;
        report.source_pull_s = Some(begin.elapsed().as_secs_f64());
        report.image = name.to_owned();
        self.command = args
            .command
            .iter()
            .map(|word| word.to_string_lossy().into_owned())
            .collect();
        Ok(())
    }

    fn push(&self, source: &str, options: &ClientOptions, report: &mut Report) -> Result<()> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?;
        let source: ImageName = source.parse()?;
        let target: ImageName = self.direct("plain").parse()?;
        let (layers, bytes) = runtime.block_on(async {
            let source = Source::open(&source, options).await?;
            let local = ClientOptions {
                plain_http: true,
                ..ClientOptions::default()
            };
            let target = Target::open(&target, &local).await?;
            let image = source.resolve(None).await?;
            let manifest = &image.manifest;
            for descriptor in manifest.layers().iter().chain([manifest.config()]) {
                let blob = source.blob(descriptor)?;
                target
                    .push_blob(blob.digest(), blob.size(), Upload::Blob(blob))
                    .await?;
            }
            target
                .put_manifest(image.manifest_bytes.clone(), &image.media_type)
                .await?;
            let bytes = manifest
                .layers()
                .iter()
                .map(oci_spec::image::Descriptor::size)
                .sum();
            Ok::<_, peel_registry::Error>((manifest.layers().len(), bytes))
        })?;
        (report.layers, report.image_bytes) = (layers, bytes);
        Ok(())
    }

    /// Name of an image in the registry itself, without the link.
    fn direct(&self, tag: &str) -> String {
        format!("{}/demo:{tag}", self.registry.addr())
    }

    /// Name of the same image through the link.
    fn linked(&self, tag: &str) -> String {
        format!("{}/demo:{tag}", self.link.addr())
    }

    /// A command of this program on the store `store`.
    fn peel(&self, store: &Path, command: &str) -> Command {
        let mut peel = Command::new(&self.peel);
        peel.arg(command)
            .arg("--store")
            .arg(store)
            .arg("--plain-http")
            .stdin(Stdio::null());
        peel.env_remove("PEEL_STORE");
        peel
    }

    /// Converts the image with and without a profile.
    fn prepare(&self, report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
        let store = self.work.join("prepare");
        say("Converting it to eStargz without a profile: peel convert.");
        let status = self
            .peel(&store, "convert")
            .args([self.direct("plain"), self.direct("estargz")])
            .stdout(Stdio::null())
            .status()?;
        ensure!(status.success(), "peel convert failed ({status})");
        say("Running it, recording what it reads, writing it with those files first: peel optimize.");
        let mut optimize = self.peel(&store, "optimize");
        optimize.args([self.direct("plain"), self.direct("optimized")]);
        if !self.command.is_empty() {
            optimize.arg("--").args(&self.command);
        }
        let status = optimize.stdout(Stdio::null()).status()?;
        ensure!(status.success(), "peel optimize failed ({status})");
        let inspected = self
            .peel(&store, "inspect")
            .args(["--json", &self.direct("optimized")])
            .output()?;
        ensure!(inspected.status.success(), "peel inspect failed");
        let inspected: serde_json::Value = serde_json::from_slice(&inspected.stdout)?;
        let layers = inspected.get("layers").and_then(serde_json::Value::as_array);
        report.opened_bytes = layers
            .into_iter()
            .flatten()
            .filter_map(|layer| layer.get("prefetch_bytes")?.as_u64())
            .sum();
        self.discard(&store)
    }

    /// All measurements; each round has every cold start once. `foreign`: the image was not made here.
    fn measure(&self, runs: u32, foreign: bool, report: &mut Report, say: &dyn Fn(&str)) -> Result<()> {
        let [mut full, mut lazy, mut optimized, mut second, mut warm] = [const { Vec::new() }; 5];
        let mut curl = Vec::new();
        let mut expected = Outputs {
            may_differ: foreign,
            ..Outputs::default()
        };
        for run in 1..=runs {
            let round = if runs > 1 {
                format!(" ({run} of {runs})")
            } else {
                String::new()
            };
            say(&format!("Cold start: full pull and unpack{round}."));
            let dir = self.work.join("full");
            let unpacked = self.full(&dir, &mut full, &mut expected)?;
            say(&format!("Warm start of the same{round}."));
            for index in 0..=WARM_UP {
                let begin = Instant::now();
                let started = unpacked.start(&self.command, &dir.join("scratch"), begin)?;
                if index == WARM_UP {
                    warm.push(times(Duration::ZERO, &started));
                }
                expected.agree(&started.output)?;
            }
            fs::remove_dir_all(&dir)?;

            say(&format!("Cold start: lazily, without a profile{round}."));
            let store = self.work.join("lazy");
            lazy.push(self.cold(&store, "estargz", &mut expected)?);
            self.discard(&store)?;

            say(&format!("Cold start: lazily, optimized{round}."));
            let store = self.work.join("optimized");
            optimized.push(self.cold(&store, "optimized", &mut expected)?);
            say(&format!("Second start from the same store{round}."));
            second.push(self.start(&store, "optimized", &mut expected)?);
            self.discard(&store)?;

            let bytes = optimized.last().map_or(0, |start| start.bytes);
            curl.push(self.curl(bytes)?);
        }
        if expected.differed {
            say("The program did not print the same in every start.");
        }
        report.workload.clone_from(&self.command);
        report.full_pull = Starts::of(&full);
        report.lazy = Starts::of(&lazy);
        report.optimized = Starts::of(&optimized);
        report.second_start = Starts::of(&second);
        report.warm = Starts::of(&warm);
        report.curl_s = median(&curl);
        Ok(())
    }

    /// Full pull and unpack into `dir`.
    fn full(
        &self,
        dir: &Path,
        starts: &mut Vec<Start>,
        expected: &mut Outputs,
    ) -> Result<full_pull::Unpacked> {
        fs::create_dir_all(dir)?;
        let options = ClientOptions {
            plain_http: true,
            ..ClientOptions::default()
        };
        self.chill()?;
        let begin = Instant::now();
        let unpacked = full_pull::pull(&self.linked("plain"), &options, dir)?;
        let started = unpacked.start(&self.command, &dir.join("scratch"), begin)?;
        let mut start = times(unpacked.resolved, &started);
        self.count(&mut start);
        starts.push(start);
        expected.agree(&started.output)?;
        Ok(unpacked)
    }

    /// One start of `peel run` with a fresh store and nothing in the page cache.
    fn cold(&self, store: &Path, tag: &str, expected: &mut Outputs) -> Result<Start> {
        self.chill()?;
        self.start(store, tag, expected)
    }

    /// One start of `peel run`, from the start of the process to its end.
    fn start(&self, store: &Path, tag: &str, expected: &mut Outputs) -> Result<Start> {
        let timing = self.work.join("timing.json");
        let mut command = self.peel(store, "run");
        command
            .arg("--timing-file")
            .arg(&timing)
            .arg(self.linked(tag))
            .args(&self.command);
        self.registry.reset_counters();
        self.link.reset_counters();
        let begin = Instant::now();
        let mut child = command
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run peel")?;
        let stdout = child.stdout.take().context("peel run has no output")?;
        let reader = std::thread::Builder::new()
            .name("demo-output".into())
            .spawn(move || read_output(stdout, begin))?;
        let status = wait(&mut child)?;
        let total = begin.elapsed();
        ensure!(status.success(), "peel run failed ({status})");
        let (ready, output) = reader
            .join()
            .map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        expected.agree(&output)?;
        let timing: serde_json::Value = serde_json::from_slice(&fs::read(&timing)?)?;
        let seconds = |name: &str| {
            timing
                .get(name)
                .and_then(serde_json::Value::as_f64)
                .unwrap_or_default()
        };
        let mut start = Start {
            resolve_s: seconds("resolve_s"),
            mount_s: seconds("mount_s"),
            ready_s: ready.unwrap_or(total).as_secs_f64(),
            total_s: total.as_secs_f64(),
            ..Start::default()
        };
        self.count(&mut start);
        Ok(start)
    }

    /// What went over the link since the counters were reset.
    fn count(&self, start: &mut Start) {
        start.bytes = self.link.counters().down_bytes;
        start.requests = self.registry.counters().requests;
    }

    /// The real curl fetching `bytes` bytes over the same link, from the start of its process to its end.
    fn curl(&self, bytes: u64) -> Result<f64> {
        let content = self.registry.content();
        let blob = content.put_blob_from(std::io::Read::take(std::io::repeat(b'p'), bytes))?;
        let url = format!("http://{}/v2/demo/blobs/{blob}", self.link.addr());
        Command::new("curl")
            .arg("--version")
            .stdout(Stdio::null())
            .status()
            .context("cannot run curl")?;
        let begin = Instant::now();
        let status = Command::new("curl")
            .args(["--silent", "--fail", "--noproxy", "*", "--output", "/dev/null"])
            .arg(&url)
            .status()?;
        let seconds = begin.elapsed().as_secs_f64();
        ensure!(status.success(), "curl failed ({status})");
        fs::remove_file(content.blob_path(&blob))?;
        Ok(seconds)
    }

    /// Empties the page cache of everything but what another machine would hold, and resets the counters.
    fn chill(&self) -> Result<()> {
        rustix::fs::sync();
        fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the page cache")?;
        self.registry.content().warm()?;
        for tool in [self.peel.as_path(), Path::new("tar")] {
            let mut command = Command::new(tool);
            command
                .arg("--version")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null());
            command
                .status()
                .with_context(|| format!("cannot run {}", tool.display()))?;
        }
        self.registry.reset_counters();
        self.link.reset_counters();
        Ok(())
    }

    /// Ends the server of a store and removes the store.
    fn discard(&self, store: &Path) -> Result<()> {
        if let Some(pid) = (self.host.server_pid)(store)? {
            let pid = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw);
            let pid = pid.context("the server has no process id")?;
            let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
            rustix::process::pidfd_send_signal(&fd, rustix::process::Signal::TERM)?;
            let mut ended = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec {
                tv_sec: END.as_secs().cast_signed(),
                tv_nsec: 0,
            };
            if rustix::event::poll(&mut ended, Some(&limit))? == 0 {
                bail!("the server of {} does not end", store.display());
            }
        }
        if store.exists() {
            fs::remove_dir_all(store).with_context(|| format!("{} cannot be removed", store.display()))?;
        }
        Ok(())
    }
}

/// Waits for a process; kills it when it takes too long.
fn wait(child: &mut std::process::Child) -> Result<std::process::ExitStatus> {
    let pid = rustix::process::Pid::from_child(child);
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let mut ended = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    let limit = rustix::event::Timespec {
        tv_sec: START_LIMIT.as_secs().cast_signed(),
        tv_nsec: 0,
    };
    if rustix::event::poll(&mut ended, Some(&limit))? == 0 {
        child.kill()?;
        child.wait()?;
        bail!("peel run did not end within {} s", START_LIMIT.as_secs());
    }
    Ok(child.wait()?)
}

fn times(resolved: Duration, started: &Started) -> Start {
    Start {
        resolve_s: resolved.as_secs_f64(),
        mount_s: started.mounted.as_secs_f64(),
        ready_s: started.ready.unwrap_or(started.total).as_secs_f64(),
        total_s: started.total.as_secs_f64(),
        ..Start::default()
    }
}

/// What the starts printed.
#[derive(Debug, Default)]
struct Outputs {
    first: Option<Vec<u8>>,
    /// Whether they may differ: a program that nobody here knows may print the time.
    may_differ: bool,
    differed: bool,
}

impl Outputs {
    /// Every way must print the same.
    fn agree(&mut self, output: &[u8]) -> Result<()> {
        let first = self.first.get_or_insert_with(|| output.to_vec());
        self.differed |= first != output;
        ensure!(
            self.may_differ || !self.differed,
            "two starts of the same program printed different things: {:?} and {:?}",
            String::from_utf8_lossy(first),
            String::from_utf8_lossy(output)
        );
        Ok(())
    }
}
