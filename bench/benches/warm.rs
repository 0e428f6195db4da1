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
/// Random reads of one run.
const RANDOM_READS: usize = 20_000;
/// Bytes of one.
const BLOCK: usize = 4096;

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let count = if measuring() { 100_000 } else { 1000 };
    // Ten large files would be as good for random reads; that all are in one tree shows what a large tree costs.
    let files = Files::new(count, 64, 12 << 10, Kind::Text);
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
    let some: Vec<CString> = all.iter().step_by(READ_EACH).cloned().collect();
    let names = files.files.len() + files.directories.len();
    let mut comparisons = Comparisons::new("warm");
    let mut compare = |what: &str, work: &dyn Fn(&Root) -> anyhow::Result<()>| {
        comparisons.compare(
            what,
            ("peel", &mut || timed(|| work(&mounted.root))),
            ("overlayfs", &mut || timed(|| work(&plain))),
        )
    };
    let bytes: u64 = files.files.iter().step_by(READ_EACH).map(|file| file.size).sum();
    compare("open, read, close", &|root| {
        anyhow::ensure!(root.read_all(&some)? == bytes, "a file has another length");
        Ok(())
    })?;
    compare("random 4 KiB reads", &|root| random_reads(root, &files, &all))?;
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

/// Reads blocks of open files, the same ones in every run.
fn random_reads(root: &Root, files: &Files, paths: &[CString]) -> anyhow::Result<()> {
    let mut random = Random::new(3);
    let open: Vec<_> = (0..100)
        .map(|_| {
            let number = usize::try_from(random.below(paths.len().try_into()?))?;
            Ok((root.open(&paths[number])?, files.files[number].size))
        })
        .collect::<anyhow::Result<_>>()?;
    let mut buffer = [0; BLOCK];
    for number in 0..RANDOM_READS {
        let (file, size) = &open[number % open.len()];
        let offset = random.below(*size);
        anyhow::ensure!(
            pread(file, &mut buffer, offset)? > 0,
            "nothing at {offset} of {size}"
        );
    }
    Ok(())
}
