//! Writes a tree that was filled in stages as an OCI layout: one gzip layer for each stage.
//!
//! Called by [`super::debian`] and [`super::host`]. The tar streams come from GNU tar, compression and digests from
//! here; two layers are compressed at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use flate2::Compression;
use flate2::write::GzEncoder;
use oci_spec::image::Arch;
use peel_image::{Digest, Hasher};

use super::{FACTS, MadeImage, TAG};

/// Level of gzip's command and of most registries' layers.
const LEVEL: u32 = 6;

/// Layers that are compressed at once.
const WORKERS: usize = 2;

/// The layers of an image as lists of paths below a root.
#[derive(Debug)]
pub(super) struct Plan {
    /// Directory that the paths are relative to.
    pub(super) root: PathBuf,
    /// For each layer a word for its history, and its paths.
    pub(super) layers: Vec<(String, BTreeSet<PathBuf>)>,
    /// Environment of the image.
    pub(super) env: Vec<String>,
    /// Command of the image.
    pub(super) cmd: Vec<String>,
}

/// A finished layer.
#[derive(Debug)]
struct Layer {
    digest: Digest,
    diff_id: Digest,
    size: u64,
}

/// Writes the plan into `layout`, which appears only when it is whole.
pub(super) fn write(
    plan: &Plan,
    layout: &Path,
    mut made: MadeImage,
    say: &dyn Fn(&str),
) -> Result<MadeImage> {
    say(&format!("Compressing {} layers.", plan.layers.len()));
    let parent = layout.parent().context("the layout has no parent directory")?;
    let temporary = tempfile::Builder::new().prefix("layout-").tempdir_in(parent)?;
    let blobs = temporary.path().join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let mut finished: BTreeMap<usize, Layer> = BTreeMap::new();
    for chunk in plan.layers.iter().enumerate().collect::<Vec<_>>().chunks(WORKERS) {
        std::thread::scope(|scope| -> Result<()> {
            let workers: Vec<_> = chunk
                .iter()
                .map(|(index, (_, paths))| (*index, scope.spawn(|| layer(&plan.root, paths, &blobs))))
                .collect();
            for (index, worker) in workers {
                let layer = worker
                    .join()
                    .map_err(|_| anyhow::anyhow!("a compressing thread panicked"))??;
                finished.insert(index, layer);
            }
            Ok(())
        })?;
    }
    let history: Vec<_> = plan
        .layers
        .iter()
        .map(|(name, _)| serde_json::json!({ "created_by": format!("peel demo: {name}") }))
        .collect();
    let diff_ids: Vec<_> = finished.values().map(|layer| layer.diff_id.to_string()).collect();
    let architecture = Arch::default().to_string();
    let config = serde_json::json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Env": plan.env, "Cmd": plan.cmd, "WorkingDir": "/" },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
        "history": history,
    });
    let config = config.to_string();
    let put = |bytes: &[u8]| -> Result<Digest> {
        let digest = Digest::of(bytes);
        fs::write(blobs.join(digest.hex()), bytes)?;
        Ok(digest)
    };
    let layers: Vec<_> = finished
        .values()
        .map(|layer| {
            serde_json::json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
                "digest": layer.digest.to_string(),
                "size": layer.size,
            })
        })
        .collect();
    let manifest = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": put(config.as_bytes())?.to_string(),
            "size": config.len(),
        },
        "layers": layers,
    })
    .to_string();
    let index = serde_json::json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [{
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "digest": put(manifest.as_bytes())?.to_string(),
            "size": manifest.len(),
            "platform": { "os": "linux", "architecture": architecture },
            "annotations": { "org.opencontainers.image.ref.name": TAG },
        }],
    });
    fs::write(temporary.path().join("index.json"), index.to_string())?;
    fs::write(
        temporary.path().join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    made.layer_bytes = finished.values().map(|layer| layer.size).sum();
    made.layers = finished.len();
    fs::write(temporary.path().join(FACTS), serde_json::to_vec(&made)?)?;
    if layout.exists() {
        fs::remove_dir_all(layout)?;
    }
    fs::rename(temporary.keep(), layout)?;
    made.layout = layout.to_path_buf();
    Ok(made)
}

/// Packs, compresses and hashes one layer.
fn layer(root: &Path, paths: &BTreeSet<PathBuf>, blobs: &Path) -> Result<Layer> {
    let mut list = tempfile::NamedTempFile::new()?;
    for path in paths {
        list.write_all(b"./")?;
        list.write_all(path.as_os_str().as_bytes())?;
        list.write_all(b"\0")?;
    }
    list.flush()?;
    let mut tar = Command::new("tar")
        .arg("--directory")
        .arg(root)
        .args([
            "--create",
            "--file=-",
            "--numeric-owner",
            "--no-recursion",
            "--null",
            "--verbatim-files-from",
        ])
        .arg("--files-from")
        .arg(list.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    let mut stream = tar.stdout.take().context("tar has no output")?;
    let mut file = tempfile::NamedTempFile::new_in(blobs)?;
    let mut plain = Hasher::new();
    let mut encoder = GzEncoder::new(Hashed::new(file.as_file_mut()), Compression::new(LEVEL));
    let mut buffer = vec![0; 1 << 18];
    loop {
        let length = stream.read(&mut buffer)?;
        let Some(bytes) = buffer.get(..length).filter(|bytes| !bytes.is_empty()) else {
            break;
        };
        plain.update(bytes);
        encoder.write_all(bytes)?;
    }
    let hashed = encoder.finish()?;
    let (digest, size) = (hashed.hasher.finish(), hashed.size);
    ensure!(tar.wait()?.success(), "tar failed");
    file.persist(blobs.join(digest.hex()))?;
    Ok(Layer {
        digest,
        diff_id: plain.finish(),
        size,
    })
}

/// A file that hashes and counts what is written into it.
#[derive(Debug)]
struct Hashed<'a> {
    file: &'a mut File,
    hasher: Hasher,
    size: u64,
}

impl<'a> Hashed<'a> {
    fn new(file: &'a mut File) -> Self {
        Self {
            file,
            hasher: Hasher::new(),
            size: 0,
        }
    }
}

impl Write for Hashed<'_> {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(data)?;
        self.hasher.update(data.get(..written).unwrap_or_default());
        self.size += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

/// Every path below `root`, relative, with what tells whether it was changed: inode and change time.
pub(super) fn listing(root: &Path) -> Result<BTreeMap<PathBuf, (u64, i64, i64)>> {
    use std::os::unix::fs::MetadataExt;
    let mut found = BTreeMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(dir) = pending.pop() {
        let at = root.join(&dir);
        for entry in fs::read_dir(&at).with_context(|| format!("cannot list {}", at.display()))? {
            let entry = entry?;
            let metadata = entry.metadata()?;
            let path = dir.join(entry.file_name());
            if metadata.is_dir() {
                pending.push(path.clone());
            }
            found.insert(path, (metadata.ino(), metadata.ctime(), metadata.ctime_nsec()));
        }
    }
    Ok(found)
}

/// Adds the directories above each path, so that every layer can be unpacked on its own with the right modes.
pub(super) fn with_parents(paths: impl IntoIterator<Item = PathBuf>) -> BTreeSet<PathBuf> {
    let mut all = BTreeSet::new();
    for path in paths {
        for ancestor in path
            .ancestors()
            .filter(|ancestor| !ancestor.as_os_str().is_empty())
        {
            if !all.insert(ancestor.to_path_buf()) {
                break;
            }
        }
    }
    all
}
