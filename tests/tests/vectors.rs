//! The images of the vectors, made by the upstream tools: each mounts to the tree that containerd unpacks, runs, and is
//! listed the same without being mounted.

use peel_tests::world::{TAGS, World, assert_expected, eventually, vector};

#[test]
fn every_image_mounts_to_the_tree_that_containerd_unpacks() {
    let world = World::new();
    for tag in TAGS {
        let dir = world.mount(&vector(tag), tag);
        assert_expected(&dir, tag);
        world.umount(&dir);
    }
    assert!(world.mounts().is_empty());
    world.assert_sound();
}

#[test]
fn all_images_mounted_at_once_hold_each_file_once() {
    let world = World::new();
    let dirs: Vec<_> = TAGS.iter().map(|tag| world.mount(&vector(tag), tag)).collect();
    for (dir, tag) in dirs.iter().zip(TAGS) {
        assert_expected(dir, tag);
    }
    // Every regular file was read to its end, so each different one is an object now, whatever image it was read from.
    let expected = peel_tests::world::expected_listing();
    let digests: std::collections::BTreeSet<&str> = expected
        .lines()
        .filter(|line| !line.contains("\"size\": 0,"))
        .filter_map(|line| line.split("\"sha256\": \"").nth(1)?.split('"').next())
        .collect();
    let objects = || -> std::collections::BTreeSet<String> {
        let paths = world.objects().into_iter();
        paths
            .map(|path| {
                let name = path.strip_prefix(world.store().join("objects")).unwrap();
                name.to_str().unwrap().replace('/', "")
            })
            .collect()
    };
    // It is one once the disk has it.
    for digest in &digests {
        eventually(&format!("object {digest}"), || objects().contains(*digest));
    }
    for dir in &dirs {
        world.umount(dir);
    }
}

/// What `peel inspect` calls the layers of each tag. Only `org` is not lazy.
const FORMATS: &[(&str, &str)] = &[
    ("org", "tar+gzip"),
    ("esgz", "eStargz"),
    ("esgz-opt", "eStargz"),
    ("esgz-chunk64k", "eStargz"),
    ("esgz-min50k", "eStargz"),
    ("esgz-ext", "eStargz with external TOC"),
    ("esgz-keep", "eStargz with external TOC"),
    ("zstd-stargz", "zstd:chunked (stargz)"),
    ("zstd-stargz-opt", "zstd:chunked (stargz)"),
    ("zstd-podman", "zstd:chunked (Podman)"),
    ("zstd-skopeo", "zstd:chunked (Podman)"),
];

#[test]
fn every_image_but_the_plain_one_is_lazy() {
    let world = World::new();
    for (tag, format) in FORMATS {
        let output = world.run(&["inspect", "--json", &vector(tag)]);
        let seen: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        for layer in seen["layers"].as_array().unwrap() {
            assert_eq!(layer["format"], *format, "{tag}: {layer}");
            assert_eq!(layer["lazy"], *format != "tar+gzip", "{tag}: {layer}");
        }
        // A mount says it on standard error when it has to pull a layer whole.
        let dir = world.dir(tag);
        let output = world.run(&["mount", &vector(tag), dir.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{tag}: {said}");
        assert_eq!(said.contains("pulled whole"), *tag == "org", "{tag}: {said}");
        world.umount(&dir);
    }
    assert_eq!(FORMATS.len(), TAGS.len());
}

#[test]
fn every_image_runs() {
    let world = World::new();
    let mut lines = std::collections::BTreeSet::new();
    for tag in TAGS {
        lines.insert(world.ok(&["run", &vector(tag)]));
    }
    assert_eq!(
        lines.len(),
        1,
        "different images printed different things: {lines:?}"
    );
    assert_eq!(lines.first().unwrap().lines().count(), 1);
    world.assert_sound();
}
