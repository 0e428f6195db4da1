//! What `peel convert` writes, seen by others: gzip and tar, umoci, containerd, and peel itself.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use peel_tests::service::Containerd;
use peel_tests::world::{World, assert_expected, errors, text, vector};

/// The vectors' image, converted into a layout of its own.
fn converted(world: &World) -> PathBuf {
    let layout = world.path("layout");
    world.ok(&[
        "convert",
        &vector("org"),
        &format!("oci:{}:esgz", layout.display()),
    ]);
    layout
}

/// Runs a program and expects success.
fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
    text(&output)
}

/// The layer blobs of the image in a layout, lowest first.
fn layers(layout: &Path) -> Vec<PathBuf> {
    let json =
        |path: PathBuf| -> serde_json::Value { serde_json::from_slice(&fs::read(path).unwrap()).unwrap() };
    let blob = |digest: &serde_json::Value| {
        layout
            .join("blobs")
            .join(digest.as_str().unwrap().replace(':', "/"))
    };
    let index = json(layout.join("index.json"));
    let manifest = json(blob(&index["manifests"][0]["digest"]));
    manifest["layers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|layer| blob(&layer["digest"]))
        .collect()
}

#[test]
fn peel_reads_back_what_it_wrote() {
    let world = World::new();
    let layout = converted(&world);
    let dir = world.mount(&format!("oci:{}:esgz", layout.display()), "root");
    assert_expected(&dir, "converted");
    world.umount(&dir);
}

#[test]
fn gzip_and_tar_read_every_layer() {
    let world = World::new();
    let layers = layers(&converted(&world));
    assert_eq!(layers.len(), 3);
    for layer in layers {
        let script = "set -o pipefail; gzip -dc \"$0\" | tar --list --file=- >/dev/null";
        run(Command::new("bash").args(["-c", script]).arg(&layer));
    }
}

#[test]
fn umoci_unpacks_it_to_the_same_tree() {
    let world = World::new();
    let layout = converted(&world);
    let bundle = world.path("bundle");
    let image = format!("{}:esgz", layout.display());
    run(Command::new("umoci")
        .args(["unpack", "--image", &image])
        .arg(&bundle));
    remove_landmarks(&bundle.join("rootfs"));
    assert_expected(&bundle.join("rootfs"), "unpacked by umoci");
}

#[test]
fn containerd_unpacks_it_to_the_same_tree() {
    let world = World::new();
    let layout = converted(&world);
    let archive = world.path("image.tar");
    run(Command::new("tar")
        .arg("--create")
        .arg("--file")
        .arg(&archive)
        .arg("--directory")
        .arg(&layout)
        .arg("."));
    let containerd = Containerd::start(&world.dir("containerd"));
    let target = world.dir("unpacked");
    containerd.ctr(&[
        "image",
        "import",
        "--base-name",
        "example.org/vectors",
        archive.to_str().unwrap(),
    ]);
    let name = containerd.ctr(&["image", "ls", "--quiet"]);
    let name = name.trim();
    containerd.ctr(&["image", "mount", name, target.to_str().unwrap()]);
    // A mounted root cannot be changed; the landmarks are left out of a copy.
    let copy = world.path("copy");
    run(Command::new("cp").arg("--archive").arg(&target).arg(&copy));
    containerd.ctr(&["image", "unmount", target.to_str().unwrap()]);
    remove_landmarks(&copy);
    assert_expected(&copy, "unpacked by containerd");
}

/// Landmarks and the table of contents are ordinary files for tools that do not know eStargz.
fn remove_landmarks(root: &Path) {
    for name in [".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"] {
        let _ = fs::remove_file(root.join(name));
    }
}
