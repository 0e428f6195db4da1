//! Images in one tar file, as `docker save` and `skopeo` write them: an error, or a source that answers.
#![no_main]

use std::cell::RefCell;
use std::fs;

use libfuzzer_sys::fuzz_target;
use peel_image::Digest;
use peel_registry::{ClientOptions, ImageName, Source};
use tempfile::TempDir;

struct World {
    dir: TempDir,
    runtime: tokio::runtime::Runtime,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::new(World {
        dir: tempfile::tempdir().expect("a temporary directory"),
        runtime: tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime"),
    });
}

async fn read(name: ImageName) {
    let Ok(source) = Source::open(&name, &ClientOptions::default()).await else {
        return;
    };
    if let Ok(image) = source.resolve(None).await {
        assert_eq!(Digest::of(&image.manifest_bytes), image.manifest_digest);
        let _ = source.config(&image).await;
        for layer in image.manifest.layers() {
            if let Ok(blob) = source.blob(layer)
                && let Ok(bytes) = blob.read_verified(1 << 20).await
            {
                assert_eq!(Digest::of(&bytes), blob.digest());
            }
        }
    }
}

fuzz_target!(|data: &[u8]| {
    WORLD.with_borrow(|world| {
        let file = world.dir.path().join("archive.tar");
        fs::write(&file, data).expect("a file");
        world.runtime.block_on(read(ImageName::DockerArchive {
            file: file.clone(),
            tag: None,
        }));
        world
            .runtime
            .block_on(read(ImageName::OciArchive { file, tag: None }));
    });
});
