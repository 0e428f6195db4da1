//! The first read of a missing chunk, through overlay, FUSE and the fetch engine, against `curl` of the same bytes from the
//! same registry: on loopback, and behind a link like that of the demo. Every run takes another chunk; when there is none
//! left, an empty store begins.
//!
//! Of `curl` the time counts that it reports itself (connection and transfer), so starting its process is not held against
//! it; the connections of peel stay open between two reads.

use std::ffi::CString;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use peel_bench::files::{Files, Kind};
use peel_bench::host::{Host, Mounted};
use peel_bench::image::{Served, tar_file};
use peel_bench::measuring;
use peel_bench::pair::{Comparisons, timed};
use peel_image::estargz;
use peel_image::layer::{ChunkSource, EntryKind};
use peel_testkit::link::{Link, Shape};

/// Bytes of a file, which is one chunk that does not compress.
const CHUNK: u64 = 512 << 10;

/// A chunk that is fetched.
struct Target {
    path: CString,
    /// First and last byte in the blob.
    first: u64,
    last: u64,
}

fn main() -> anyhow::Result<()> {
    let dir = peel_bench::scratch(Path::new(env!("CARGO_TARGET_TMPDIR")))?;
    let files = Files::new(if measuring() { 128 } else { 4 }, CHUNK, CHUNK, Kind::Noise);
    let served = Served::new(dir.path(), &tar_file(dir.path(), &files)?)?;
    let targets = targets(&served)?;
    anyhow::ensure!(targets.len() == files.files.len(), "a file is not one chunk");
    let link = Link::start(served.addr(), Shape::default())?;
    let mut comparisons = Comparisons::new("first_touch");
    for (what, addr) in [
        ("512 KiB, loopback", served.addr()),
        ("512 KiB, 20 ms and 500 Mbit/s", link.addr()),
    ] {
        let mut lazy = Lazy::new(dir.path(), &served, addr);
        let url = served.blob_url(addr);
        // Neighbours are not fetched one after the other, so nothing that is learned of the order helps.
        let mut order = (0..targets.len())
            .cycle()
            .step_by(37)
            .map(|number| &targets[number]);
        let mut next = || order.next().context("no chunk");
        comparisons.compare(
            what,
            [
                ("peel", &mut || lazy.touch(&targets)),
                ("curl", &mut || curl(&url, next()?)),
            ],
        )?;
        lazy.stop();
    }
    comparisons.finish();
    Ok(())
}

/// Where the files lie in the layer, by its TOC.
fn targets(served: &Served) -> anyhow::Result<Vec<Target>> {
    let blob = std::fs::read(served.blob_path())?;
    let location = estargz::locate(&blob, served.layer().blob_size)?;
    let start = usize::try_from(location.payload_end)?;
    let toc = blob
        .get(start..start + usize::try_from(location.toc_size)?)
        .context("no TOC")?;
    let index = estargz::read_index(&estargz::extract_toc(toc)?.json, location.payload_end)?;
    let mut targets = Vec::new();
    for entry in &index.entries {
        if let EntryKind::Regular(content) = &entry.kind
            && let [chunk] = content.chunks.as_slice()
            && let ChunkSource::Blob {
                offset,
                compressed_size,
                ..
            } = chunk.source
        {
            targets.push(Target {
                path: CString::new(entry.path.as_bytes())?,
                first: offset,
                last: offset + compressed_size - 1,
            });
        }
    }
    Ok(targets)
}

fn curl(url: &str, target: &Target) -> anyhow::Result<Duration> {
    let range = format!("{}-{}", target.first, target.last);
    let output = Command::new("curl")
        .args(["--silent", "--fail", "--output", "/dev/null", "--range", &range])
        .args(["--write-out", "%{size_download} %{time_total}", url])
        .output()
        .context("cannot run curl")?;
    let text = String::from_utf8(output.stdout)?;
    let (bytes, seconds) = text.split_once(' ').context("curl says nothing")?;
    anyhow::ensure!(
        output.status.success() && bytes.parse() == Ok(target.last - target.first + 1),
        "curl: {}: {text}",
        output.status
    );
    Ok(Duration::from_secs_f64(seconds.parse()?))
}

/// A mounted image of which chunks are missing.
struct Lazy<'a> {
    dir: &'a Path,
    served: &'a Served,
    addr: SocketAddr,
    mounted: Option<(Mounted, Host)>,
    /// Chunks taken from this store.
    taken: usize,
    stores: usize,
}

impl<'a> Lazy<'a> {
    fn new(dir: &'a Path, served: &'a Served, addr: SocketAddr) -> Self {
        Self {
            dir,
            served,
            addr,
            mounted: None,
            taken: 0,
            stores: 0,
        }
    }

    /// Reads the beginning of a file that no run has read from this store.
    fn touch(&mut self, targets: &[Target]) -> anyhow::Result<Duration> {
        if self.taken == targets.len() {
            self.stop();
        }
        if self.mounted.is_none() {
            self.stores += 1;
            let host = Host::start(
                &self
                    .dir
                    .join(format!("store-{}-{}", self.addr.port(), self.stores)),
            )?;
            let image = host.load(&self.served.name(self.addr)?, false)?;
            self.mounted = Some((host.mount(&image)?, host));
        }
        let (mounted, host) = self.mounted.as_ref().context("not mounted")?;
        // 37 has no divisor in common with a power of two: every file comes once.
        let target = &targets[self.taken * 37 % targets.len()];
        self.taken += 1;
        let (_, before) = host.fetched();
        let mut buffer = [0; 4096];
        let time = timed(|| {
            let file = mounted.root.open(&target.path)?;
            Ok(rustix::io::read(&file, &mut buffer)?)
        })?;
        let (_, after) = host.fetched();
        anyhow::ensure!(
            after - before > target.last - target.first,
            "the chunk was here already"
        );
        Ok(time)
    }

    /// Ends the service; the next read begins with an empty store.
    fn stop(&mut self) {
        self.taken = 0;
        if let Some((mounted, host)) = self.mounted.take() {
            drop(mounted);
            host.stop();
        }
    }
}
