//! Two images with a common base, mounted at once: the common files are fetched once and exist once.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use peel_image::Digest;
use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, eventually, read};

/// Chunks of this many bytes, so that a file can be half here.
const CHUNK: usize = 64 << 10;

fn base() -> (Vec<u8>, Layer) {
    let common = noise(1, 40 * CHUNK);
    let tar = Tar::new()
        .dir("lib/")
        .file("lib/common", &common)
        .file("lib/other", &noise(2, CHUNK))
        .finish();
    (common, Layer::estargz(&tar, CHUNK as u64, &[]))
}

fn top(text: &str) -> Layer {
    Layer::estargz(
        &Tar::new().dir("etc/").file("etc/name", text.as_bytes()).finish(),
        0,
        &[],
    )
}

#[test]
fn a_common_file_is_fetched_once_and_is_one_inode() {
    let world = World::new().with_read_deadline(3);
    let registry = world.registry();
    let (common, layer) = base();
    let names = ["one", "two"].map(|tag| push(&registry, "app", tag, &[layer.clone(), top(tag)]));
    let dirs = ["one", "two"].map(|tag| world.dir(tag));
    for (name, dir) in names.iter().zip(&dirs) {
        world.ok(&["mount", "--no-prefetch", name, dir.to_str().unwrap()]);
    }
    let [one, two] = dirs.each_ref().map(|dir| dir.join("lib/common"));
    registry.reset_counters();
    assert!(read(&one).unwrap() == common);
    let fetched = registry.counters();
    assert!(fetched.body_bytes > 0, "the file was here before it was read");
    // The second image must not need the registry for it any more.
    registry.faults().refuse();
    assert!(read(&two).unwrap() == common);
    assert_eq!(registry.counters(), fetched);

    let digest = Digest::of(&common);
    let hex = digest.hex();
    let object = world.store().join("objects").join(&hex[..2]).join(&hex[2..]);
    eventually("the disk has the file", || object.exists());
    let same: Vec<_> = world
        .objects()
        .into_iter()
        .filter(|path| path.metadata().unwrap().len() == common.len() as u64)
        .collect();
    assert_eq!(same, [object]);
    assert_eq!(
        read(&dirs[0].join("etc/name")).err(),
        Some(5),
        "what was not fetched fails while nobody answers"
    );
    registry.faults().accept();
    assert_eq!(read(&dirs[1].join("etc/name")).unwrap(), b"two");
    dirs.iter().for_each(|dir| world.umount(dir));
    world.assert_sound();
}

#[test]
fn a_common_file_that_is_half_here_is_shared_too() {
    let world = World::new().with_read_deadline(3);
    let registry = world.registry();
    let (common, layer) = base();
    let names = ["one", "two"].map(|tag| push(&registry, "app", tag, &[layer.clone(), top(tag)]));
    let dirs = ["one", "two"].map(|tag| world.dir(tag));
    for (name, dir) in names.iter().zip(&dirs) {
        world.ok(&["mount", "--no-prefetch", name, dir.to_str().unwrap()]);
    }
    let at = |dir: &Path, chunk: usize| {
        let mut bytes = vec![0; 4096];
        let file = File::open(dir.join("lib/common")).unwrap();
        file.read_exact_at(&mut bytes, (chunk * CHUNK) as u64)
            .map(|()| bytes)
            .map_err(|error| error.raw_os_error())
    };
    assert!(at(&dirs[0], 3).unwrap() == common[3 * CHUNK..3 * CHUNK + 4096]);
    registry.faults().refuse();
    assert!(at(&dirs[1], 3).unwrap() == common[3 * CHUNK..3 * CHUNK + 4096]);
    assert_eq!(
        at(&dirs[1], 39).err(),
        Some(Some(5)),
        "a chunk that nobody fetched is an error, never zeros"
    );
    registry.faults().accept();
    assert!(at(&dirs[1], 39).unwrap() == common[39 * CHUNK..39 * CHUNK + 4096]);
    // The same inode is below both mounts: a page that one brought in is there for the other.
    let inode = |dir: &Path| dir.join("lib/common").metadata().unwrap().size();
    assert_eq!(inode(&dirs[0]), inode(&dirs[1]));
    dirs.iter().for_each(|dir| world.umount(dir));
    world.assert_sound();
}
