//! The limits on what an image may ask for, each by an image that asks for more: the error names the thing, the place and the limit. What
//! only its table of contents asks for makes a layer not lazy and the image is still served.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::io::Write;

use peel_image::Digest;
use peel_image::annotations::{LAYER_DIGEST, PODMAN_MANIFEST_POSITION, TOC_IMAGE_SUFFIX};
use peel_image::estargz::{TOC_JSON_MAX, TOC_MEMBER_MAX};
use peel_testkit::registry::Registry;
use peel_tests::image::{ESTARGZ, Layer, Tar, entry, estargz_with, gzip, noise, push, zstd_chunked};
use peel_tests::world::{World, errors, eventually, read};
use peel_writer::{Dialect, Format};
use serde_json::{Value, json};

const CONTENT: &[u8] = b"content";

fn tar() -> Vec<u8> {
    Tar::new().dir("data").file("data/a", CONTENT).finish()
}

fn written(format: Format) -> Layer {
    Layer::written(&tar(), format).unwrap()
}

/// What `peel inspect` says of the first layer, which is not lazy.
fn not_lazy(world: &World, name: &str) -> String {
    let report = world.json(&["inspect", name]);
    let layer = &report["layers"][0];
    assert_eq!(layer["lazy"], json!(false), "{report}");
    layer["not_lazy"].as_str().unwrap().to_owned()
}

/// The layer is not lazy for this reason, which names the layer where it is told, and its image is served all the same.
fn assert_served_whole(world: &World, name: &str, layer: &Layer, reason: &str) {
    let told = not_lazy(world, name);
    assert!(told.contains(reason), "{told}");
    let dir = world.mount(name, "root");
    assert_eq!(read(&dir.join("data/a")).unwrap(), CONTENT);
    world.umount(&dir);
    let log = world.log();
    let line = log.lines().find(|line| line.contains(reason));
    let line = line.unwrap_or_else(|| panic!("nothing about it in the log:\n{log}"));
    assert!(
        line.contains(&layer.digest().to_string()) && line.contains("pulling a layer whole"),
        "{line}"
    );
    world.assert_sound();
}

/// The image is refused by everything that reads the whole layer; the errors name the layer and hold `reason`.
fn assert_refused(world: &World, name: &str, layer: &Layer, reason: &str) {
    let dir = world.dir("root");
    let target = format!("oci:{}:x", world.path("converted").display());
    for arguments in [
        ["mount", name, dir.to_str().unwrap()].as_slice(),
        &["convert", "--estargz", name, &target],
    ] {
        let output = world.run(arguments);
        assert!(!output.status.success(), "peel {arguments:?} took it");
        let message = errors(&output);
        assert!(
            message.contains(reason) && message.contains(&layer.digest().to_string()),
            "peel {arguments:?}: {message}"
        );
    }
    world.assert_sound();
}

/// JSON of more bytes than a table of contents may have, almost all of it blanks.
fn bomb(json: &[u8]) -> Vec<u8> {
    let mut json = json.to_vec();
    json.resize(usize::try_from(TOC_JSON_MAX).unwrap() + 1, b' ');
    json
}

#[test]
fn a_table_of_contents_that_expands_beyond_its_limit() {
    let plain = "the limit is 157286400";
    for (what, layer, reason) in [
        // Its tar header says so before a byte of it is read.
        ("esgz", written(ESTARGZ).with_json(bomb), plain),
        (
            "podman",
            written(zstd_chunked(Dialect::Podman)).with_zstd_json(bomb),
            plain,
        ),
        (
            "stargz",
            written(zstd_chunked(Dialect::Stargz)).with_zstd_json(bomb),
            plain,
        ),
    ] {
        let world = World::new();
        let registry = world.registry();
        assert!(layer.blob.len() < 1 << 20, "{what} is no bomb");
        let name = push(&registry, "app", what, std::slice::from_ref(&layer));
        assert_served_whole(&world, &name, &layer, reason);
    }
}

