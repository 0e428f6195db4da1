//! Layers made by upstream tools, read whole and merged, against the listing of what containerd unpacks from them.
//!
//! The vectors are looked for in `$PEEL_VECTORS`, else beside the checkout; without them the test fails.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use peel_image::compression::{Guard, decoder};
use peel_image::layer::{Device, LayerIndex};
use peel_image::tar::index::HashSink;
use peel_image::tar::index_tar;
use peel_image::tree::{InodeKind, Tree};
use peel_image::{Digest, Hasher};
use serde_json::{Value, json};

fn vectors() -> PathBuf {
    let default = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/vectors"));
    let path = std::env::var_os("PEEL_VECTORS").map_or_else(default, PathBuf::from);
    assert!(
        path.join("expected.jsonl").is_file(),
        "{} holds no vectors: set PEEL_VECTORS to their directory",
        path.display()
    );
    path
}

fn blob(digest: &Value) -> PathBuf {
    let digest: Digest = digest.as_str().unwrap().parse().unwrap();
    vectors().join("oci/blobs/sha256").join(digest.hex())
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// Hashes what passes; the hash can be asked for from outside.
struct Tee<R>(R, Arc<Mutex<Hasher>>);

impl<R: Read> Read for Tee<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(buffer)?;
        self.1.lock().unwrap().update(&buffer[..count]);
        Ok(count)
    }
}

fn tee<R: Read>(stream: R) -> (Tee<R>, impl FnOnce() -> Digest) {
    let hasher = Arc::new(Mutex::new(Hasher::new()));
    let shared = Arc::clone(&hasher);
    (Tee(stream, hasher), move || {
        shared.lock().unwrap().clone().finish()
    })
}

/// Reads every layer of a tag whole; blob digests and DiffIDs must fit, so no byte is left unread.
fn layers(tag: &str) -> Vec<LayerIndex> {
    let index = json(vectors().join("oci/index.json"));
    let name = "org.opencontainers.image.ref.name";
    let mut manifests = index["manifests"].as_array().unwrap().iter();
    let descriptor = manifests.find(|manifest| manifest["annotations"][name] == tag);
    let descriptor = descriptor.unwrap_or_else(|| panic!("no tag {tag}"));
    let mut manifest = json(blob(&descriptor["digest"]));
    if let Some(manifests) = manifest["manifests"].as_array() {
        manifest = json(blob(&manifests[0]["digest"]));
    }
    let config = json(blob(&manifest["config"]["digest"]));
    let diff_ids = config["rootfs"]["diff_ids"].as_array().unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    assert_eq!(layers.len(), diff_ids.len());
    let read = |(layer, diff_id): (&Value, &Value)| {
        let (compressed, blob_digest) = tee(File::open(blob(&layer["digest"])).unwrap());
        let (_, plain) = decoder(compressed, Guard::default()).unwrap();
        let (plain, plain_digest) = tee(plain);
        let (index, trailer) = index_tar(plain, &mut HashSink::default()).unwrap();
        assert!(!trailer.has_data, "{tag}: bytes after the end of the archive");
        assert_eq!(blob_digest().to_string(), layer["digest"].as_str().unwrap());
        assert_eq!(plain_digest().to_string(), diff_id.as_str().unwrap());
        index
    };
    layers.iter().zip(diff_ids).map(read).collect()
}

/// One object per name below the root, as listing.py prints them.
fn listing(tree: &Tree) -> Vec<Value> {
    let mut lines: Vec<(Vec<u8>, Value)> = Vec::new();
    for (path, id) in tree.walk() {
        let inode = tree.inode(id).unwrap();
        let metadata = &inode.metadata;
        let mut line = json!({
            "path": String::from_utf8(path.clone()).unwrap(),
            "mode": format!("{:o}", metadata.mode),
            "uid": metadata.uid,
            "gid": metadata.gid,
            "mtime": metadata.mtime,
        });
        let device = |device: &Device| format!("{}:{}", device.major, device.minor);
        line["type"] = match &inode.kind {
            InodeKind::Directory(_) => "dir",
            InodeKind::Regular(file) => {
                line["nlink"] = inode.links.into();
                line["size"] = file.size.into();
                line["sha256"] = file.object.hex().into();
                "file"
            }
            InodeKind::Symlink(target) => {
                line["target"] = String::from_utf8(target.to_vec()).unwrap().into();
                "symlink"
            }
            InodeKind::CharDevice(number) => {
                line["rdev"] = device(number).into();
                "char"
            }
            InodeKind::BlockDevice(number) => {
                line["rdev"] = device(number).into();
                "block"
            }
            InodeKind::Fifo => "fifo",
        }
        .into();
        let hex = |value: &[u8]| value.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        let xattrs = metadata.xattrs.iter();
        let xattrs: BTreeMap<_, _> = xattrs
            .map(|(name, value)| (String::from_utf8(name.to_vec()).unwrap(), hex(value)))
            .collect();
        if !xattrs.is_empty() && !matches!(inode.kind, InodeKind::Symlink(_)) {
            line["xattrs"] = json!(xattrs);
        }
        lines.push((path, line));
    }
    lines.sort_by(|(left, _), (right, _)| left.cmp(right));
    lines.into_iter().map(|(_, line)| line).collect()
}

#[test]
fn every_encoding_gives_the_tree_that_containerd_unpacks() {
    let expected = fs::read_to_string(vectors().join("expected.jsonl")).unwrap();
    let expected: Vec<Value> = expected
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(expected.len() > 300);
    for tag in [
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
    ] {
        let layers = layers(tag);
        let tree = Tree::merge(&layers).unwrap();
        let listing = listing(&tree);
        for (have, want) in listing.iter().zip(&expected) {
            assert_eq!(have, want, "{tag}");
        }
        assert_eq!(listing.len(), expected.len(), "{tag}");
    }
}

#[test]
fn times_below_a_second_are_kept() {
    let tree = Tree::merge(&layers("org")).unwrap();
    assert!(
        tree.inodes
            .iter()
            .any(|inode| inode.metadata.mtime_nanoseconds != 0)
    );
}
