//! Every format that `peel convert` writes, and the way back: DiffIDs, media types, annotations, the image beside an image, and that
//! other people's programs find in each the tree that went in.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peel_image::Digest;
use peel_tests::world::{World, assert_expected, errors, vector};
use serde_json::{Value, json};

const GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
const ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
const PLAIN: &str = "application/vnd.oci.image.layer.v1.tar";

/// A layout that images are converted into.
struct Layout(PathBuf);

impl Layout {
    fn name(&self, tag: &str) -> String {
        format!("oci:{}:{tag}", self.0.display())
    }

    fn blob(&self, digest: &Value) -> PathBuf {
        let digest = digest.as_str().unwrap().replace(':', "/");
        self.0.join("blobs").join(digest)
    }

    fn json(path: &Path) -> Value {
        serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
    }

    /// The manifest of a tag.
    fn manifest(&self, tag: &str) -> Value {
        let index = Self::json(&self.0.join("index.json"));
        let entries = index["manifests"].as_array().unwrap();
        let entry = entries
            .iter()
            .find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == tag)
            .unwrap_or_else(|| panic!("no tag {tag} in {index}"));
        Self::json(&self.blob(&entry["digest"]))
    }

    fn diff_ids(&self, tag: &str) -> Value {
        let config = Self::json(&self.blob(&self.manifest(tag)["config"]["digest"]));
        config["rootfs"]["diff_ids"].clone()
    }

    /// The DiffIDs that the layers really have, by gzip and zstd.
    fn real_diff_ids(&self, tag: &str) -> Value {
        let manifest = self.manifest(tag);
        let of = |layer: &Value| {
            let blob = self.blob(&layer["digest"]);
            let tar = match layer["mediaType"].as_str().unwrap() {
                GZIP => run(Command::new("gzip")
                    .arg("-dc")
                    .stdin(fs::File::open(blob).unwrap())),
                ZSTD => run(Command::new("zstd").arg("-dcq").arg(blob)),
                PLAIN => fs::read(blob).unwrap(),
                other => panic!("media type {other}"),
            };
            Digest::of(&tar).to_string()
        };
        manifest["layers"].as_array().unwrap().iter().map(of).collect()
    }
}

/// Runs a program and expects success.
fn run(command: &mut Command) -> Vec<u8> {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
    output.stdout
}

fn convert(world: &World, flags: &str, source: &str, target: &str) -> String {
    let mut arguments = vec!["convert"];
    arguments.extend(flags.split_whitespace());
    arguments.extend([source, target]);
    world.ok(&arguments)
}

/// Flags, media type, whether the layers' bytes are kept, and an annotation that layers of the format have.
const FORMATS: [(&str, &str, bool, Option<&str>); 10] = [
    (
        "--estargz",
        GZIP,
        false,
        Some("containerd.io/snapshot/stargz/toc.digest"),
    ),
    (
        "--estargz --estargz-min-chunk-size 50000",
        GZIP,
        false,
        Some("dev.peel.toc.offset"),
    ),
    (
        "--estargz --estargz-chunk-size 65536",
        GZIP,
        false,
        Some("io.containers.estargz.uncompressed-size"),
    ),
    (
        "--estargz-external-toc",
        GZIP,
        false,
        Some("containerd.io/snapshot/stargz/toc.digest"),
    ),
    (
        "--estargz-external-toc --estargz-keep-diff-id",
        GZIP,
        true,
        Some("containerd.io/snapshot/stargz/toc.digest"),
    ),
    (
        "--zstdchunked",
        ZSTD,
        true,
        Some("io.github.containers.zstd-chunked.manifest-checksum"),
    ),
    (
        "--zstdchunked --dialect stargz",
        ZSTD,
        false,
        Some("io.containers.zstd-chunked.manifest-checksum"),
    ),
    ("--gzip", GZIP, true, None),
    ("--zstd", ZSTD, true, None),
    ("--uncompress", PLAIN, true, None),
];

