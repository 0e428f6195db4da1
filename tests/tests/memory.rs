//! A conversion stays below 256 MiB of memory, whatever is asked of it: the largest chunks, levels with the largest tables, more
//! threads than most machines have cores. The content does not compress, so that compressed chunks are as large as can be.

use std::time::Duration;

use peel_testkit::link::{Link, Shape};
use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::World;

/// What the program promises, in bytes.
const LIMIT: u64 = 256 << 20;
/// Bytes of each of the layer's two files: several of the largest chunks.
const LENGTH: usize = 80 << 20;

#[test]
fn a_conversion_needs_less_than_256_mib() {
    const LARGEST: &str = "33554432";
    let tar = Tar::new()
        .file("one", &noise(1, LENGTH))
        .file("two", &noise(2, LENGTH))
        .finish();
    let world = World::new();
    let registry = world.registry();
    let source = push(&registry, "app", "plain", &[Layer::plain(&tar)]);
    // With files that come first, layers go through the spool.
    let record = world.path("record.jsonl");
    std::fs::write(&record, "{\"path\":\"two\"}\n").unwrap();
    let record = record.to_str().unwrap();
    let stargz = ["--zstdchunked", "--dialect", "stargz", "--zstdchunked-chunk-size"];
    let cases: &[&[&str]] = &[
        &["--estargz"],
        &["--estargz", "--estargz-chunk-size", LARGEST],
        &["--estargz", "--estargz-min-chunk-size", "262144"],
        &["--estargz", "--estargz-record-in", record],
        &["--estargz", "--estargz-min-chunk-size", LARGEST],
        &["--zstdchunked"],
        &["--zstdchunked", "--zstdchunked-compression-level", "22"],
        &[&stargz[..], &[LARGEST]].concat(),
        &[&stargz[..], &["8388608"]].concat(),
        &[&stargz[..], &[LARGEST, "--zstdchunked-compression-level", "11"]].concat(),
        &["--zstd", "--zstd-compression-level", "11"],
    ];
    for (number, case) in cases.iter().enumerate() {
        let target = format!("oci:{}:x", world.path(&format!("out{number}")).display());
        let arguments = [
            &["convert", "--estargz-parallelism", "16"],
            *case,
            &[&source, &target],
        ]
        .concat();
        let (status, peak) = world.start(&arguments).wait_and_weigh();
        assert!(status.success(), "{case:?}: {status}");
        // Less would mean that the measurement saw nothing.
        let range = 16 << 20..LIMIT;
        assert!(range.contains(&peak), "{case:?} took {} MiB", peak >> 20);
    }
}

/// What is made waits for a link that is slower than the compressors; two layers are under way where that is allowed.
#[test]
fn nor_does_one_to_a_slow_target_need_more() {
    let world = World::new();
    let registry = world.registry();
    let layer = |seed| Layer::plain(&Tar::new().file("file", &noise(seed, LENGTH)).finish());
    let source = push(&registry, "app", "two", &[layer(1), layer(2)]);
    let shape = Shape {
        rtt: Duration::from_millis(1),
        bits_per_second: 200_000_000,
    };
    let record = world.path("record.jsonl");
    std::fs::write(&record, "{\"path\":\"file\"}\n").unwrap();
    let record = record.to_str().unwrap();
    let link = Link::start(registry.addr(), shape).unwrap();
    let cases: &[&[&str]] = &[
        &["--estargz"],
        &["--estargz", "--estargz-chunk-size", "33554432"],
        &["--estargz", "--estargz-min-chunk-size", "262144"],
        &["--zstdchunked"],
        &["--zstdchunked", "--zstdchunked-record-in", record],
        &[
            "--zstdchunked",
            "--dialect",
            "stargz",
            "--zstdchunked-chunk-size",
            "33554432",
            "--zstdchunked-compression-level",
            "11",
        ],
    ];
    for (number, case) in cases.iter().enumerate() {
        let target = format!("{}/slow/v{number}:x", link.addr());
        let arguments = [
            &["convert", "--estargz-parallelism", "16"],
            *case,
            &[&source, &target],
        ]
        .concat();
        let (status, peak) = world.start(&arguments).wait_and_weigh();
        assert!(status.success(), "{case:?}: {status}");
        let range = 16 << 20..LIMIT;
        assert!(range.contains(&peak), "{case:?} took {} MiB", peak >> 20);
    }
}
