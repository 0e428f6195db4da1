//! Writing layers, all cores, from the page cache: eStargz at the setting whose size equals that of `gzip -6` against `pigz -6`,
//! and both dialects of zstd:chunked at level 3 against `zstd -3 -T2`, on the same tar stream: real files, and text that
//! repeats itself across files, which suits a compressor that knows no files. Shown beside each ratio: sizes, processor time,
//! and the most memory that each side had.

use std::cell::Cell;
use std::fs::File;
use std::io::sink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use peel_bench::files::{Files, Kind};
use peel_bench::image::tar_file;
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use peel_bench::usage::{self, Usage};
use peel_bench::usr;
use peel_writer::{Dialect, Duplicates, Format, Options, write};

/// Threads of `zstd`, as many as the machine has that the ratio is meant for.
const ZSTD_THREADS: &str = "-T2";
/// Bytes of real files.
const USR: u64 = 180 << 20;

/// One side of a comparison: a way to make a blob of the tar stream.
struct Side<'a> {
    tar: &'a Path,
    usage: Cell<Usage>,
    size: Cell<u64>,
}

impl<'a> Side<'a> {
    fn new(tar: &'a Path) -> Self {
        Self {
            tar,
            usage: Cell::default(),
            size: Cell::default(),
        }
    }

    fn ours(&self, format: Format) -> anyhow::Result<Duration> {
        let (input, directory) = (File::open(self.tar)?, self.tar.parent().unwrap_or(Path::new(".")));
        let spool = tempfile::tempfile_in(directory)?;
        // As `peel convert` begins every layer.
        let options = Options {
            format,
            duplicates: Duplicates::Refuse,
            ..Options::default()
        };
        timed(|| {
            let (written, usage) = usage::own(|| Ok(write(input, spool, sink(), &options)?))?;
            anyhow::ensure!(written.entries > 0, "an empty blob");
            self.usage.set(usage);
            self.size.set(written.blob_size);
            Ok(())
        })
    }

    fn theirs(&self, program: &str, arguments: &[&str]) -> anyhow::Result<Duration> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(File::open(self.tar)?)
            .stdout(Stdio::null());
        timed(|| {
            self.usage.set(usage::command(&mut command)?);
            Ok(())
        })
    }

    /// Bytes that such a command writes.
    fn output_size(&self, program: &str, arguments: &[&str]) -> anyhow::Result<u64> {
        let out: PathBuf = self.tar.with_extension("out");
        let mut command = Command::new(program);
        command
            .args(arguments)
            .stdin(File::open(self.tar)?)
            .stdout(File::create(&out)?);
        usage::command(&mut command)?;
        let size = std::fs::metadata(&out)?.len();
        std::fs::remove_file(&out)?;
        Ok(size)
    }

    fn show(&self, name: &str) {
        println!("{name}: {} bytes, {}", self.size.get(), self.usage.get());
    }
}

/// eStargz: first with every file in members of its own, then with small files sharing members, which is what makes up for
/// the context that gzip has across files.
fn estargz_settings() -> impl Iterator<Item = Format> {
    [0, 256 << 10].into_iter().flat_map(|min_chunk_size| {
        (6..=8).map(move |level| Format::Estargz {
            chunk_size: 0,
            min_chunk_size,
            level,
            external_toc: false,
            keep_diff_id: false,
        })
    })
}

/// Measures with one tar stream.
fn compare(comparisons: &mut Comparisons, name: &str, tar: &Path) -> anyhow::Result<()> {
    let what = format!("{} MB of {name}", std::fs::metadata(tar)?.len() / 1_000_000);
    let (ours, pigz) = (Side::new(tar), Side::new(tar));
    pigz.size.set(pigz.output_size("pigz", &["-6", "--stdout"])?);
    let mut chosen = Format::ESTARGZ;
    for format in estargz_settings() {
        chosen = format;
        ours.ours(format)?;
        if ours.size.get() <= pigz.size.get() {
            break;
        }
    }
    println!("{what}: as small as gzip -6: {chosen:?}");
    let mut run_ours = || ours.ours(chosen);
    let mut run_pigz = || pigz.theirs("pigz", &["-6", "--stdout"]);
    comparisons.compare(&what, [("estargz", &mut run_ours), ("pigz -6", &mut run_pigz)])?;

    let (podman, stargz, zstd) = (Side::new(tar), Side::new(tar), Side::new(tar));
    let arguments = ["-3", ZSTD_THREADS, "--stdout", "--quiet"];
    zstd.size.set(zstd.output_size("zstd", &arguments)?);
    let mut run_podman = || podman.ours(Format::zstd_chunked(Dialect::Podman));
    let mut run_stargz = || stargz.ours(Format::zstd_chunked(Dialect::Stargz));
    let mut run_zstd = || zstd.theirs("zstd", &arguments);
    comparisons.compare(
        &what,
        [
            ("zstd:chunked (podman)", &mut run_podman),
            ("zstd:chunked (stargz)", &mut run_stargz),
            ("zstd -3 -T2", &mut run_zstd),
        ],
    )?;
    for (name, side) in [
        ("estargz", &ours),
        ("pigz -6", &pigz),
        ("zstd:chunked (podman)", &podman),
        ("zstd:chunked (stargz)", &stargz),
        ("zstd -3 -T2", &zstd),
    ] {
        side.show(&format!("{what}: {name}"));
    }
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let mut comparisons = Comparisons::new("convert");
    // Another tar stream can be named instead, such as that of a real layer.
    if let Some(path) = std::env::var_os("PEEL_BENCH_TAR") {
        compare(&mut comparisons, "a layer", Path::new(&path))?;
    } else if measuring() {
        compare(&mut comparisons, "/usr", &usr::tar_file(dir.path(), USR)?)?;
        let text = Files::new(3000, 1 << 10, 64 << 10, Kind::Text).with_large(4, 20 << 20);
        compare(&mut comparisons, "text", &tar_file(dir.path(), &text)?)?;
    } else {
        let text = Files::new(30, 1 << 10, 64 << 10, Kind::Text);
        compare(&mut comparisons, "text", &tar_file(dir.path(), &text)?)?;
    }
    comparisons.finish();
    Ok(())
}
