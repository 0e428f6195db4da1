//! Layers made by upstream tools, read whole and merged, against the listing of what containerd unpacks from them.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::{Arc, Mutex};

use peel_image::compression::{Guard, decoder};
use peel_image::layer::{Device, LayerIndex};
use peel_image::tar::index::HashSink;
use peel_image::tar::index_tar;
use peel_image::tree::{InodeKind, Tree};
use peel_image::{Digest, Hasher};
use peel_testkit::vectors;
use serde_json::{Value, json};

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
    let read = |layer: &vectors::Layer| {
        let (compressed, blob_digest) = tee(File::open(&layer.path).unwrap());
        let (_, plain) = decoder(compressed, Guard::default()).unwrap();
        let (plain, plain_digest) = tee(plain);
        let (index, trailer) = index_tar(plain, &mut HashSink::default()).unwrap();
        assert!(!trailer.has_data, "{tag}: bytes after the end of the archive");
        assert_eq!(blob_digest().to_string(), layer.digest);
        assert_eq!(Some(plain_digest().to_string()), layer.diff_id);
        index
    };
    vectors::layers(tag).iter().map(read).collect()
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
    let expected: Vec<Value> = vectors::expected_listing()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert!(expected.len() > 300);
    for tag in vectors::TAGS {
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
