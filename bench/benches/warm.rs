//! Everything is here: an image of 100,000 files whose objects are complete (EROFS, objects and overlay) against plain
//! overlayfs over a directory with the same files. The first run of each fills the kernel's caches.

use std::ffi::CString;
use std::path::Path;

use peel_bench::files::{Files, Kind, Random};
use peel_bench::host::{Host, Root, plain_overlay};
use peel_bench::image::{Served, tar_file};
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use rustix::io::pread;

/// Every tenth file is read, so that a run does not take longer than all others together.
const READ_EACH: usize = 10;
/// Files for random reads, and their length in bytes.
const LARGE: usize = 64;
const LARGE_SIZE: u64 = 1 << 20;
/// Random reads of one run.
const RANDOM_READS: usize = 20_000;
/// Bytes of one.
const BLOCK: usize = 4096;

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let count = if measuring() { 100_000 } else { 1000 };
    let files = Files::new(count, 64, 2048, Kind::Text).with_large(LARGE, LARGE_SIZE);
    let tar = tar_file(dir.path(), &files)?;
    let served = Served::new(dir.path(), &tar)?;
    let host = Host::start(&dir.path().join("store"))?;
    let image = host.load(&served.name(served.addr())?, true)?;
    let mounted = host.mount(&image)?;
    let lower = dir.path().join("lower");
    files.unpack(&lower)?;
    let plain = plain_overlay(&lower, &dir.path().join("plain"))?;

    let all: Vec<CString> = files
        .files
        .iter()
        .map(|file| CString::new(file.path.clone()))
        .collect::<Result<_, _>>()?;
    let large = &all[count..];
    let some: Vec<CString> = all.iter().step_by(READ_EACH).cloned().collect();
    let names = files.files.len() + files.directories.len();
    let mut comparisons = Comparisons::new("warm");
    let mut compare = |what: &str, work: &dyn Fn(&Root) -> anyhow::Result<()>| {
        comparisons.compare(
            what,
            [
                ("peel", &mut || timed(|| work(&mounted.root))),
                ("overlayfs", &mut || timed(|| work(&plain))),
            ],
        )
    };
    let bytes: u64 = files.files.iter().step_by(READ_EACH).map(|file| file.size).sum();
    compare("open, read, close", &|root| {
        anyhow::ensure!(root.read_all(&some)? == bytes, "a file has another length");
        Ok(())
    })?;
    compare("random 4 KiB reads", &|root| random_reads(root, large))?;
    compare("stat of all", &|root| {
        anyhow::ensure!(root.stat_all(&all)? == files.bytes(), "a file has another length");
        Ok(())
    })?;
    compare("readdir of all", &|root| {
        anyhow::ensure!(root.list_all()? == names, "a directory has other names");
        Ok(())
    })?;
    comparisons.finish();
    drop(mounted);
    drop(image);
    host.stop();
    Ok(())
}

/// Reads blocks of the large files, the same ones in every run.
fn random_reads(root: &Root, paths: &[CString]) -> anyhow::Result<()> {
    let mut random = Random::new(3);
    let open: Vec<_> = paths
        .iter()
        .map(|path| root.open(path))
        .collect::<Result<_, _>>()?;
    let mut buffer = [0; BLOCK];
    for file in open.iter().cycle().take(RANDOM_READS) {
        let offset = random.below(LARGE_SIZE - 4096);
        let count = pread(file, &mut buffer, offset)?;
        anyhow::ensure!(count == BLOCK, "{count} bytes at {offset}");
    }
    Ok(())
}
