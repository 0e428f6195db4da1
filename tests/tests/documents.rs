//! Images whose documents leave out what others have, or say it in another way: every command takes the same ones.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::path::Path;

use peel_image::{Digest, media};
use peel_tests::image::{Tar, gzip};
use peel_tests::world::{World, errors};
use serde_json::{Value, json};

fn put(layout: &Path, bytes: &[u8]) -> Value {
    let digest = Digest::of(bytes);
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    fs::write(blobs.join(digest.hex()), bytes).unwrap();
    json!({"mediaType": media::OCI_MANIFEST, "digest": digest.to_string(), "size": bytes.len()})
}

/// A layout with one image, whose manifest and configuration `change` makes of the usual ones.
fn layout(dir: &Path, change: impl FnOnce(&mut Value, &mut Value)) -> String {
    let tar = Tar::new().file("a", b"content").finish();
    let mut config = json!({"architecture": "amd64", "os": "linux", "config": {},
        "rootfs": {"type": "layers", "diff_ids": [Digest::of(&tar).to_string()]}});
    let mut layer = put(dir, &gzip(&tar));
    layer["mediaType"] = media::OCI_LAYER_GZIP.into();
    let mut manifest = json!({"schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "layers": [layer]});
    change(&mut manifest, &mut config);
    let mut of_config = put(dir, config.to_string().as_bytes());
    of_config["mediaType"] = media::OCI_CONFIG.into();
    manifest["config"] = of_config;
    let entry = put(dir, manifest.to_string().as_bytes());
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let index = json!({"schemaVersion": 2, "manifests": [entry]});
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    format!("oci:{}", dir.display())
}

#[test]
fn every_command_takes_what_leaves_things_out() {
    type Change = fn(&mut Value, &mut Value);
    let changes: [(&str, Change); 6] = [
        ("no-architecture", |_, config| {
            config.as_object_mut().unwrap().remove("architecture");
        }),
        ("no-os", |_, config| {
            config.as_object_mut().unwrap().remove("os");
        }),
        ("null", |manifest, config| {
            for name in ["config", "history", "created", "os", "architecture"] {
                config[name] = Value::Null;
            }
            manifest["annotations"] = Value::Null;
            for name in ["annotations", "urls", "platform", "data"] {
                manifest["layers"][0][name] = Value::Null;
            }
        }),
        ("foreign", |manifest, _| {
            manifest["layers"][0]["mediaType"] = media::OCI_FOREIGN_LAYER_GZIP.into();
        }),
        ("foreign-of-docker", |manifest, _| {
            manifest["layers"][0]["mediaType"] = media::DOCKER_FOREIGN_LAYER_GZIP.into();
            manifest["layers"][0]["urls"] = json!(["http://127.0.0.1:1/x"]);
        }),
        ("unknown-type", |manifest, _| {
            manifest["layers"][0]["mediaType"] = "application/vnd.example.layer".into();
        }),
    ];
    let world = World::new();
    for (name, change) in changes {
        let image = layout(&world.dir(name), change);
        let dir = world.mount(&image, &format!("{name}-root"));
        assert_eq!(fs::read(dir.join("a")).unwrap(), b"content", "{name}");
        world.umount(&dir);
        assert!(
            world
                .ok(&["ls", &image])
                .lines()
                .any(|line| line.trim_end().ends_with("a")),
            "{name}"
        );
        assert_eq!(world.ok(&["cat", &image, "/a"]), "content", "{name}");
        world.ok(&["inspect", &image]);
        let target = format!("oci:{}:x", world.path(&format!("{name}-out")).display());
        world.ok(&["convert", &image, &target]);
        let dir = world.mount(&target, &format!("{name}-out-root"));
        assert_eq!(fs::read(dir.join("a")).unwrap(), b"content", "{name}");
        world.umount(&dir);
    }
    world.assert_sound();
}

#[test]
fn an_image_without_layers_is_empty() {
    let world = World::new();
    let image = layout(&world.dir("none"), |manifest, config| {
        manifest["layers"] = Value::Null;
        config["rootfs"]["diff_ids"] = Value::Null;
    });
    let dir = world.mount(&image, "root");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    world.umount(&dir);
    let target = world.dir("new");
    fs::write(target.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    fs::write(
        target.join("index.json"),
        r#"{"schemaVersion":2,"manifests":null}"#,
    )
    .unwrap();
    let target = format!("oci:{}:x", target.display());
    world.ok(&["convert", &image, &target]);
    world.ok(&["inspect", &target]);
}

#[test]
fn what_is_refused_is_named() {
    let world = World::new();
    let image = layout(&world.dir("odd"), |_, config| {
        config["rootfs"]["diff_ids"] = json!({});
    });
    let target = format!("oci:{}:x", world.path("odd-out").display());
    let dir = world.dir("root");
    for command in [
        vec!["mount", &image, dir.to_str().unwrap()],
        vec!["convert", &image, &target],
    ] {
        let output = world.run(&command);
        let text = errors(&output);
        assert!(!output.status.success(), "{command:?}");
        assert!(
            text.contains("`rootfs.diff_ids`") && text.contains("configuration"),
            "{text}"
        );
    }
}

#[test]
fn an_image_for_another_platform_is_taken_and_said() {
    let world = World::new();
    let image = layout(&world.dir("odd"), |_, config| {
        config["architecture"] = "s390x".into();
    });
    let dir = world.dir("root");
    let output = world.run(&["mount", &image, dir.to_str().unwrap()]);
    let text = errors(&output);
    assert!(output.status.success() && text.contains("linux/s390x"), "{text}");
    world.umount(&dir);
}
