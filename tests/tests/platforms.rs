//! Images for several platforms: which of them are converted, and what the index says of them afterwards.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use peel_image::{Digest, media};
use peel_testkit::registry::Registry;
use peel_tests::image::{Tar, gzip};
use peel_tests::world::{World, errors};
use serde_json::{Value, json};

/// Go's name of this machine's architecture, and another one.
const ARCHITECTURES: [&str; 2] = if cfg!(target_arch = "aarch64") {
    ["arm64", "amd64"]
} else {
    ["amd64", "arm64"]
};

/// Pushes an image of one layer, which it shares with the others, and one that tells the architecture; its index entry.
fn image(registry: &Registry, architecture: &str, variant: Option<&str>) -> Value {
    let content = registry.content();
    let shared = Tar::new().file("shared", &[b's'; 100_000]).finish();
    let own = Tar::new().file("arch", architecture.as_bytes()).finish();
    let layers: Vec<Value> = [&shared, &own]
        .into_iter()
        .map(|tar| {
            let blob = gzip(tar);
            let digest = content.put_blob(&blob).unwrap();
            json!({"mediaType": media::DOCKER_LAYER_GZIP, "digest": digest.to_string(), "size": blob.len()})
        })
        .collect();
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["/arch"], "Odd": {"x": 1}},
        "history": [{"created_by": "one"}, {"created_by": "none", "empty_layer": true}, {"created_by": "two"}],
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&shared).to_string(), Digest::of(&own).to_string()]},
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": media::DOCKER_MANIFEST,
        "config": {
            "mediaType": media::DOCKER_CONFIG,
            "digest": content.put_blob(config.as_bytes()).unwrap().to_string(),
            "size": config.len(),
        },
        "layers": layers,
    })
    .to_string();
    let digest = Digest::of(manifest.as_bytes()).to_string();
    content
        .put_manifest("multi", &digest, media::DOCKER_MANIFEST, manifest.as_bytes())
        .unwrap();
    let mut platform = json!({"os": "linux", "architecture": architecture, "os.features": ["odd"]});
    if let Some(variant) = variant {
        platform["variant"] = variant.into();
    }
    json!({"mediaType": media::DOCKER_MANIFEST, "digest": digest, "size": manifest.len(), "platform": platform})
}

/// An index of this machine's image, two others, and an attestation.
fn multi(registry: &Registry) -> String {
    let statement = json!({
        "mediaType": media::OCI_MANIFEST,
        "digest": Digest::of(b"statement").to_string(),
        "size": 9,
        "platform": {"os": "unknown", "architecture": "unknown"},
        "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": media::DOCKER_INDEX,
        "manifests": [
            image(registry, "arm", Some("v7")),
            image(registry, ARCHITECTURES[0], None),
            image(registry, ARCHITECTURES[1], None),
            statement,
        ],
    })
    .to_string();
    registry
        .content()
        .put_manifest("multi", "v1", media::DOCKER_INDEX, index.as_bytes())
        .unwrap();
    format!("{}/multi:v1", registry.addr())
}

/// Converts; what the target's tag names then: media type and document.
fn convert(world: &World, registry: &Registry, flags: &[&str], tag: &str) -> (String, Value) {
    let source = multi(registry);
    let target = format!("{}/multi:{tag}", registry.addr());
    let arguments: Vec<&str> = ["convert"]
        .iter()
        .chain(flags)
        .copied()
        .chain([source.as_str(), target.as_str()])
        .collect();
    let printed = world.ok(&arguments);
    let manifest = registry.content().manifest("multi", tag).unwrap();
    assert_eq!(printed.lines().next(), Some(manifest.digest.to_string().as_str()));
    (manifest.media_type.clone(), document(registry, manifest.digest))
}

fn document(registry: &Registry, digest: Digest) -> Value {
    let bytes = std::fs::read(registry.content().blob_path(&digest)).unwrap();
    serde_json::from_slice(&bytes).unwrap()
}

