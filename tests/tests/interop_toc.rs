//! stargz-snapshotter's own reader (`ctr-remote`) finds the table of contents in our layers and hashes it to what our
//! annotations say. The images that `ctr-remote` made (in the vectors) go the same way first.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::process::Command;

use peel_image::annotations::TOC_DIGEST;
use peel_tests::namespace::Namespace;
use peel_tests::service::{Containerd, DockerRegistry};
use peel_tests::world::{World, errors, vector};
use serde_json::Value;

/// Images that peel writes, and whether they are zstd:chunked.
const WRITTEN: &[(&str, &[&str], bool)] = &[
    ("estargz", &["--estargz"], false),
    ("chunk", &["--estargz", "--estargz-chunk-size=65536"], false),
    ("min", &["--estargz", "--estargz-min-chunk-size=50000"], false),
    ("stargz", &["--zstdchunked", "--dialect=stargz"], true),
];

#[test]
fn ctr_remote_agrees_with_our_annotations() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("registry"));
    let mut images = vec![
        (registry.take(&vector("esgz-opt"), "their-estargz"), false),
        (registry.take(&vector("zstd-stargz-opt"), "their-zstd"), true),
    ];
    for (name, flags, zstd) in WRITTEN {
        let target = format!("{}/{name}:latest", registry.addr);
        world.convert(flags, &vector("org"), &target);
        images.push((target, *zstd));
    }
    let namespace = Namespace::trixie(&world);
    let containerd = Containerd::start_in(&namespace, &world.path("containerd"));
    for (image, zstd) in images {
        containerd.ctr(&["content", "fetch", "--plain-http", &image]);
        let layers = layers(&image);
        assert_eq!(layers.len(), 3, "{image}");
        for layer in layers {
            let digest = layer["digest"].as_str().unwrap();
            let mut arguments = vec!["image", "get-toc-digest"];
            if zstd {
                arguments.push("--zstdchunked");
            }
            arguments.push(digest);
            let found = containerd.client("ctr-remote", &arguments);
            assert_eq!(
                Some(found.trim()),
                layer["annotations"][TOC_DIGEST].as_str(),
                "{image}, layer {digest}"
            );
        }
    }
}

/// The layer descriptors of an image in a registry.
fn layers(image: &str) -> Vec<Value> {
    let output = Command::new("skopeo")
        .args(["inspect", "--raw", "--tls-verify=false"])
        .arg(format!("docker://{image}"))
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "skopeo inspect {image}: {}",
        errors(&output)
    );
    let manifest: Value = serde_json::from_slice(&output.stdout).unwrap();
    manifest["layers"].as_array().unwrap().clone()
}
