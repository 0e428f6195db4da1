//! What a conversion does not do again: layers that were converted before, layers that are what is asked for, layers that the
//! registry has in another repository, layers that an image has twice.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;

use peel_image::Digest;
use peel_testkit::registry::{Registry, RequestRecord};
use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::service::DockerRegistry;
use peel_tests::world::{World, assert_expected, errors, vector};
use peel_writer::{Dialect, Format};
use serde_json::Value;

/// Converts and returns what `--json` says.
fn convert(world: &World, flags: &[&str], source: &str, target: &str) -> Value {
    world.json(&[&["convert"], flags, &[source, target]].concat())
}

/// How each layer of the first image came about.
fn how(outcome: &Value) -> Vec<&str> {
    let layers = outcome["images"][0]["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| layer["how"].as_str().unwrap())
        .collect()
}

/// Bytes of blobs that went either way since the log began at `from`.
fn blob_traffic(registry: &Registry, from: usize) -> Vec<RequestRecord> {
    let moves = |record: &RequestRecord| {
        let upload = record.target.contains("/uploads/") && record.method != "HEAD";
        upload || (record.method == "GET" && record.target.contains("/blobs/"))
    };
    registry.log().into_iter().skip(from).filter(moves).collect()
}

#[test]
fn a_second_conversion_moves_no_layer_and_gives_the_same_image() {
    let world = World::new();
    let registry = world.registry();
    let record = world.path("record.jsonl");
    fs::write(
        &record,
        "{\"path\":\"usr/lib/mod007.py\"}\n{\"path\":\"bin/sh\"}\n{\"path\":\"etc/os-release\"}\n",
    )
    .unwrap();
    let record = record.to_str().unwrap();
    for (number, flags) in FORMATS.iter().enumerate() {
        let mut flags: Vec<&str> = flags.split_whitespace().collect();
        for flag in &mut flags {
            if *flag == "RECORD" {
                *flag = record;
            }
        }
        let target = format!("{}/again/v{number}:v1", registry.addr());
        let first = convert(&world, &flags, &vector("org"), &target);
        assert_eq!(how(&first), ["converted"; 3], "{flags:?}");

        let from = registry.log().len();
        let second = convert(&world, &flags, &vector("org"), &target);
        assert_eq!(how(&second), ["reused"; 3], "{flags:?}");
        assert_eq!(second["manifest_digest"], first["manifest_digest"], "{flags:?}");
        let layers = first["images"][0]["layers"].as_array().unwrap();
        for request in blob_traffic(&registry, from) {
            let of_layer = layers
                .iter()
                .any(|layer| request.target.contains(layer["digest"].as_str().unwrap()));
            let tail = request.range.is_some();
            assert!(
                request.method == "GET" && (!of_layer || tail),
                "{flags:?}: {request:?}"
            );
        }

        let one: Vec<&str> = flags
            .iter()
            .copied()
            .chain(["--reconvert", "--estargz-parallelism", "1"])
            .collect();
        let third = convert(&world, &one, &vector("org"), &target);
        assert_eq!(how(&third), ["converted"; 3], "{flags:?}");
        assert_eq!(third["manifest_digest"], first["manifest_digest"], "{flags:?}");
        assert!(
            third["images"][0]["layers"]
                .as_array()
                .unwrap()
                .iter()
                .all(|layer| layer["sent"] == false),
            "{flags:?}: {third}"
        );
        let dir = world.mount(&target, "root");
        assert_expected(&dir, &format!("{flags:?}"));
        world.umount(&dir);
    }
}

/// One of each format, with files that come first where the format has an order.
const FORMATS: [&str; 10] = [
    "--estargz",
    "--estargz-record-in RECORD",
    "--estargz-chunk-size 65536 --estargz-compression-level 3",
    "--estargz-min-chunk-size 50000",
    "--estargz-external-toc",
    "--zstdchunked",
    "--zstdchunked --dialect stargz --zstdchunked-chunk-size 65536",
    "--gzip",
    "--zstd --zstd-compression-level 5",
    "--uncompress",
];

#[test]
fn another_way_of_converting_is_another_layer() {
    let world = World::new();
    let registry = world.registry();
    let target = format!("{}/other:v1", registry.addr());
    let first = convert(&world, &[], &vector("org"), &target);
    let other = convert(
        &world,
        &["--estargz-chunk-size", "65536"],
        &vector("org"),
        &target,
    );
    assert_eq!(how(&other), ["converted"; 3]);
    assert_ne!(other["manifest_digest"], first["manifest_digest"]);
    // What the tag names now is what counts, not what it named before.
    let again = convert(&world, &[], &vector("org"), &target);
    assert_eq!(how(&again), ["converted"; 3]);
    assert_eq!(again["manifest_digest"], first["manifest_digest"]);
}

#[test]
fn layers_that_occur_twice_are_converted_once() {
    let world = World::new();
    let registry = world.registry();
    // Docker's empty layer: the gzip stream of two empty records.
    let empty = Layer::plain(&Tar::new().finish());
    let some = Layer::plain(&Tar::new().dir("d/").file("d/f", &noise(1, 300_000)).finish());
    let other = Layer::plain(&Tar::new().dir("e/").file("e/f", b"content").finish());
    let layers = [
        some.clone(),
        empty.clone(),
        some.clone(),
        other,
        empty.clone(),
        some.clone(),
    ];
    let source = push(&registry, "twice", "v1", &layers);
    let from = registry.log().len();
    let target = format!("{}/twice:esgz", registry.addr());
    let outcome = convert(&world, &[], &source, &target);
    let digests: Vec<&str> = outcome["images"][0]["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| layer["digest"].as_str().unwrap())
        .collect();
    assert_eq!(digests.len(), 6);
    assert!(digests[0] == digests[2] && digests[2] == digests[5] && digests[1] == digests[4]);
    let reads = |layer: &Layer| {
        let digest = layer.digest().to_string();
        let gets = blob_traffic(&registry, from);
        gets.iter()
            .filter(|request| request.target.contains(&digest))
            .count()
    };
    assert_eq!((reads(&some), reads(&empty)), (1, 1));
    assert_eq!(world.ok(&["cat", &target, "/e/f"]), "content");
    assert_eq!(how(&convert(&world, &[], &source, &target)), ["reused"; 6]);
}

#[test]
fn a_layer_with_a_path_twice_is_begun_again() {
    let world = World::new();
    let registry = world.registry();
    // Enough before the second entry that the first upload is under way.
    let tar = Tar::new()
        .dir("d/")
        .file("d/f", b"old")
        .file("large", &noise(1, 20 << 20))
        .file("./d/f", b"new")
        .finish();
    let layer = Layer::plain(&tar);
    let source = push(&registry, "path-twice", "v1", std::slice::from_ref(&layer));
    let zstd = |dialect| Format::zstd_chunked(dialect);
    for (flags, format) in [
        ("--estargz --estargz-compression-level 7", Format::ESTARGZ),
        ("--zstdchunked", zstd(Dialect::Podman)),
        ("--zstdchunked --dialect stargz", zstd(Dialect::Stargz)),
    ] {
        let flags: Vec<&str> = flags.split_whitespace().collect();
        let from = registry.log().len();
        let to_registry = format!("{}/path-twice:new", registry.addr());
        let to_layout = format!("oci:{}:new", world.path("layout").display());
        for target in [&to_registry, &to_layout] {
            let outcome = convert(&world, &flags, &source, target);
            assert_eq!(how(&outcome), ["converted"]);
            let made = outcome["images"][0]["layers"][0]["digest"].as_str().unwrap();
            let expected = Layer::written(&tar, format).unwrap().digest().to_string();
            assert_eq!(made, expected, "{flags:?}");
            assert_eq!(world.ok(&["cat", target, "/d/f"]), "new");
        }
        let digest = layer.digest().to_string();
        let reads = blob_traffic(&registry, from);
        let reads = reads
            .iter()
            .filter(|request| request.method == "GET" && request.target.contains(&digest));
        assert!(reads.count() >= 4, "{flags:?}");
    }
}

#[test]
fn a_layer_that_is_not_the_configurations_is_refused() {
    let world = World::new();
    let registry = world.registry();
    let mut layer = Layer::plain(&Tar::new().file("f", b"content").finish());
    let right = layer.diff_id;
    layer.diff_id = Digest::of(b"something else");
    let source = push(&registry, "wrong", "v1", std::slice::from_ref(&layer));
    let target = format!("{}/wrong:esgz", registry.addr());
    let output = world.run(&["convert", &source, &target]);
    let message = errors(&output);
    assert!(!output.status.success());
    for part in [layer.digest(), right, layer.diff_id] {
        assert!(message.contains(&part.to_string()), "{message}");
    }
    assert!(registry.content().manifest("wrong", "esgz").is_none());
}

#[test]
fn kept_layers_are_taken_over_from_another_repository() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("docker-registry"));
    let name = |repository: &str| format!("{}/{repository}:v1", registry.addr);
    let first = convert(&world, &[], &vector("org"), &name("team/one"));
    let kept = convert(&world, &["--reuse"], &name("team/one"), &name("team/two"));
    assert_eq!(how(&kept), ["kept"; 3]);
    let digests = |outcome: &Value| -> Vec<String> {
        let layers = outcome["images"][0]["layers"].as_array().unwrap();
        layers.iter().map(|layer| layer["digest"].to_string()).collect()
    };
    assert_eq!(digests(&kept), digests(&first));
    for layer in kept["images"][0]["layers"].as_array().unwrap() {
        assert_eq!(layer["sent"], false, "{kept}");
    }
    let dir = world.mount(&name("team/two"), "root");
    assert_expected(&dir, "kept layers, mounted");
    world.umount(&dir);
    // Layers of which a file is put first are not kept.
    let record = world.path("record.jsonl");
    fs::write(&record, "{\"path\":\"bin/sh\"}\n").unwrap();
    let list = world.path("list");
    fs::write(&list, "bin/sh\n").unwrap();
    let arguments = [
        "optimize",
        "--reuse",
        "--prefetch-list",
        list.to_str().unwrap(),
        &name("team/one"),
        &name("team/three"),
    ];
    let optimized = world.json(&arguments);
    assert_eq!(how(&optimized), ["converted", "kept", "kept"]);
}
