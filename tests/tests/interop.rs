//! What peel writes, pulled as an ordinary image by containerd, Podman, Skopeo and umoci: each gives the tree of the
//! vectors. The images that the upstream tools made go the same way, as a control of the way itself.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::path::Path;
use std::process::Command;

use peel_tests::namespace::Namespace;
use peel_tests::podman::Podman;
use peel_tests::service::{Containerd, DockerRegistry};
use peel_tests::world::{World, assert_expected, assert_expected_beside_own, errors, vector};

/// Images that peel writes: the name here, the vector that they are made of, and the flags.
const WRITTEN: &[(&str, &str, &[&str])] = &[
    ("estargz", "org", &["--estargz"]),
    (
        "estargz-chunk",
        "org",
        &["--estargz", "--estargz-chunk-size=65536"],
    ),
    (
        "estargz-min",
        "org",
        &["--estargz", "--estargz-min-chunk-size=50000"],
    ),
    ("estargz-ext", "org", &["--estargz", "--estargz-external-toc"]),
    (
        "estargz-keep",
        "org",
        &["--estargz", "--estargz-external-toc", "--estargz-keep-diff-id"],
    ),
    ("zstd-podman", "org", &["--zstdchunked"]),
    ("zstd-stargz", "org", &["--zstdchunked", "--dialect=stargz"]),
    ("gzip", "org", &["--gzip"]),
    ("zstd", "org", &["--zstd"]),
    ("plain", "org", &["--uncompress"]),
    ("gzip-of-podman", "zstd-podman", &["--gzip"]),
    ("zstd-of-keep", "esgz-keep", &["--zstd"]),
    ("plain-of-skopeo", "zstd-skopeo", &["--uncompress"]),
];

/// Images of the vectors for the control.
const VECTORS: &[&str] = &[
    "org",
    "esgz",
    "esgz-keep",
    "zstd-stargz",
    "zstd-podman",
    "zstd-skopeo",
];

/// An image in the registry.
struct Image {
    name: String,
    /// Whether tools that do not know its format find entries of the format among the files.
    own_entries: bool,
}

impl Image {
    fn new(name: String, format: &str) -> Self {
        let own_entries = ["estargz", "esgz", "zstd-stargz"]
            .iter()
            .any(|prefix| format.starts_with(prefix))
            && !format.ends_with("-keep");
        Self { name, own_entries }
    }

    /// Compares the tree that a tool made of it with the vectors' listing.
    fn check(&self, dir: &Path, tool: &str) {
        let what = format!("{} in {tool}", self.name);
        if self.own_entries {
            assert_expected_beside_own(dir, &what);
        } else {
            assert_expected(dir, &what);
        }
    }
}

#[test]
fn every_tool_pulls_every_format_to_the_same_tree() {
    let world = World::new();
    let registry = DockerRegistry::start(&world.dir("registry"));
    let mut images = Vec::new();
    for tag in VECTORS {
        let name = registry.take(&vector(tag), &format!("vectors/{tag}"));
        images.push(Image::new(name, tag));
    }
    for (format, source, flags) in WRITTEN {
        let name = format!("{}/peel/{format}:latest", registry.addr);
        world.convert(flags, &vector(source), &name);
        images.push(Image::new(name, format));
    }
    let (host, trixie) = (Namespace::host(&world), Namespace::trixie(&world));
    std::thread::scope(|scope| {
        scope.spawn(|| podman(&host, &world.dir("podman-4"), &images));
        scope.spawn(|| podman(&trixie, &world.dir("podman-5"), &images));
        scope.spawn(|| containerd(&host, &world.dir("containerd-1.6"), &images));
        scope.spawn(|| containerd(&trixie, &world.dir("containerd-1.7"), &images));
        scope.spawn(|| umoci(&world.dir("umoci"), &images));
    });
}

/// Storage of its own for each image: no layer may come from another one.
fn podman(namespace: &Namespace, dir: &Path, images: &[Image]) {
    for (number, image) in images.iter().enumerate() {
        let podman = Podman::whole(namespace, &dir.join(number.to_string()));
        podman.pull(&image.name);
        image.check(&podman.mount(&image.name), &dir.display().to_string());
    }
}

fn containerd(namespace: &Namespace, dir: &Path, images: &[Image]) {
    let containerd = Containerd::start_in(namespace, dir);
    for (number, image) in images.iter().enumerate() {
        let apart = format!("image-{number}");
        let root = containerd.pull_and_mount(&apart, &image.name, &dir.join(&apart));
        image.check(&root, &dir.display().to_string());
    }
}

/// Debian's umoci reads gzip alone, so Skopeo, which checks every digest on the way, makes gzip of the rest.
fn umoci(dir: &Path, images: &[Image]) {
    for (number, image) in images.iter().enumerate() {
        let layout = dir.join(format!("{number}-layout"));
        run(Command::new("skopeo")
            .args(["copy", "--quiet", "--src-tls-verify=false"])
            .args(["--dest-compress", "--dest-compress-format=gzip"])
            .arg(format!("docker://{}", image.name))
            .arg(format!("oci:{}:image", layout.display())));
        let bundle = dir.join(format!("{number}-bundle"));
        run(Command::new("umoci")
            .args(["unpack", "--image", &format!("{}:image", layout.display())])
            .arg(&bundle));
        image.check(&bundle.join("rootfs"), "umoci");
    }
}

/// Runs a program and expects success.
fn run(command: &mut Command) {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", errors(&output));
}