#[test]
fn every_format_and_back() {
    let world = World::new();
    let layout = Layout(world.path("layout"));
    // A conversion that keeps the bytes gives the DiffIDs of the original.
    convert(&world, "--gzip", &vector("org"), &layout.name("org"));
    let original = layout.diff_ids("org");
    assert_eq!(original, layout.real_diff_ids("org"));
    for (number, (flags, media_type, keeps, annotation)) in FORMATS.into_iter().enumerate() {
        let tag = format!("f{number}");
        convert(&world, flags, &vector("org"), &layout.name(&tag));
        let manifest = layout.manifest(&tag);
        assert_eq!(layout.diff_ids(&tag), layout.real_diff_ids(&tag), "{flags}");
        assert_eq!(layout.diff_ids(&tag) == original, keeps, "{flags}");
        for layer in manifest["layers"].as_array().unwrap() {
            assert_eq!(layer["mediaType"], media_type, "{flags}");
            let annotations = layer["annotations"].as_object().unwrap();
            if let Some(name) = annotation {
                assert!(annotations.contains_key(name), "{flags}: {layer}");
            }
            let compressor = annotations.get("dev.peel.compressor");
            assert_eq!(compressor.is_some(), media_type != PLAIN, "{flags}: {layer}");
        }
        let config = Layout::json(&layout.blob(&manifest["config"]["digest"]));
        assert_eq!(config["history"].as_array().unwrap().len(), 3, "{flags}");
        let dir = world.mount(&layout.name(&tag), &tag);
        assert_expected(&dir, flags);
        world.umount(&dir);

        for (back, back_type) in [("--gzip", GZIP), ("--zstd", ZSTD), ("--uncompress", PLAIN)] {
            let back_tag = format!("f{number}{back}");
            convert(&world, back, &layout.name(&tag), &layout.name(&back_tag));
            let manifest = layout.manifest(&back_tag);
            for layer in manifest["layers"].as_array().unwrap() {
                assert_eq!(layer["mediaType"], back_type, "{flags} {back}");
                let names = layer["annotations"].as_object().unwrap().keys();
                let ours = [
                    "dev.peel.compressor",
                    "dev.peel.source.digest",
                    "dev.peel.source.options",
                ];
                for name in names {
                    assert!(ours.contains(&name.as_str()), "stale: {flags} {back}: {layer}");
                }
            }
            assert_eq!(
                layout.diff_ids(&back_tag),
                layout.real_diff_ids(&back_tag),
                "{flags} {back}"
            );
            if keeps {
                assert_eq!(layout.diff_ids(&back_tag), original, "{flags} {back}");
            }
        }
        let dir = world.mount(&layout.name(&format!("f{number}--zstd")), "back");
        assert_expected(&dir, &format!("{flags} and back"));
        world.umount(&dir);
    }
}

#[test]
fn every_format_becomes_every_other() {
    let world = World::new();
    let layout = Layout(world.path("layout"));
    // Images of upstream's tools come first: what they have added to layers must not stay.
    let mut source = vector("esgz-opt");
    let formats = [0, 5, 6, 5, 0, 6, 0].map(|number| FORMATS[number].0);
    for (number, flags) in formats.into_iter().enumerate() {
        let target = layout.name(&format!("step{number}"));
        convert(&world, flags, &source, &target);
        let dir = world.mount(&target, "step");
        assert_expected(&dir, &format!("step {number}, {flags}"));
        world.umount(&dir);
        source = target;
    }
    let gzip = layout.name("gzip");
    convert(&world, "--gzip", &source, &gzip);
    let bundle = world.path("bundle");
    run(Command::new("umoci")
        .args(["unpack", "--image"])
        .arg(gzip.trim_start_matches("oci:"))
        .arg(&bundle));
    assert_expected(&bundle.join("rootfs"), "ordinary layers, unpacked by umoci");
}

