//! What several fuzz targets share: the properties that every index of a layer and every tree must have, whatever the bytes
//! that they were made of.

pub mod layout;

use std::io;

use peel_image::layer::{ChunkSource, EntryKind, LayerIndex};
use peel_image::path::EntryPath;
use peel_image::tar::index::FileSink;
use peel_image::tree::{InodeId, InodeKind, Tree};
use peel_image::{Digest, Hasher};

/// A sink that hashes, and fails once a stream expands to more than a fuzz run has time for.
#[derive(Debug, Default)]
pub struct SmallSink {
    hasher: Hasher,
    taken: usize,
}

/// Bytes that a [`SmallSink`] takes.
const SINK_MAX: usize = 4 << 20;

impl FileSink for SmallSink {
    fn begin(&mut self, _path: &EntryPath, _size: u64) -> io::Result<()> {
        self.hasher = Hasher::new();
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        self.taken += data.len();
        if self.taken > SINK_MAX {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        self.hasher.update(data);
        Ok(())
    }

    fn finish(&mut self) -> io::Result<Digest> {
        Ok(std::mem::take(&mut self.hasher).finish())
    }
}

/// Makes the checksum right in every block that looks like a tar header. Without this nearly every change of an input would only
/// show that checksums are checked.
pub fn with_checksums(tar: &[u8]) -> Vec<u8> {
    let mut tar = tar.to_vec();
    for header in tar.chunks_exact_mut(512) {
        if header[257..].starts_with(b"ustar") {
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().copied().map(u32::from).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        }
    }
    tar
}

/// Every path is clean, every chunk lies in its file and in the blob, and chunks leave no gap.
pub fn check_index(index: &LayerIndex, payload_end: u64) {
    for entry in &index.entries {
        check_path(&entry.path);
        let EntryKind::Regular(content) = &entry.kind else {
            continue;
        };
        let mut next = 0;
        for chunk in &content.chunks {
            assert_eq!(chunk.file_offset, next, "a gap in {}", entry.path);
            assert!(chunk.size > 0, "an empty chunk in {}", entry.path);
            next = next.checked_add(chunk.size).expect("a file without end");
            if let ChunkSource::Blob {
                offset,
                compressed_size,
                ..
            } = chunk.source
            {
                let end = offset.checked_add(compressed_size).expect("a chunk without end");
                assert!(end <= payload_end, "a chunk of {} outside the blob", entry.path);
            }
        }
        assert!(
            content.chunks.is_empty() || next == content.size,
            "chunks of {} cover {next} of {} bytes",
            entry.path,
            content.size
        );
    }
}

/// No component can lead out of the tree.
pub fn check_path(path: &EntryPath) {
    for component in path.components() {
        assert!(
            !component.is_empty() && component != b"." && component != b"..",
            "{path}"
        );
        assert!(!component.contains(&b'/') && !component.contains(&0), "{path}");
    }
}

/// Merges, and if that gives a tree: every inode has a name and as many links as it says, and every name is found again.
pub fn check_merge(layers: &[LayerIndex]) -> Option<Tree> {
    let tree = Tree::merge(layers).ok()?;
    let mut links: Vec<u32> = tree.inodes.iter().map(|_| 0).collect();
    let mut count = |id: InodeId| links[usize::try_from(id.0).expect("an inode number")] += 1;
    // A directory is named by its parent, by itself and by its subdirectories; nobody names the root but itself.
    count(InodeId::ROOT);
    for (path, id) in tree.walk() {
        count(id);
        assert_eq!(tree.resolve(&path, false), Ok(id));
        // Links may lead nowhere, but never out of the tree and never for ever.
        if let Ok(target) = tree.resolve(&path, true) {
            assert!(tree.inode(target).is_some());
        }
    }
    for (number, inode) in tree.inodes.iter().enumerate() {
        let mut expected = links[number];
        assert!(expected > 0, "inode {number} has no name");
        if let InodeKind::Directory(children) = &inode.kind {
            assert_eq!(expected, 1, "directory {number} has {expected} names");
            let is_directory = |id: &&InodeId| tree.children(**id).is_some();
            let subdirectories = children.values().filter(is_directory).count();
            expected = 2 + u32::try_from(subdirectories).expect("few directories");
        }
        assert_eq!(inode.links, expected, "inode {number}");
    }
    Some(tree)
}
