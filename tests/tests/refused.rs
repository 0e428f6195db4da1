//! Images and names that cannot be used: what is said of them, when, and that what can be done is done.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use peel_image::{Digest, media};
use peel_testkit::registry::Registry;
use peel_tests::image::{Layer, Tar, push};
use peel_tests::world::{World, errors, text, vector};
use serde_json::{Value, json};

/// Docker's type of layers whose bytes lie elsewhere.
const FOREIGN: &str = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip";

/// Pushes an image of one layer, then once more as what `change` makes of its manifest; that one's name.
fn changed(registry: &Registry, change: impl FnOnce(&mut Value)) -> String {
    let layer = Layer::plain(&Tar::new().file("f", b"content").finish());
    push(registry, "x", "v1", &[layer]);
    let manifest = registry.content().manifest("x", "v1").unwrap();
    let bytes = std::fs::read(registry.content().blob_path(&manifest.digest)).unwrap();
    let mut json = serde_json::from_slice(&bytes).unwrap();
    change(&mut json);
    let bytes = json.to_string().into_bytes();
    registry
        .content()
        .put_manifest("x", "v2", media::OCI_MANIFEST, &bytes)
        .unwrap();
    format!("{}/x:v2", registry.addr())
}

fn refused(world: &World, arguments: &[&str]) -> String {
    let output = world.run(arguments);
    assert!(!output.status.success(), "peel {arguments:?}");
    errors(&output)
}

#[test]
fn foreign_layers_are_named_and_the_others_looked_at() {
    let world = World::new();
    let registry = world.registry();
    let nowhere = Digest::of(b"not in the registry").to_string();
    let source = changed(&registry, |manifest| {
        let layers = manifest["layers"].as_array_mut().unwrap();
        let urls = ["https://registry.invalid/blob"];
        layers.insert(
            0,
            json!({"mediaType": FOREIGN, "digest": nowhere, "size": 9, "urls": urls}),
        );
    });
    let report = world.json(&["inspect", &source]);
    let reason = report["layers"][0]["not_lazy"].as_str().unwrap();
    assert!(
        reason.contains("foreign") && reason.contains(&nowhere),
        "{reason}"
    );
    assert_eq!(report["layers"][1]["format"], json!("tar+gzip"), "{report}");

    // The configuration has to know of it before the conversion gets that far.
    let source = changed(&registry, |manifest| {
        manifest["layers"][0]["mediaType"] = json!(FOREIGN);
    });
    let target = format!("{}/x:esgz", registry.addr());
    world.ok(&["convert", &source, &target]);
    let source = changed(&registry, |manifest| {
        manifest["layers"][0] = json!({"mediaType": FOREIGN, "digest": nowhere, "size": 9});
    });
    let message = refused(&world, &["convert", &source, &target]);
    assert!(
        message.contains("foreign") && message.contains("push the image again"),
        "{message}"
    );
}

#[test]
fn a_table_of_contents_is_told_from_a_layer() {
    let world = World::new();
    let report = world.json(&["inspect", &vector("esgz-ext-esgztoc")]);
    for layer in report["layers"].as_array().unwrap() {
        let of = layer["annotations"]["containerd.io/snapshot/stargz/layer.digest"].as_str();
        let reason = layer["not_lazy"].as_str().unwrap();
        assert!(
            reason.contains("table of contents of the layer") && reason.contains(of.unwrap()),
            "{reason}"
        );
    }
}

#[test]
fn targets_are_judged_before_anything_is_read() {
    let world = World::new();
    let digest = Digest::of(b"which one?");
    let archive = format!("oci-archive:{}:x", world.path("x.tar").display());
    let layout = format!("oci:{}", world.path("layout").display());
    for (target, flags, reason) in [
        (
            format!("registry.invalid/x@{digest}"),
            &[][..],
            "leave @DIGEST out",
        ),
        (format!("registry.invalid/x:y@{digest}"), &[], "leave @DIGEST out"),
        (archive, &[], "push to a registry"),
        (layout, &["--estargz-external-toc"], "needs a tag"),
    ] {
        for command in ["convert", "optimize"] {
            // A source that cannot be had: it would be the first complaint.
            let arguments = [&[command], flags, &["registry.invalid/source", &target]].concat();
            let message = refused(&world, &arguments);
            assert!(
                message.contains(reason) && message.contains(&target),
                "{command}: {message}"
            );
        }
    }
    assert!(!world.path("layout").exists());
}

#[test]
fn a_platform_that_is_none_is_told_at_once() {
    let world = World::new();
    let registry = world.registry();
    let source = changed(&registry, |_| {});
    let message = refused(&world, &["inspect", "--platform", "arm64/linux/v8/x", &source]);
    assert!(
        message.contains("arm64/linux/v8/x") && message.contains("os/architecture[/variant]"),
        "{message}"
    );
    let empty = r#"{"schemaVersion":2,"manifests":[]}"#;
    registry
        .content()
        .put_manifest("x", "empty", media::OCI_INDEX, empty.as_bytes())
        .unwrap();
    let message = refused(&world, &["inspect", &format!("{}/x:empty", registry.addr())]);
    assert!(message.contains("the index is empty"), "{message}");
}

#[test]
fn names_without_a_file_are_told() {
    let world = World::new();
    let registry = world.registry();
    let source = changed(&registry, |_| {});
    let target = format!("{}/x:first", registry.addr());
    let (list, record) = (world.path("list"), world.path("record"));
    std::fs::write(&list, "f\nmissing/file\n*.none\n").unwrap();
    std::fs::write(&record, "{\"path\":\"/f\"}\n{\"path\":\"gone\"}\n").unwrap();
    for (flag, file, expected) in [
        ("--prefetch-list", &list, &["missing/file", "*.none"][..]),
        ("--record-in", &record, &["1 of 2 paths"]),
    ] {
        let output = world.run(&["optimize", flag, file.to_str().unwrap(), &source, &target]);
        let message = errors(&output);
        assert!(output.status.success(), "{message}");
        for text in expected.iter().chain(&["1 file first"]) {
            assert!(message.contains(text), "{flag}: {message}");
        }
        assert!(!message.contains(": f:"), "{message}");
    }
}

#[test]
fn strangers_do_not_control_the_terminal() {
    const WIPE: &str = "\u{1b}[2J";
    let world = World::new();
    let registry = world.registry();
    let source = changed(&registry, |manifest| {
        manifest["layers"][0]["mediaType"] = json!(format!("application/{WIPE}x"));
        manifest["annotations"] = json!({format!("name{WIPE}"): format!("value{WIPE}")});
    });
    let target = format!("{}/x:made", registry.addr());
    let dir = world.dir("root");
    for arguments in [
        &["inspect", &source][..],
        &["convert", &source, &target],
        &["mount", &source, dir.to_str().unwrap()],
    ] {
        let output = world.run(arguments);
        let shown = text(&output) + &errors(&output);
        // A conversion has no reason to name the type.
        let named = arguments.first() == Some(&"convert") || shown.contains("\\u{1b}[2J");
        assert!(!shown.contains('\u{1b}') && named, "{arguments:?}: {shown:?}");
    }
}
