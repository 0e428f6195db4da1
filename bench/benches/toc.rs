//! From the compressed TOC of a layer of 100,000 entries to the tree, in each format and the way that a start goes, against `tar tf`
//! of the same layer, compressed with gzip and not compressed at all.
//!
//! What is timed begins with the bytes that were fetched and ends with the tree; index and tree are dropped afterwards, since a
//! start goes on to use them. The tree must be the same by every format.

use std::cell::RefCell;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use peel_bench::files::{Files, Kind};
use peel_bench::image::tar_file;
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use peel_bench::usage::{self, Usage};
use peel_image::layer::LayerIndex;
use peel_image::lazy::Candidate;
use peel_image::tree::Tree;
use peel_image::zstd_chunked::Dialect;
use peel_writer::{Format, Options, write};

/// A lazy layer as a reader comes to know it.
struct Layer {
    candidate: Candidate,
    /// The first bytes that a reader fetches.
    fetched: Vec<u8>,
    /// What each run cost.
    used: RefCell<Vec<Usage>>,
}

impl Layer {
    /// Makes a layer of the tar file.
    fn new(tar: &Path, dir: &Path, format: Format) -> anyhow::Result<Self> {
        let mut blob = tempfile::tempfile_in(dir)?;
        let options = Options {
            format,
            ..Options::default()
        };
        let written = write(File::open(tar)?, tempfile::tempfile_in(dir)?, &mut blob, &options)?;
        let candidate = Candidate::new(written.media_type, written.blob_size, |name| {
            written.annotations.get(name).map(String::as_str)
        });
        let range = candidate.first_range();
        let mut fetched = Vec::new();
        blob.seek(SeekFrom::Start(range.start))?;
        blob.take(range.end - range.start).read_to_end(&mut fetched)?;
        Ok(Self {
            candidate,
            fetched,
            used: RefCell::default(),
        })
    }

    /// The index, and the tree of this layer alone.
    fn read(&self) -> anyhow::Result<([LayerIndex; 1], Tree)> {
        let located = self.candidate.locate(&self.fetched)?;
        let first = self.candidate.first_range();
        let toc = located.toc.clone().context("the TOC is elsewhere")?;
        let inside = |offset: u64| usize::try_from(offset - first.start);
        let toc = self.fetched.get(inside(toc.start)?..inside(toc.end)?);
        let layers = [self.candidate.read(&located, toc.context("too few bytes")?)?];
        let tree = Tree::merge(&layers)?;
        Ok((layers, tree))
    }

    /// Reads once and tells how long that took.
    fn run(&self) -> anyhow::Result<Duration> {
        let ((_read, time), used) = usage::own(|| {
            let start = Instant::now();
            let read = self.read()?;
            Ok((read, start.elapsed()))
        })?;
        self.used.borrow_mut().push(used);
        Ok(time)
    }

    /// Least processor time of all runs, and the memory of the run that took most.
    fn usage(&self) -> Usage {
        let used = self.used.borrow();
        Usage {
            processor: used.iter().map(|used| used.processor).min().unwrap_or_default(),
            peak: used.iter().map(|used| used.peak).max().unwrap_or_default(),
        }
    }
}

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let count = if measuring() { 100_000 } else { 1000 };
    let tar = tar_file(dir.path(), &Files::new(count, 64, 2048, Kind::Text))?;

    let gzip = dir.path().join("gzip");
    let options = Options {
        format: Format::Gzip { level: 6 },
        ..Options::default()
    };
    let spool = tempfile::tempfile_in(dir.path())?;
    write(File::open(&tar)?, spool, File::create(&gzip)?, &options)?;
    let layer = |format| Layer::new(&tar, dir.path(), format);
    let estargz = layer(Format::ESTARGZ)?;
    let podman = layer(Format::zstd_chunked(Dialect::Podman))?;
    let stargz = layer(Format::zstd_chunked(Dialect::Stargz))?;
    let tree = estargz.read()?.1;
    anyhow::ensure!(tree.inodes.len() > count, "only {} inodes", tree.inodes.len());
    for other in [&podman, &stargz] {
        anyhow::ensure!(other.read()?.1 == tree, "the trees differ");
    }
    drop(tree);

    let list = |tar: &Path, arguments: &'static str, used: &mut Usage| {
        timed(|| {
            let mut command = Command::new("tar");
            command.arg(arguments).arg(tar).stdout(Stdio::null());
            *used = usage::command(&mut command)?;
            Ok(())
        })
    };
    let (mut plain_used, mut gzip_used) = (Usage::default(), Usage::default());
    let mut list_gzip = || list(&gzip, "-tzf", &mut gzip_used);
    let mut list_plain = || list(&tar, "-tf", &mut plain_used);
    let mut comparisons = Comparisons::new("toc");
    comparisons.compare(
        &format!("{count} entries"),
        [
            ("estargz", &mut || estargz.run()),
            ("zstd:chunked (podman)", &mut || podman.run()),
            ("zstd:chunked (stargz)", &mut || stargz.run()),
            ("tar tf, uncompressed", &mut list_plain),
            ("tar tzf", &mut list_gzip),
        ],
    )?;
    comparisons.finish();
    let mut out = std::io::stdout().lock();
    writeln!(out, "estargz: {}", estargz.usage())?;
    writeln!(out, "zstd:chunked (podman): {}", podman.usage())?;
    writeln!(out, "zstd:chunked (stargz): {}", stargz.usage())?;
    writeln!(out, "tar tf, uncompressed: {plain_used}")?;
    writeln!(out, "tar tzf: {gzip_used}")?;
    Ok(())
}