#[test]
fn a_member_that_is_no_table_of_contents_but_large() {
    // A valid header before zeros without end: no reader may hold them all.
    let world = World::new();
    let registry = world.registry();
    let mut tar = Tar::new().file("stargz.index.json", b"{}").finish();
    tar.resize(usize::try_from(TOC_MEMBER_MAX).unwrap() + 1, 0);
    let layer = written(ESTARGZ).with_member(&gzip(&tar), Digest::of(b"{}"));
    let name = push(&registry, "app", "x", std::slice::from_ref(&layer));
    assert_served_whole(&world, &name, &layer, "expands to more than 158334976 bytes");
}

#[test]
fn a_position_that_says_more_than_the_limit() {
    let world = World::new();
    let registry = world.registry();
    let mut layer = written(zstd_chunked(Dialect::Podman));
    let position = layer.annotations[PODMAN_MANIFEST_POSITION].clone();
    let numbers: Vec<&str> = position.split(':').collect();
    let said = TOC_JSON_MAX + 1;
    layer.annotations.insert(
        PODMAN_MANIFEST_POSITION.to_owned(),
        format!("{}:{}:{said}:1", numbers[0], numbers[1]),
    );
    // A hint that cannot be right is not used: the footer says the same thing rightly.
    let name = push(&registry, "app", "hint", std::slice::from_ref(&layer));
    let report = world.json(&["inspect", &name]);
    assert_eq!(report["layers"][0]["toc_origin"], json!("footer"), "{report}");
    assert_eq!(report["layers"][0]["lazy"], json!(true), "{report}");
    // The same number in the footer.
    let place = layer.blob.len() - 64 + 16;
    layer.blob[place..place + 8].copy_from_slice(&said.to_le_bytes());
    let name = push(&registry, "app", "footer", std::slice::from_ref(&layer));
    assert_served_whole(
        &world,
        &name,
        &layer,
        "157286401 bytes of JSON; the limit is 157286400",
    );
}

/// Pushes the image beside another: one layer, which holds the table of contents of `of`, as long as `size` says.
fn push_beside(registry: &Registry, tag: &str, of: &Layer, toc: &[u8], size: u64) {
    let content = registry.content();
    let digest = content.put_blob(toc).unwrap().to_string();
    let config = content.put_blob(b"{}").unwrap().to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config, "size": 2},
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar+gzip",
            "digest": digest,
            "size": size,
            "annotations": { LAYER_DIGEST: of.digest().to_string() },
        }],
    })
    .to_string();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let tag = format!("{tag}{TOC_IMAGE_SUFFIX}");
    content
        .put_manifest("app", &tag, kind, manifest.as_bytes())
        .unwrap();
}

