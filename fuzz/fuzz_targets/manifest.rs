//! Manifests, indexes and configurations as they come from a registry: through an OCI layout, where they need no server. The
//! first byte says what the rest is.
#![no_main]

use std::cell::RefCell;

use libfuzzer_sys::fuzz_target;
use peel_fuzz::layout::Layout;
use peel_image::{Digest, media};
use peel_registry::{ClientOptions, ImageName, Source};

thread_local! {
    static LAYOUT: RefCell<Layout> = RefCell::default();
}

async fn read(name: ImageName) {
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
    LAYOUT.with_borrow(|layout| {
        let mut made = vec![Digest::of(data)];
        let descriptor = match kind % 4 {
            0 => None,
            1 => Some(layout.blob(media::OCI_MANIFEST, data)),
            2 => Some(layout.blob(media::OCI_INDEX, data)),
            _ => {
                let config = layout.blob(media::OCI_CONFIG, data);
                let manifest =
                    serde_json::json!({"schemaVersion": 2, "config": config, "layers": []}).to_string();
                made.push(Digest::of(manifest.as_bytes()));
                Some(layout.blob(media::OCI_MANIFEST, manifest.as_bytes()))
            }
        };
        match descriptor {
            None => layout.index(data),
            Some(descriptor) => {
                let index = serde_json::json!({"schemaVersion": 2, "manifests": [descriptor]});
                layout.index(index.to_string().as_bytes());
            }
        }
        layout.wait(read(layout.name(None)));
        for digest in made {
            layout.remove(&digest);
        }
    });
});
