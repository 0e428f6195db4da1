//! From a name to the mounted root file system of an image of 100,000 files: with an empty store (manifest, TOC, tree and
//! EROFS image are made) and with one that knows the image, against `tar tf` of the same layer, which only lists it.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use peel_bench::files::{Files, Kind};
use peel_bench::host::Host;
use peel_bench::image::{Served, tar_file};
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let count = if measuring() { 100_000 } else { 1000 };
    let files = Files::new(count, 64, 2048, Kind::Text);
    let tar = tar_file(dir.path(), &files)?;
    let served = Served::new(dir.path(), &tar)?;
    std::fs::remove_file(&tar)?;
    let name = served.name(served.addr())?;
    let layer = served.blob_path();
    let names = files.files.len() + files.directories.len();

    // One mount; everything before and after it does not count.
    let mount = |store: &Path| {
        let host = Host::start(store)?;
        let mut mounted = None;
        let time = timed(|| {
            let image = host.load(&name, false)?;
            mounted = Some(host.mount(&image)?);
            Ok(())
        })?;
        let seen = mounted
            .as_ref()
            .map(|mounted| mounted.root.list_all())
            .transpose()?;
        anyhow::ensure!(seen == Some(names), "the mount shows {seen:?} names");
        drop(mounted);
        let (requests, _) = host.fetched();
        host.stop();
        Ok((time, requests))
    };
    let mut list = || {
        timed(|| {
            let status = Command::new("tar")
                .arg("-tzf")
                .arg(&layer)
                .stdout(Stdio::null())
                .status()
                .context("cannot run tar")?;
            anyhow::ensure!(status.success(), "tar: {status}");
            Ok(())
        })
    };

    let mut comparisons = Comparisons::new("mount");
    let known = dir.path().join("known");
    mount(&known)?;
    let mut number = 0;
    comparisons.compare(
        &format!("{count} files"),
        [
            ("peel, empty store", &mut || {
                number += 1;
                let store = dir.path().join(format!("store-{number}"));
                let (time, requests) = mount(&store)?;
                anyhow::ensure!(requests > 0, "the image was known already");
                std::fs::remove_dir_all(&store)?;
                Ok(time)
            }),
            ("peel, known image", &mut || {
                let (time, requests) = mount(&known)?;
                anyhow::ensure!(requests == 0, "a known image was asked for again");
                Ok(time)
            }),
            ("tar tf", &mut list),
        ],
    )?;
    comparisons.finish();
    Ok(())
}
