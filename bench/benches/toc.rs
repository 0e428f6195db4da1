//! From the compressed TOC of a layer of 100,000 entries to the tree, against `tar tf` of the same layer, compressed with gzip
//! and not compressed at all.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context;
use peel_bench::files::{Files, Kind};
use peel_bench::image::tar_file;
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use peel_bench::usage::{self, Usage};
use peel_image::estargz;
use peel_image::layer::LayerIndex;
use peel_image::tree::Tree;
use peel_image::write::{Format, Options, Written, write};

/// A blob, and what was said when it was written.
fn make(tar: &Path, to: &Path, format: Format) -> anyhow::Result<(PathBuf, Written)> {
    let options = Options {
        format,
        ..Options::default()
    };
    let spool = tempfile::tempfile_in(to.parent().unwrap_or(Path::new(".")))?;
    let written = write(File::open(tar)?, spool, File::create(to)?, &options)?;
    Ok((to.to_owned(), written))
}

/// The bytes of a blob from an offset on, which a lazy reader fetches.
fn tail(blob: &Path, offset: u64) -> anyhow::Result<Vec<u8>> {
    let mut file = File::open(blob)?;
    file.seek(SeekFrom::Start(offset))?;
    let mut tail = Vec::new();
    file.read_to_end(&mut tail)?;
    Ok(tail)
}

fn tree_of(index: LayerIndex, entries: usize) -> anyhow::Result<()> {
    let tree = Tree::merge(&[index])?;
    anyhow::ensure!(tree.inodes.len() > entries, "only {} inodes", tree.inodes.len());
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let count = if measuring() { 100_000 } else { 1000 };
    let tar = tar_file(dir.path(), &Files::new(count, 64, 2048, Kind::Text))?;

    let (gzip, _) = make(&tar, &dir.path().join("gzip"), Format::Gzip { level: 6 })?;
    let (blob, written) = make(&tar, &dir.path().join("estargz"), Format::ESTARGZ)?;
    let toc_offset = written.toc_offset.context("no TOC")?;
    let estargz = tail(&blob, toc_offset)?;
    let mut used = Vec::new();
    let mut of_estargz = || {
        timed(|| {
            let (_, usage) = usage::own(|| {
                let location = estargz::locate(&estargz, written.blob_size)?;
                let toc = estargz::extract_toc(&estargz)?;
                tree_of(estargz::read_index(&toc.json, location.payload_end)?, count)
            })?;
            used.push(usage);
            Ok(())
        })
    };
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
            ("estargz", &mut of_estargz),
            ("tar tf, uncompressed", &mut list_plain),
            ("tar tzf", &mut list_gzip),
        ],
    )?;
    comparisons.finish();
    let mut out = std::io::stdout().lock();
    writeln!(out, "estargz: {}", used.last().copied().unwrap_or_default())?;
    writeln!(out, "tar tf, uncompressed: {plain_used}")?;
    writeln!(out, "tar tzf: {gzip_used}")?;
    Ok(())
}
