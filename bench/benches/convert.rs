//! A tar stream to an eStargz blob against `pigz -6` of the same stream, both with all cores and from the page cache.

use std::fs::File;
use std::io::{BufReader, sink};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use peel_bench::files::{Files, Kind};
use peel_bench::image::tar_file;
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use peel_image::write;

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let files = Files::new(if measuring() { 3000 } else { 30 }, 1 << 10, 64 << 10, Kind::Text);
    let tar = tar_file(dir.path(), &files)?;
    let megabytes = std::fs::metadata(&tar)?.len() / 1_000_000;

    let mut size = 0;
    let mut ours = || {
        let (input, spool) = (File::open(&tar)?, tempfile::tempfile_in(dir.path())?);
        timed(|| {
            let options = write::Options::default();
            let written = write::write(BufReader::new(input), spool, sink(), &options)?;
            anyhow::ensure!(written.entries > 0, "an empty blob");
            size = written.blob_size;
            Ok(())
        })
    };
    let mut pigz = || {
        timed(|| {
            let status = Command::new("pigz")
                .args(["-6", "--stdout"])
                .stdin(File::open(&tar)?)
                .stdout(Stdio::null())
                .status()
                .context("cannot run pigz; the Debian package pigz has it")?;
            anyhow::ensure!(status.success(), "pigz: {status}");
            Ok(())
        })
    };
    let mut comparisons = Comparisons::new("convert");
    let what = format!("{megabytes} MB");
    comparisons.compare(&what, [("peel", &mut ours), ("pigz -6", &mut pigz)])?;
    comparisons.finish();
    println!("blob: {} of {megabytes} MB", size / 1_000_000);
    Ok(())
}