fn platforms(index: &Value) -> Vec<String> {
    let entries = index["manifests"].as_array().unwrap();
    entries
        .iter()
        .map(|entry| entry["platform"]["architecture"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn one_platform_is_a_manifest() {
    let world = World::new();
    let registry = world.registry();
    for (flags, architecture) in [
        (vec![], ARCHITECTURES[0]),
        (vec!["--platform", "linux/arm/v7"], "arm"),
    ] {
        let (media_type, manifest) = convert(&world, &registry, &flags, "one");
        assert_eq!(media_type, media::OCI_MANIFEST);
        let digest = manifest["config"]["digest"].as_str().unwrap().parse().unwrap();
        let config = document(&registry, digest);
        assert_eq!(config["architecture"], architecture);
        assert_eq!(config["history"].as_array().unwrap().len(), 3);
        assert_eq!(config["config"]["Odd"]["x"], 1);
        let name = format!("{}/multi:one", registry.addr());
        assert_eq!(world.ok(&["cat", &name, "/arch"]), architecture);
    }
}

#[test]
fn all_platforms_are_an_index() {
    let world = World::new();
    let registry = world.registry();
    let source: Value = {
        multi(&registry);
        document(
            &registry,
            registry.content().manifest("multi", "v1").unwrap().digest,
        )
    };
    for (flags, zstd) in [
        (vec!["--all-platforms"], false),
        (vec!["--all-platforms", "--zstdchunked"], true),
        (vec!["--all-platforms", "--zstd"], true),
        (vec!["--all-platforms", "--estargz-external-toc"], false),
    ] {
        let (media_type, index) = convert(&world, &registry, &flags, "all");
        assert_eq!(media_type, media::OCI_INDEX);
        assert_eq!(platforms(&index), ["arm", ARCHITECTURES[0], ARCHITECTURES[1]]);
        let pairs = index["manifests"].as_array().unwrap().iter();
        for (entry, old) in pairs.zip(source["manifests"].as_array().unwrap()) {
            assert_eq!(entry["platform"], old["platform"]);
            assert_eq!(entry["mediaType"], media::OCI_MANIFEST);
            let marked = &entry["annotations"]["io.github.containers.compression.zstd"];
            assert_eq!(marked == "true", zstd, "{entry}");
            let digest = entry["digest"].as_str().unwrap().parse().unwrap();
            let manifest = document(&registry, digest);
            assert_eq!(
                std::fs::metadata(registry.content().blob_path(&digest))
                    .unwrap()
                    .len(),
                entry["size"].as_u64().unwrap()
            );
            assert_eq!(manifest["layers"].as_array().unwrap().len(), 2);
        }
        let name = format!("{}/multi:all", registry.addr());
        for platform in ["arm/v7", ARCHITECTURES[0], ARCHITECTURES[1]] {
            let wanted = format!("linux/{platform}");
            let shown = world.ok(&["cat", "--platform", &wanted, &name, "/arch"]);
            assert!(platform.starts_with(&shown), "{shown} for {platform}");
        }
    }
}

#[test]
fn platforms_by_name_and_again() {
    let world = World::new();
    let registry = world.registry();
    let other = format!("linux/{}", ARCHITECTURES[1]);
    let flags = ["--platform", other.as_str(), "--platform", "linux/arm"];
    let (_, index) = convert(&world, &registry, &flags, "some");
    assert_eq!(platforms(&index), ["arm", ARCHITECTURES[1]]);
    // As ctr-remote and nerdctl take them.
    let joined = format!("{},arm", ARCHITECTURES[1]);
    let (_, same) = convert(&world, &registry, &["--platform", &joined], "joined");
    assert_eq!(same, index);
    // The second run finds all layers of all platforms.
    let from = registry.log().len();
    let (_, again) = convert(&world, &registry, &flags, "some");
    assert_eq!(again, index);
    let log = registry.log();
    let uploads = log
        .iter()
        .skip(from)
        .filter(|request| request.target.contains("/uploads/"));
    assert_eq!(uploads.count(), 0);

    let source = multi(&registry);
    let target = format!("{}/multi:never", registry.addr());
    let arguments = [
        "convert",
        "--platform",
        "linux/s390x",
        "--platform",
        "linux/arm",
        &source,
        &target,
    ];
    let output = world.run(&arguments);
    let message = errors(&output);
    assert!(!output.status.success());
    assert!(
        message.contains("linux/s390x") && message.contains("linux/arm/v7"),
        "{message}"
    );
}

#[test]
fn attestations_are_left_out_with_a_note() {
    let world = World::new();
    let registry = world.registry();
    let source = multi(&registry);
    let target = format!("{}/multi:noted", registry.addr());
    let output = world.run(&["convert", "--all-platforms", &source, &target]);
    assert!(output.status.success(), "{}", errors(&output));
    assert!(errors(&output).contains("1 of 4 entries"), "{}", errors(&output));
}

#[test]
fn only_this_machines_image_is_optimized() {
    let world = World::new();
    let registry = world.registry();
    let source = multi(&registry);
    let target = format!("{}/multi:first", registry.addr());
    let list = world.path("list");
    std::fs::write(&list, "arch\n").unwrap();
    let arguments = [
        "optimize",
        "--all-platforms",
        "--prefetch-list",
        list.to_str().unwrap(),
        &source,
        &target,
    ];
    let outcome = world.json(&arguments);
    for image in outcome["images"].as_array().unwrap() {
        let first: Vec<bool> = image["layers"]
            .as_array()
            .unwrap()
            .iter()
            .map(|layer| layer["prefetch_end"].is_u64())
            .collect();
        let host = image["platform"] == format!("linux/{}", ARCHITECTURES[0]);
        assert_eq!(first, [false, host], "{image}");
    }
    // Without this machine's image nothing is run.
    let other = format!("linux/{}", ARCHITECTURES[1]);
    let output = world.run(&["optimize", "--platform", &other, &source, &target]);
    assert!(output.status.success(), "{}", errors(&output));
    assert!(errors(&output).contains("nothing is run"), "{}", errors(&output));
}

/// Pushes an index of these entries and returns the entry that leads to it.
fn index_of(registry: &Registry, tag: &str, entries: &[Value]) -> Value {
    let index = json!({"schemaVersion": 2, "mediaType": media::OCI_INDEX, "manifests": entries}).to_string();
    let content = registry.content();
    let digest = Digest::of(index.as_bytes()).to_string();
    for name in [tag, &digest] {
        content
            .put_manifest("multi", name, media::OCI_INDEX, index.as_bytes())
            .unwrap();
    }
    json!({"mediaType": media::OCI_INDEX, "digest": digest, "size": index.len()})
}

#[test]
fn indexes_within_an_index_are_followed() {
    let world = World::new();
    let registry = world.registry();
    let mut nameless = image(&registry, ARCHITECTURES[1], None);
    nameless.as_object_mut().unwrap().remove("platform");
    let arm = index_of(&registry, "arm", &[image(&registry, "arm", Some("v7"))]);
    // Its own entry says no platform; the one that leads to it does.
    let mut other = index_of(&registry, "other", &[nameless]);
    other["platform"] = json!({"os": "linux", "architecture": ARCHITECTURES[1]});
    let absent = json!({
        "mediaType": media::OCI_INDEX,
        "digest": Digest::of(b"not copied").to_string(),
        "size": 10,
        "platform": {"os": "linux", "architecture": "s390x"},
    });
    let both = index_of(
        &registry,
        "both",
        &[arm, image(&registry, ARCHITECTURES[0], None)],
    );
    index_of(&registry, "nested", &[absent, both, other]);
    let name = format!("{}/multi:nested", registry.addr());
    for platform in ["arm", ARCHITECTURES[0], ARCHITECTURES[1]] {
        let wanted = format!("linux/{platform}");
        assert_eq!(
            world.ok(&["cat", "--platform", &wanted, &name, "/arch"]),
            platform
        );
        let report = world.json(&["inspect", "--platform", &wanted, &name]);
        assert_eq!(report["layers"].as_array().unwrap().len(), 2);
    }
    let dir = world.mount(&name, "root");
    assert_eq!(
        std::fs::read_to_string(dir.join("arch")).unwrap(),
        ARCHITECTURES[0]
    );
    world.umount(&dir);
    // What is written is flat.
    let target = format!("{}/multi:flat", registry.addr());
    world.convert(
        &[
            "--platform",
            "linux/arm",
            "--platform",
            &format!("linux/{}", ARCHITECTURES[1]),
        ],
        &name,
        &target,
    );
    let index = document(
        &registry,
        registry.content().manifest("multi", "flat").unwrap().digest,
    );
    assert_eq!(platforms(&index), ["arm", ARCHITECTURES[1]]);
    assert_eq!(index["manifests"][0]["platform"]["variant"], "v7");
    let output = world.run(&["inspect", "--platform", "linux/s390x", &name]);
    let message = errors(&output);
    assert!(!output.status.success());
    assert!(
        message.contains(&Digest::of(b"not copied").to_string()),
        "{message}"
    );
    world.assert_sound();
}

#[test]
fn indexes_within_indexes_end() {
    let world = World::new();
    let registry = world.registry();
    let mut entry = image(&registry, ARCHITECTURES[0], None);
    for depth in 1..=5 {
        entry = index_of(&registry, &format!("deep{depth}"), &[entry]);
    }
    let deep = |depth| format!("{}/multi:deep{depth}", registry.addr());
    assert_eq!(world.ok(&["cat", &deep(4), "/arch"]), ARCHITECTURES[0]);
    let wide: Vec<Value> = (0..65)
        .map(|number| {
            let image = image(&registry, &format!("odd{number}"), None);
            index_of(&registry, &format!("inner{number}"), &[image])
        })
        .collect();
    index_of(&registry, "wide", &wide);
    let wide = format!("{}/multi:wide", registry.addr());
    for (name, reason) in [
        (deep(5), "more than 4 indexes within each other"),
        (wide, "more than 64 indexes within it"),
    ] {
        let dir = world.dir("root");
        for arguments in [
            ["inspect", &name].as_slice(),
            &["mount", &name, dir.to_str().unwrap()],
        ] {
            let output = world.run(arguments);
            assert!(!output.status.success(), "{arguments:?}");
            let message = errors(&output);
            assert!(
                message.contains(reason) && message.contains("index sha256:"),
                "{arguments:?}: {message}"
            );
        }
    }
    world.assert_sound();
}

#[test]
fn a_platform_that_was_not_copied_is_named() {
    let world = World::new();
    let registry = world.registry();
    let here = image(&registry, ARCHITECTURES[0], None);
    let mut gone = here.clone();
    gone["digest"] = json!(Digest::of(b"gone").to_string());
    gone["platform"] = json!({"os": "linux", "architecture": "s390x"});
    index_of(&registry, "some", &[here, gone]);
    let (source, target) = (
        format!("{}/multi:some", registry.addr()),
        format!("{}/multi:all", registry.addr()),
    );
    let output = world.run(&["convert", "--all-platforms", &source, &target]);
    let message = errors(&output);
    assert!(!output.status.success());
    assert!(
        message.contains("(linux/s390x)") && message.contains("--platform"),
        "{message}"
    );
    let this = format!("linux/{}", ARCHITECTURES[0]);
    world.convert(&["--platform", &this], &source, &target);
}