#[test]
fn tables_of_contents_beside_the_image() {
    let world = World::new();
    let layout = Layout(world.path("layout"));
    let flags = "--estargz-external-toc --estargz-keep-diff-id";
    let printed = convert(&world, flags, &vector("org"), &layout.name("ext"));
    let beside = layout.name("ext-esgztoc");
    assert_eq!(
        printed.lines().nth(1),
        Some(format!("extra image: {beside}").as_str())
    );
    let (image, tocs) = (layout.manifest("ext"), layout.manifest("ext-esgztoc"));
    assert_eq!(fs::read(layout.blob(&tocs["config"]["digest"])).unwrap(), b"{}");
    let entries = tocs["layers"].as_array().unwrap();
    let mut sorted = entries.clone();
    sorted.sort_by_key(|entry| entry["digest"].to_string());
    assert_eq!(*entries, sorted);
    assert_eq!(entries.len(), 3);
    for layer in image["layers"].as_array().unwrap() {
        let of_layer = |entry: &&Value| {
            entry["annotations"]["containerd.io/snapshot/stargz/layer.digest"] == layer["digest"]
        };
        let toc = entries.iter().find(of_layer).unwrap();
        let blob = layout.blob(&toc["digest"]);
        assert_eq!(fs::metadata(&blob).unwrap().len(), toc["size"].as_u64().unwrap());
        let script = "gzip -dc \"$0\" | tar --extract --to-stdout --file=- stargz.index.json";
        let json = run(Command::new("bash").args(["-c", script]).arg(&blob));
        let annotated = &layer["annotations"]["containerd.io/snapshot/stargz/toc.digest"];
        assert_eq!(*annotated, json!(Digest::of(&json).to_string()));
    }
    // Again: nothing is made anew, and the image beside is the same.
    let again = world.ok(&[
        "--json",
        "convert",
        "--estargz-external-toc",
        "--estargz-keep-diff-id",
        &vector("org"),
        &layout.name("ext"),
    ]);
    let again: Value = serde_json::from_str(&again).unwrap();
    assert_eq!(again["extra_images"], json!([beside]));
    for layer in again["images"][0]["layers"].as_array().unwrap() {
        assert_eq!(layer["how"], "reused", "{again}");
    }
    assert_eq!(layout.manifest("ext-esgztoc"), tocs);

    let output = world.run(&[
        "convert",
        "--estargz-external-toc",
        &vector("org"),
        &format!("oci:{}", layout.0.display()),
    ]);
    assert!(errors(&output).contains("needs a tag"), "{}", errors(&output));
    // What is eStargz already cannot be eStargz with its old DiffID.
    let output = world.run(&[
        "convert",
        "--estargz-external-toc",
        "--estargz-keep-diff-id",
        &vector("esgz"),
        &layout.name("never"),
    ]);
    assert!(!output.status.success());
    assert!(
        errors(&output).contains("its DiffID cannot be kept"),
        "{}",
        errors(&output)
    );
}

#[test]
fn what_is_asked_for_already_is_kept() {
    let world = World::new();
    let layout = Layout(world.path("layout"));
    for (number, (flags, ..)) in FORMATS.into_iter().enumerate() {
        if flags.contains("external") {
            continue;
        }
        let (one, two) = (format!("one{number}"), format!("two{number}"));
        convert(&world, flags, &vector("org"), &layout.name(&one));
        let again = format!("--reuse {flags}");
        convert(&world, &again, &layout.name(&one), &layout.name(&two));
        assert_eq!(layout.manifest(&one), layout.manifest(&two), "{flags}");
        // Another format is not kept.
        let other = if flags.contains("--zstdchunked") {
            "--estargz"
        } else {
            "--zstdchunked"
        };
        let outcome = world.ok(&[
            "--json",
            "convert",
            "--reuse",
            other,
            &layout.name(&one),
            &layout.name("other"),
        ]);
        let outcome: Value = serde_json::from_str(&outcome).unwrap();
        for layer in outcome["images"][0]["layers"].as_array().unwrap() {
            assert_eq!(layer["how"], "converted", "{flags}, then {other}: {outcome}");
        }
    }
}

#[test]
fn files_come_first_in_every_lazy_format() {
    let world = World::new();
    let layout = Layout(world.path("layout"));
    let list = world.path("list");
    fs::write(&list, "usr/lib/mod007.py\nbin/sh\netc/os-release\n").unwrap();
    for (number, flags) in [
        "--estargz",
        "--estargz --estargz-external-toc",
        "--zstdchunked",
        "--zstdchunked --dialect stargz",
    ]
    .into_iter()
    .enumerate()
    {
        let tag = format!("o{number}");
        let mut arguments = vec!["optimize", "--prefetch-list", list.to_str().unwrap()];
        arguments.extend(flags.split_whitespace());
        let (source, target) = (vector("org"), layout.name(&tag));
        arguments.extend([source.as_str(), target.as_str()]);
        let first = world.json(&arguments);
        let layer = &first["images"][0]["layers"][0];
        let (end, size) = (
            layer["prefetch_end"].as_u64().unwrap(),
            layer["size"].as_u64().unwrap(),
        );
        assert!(end > 0 && end < size / 2, "{flags}: {first}");
        let manifest = layout.manifest(&tag);
        let order = manifest["annotations"]["dev.peel.prefetch.order"]
            .as_str()
            .unwrap();
        let last = order.split(',').rfind(|run| run.starts_with("0:"));
        assert_eq!(last, Some(format!("0:{end}").as_str()), "{flags}: {order}");
        let annotated = &manifest["layers"][0]["annotations"]["dev.peel.prefetch.end"];
        assert_eq!(*annotated, json!(end.to_string()), "{flags}");
        let dir = world.mount(&target, &tag);
        assert_expected(&dir, flags);
        world.umount(&dir);
        // The same again is the same image, order across layers included.
        let again = world.json(&arguments);
        assert_eq!(again["manifest_digest"], first["manifest_digest"], "{flags}");
    }
}
