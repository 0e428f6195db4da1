//! An OCI layout in a temporary directory and a runtime to read it with: where documents and blobs of strangers need no server.
//! Fuzz targets put in what they are given and read it as the product does.

use std::fs;
use std::future::Future;
use std::path::{Path, PathBuf};

use peel_image::Digest;
use peel_registry::ImageName;
use tempfile::TempDir;

/// The layout; one per thread is enough for a whole run.
#[derive(Debug)]
pub struct Layout {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Default for Layout {
    fn default() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("blobs/sha256")).expect("directories");
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        Self { dir, runtime }
    }
}

impl Layout {
    /// Its directory.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// The name of an image in it.
    pub fn name(&self, tag: Option<&str>) -> ImageName {
        ImageName::Layout {
            dir: self.dir.path().to_owned(),
            tag: tag.map(str::to_owned),
        }
    }

    /// Puts a blob in and returns its descriptor.
    pub fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).expect("a file");
        serde_json::json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    /// Takes a blob out, if it is there.
    pub fn remove(&self, digest: &Digest) {
        let _ = fs::remove_file(self.blob_path(digest));
    }

    /// Writes `index.json`.
    pub fn index(&self, bytes: &[u8]) {
        fs::write(self.dir.path().join("index.json"), bytes).expect("a file");
    }

    /// Waits for something that reads.
    pub fn wait<T>(&self, reading: impl Future<Output = T>) -> T {
        self.runtime.block_on(reading)
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.hex())
    }
}
