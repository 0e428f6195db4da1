//! Images in one tar file, as `docker save` and `skopeo` write them: an error, or a source that answers.
#![no_main]

use std::cell::RefCell;
use std::fs;

use libfuzzer_sys::fuzz_target;
use peel_fuzz::layout::Layout;
use peel_image::Digest;
use peel_registry::{ClientOptions, ImageName, Source};

thread_local! {
    // Its directory and its runtime are all that is needed.
    static WORLD: RefCell<Layout> = RefCell::default();
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
        let file = world.path().join("archive.tar");
        fs::write(&file, data).expect("a file");
        world.wait(read(ImageName::DockerArchive {
            file: file.clone(),
            tag: None,
        }));
        world.wait(read(ImageName::OciArchive { file, tag: None }));
    });
});
