//! The vectors in `tests/vectors`: one image of three layers in many encodings, made by the upstream tools, and the
//! listing of the tree that containerd unpacks from it. Called by tests of every crate.
//!
//! Every image of [`TAGS`] has the same tree. `tests/vectors/README.md` says what made which. Functions here fail by
//! panicking: their callers are tests.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// The images of the vectors. The TOC images beside two of them (`-esgztoc`) are none.
pub const TAGS: &[&str] = &[
    "org",
    "esgz",
    "esgz-opt",
    "esgz-chunk64k",
    "esgz-min50k",
    "esgz-ext",
    "esgz-keep",
    "zstd-stargz",
    "zstd-stargz-opt",
    "zstd-podman",
    "zstd-skopeo",
];

/// One layer of an image of the vectors.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The digest of its blob, `sha256:` and 64 hexadecimal digits.
    pub digest: String,
    /// The file that holds its blob.
    pub path: PathBuf,
    /// Its descriptor in the manifest.
    pub descriptor: Value,
    /// The digest of its uncompressed stream; of TOC images there is none.
    pub diff_id: Option<String>,
}

impl Layer {
    /// The whole blob.
    pub fn blob(&self) -> Vec<u8> {
        read(&self.path)
    }

    /// The value of an annotation of its descriptor.
    pub fn annotation(&self, name: &str) -> Option<&str> {
        self.descriptor["annotations"][name].as_str()
    }
}

/// The directory of the vectors, without links in its name.
pub fn directory() -> PathBuf {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/vectors");
    directory
        .canonicalize()
        .unwrap_or_else(|error| panic!("no vectors in {}: {error}", directory.display()))
}

/// The OCI layout that holds all images.
pub fn layout() -> PathBuf {
    directory().join("oci")
}

/// Name of an image, as the commands take it.
pub fn image(tag: &str) -> String {
    format!("oci:{}:{tag}", layout().display())
}

/// The file of the blob with this digest.
pub fn blob_path(digest: &str) -> PathBuf {
    layout().join("blobs").join(digest.replace(':', "/"))
}

/// The listing of the tree, one JSON object a line, in the order of the paths.
pub fn expected_listing() -> String {
    String::from_utf8(read(&directory().join("expected.jsonl"))).unwrap()
}

/// The listing of the tree at a directory, made by `listing.py` of the vectors.
pub fn listing(root: &Path) -> String {
    let output = Command::new("python3")
        .arg(directory().join("listing.py"))
        .arg(root)
        .output()
        .unwrap_or_else(|error| panic!("python3: {error}"));
    assert!(
        output.status.success(),
        "listing.py: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// The layers of an image, lowest first. Of an index, those of its first image.
pub fn layers(tag: &str) -> Vec<Layer> {
    let manifest = manifest(tag);
    let config = json(&blob_path(text(&manifest["config"]["digest"])));
    let diff_ids = config["rootfs"]["diff_ids"].as_array();
    let layers = manifest["layers"].as_array().unwrap();
    if let Some(diff_ids) = diff_ids {
        assert_eq!(layers.len(), diff_ids.len(), "{tag}");
    }
    let layer = |(position, descriptor): (usize, &Value)| Layer {
        digest: text(&descriptor["digest"]).to_owned(),
        path: blob_path(text(&descriptor["digest"])),
        descriptor: descriptor.clone(),
        diff_id: diff_ids.map(|ids| text(&ids[position]).to_owned()),
    };
    layers.iter().enumerate().map(layer).collect()
}

/// The manifest of an image. Of an index, that of its first image.
pub fn manifest(tag: &str) -> Value {
    let index = json(&layout().join("index.json"));
    let descriptor = index["manifests"]
        .as_array()
        .unwrap()
        .iter()
        .find(|entry| entry["annotations"]["org.opencontainers.image.ref.name"] == tag)
        .unwrap_or_else(|| panic!("the vectors have no image {tag}"));
    let manifest = json(&blob_path(text(&descriptor["digest"])));
    match manifest["manifests"].get(0) {
        Some(first) => json(&blob_path(text(&first["digest"]))),
        None => manifest,
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap()
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}
