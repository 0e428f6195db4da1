//! A tree of files as an image of one eStargz layer in an embedded registry. Called by the benchmarks that load images.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context;
use peel_image::media;
use peel_registry::ImageName;
use peel_testkit::registry::Registry;
use peel_writer::{self as writer, Written};
use serde_json::json;

use crate::files::Files;

/// Its repository.
const REPOSITORY: &str = "bench/files";
/// Its tag.
const TAG: &str = "latest";

/// A registry with one image.
#[derive(Debug)]
pub struct Served {
    registry: Registry,
    layer: Written,
}

/// The tree as a tar file in `dir`.
pub fn tar_file(dir: &Path, files: &Files) -> anyhow::Result<PathBuf> {
    let path = dir.join("layer.tar");
    let file = File::create(&path).with_context(|| path.display().to_string())?;
    files.write_tar(BufWriter::with_capacity(1 << 20, file))?;
    Ok(path)
}

impl Served {
    /// Makes an image of the tar file and serves it from `dir`, which is made.
    pub fn new(dir: &Path, tar: &Path) -> anyhow::Result<Self> {
        let registry = Registry::start(&dir.join("registry"))?;
        let blob = dir.join("layer.tar.gz");
        let input = BufReader::with_capacity(1 << 20, File::open(tar)?);
        let output = BufWriter::new(File::create(&blob)?);
        let options = writer::Options::default();
        let layer = writer::write(input, tempfile::tempfile_in(dir)?, output, &options)?;
        let content = registry.content();
        content.put_blob_from(File::open(&blob)?)?;
        std::fs::remove_file(&blob)?;
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let config = json!({
            "architecture": architecture,
            "os": "linux",
            "rootfs": { "type": "layers", "diff_ids": [layer.diff_id.to_string()] },
        })
        .to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": media::OCI_MANIFEST,
            "config": {
                "mediaType": media::OCI_CONFIG,
                "digest": content.put_blob(config.as_bytes())?.to_string(),
                "size": config.len(),
            },
            "layers": [{
                "mediaType": layer.media_type,
                "digest": layer.blob_digest.to_string(),
                "size": layer.blob_size,
                "annotations": layer.annotations,
            }],
        })
        .to_string();
        content.put_manifest(REPOSITORY, TAG, media::OCI_MANIFEST, manifest.as_bytes())?;
        Ok(Self { registry, layer })
    }

    /// Where the registry listens.
    pub fn addr(&self) -> SocketAddr {
        self.registry.addr()
    }

    /// The image's only layer.
    pub fn layer(&self) -> &Written {
        &self.layer
    }

    /// The layer's file.
    pub fn blob_path(&self) -> PathBuf {
        self.registry.content().blob_path(&self.layer.blob_digest)
    }

    /// The layer's URL at the registry, or at a link in front of it.
    pub fn blob_url(&self, addr: SocketAddr) -> String {
        format!("http://{addr}/v2/{REPOSITORY}/blobs/{}", self.layer.blob_digest)
    }

    /// The image's name at the registry, or at a link in front of it.
    pub fn name(&self, addr: SocketAddr) -> anyhow::Result<ImageName> {
        Ok(format!("{addr}/{REPOSITORY}:{TAG}").parse()?)
    }
}