#[test]
fn a_table_of_contents_beside_the_image_beyond_its_limit() {
    let external = estargz_with(0, 0, true);
    let world = World::new();
    let registry = world.registry();
    let layer = written(external);
    let name = push(&registry, "app", "said", std::slice::from_ref(&layer));
    push_beside(&registry, "said", &layer, b"short", TOC_MEMBER_MAX + 1);
    assert_served_whole(&world, &name, &layer, "158334976 bytes");
    // As long as it says, and many times that inside.
    let world = World::new();
    let registry = world.registry();
    let mut layer = written(external);
    let json = bomb(br#"{"version":1,"entries":[]}"#);
    let blob = gzip(&Tar::new().file("stargz.index.json", &json).finish());
    let vouched = Digest::of(&json).to_string();
    layer
        .annotations
        .insert("containerd.io/snapshot/stargz/toc.digest".to_owned(), vouched);
    let name = push(&registry, "app", "bomb", std::slice::from_ref(&layer));
    push_beside(&registry, "bomb", &layer, &blob, blob.len() as u64);
    assert_served_whole(&world, &name, &layer, "the limit is 157286400");
}

#[test]
fn names_in_a_table_of_contents_beyond_what_linux_takes() {
    for (what, name, reason) in [
        ("component", "n".repeat(256), "more than 255 bytes"),
        ("path", "d/".repeat(2049), "longer than 4095 bytes"),
    ] {
        let rename = |entries: &mut Vec<Value>| {
            entries.push(json!({"name": name, "type": "dir", "mode": 0o755}));
        };
        for layer in [
            written(ESTARGZ).with_contents(rename),
            written(zstd_chunked(Dialect::Podman)).with_zstd_contents(rename),
            written(zstd_chunked(Dialect::Stargz)).with_zstd_contents(rename),
        ] {
            let world = World::new();
            let registry = world.registry();
            let name = push(&registry, "app", what, std::slice::from_ref(&layer));
            assert_served_whole(&world, &name, &layer, reason);
        }
    }
}

/// One zstd frame (RFC 8878, section 3.1.1) that asks for a window of 2 to the power `log` bytes and holds raw blocks.
fn frame_with_window(log: u8, content: &[u8]) -> Vec<u8> {
    // Neither a single segment nor a content size, checksum or dictionary.
    let mut frame = vec![0x28, 0xb5, 0x2f, 0xfd, 0, (log - 10) << 3];
    let mut blocks = content.chunks(1 << 16).peekable();
    while let Some(block) = blocks.next() {
        let last = u32::from(blocks.peek().is_none());
        let header = u32::try_from(block.len()).unwrap() << 3 | last;
        frame.extend_from_slice(&header.to_le_bytes()[..3]);
        frame.extend_from_slice(block);
    }
    frame
}

#[test]
fn a_zstd_window_beyond_128_mib() {
    let layer = |log| Layer {
        blob: frame_with_window(log, &tar()),
        suffix: "+zstd",
        ..Layer::plain(&tar())
    };
    let world = World::new();
    let registry = world.registry();
    let name = push(&registry, "app", "most", &[layer(27)]);
    let dir = world.mount(&name, "most");
    assert_eq!(read(&dir.join("data/a")).unwrap(), CONTENT);
    world.umount(&dir);
    let beyond = layer(28);
    let name = push(&registry, "app", "beyond", std::slice::from_ref(&beyond));
    assert_refused(&world, &name, &beyond, "a window of more than 128 MiB");
}

#[test]
fn a_layer_that_expands_far_more_than_real_ones() {
    // Beyond the first GiB, more than 2000 to 1.
    let layer = |size: u64| {
        let mut header = vec![0_u8; 512];
        let named = Tar::new().file("data/a", CONTENT).finish();
        header.copy_from_slice(&named[..512]);
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.write_all(&header).unwrap();
        let zeros = vec![0; 1 << 20];
        for _ in 0..size >> 20 {
            encoder.write_all(&zeros).unwrap();
        }
        encoder.write_all(&[0; 1024]).unwrap();
        Layer {
            blob: encoder.finish().unwrap(),
            suffix: "+zstd",
            ..Layer::plain(b"")
        }
    };
    let world = World::new();
    let registry = world.registry();
    let bomb = layer(2 << 30);
    let name = push(&registry, "app", "bomb", std::slice::from_ref(&bomb));
    assert_refused(&world, &name, &bomb, "more than 2000 times its size");
}

#[test]
fn chains_of_hard_links_of_any_length() {
    const LINKS: usize = 20_000;
    let chain = |links: Vec<usize>| {
        let tar = Tar::new().dir("data").file("data/0", CONTENT);
        let tar = links.into_iter().fold(tar, |tar, number| {
            tar.hard_link(&format!("data/{}", number + 1), &format!("data/{number}"))
        });
        tar.file("data/a", CONTENT).finish()
    };
    for (what, tar) in [
        ("forwards", chain((0..LINKS).collect())),
        ("backwards", chain((0..LINKS).rev().collect())),
    ] {
        for (format, layer) in [
            ("plain", Layer::plain(&tar)),
            ("esgz", Layer::estargz(&tar, 0, &[])),
        ] {
            let world = World::new();
            let registry = world.registry();
            let name = push(&registry, "app", &format!("{what}-{format}"), &[layer]);
            let dir = world.mount(&name, "root");
            let last = dir.join(format!("data/{LINKS}"));
            assert_eq!(read(&last).unwrap(), CONTENT, "{what}, {format}");
            let links = std::os::unix::fs::MetadataExt::nlink(&last.metadata().unwrap());
            assert_eq!(links, LINKS as u64 + 1, "{what}, {format}");
            world.umount(&dir);
            world.assert_sound();
        }
    }
}

#[test]
fn chains_of_symbolic_links_end_where_linux_ends_them() {
    let chain = |links: usize| {
        let tar = Tar::new().dir("s0");
        let tar = (0..links).fold(tar, |tar, number| {
            tar.symlink(&format!("s{}", number + 1), &format!("s{number}"))
        });
        tar.file(&format!("s{links}/x"), CONTENT).finish()
    };
    let world = World::new();
    let registry = world.registry();
    let name = push(&registry, "app", "most", &[Layer::plain(&chain(40))]);
    let dir = world.mount(&name, "most");
    assert_eq!(read(&dir.join("s0/x")).unwrap(), CONTENT);
    world.umount(&dir);
    let beyond = Layer::plain(&chain(41));
    let name = push(&registry, "app", "beyond", std::slice::from_ref(&beyond));
    let output = world.run(&["mount", &name, dir.to_str().unwrap()]);
    let message = errors(&output);
    assert!(!output.status.success(), "41 links were followed");
    assert!(
        message.contains("s41/x") && message.contains("40") && message.contains(&beyond.digest().to_string()),
        "{message}"
    );
    world.assert_sound();
}

/// A Podman layer with a file of so many zeros, of which its tar stream says the truth; none of them are in the blob.
fn zeros(size: usize) -> Layer {
    let tar = Tar::new()
        .dir("data")
        .file("data/a", CONTENT)
        .file("data/z", &vec![0; size]);
    Layer::written(&tar.finish(), zstd_chunked(Dialect::Podman)).unwrap()
}

#[test]
fn a_file_of_zeros_needs_neither_bytes_nor_memory() {
    const SIZE: usize = 300 << 20;
    let world = World::new();
    let registry = world.registry();
    let layer = zeros(SIZE);
    let name = push(&registry, "app", "x", std::slice::from_ref(&layer));
    let dir = world.mount(&name, "root");
    assert!(!world.log().contains("pulling a layer whole"), "{}", world.log());
    let bytes = read(&dir.join("data/z")).unwrap();
    assert!(bytes.len() == SIZE && bytes.iter().all(|byte| *byte == 0));
    let digest = Digest::of(&bytes).hex();
    let object = world
        .store()
        .join("objects")
        .join(&digest[..2])
        .join(&digest[2..]);
    eventually("the disk has the file", || object.exists());
    let metadata = object.metadata().unwrap();
    assert_eq!(metadata.len(), SIZE as u64);
    assert_eq!(
        std::os::unix::fs::MetadataExt::blocks(&metadata),
        0,
        "the hole has bytes on disk"
    );
    world.umount(&dir);
    let printed = world.run(&["cat", &name, "/data/z"]);
    assert!(printed.status.success() && printed.stdout == bytes);
    world.assert_sound();
}

#[test]
fn zeros_that_are_not_what_they_should_be() {
    let world = World::new();
    let registry = world.registry();
    let lie = |entries: &mut Vec<Value>| {
        let entry = entry(entries, "data/z");
        entry["digest"] = json!(Digest::of(b"x").to_string());
        entry["chunkType"] = json!("zeros");
    };
    let name = push(
        &registry,
        "app",
        "digest",
        &[zeros(1 << 20).with_zstd_contents(lie)],
    );
    let dir = world.mount(&name, "digest");
    assert_eq!(
        read(&dir.join("data/z")).err(),
        Some(rustix::io::Errno::IO.raw_os_error())
    );
    assert_eq!(read(&dir.join("data/a")).unwrap(), CONTENT);
    world.umount(&dir);
    // More than anybody would hash while a read waits.
    let much = |entries: &mut Vec<Value>| {
        let entry = entry(entries, "data/z");
        entry["size"] = json!((1_u64 << 30) + 1);
        entry["chunkType"] = json!("zeros");
    };
    let layer = zeros(1 << 20).with_zstd_contents(much);
    let name = push(&registry, "app", "much", std::slice::from_ref(&layer));
    let reason = "/data/z has more than 1 GiB of zeros, or the files up to it more than 16 GiB";
    assert_served_whole(&world, &name, &layer, reason);
}

#[test]
fn a_chunk_beyond_what_fits_into_memory() {
    let world = World::new();
    let registry = world.registry();
    let bytes = noise(1, 1000);
    let tar = Tar::new()
        .dir("data")
        .file("data/a", CONTENT)
        .file("data/b", &bytes);
    let layer = Layer::estargz(&tar.finish(), 0, &[]).with_contents(|entries| {
        entry(entries, "data/b")["size"] = json!((256_u64 << 20) + 1);
    });
    let name = push(&registry, "app", "x", std::slice::from_ref(&layer));
    assert_served_whole(&world, &name, &layer, "a chunk of /data/b is larger than 256 MiB");
}

#[test]
fn directories_that_paths_imply() {
    // 130 names of 2,001 components each.
    let deep = |number: usize| format!("{number:03}/{}x", "d/".repeat(2000));
    let tar = (0..130).fold(Tar::new(), |tar, number| {
        tar.pax("path", deep(number).as_bytes()).file("short", b"")
    });
    let tar = tar.finish();
    // The writer refuses such a stream, so the names come into the table of contents afterwards.
    let flat = (0..130).fold(Tar::new(), |tar, number| tar.file(&format!("{number:03}"), b""));
    let lazy = written_of(&flat.finish(), ESTARGZ).with_contents(|entries| {
        for number in 0..130 {
            entry(entries, &format!("{number:03}"))["name"] = json!(deep(number));
        }
    });
    for (what, layer) in [("plain", Layer::plain(&tar)), ("esgz", lazy)] {
        let world = World::new();
        let registry = world.registry();
        let name = push(&registry, "app", what, std::slice::from_ref(&layer));
        let dir = world.dir("root");
        for arguments in [["mount", &name, dir.to_str().unwrap()].as_slice(), &["ls", &name]] {
            let output = world.run(arguments);
            let message = errors(&output);
            assert!(!output.status.success(), "peel {arguments:?} took it");
            assert!(
                message.contains("more than 250000 directories that have no entry")
                    && message.contains(&layer.digest().to_string()),
                "{what}: peel {arguments:?}: {message}"
            );
        }
        world.assert_sound();
    }
}

fn written_of(tar: &[u8], format: Format) -> Layer {
    Layer::written(tar, format).unwrap()
}

#[test]
fn a_stream_that_expands_far_before_a_chunk() {
    let world = World::new();
    let registry = world.registry();
    let layer = written(estargz_with(0, 50_000, false)).with_contents(|entries| {
        entry(entries, "data/a")["innerOffset"] = json!(1020_u64 << 20);
    });
    let name = push(&registry, "app", "x", std::slice::from_ref(&layer));
    let reason = "the compressed stream that holds /data/a has more than 512 MiB up to its end";
    assert_served_whole(&world, &name, &layer, reason);
}

#[test]
fn lists_of_users_that_are_too_long() {
    let passwd = b"x:x:1:1::/:/bin/false\n".repeat(200_000);
    assert!(passwd.len() > 4 << 20);
    let tar = Tar::new().dir("etc").file("etc/passwd", &passwd).finish();
    let world = World::new();
    let registry = world.registry();
    let name = push(&registry, "app", "x", &[Layer::plain(&tar)]);
    let output = world.run(&["run", &name, "/bin/true"]);
    let message = errors(&output);
    assert!(!output.status.success());
    for part in ["/etc/passwd", "4194304", "File too large"] {
        assert!(message.contains(part), "{message}");
    }
    assert!(!message.contains("Success"), "{message}");
    world.assert_sound();
}
