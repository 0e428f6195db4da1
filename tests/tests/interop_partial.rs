//! Podman 5 takes our zstd:chunked layers in part: from the table of contents, without bytes that it has already, by
//! whole files and by chunks. The image that Podman itself pushed (the vectors' `zstd-podman`) goes the same way first.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::path::Path;

use peel_tests::image::{Layer, Tar, push};
use peel_tests::namespace::Namespace;
use peel_tests::podman::{Podman, Pull};
use peel_tests::service::DockerRegistry;
use peel_tests::world::{World, expected_listing, listing, vector};
use serde_json::Value;

/// Layers of the vectors' image.
const LAYERS: usize = 3;

/// Pulls an image; every layer must be taken in part. Returns what the pull says, and the bytes of blobs that it fetched.
fn pull_in_part(podman: &Podman<'_>, registry: &DockerRegistry, image: &str, layers: usize) -> (Pull, u64) {
    let before = registry.requests().len();
    let pull = podman.pull(image);
    assert_eq!(pull.partial_layers, layers, "{image} in part:\n{}", pull.log);
    let blobs = registry.requests().split_off(before);
    let fetched = blobs
        .iter()
        .filter(|request| request.method == "GET" && request.path.contains("/blobs/"))
        .map(|request| request.bytes)
        .sum();
    (pull, fetched)
}

/// Compares a tree that Podman made from tables of contents with the vectors' listing. From its own images, too, such a tree
/// has neither device nodes nor fifos, and directories and links have the time of the pull.
fn assert_applied(dir: &Path, what: &str) {
    let applied = |listing: String| -> Vec<Value> {
        let entries = listing.lines().map(|line| serde_json::from_str(line).unwrap());
        entries
            .filter(|entry: &Value| !matches!(entry["type"].as_str(), Some("char" | "block" | "fifo")))
            .map(|mut entry| {
                if matches!(entry["type"].as_str(), Some("dir" | "symlink")) {
                    entry["mtime"] = Value::Null;
                }
                entry
            })
            .collect()
    };
    let (got, expected) = (applied(listing(dir)), applied(expected_listing()));
    for (entry, wanted) in got.iter().zip(&expected) {
        assert_eq!(entry, wanted, "{what}");
    }
    assert_eq!(got.len(), expected.len(), "{what}: number of entries");
}

/// The images that Podman and peel made of the same tree.
fn both(world: &World, registry: &DockerRegistry) -> [String; 2] {
    let theirs = registry.take(&vector("zstd-podman"), "theirs");
    let ours = format!("{}/ours:latest", registry.addr);
    world.convert(&["--zstdchunked"], &vector("org"), &ours);
    [theirs, ours]
}

#[test]
fn files_that_one_image_has_are_not_fetched_for_the_other() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("registry"));
    let [theirs, ours] = both(&world, &registry);
    for (dir, first, second) in [("theirs-first", &theirs, &ours), ("ours-first", &ours, &theirs)] {
        // Each direction its own: Podman notes beside its storage which blobs are the same layer.
        let namespace = Namespace::trixie(&world);
        let podman = Podman::partial(&namespace, &world.path(dir));
        let (pull, whole) = pull_in_part(&podman, &registry, first, LAYERS);
        // The runs of zeros are not fetched even then; the third layer has no files, so nothing is said of it.
        assert_eq!(pull.partial.len(), 2, "{}", pull.log);
        for layer in &pull.partial {
            assert!(
                0 < layer.missing && layer.missing < layer.total,
                "{dir}: {layer:?}"
            );
        }
        assert_applied(&podman.mount(first), &format!("{first}, {dir}"));

        let (pull, rest) = pull_in_part(&podman, &registry, second, LAYERS);
        for layer in &pull.partial {
            assert_eq!(layer.missing, 0, "{dir}, of a layer of {second}:\n{}", pull.log);
        }
        // What is left is configuration, tables of contents and tar-splits.
        assert!(rest * 4 < whole, "{dir}: {rest} of {whole} bytes");
        assert_applied(&podman.mount(second), &format!("{second}, {dir}"));
    }
}

#[test]
fn chunks_of_an_older_version_of_a_file_are_not_fetched() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("registry"));
    let [theirs, _] = both(&world, &registry);
    // The file of several chunks, with something put into its third; one of the others is nearly all of it.
    let root = world.mount(&vector("org"), "root");
    let mut contents = fs::read(root.join("usr/lib/big.bin")).unwrap();
    world.umount(&root);
    let third = 30_000;
    contents.splice(third..third, *b"a new version");
    let tar = Tar::new()
        .dir("usr")
        .dir("usr/lib")
        .file("usr/lib/big.bin", &contents);
    let made = world.registry();
    let source = push(&made, "changed", "latest", &[Layer::plain(&tar.finish())]);
    let ours = format!("{}/changed:latest", registry.addr);
    world.convert(&["--zstdchunked"], &source, &ours);

    let namespace = Namespace::trixie(&world);
    let podman = Podman::partial(&namespace, &world.path("podman"));
    pull_in_part(&podman, &registry, &theirs, LAYERS);
    let (pull, _) = pull_in_part(&podman, &registry, &ours, 1);
    let [layer] = pull.partial.as_slice() else {
        panic!("one layer is expected:\n{}", pull.log)
    };
    assert_eq!(layer.total, contents.len() as u64);
    // The chunk before may end elsewhere too; all three of these are far below the mean of 64 KiB.
    assert!(0 < layer.missing && layer.missing < 65_536, "{layer:?}");
    assert!(fs::read(podman.mount(&ours).join("usr/lib/big.bin")).unwrap() == contents);
}
