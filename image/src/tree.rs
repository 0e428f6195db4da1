//! Layers merged into the one file tree that a container sees: later layers over earlier ones, whiteouts applied
//! (OCI image specification, layer.md, "Whiteouts").

#![allow(clippy::todo)]
use std::collections::BTreeMap;

use crate::digest::Digest;
use crate::layer::{Device, LayerIndex, Metadata};

/// Position of an inode in [`Tree::inodes`]; the root is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(pub u32);

/// The merged tree of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tree {
    /// All reachable inodes; index 0 is the root directory. Parents come before their children.
    pub inodes: Vec<Inode>,
}

/// One inode; hard links are several directory entries of the same inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Owner, mode, times, attributes.
    pub metadata: Metadata,
    /// How many names it has; for a directory 2 plus its subdirectories.
    pub links: u32,
    /// What it is.
    pub kind: InodeKind,
}

/// What an inode is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InodeKind {
    /// A directory: names, sorted by bytes, to inodes. `.` and `..` are not listed.
    Directory(BTreeMap<Box<[u8]>, InodeId>),
    /// A regular file.
    Regular(FileRef),
    /// A symbolic link and its target.
    Symlink(Box<[u8]>),
    /// A character device.
    CharDevice(Device),
    /// A block device.
    BlockDevice(Device),
    /// A named pipe.
    Fifo,
}

/// A regular file of the tree and where its content is described.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileRef {
    /// Length in bytes.
    pub size: u64,
    /// The object that holds the content; [`Digest::EMPTY`] for an empty file.
    pub object: Digest,
    /// Which of the merged layers it comes from (0 is the lowest).
    pub layer: u32,
    /// Index into that layer's [`LayerIndex::entries`] of the entry that holds the content.
    pub entry: u32,
}

/// Why layers cannot be merged.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Replaced by the real variants.
    #[error("placeholder")]
    Placeholder,
}

impl Tree {
    /// Merges `layers`, lowest first.
    pub fn merge(_layers: &[LayerIndex]) -> Result<Self, TreeError> {
        todo!()
    }
}
