//! Manifests, indexes and configurations as they come from a registry: through an OCI layout, where they need no server. The
//! first byte says what the rest is.
#![no_main]

use std::cell::RefCell;
use std::fs;
use std::path::Path;

use libfuzzer_sys::fuzz_target;
use peel_image::{Digest, media};
use peel_registry::{ClientOptions, ImageName, Source};
use tempfile::TempDir;

struct World {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        fs::create_dir_all(dir.path().join("blobs/sha256")).expect("directories");
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).expect("a file");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        Self { dir, runtime }
    }

    /// Puts a blob into the layout and returns its descriptor.
    fn blob(&self, media_type: &str, bytes: &[u8]) -> serde_json::Value {
        let digest = Digest::of(bytes);
        fs::write(self.blob_path(&digest), bytes).expect("a file");
        serde_json::json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    fn blob_path(&self, digest: &Digest) -> std::path::PathBuf {
        self.dir.path().join("blobs/sha256").join(digest.hex())
    }

    fn index(&self, bytes: &[u8]) {
        fs::write(self.dir.path().join("index.json"), bytes).expect("a file");
    }
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World::new());
}

async fn read(dir: &Path) {
    let name = ImageName::Layout {
        dir: dir.to_owned(),
        tag: None,
    };
    let Ok(source) = Source::open(&name, &ClientOptions::default()).await else {
        return;
    };
    let _ = source.index().await;
    for platform in [None, Some("linux/amd64"), Some("linux/arm64/v8")] {
        if let Ok(image) = source.resolve(platform).await {
            assert_eq!(Digest::of(&image.manifest_bytes), image.manifest_digest);
            let _ = source.config(&image).await;
            for layer in image.manifest.layers() {
                if let Ok(blob) = source.blob(layer) {
                    assert_eq!(blob.digest().to_string(), layer.digest().to_string());
                }
            }
        }
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (kind, data) = input;
    WORLD.with_borrow(|world| {
        let mut made = vec![Digest::of(data)];
        let descriptor = match kind % 4 {
            0 => None,
            1 => Some(world.blob(media::OCI_MANIFEST, data)),
            2 => Some(world.blob(media::OCI_INDEX, data)),
            _ => {
                let config = world.blob(media::OCI_CONFIG, data);
                let manifest =
                    serde_json::json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
                made.push(Digest::of(manifest.as_bytes()));
                Some(world.blob(media::OCI_MANIFEST, manifest.as_bytes()))
            }
        };
        match descriptor {
            None => world.index(data),
            Some(descriptor) => {
                let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor]});
                world.index(index.to_string().as_bytes());
            }
        }
        world.runtime.block_on(read(world.dir.path()));
        for digest in made {
            let _ = fs::remove_file(world.blob_path(&digest));
        }
    });
});
