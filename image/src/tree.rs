//! Layers merged into the one file tree that a container sees: later layers over earlier ones, whiteouts applied
//! (OCI image specification, layer.md, "Whiteouts"). Called by whoever mounts or lists an image.
//!
//! Where the specification is silent, the result is what containerd's unpack into overlay directories gives:
//!
//! * A whiteout or an opaque mark acts on lower layers only, wherever in its layer it stands.
//! * A hard link is one more name of what its target is at that time, whatever takes the target's place later.
//! * A directory over a directory keeps the children and takes the new metadata; anything else replaces what was there.
//! * Parents without an entry keep the lower layer's metadata, else they are 0755, root:root, mtime 0.
//! * A path through a symbolic link of the same layer follows it, inside the tree; a symbolic link of a lower layer is
//!   replaced by a directory.
//! * A hard link gives its own owner, mode, time and attributes to the inode that it names, in the order of the layer; as after
//!   chown(2), a capability that it does not repeat is gone. A link whose target comes later gives nothing.
//! * AUFS's bookkeeping in the root directory (`.wh..wh.plnk` and its like) is not part of the tree; hard links into it are.
//! * A character device 0:0 is overlayfs's whiteout, and `trusted.overlay.*` attributes steer overlayfs: no image may
//!   bring either into the tree.
//!
//! Differing from containerd, a hard link may also name a file of a lower layer or one that comes later in its own layer, and
//! eStargz's landmarks and TOC are left out of the root directory.

mod above;
mod children;
mod inherit;
mod merge;
#[cfg(test)]
mod tests;
mod walk;

use std::collections::BTreeMap;

use crate::layer::{Device, EntryKind, LayerIndex, Metadata, XATTR_COST};
use crate::path::EntryPath;
use peel_hash::Digest;

pub use above::Paths;
pub use walk::{ResolveError, Walk};

/// Most inodes of a tree: as many as [`crate::tar::index::ENTRIES_MAX`].
pub const INODES_MAX: u32 = 10_000_000;
/// Most directories of a layer that have no entry and are made because a path leads through them. A path of 4 KiB can name 2,000 of
/// them, so entries alone bound nothing. Layers without such entries exist (Bazel makes them), with some ten thousand directories.
pub const IMPLIED_MAX: u32 = 250_000;
/// The same for all layers of an image.
pub const IMAGE_IMPLIED_MAX: u32 = 500_000;
/// Most bytes of memory that a tree takes while it is made, as [`cost`] counts them: more than three million directories, or eight
/// million files.
pub const TREE_MAX: u64 = 2 << 30;
/// Most directories and symbolic links that are passed on the way to the entries of an image and to the targets of its hard links. A few
/// seconds; an image of ten million files that come in no order needs a third of that.
pub const STEPS_MAX: u64 = 300_000_000;
/// Most symbolic links followed on one path (Linux `MAXSYMLINKS`).
pub const SYMLINKS_MAX: u32 = 40;

/// What begins the name of a whiteout.
pub const WHITEOUT: &[u8] = b".wh.";
/// The name of an opaque mark.
pub const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names in the root directory that AUFS kept for itself. Hard links may lead into one of them, `.wh..wh.plnk`.
const AUFS: &[u8] = b".wh..wh.";

/// What the name of an entry makes of it, whatever its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special<'a> {
    /// Nothing.
    No,
    /// Hides all that lower layers have in its directory.
    Opaque,
    /// Hides this name of lower layers, which may be impossible.
    Whiteout(&'a [u8]),
    /// AUFS's own, which is there until its layer ends.
    Aufs,
}

/// Tells what the name of an entry at this clean path makes of it.
pub fn special(path: &[u8]) -> Special<'_> {
    let start = path
        .iter()
        .rposition(|byte| *byte == b'/')
        .map_or(0, |slash| slash + 1);
    let name = path.get(start..).unwrap_or_default();
    if name == OPAQUE {
        return Special::Opaque;
    }
    if path.starts_with(AUFS) {
        return Special::Aufs;
    }
    name.strip_prefix(WHITEOUT).map_or(Special::No, Special::Whiteout)
}

/// Names in the root directory that eStargz keeps for itself: two landmarks and the TOC.
const HIDDEN: [&[u8]; 3] = [
    b".prefetch.landmark",
    b".no.prefetch.landmark",
    b"stargz.index.json",
];

/// Position of an inode in [`Tree::inodes`]; the root is 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeId(pub u32);

impl InodeId {
    /// The root directory.
    pub const ROOT: Self = Self(0);
}

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

/// Why layers cannot be merged. Layers are counted from 0, the lowest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The target of a hard link is in no layer up to its own.
    #[error("layer {layer}: {path} is a hard link to {target}, which does not exist")]
    LinkMissing {
        /// The link's layer.
        layer: u32,
        /// The link.
        path: EntryPath,
        /// Its target.
        target: EntryPath,
    },
    /// The target of a hard link is a directory.
    #[error("layer {layer}: {path} is a hard link to {target}, which is a directory")]
    LinkToDirectory {
        /// The link's layer.
        layer: u32,
        /// The link.
        path: EntryPath,
        /// Its target.
        target: EntryPath,
    },
    /// Hard links that lead to each other or to themselves.
    #[error("layer {layer}: {path} is a hard link to {target}, which leads back to it")]
    LinkLoop {
        /// The link's layer.
        layer: u32,
        /// The link.
        path: EntryPath,
        /// Its target.
        target: EntryPath,
    },
    /// An entry lies below something that its own layer says is no directory.
    #[error("layer {layer}: {path} lies below an entry of the same layer that is no directory")]
    ParentNotDirectory {
        /// The entry's layer.
        layer: u32,
        /// The entry.
        path: EntryPath,
    },
    /// A path through too many symbolic links of its own layer.
    #[error("layer {layer}: {path} leads through more than {SYMLINKS_MAX} symbolic links of the same layer")]
    SymlinkLoop {
        /// The entry's layer.
        layer: u32,
        /// The entry.
        path: EntryPath,
    },
    /// Symbolic links of the layer lead the entry to a path longer than Linux's `PATH_MAX`.
    #[error("layer {layer}: symbolic links of the same layer put {path} at too long a path")]
    TooDeep {
        /// The entry's layer.
        layer: u32,
        /// The entry.
        path: EntryPath,
    },
    /// A whiteout that names nothing, `.` or `..`.
    #[error("layer {layer}: {path} is a whiteout of no name")]
    Whiteout {
        /// The whiteout's layer.
        layer: u32,
        /// The whiteout.
        path: EntryPath,
    },
    /// The root is not a directory.
    #[error("layer {layer}: entry {entry} would replace the root directory with something else")]
    Root {
        /// The entry's layer.
        layer: u32,
        /// Its position in the layer.
        entry: u32,
    },
    /// The layer does not say what a file holds: it must be pulled whole first.
    #[error("layer {layer}: the index has no digest for {path}; the layer must be pulled whole")]
    NoDigest {
        /// The file's layer.
        layer: u32,
        /// The file.
        path: EntryPath,
    },
    /// A file has a size, but the digest of no bytes, or the other way round.
    #[error("layer {layer}: {path} has {size} bytes and the digest {digest}, which cannot both be true")]
    EmptyDigest {
        /// The file's layer.
        layer: u32,
        /// The file.
        path: EntryPath,
        /// Its length in bytes as the layer says.
        size: u64,
        /// Its digest as the layer says.
        digest: Digest,
    },
    /// More directories without entries than a layer or an image may have.
    #[error("layer {layer}: its paths lead through more than {limit} directories that have no entry{}", of_image(*limit))]
    TooManyImplied {
        /// The layer that brings the first one too many.
        layer: u32,
        /// [`IMPLIED_MAX`] or [`IMAGE_IMPLIED_MAX`].
        limit: u32,
    },
    /// More memory than a tree may take.
    #[error(
        "layer {layer}: the files and directories of the image would take more than {TREE_MAX} bytes of memory"
    )]
    TooLarge {
        /// The layer that brings the first one too many.
        layer: u32,
    },
    /// More work than a tree may make.
    #[error(
        "layer {layer}: the paths of the image lead through more than {STEPS_MAX} directories and symbolic links in all"
    )]
    TooManySteps {
        /// The layer that takes the first one too many.
        layer: u32,
    },
    /// More files and directories than a tree may have.
    #[error("layer {layer}: the image has more than {INODES_MAX} files and directories")]
    TooManyInodes {
        /// The layer that brings the first one too many.
        layer: u32,
    },
}

/// How a message goes on about a limit of implied directories.
fn of_image(limit: u32) -> &'static str {
    if limit == IMAGE_IMPLIED_MAX {
        ", together with the layers below"
    } else {
        ""
    }
}

/// Bytes of memory that the entries of a layer take in a tree while that is made, without the directories that have no entry. As measured
/// with the system's allocator; names in directories included.
pub fn cost(layer: &LayerIndex) -> u64 {
    let entries = layer.entries.iter();
    entries
        .map(|entry| inode_cost(matches!(entry.kind, EntryKind::Directory), &entry.metadata))
        .fold(0, u64::saturating_add)
}

/// Bytes of memory of a directory that holds one name: node, inode, and two lists of names.
const DIRECTORY_COST: u64 = 600;
/// The same of anything else.
const LEAF_COST: u64 = 250;

fn inode_cost(is_directory: bool, metadata: &Metadata) -> u64 {
    let own = if is_directory { DIRECTORY_COST } else { LEAF_COST };
    metadata
        .xattrs
        .iter()
        .map(|(name, value)| XATTR_COST + (name.len() + value.len()) as u64)
        .fold(own, u64::saturating_add)
}

impl TreeError {
    /// Whether the layers may be right but are too large, in one way or another. Says nothing about what comes after the entry that
    /// was one too many.
    pub fn is_limit(&self) -> bool {
        matches!(
            self,
            Self::TooManyImplied { .. }
                | Self::TooLarge { .. }
                | Self::TooManySteps { .. }
                | Self::TooManyInodes { .. }
        )
    }

    /// The layer that cannot be merged, counted from 0, the lowest.
    pub fn layer(&self) -> u32 {
        match self {
            Self::LinkMissing { layer, .. }
            | Self::LinkToDirectory { layer, .. }
            | Self::LinkLoop { layer, .. }
            | Self::ParentNotDirectory { layer, .. }
            | Self::SymlinkLoop { layer, .. }
            | Self::TooDeep { layer, .. }
            | Self::Whiteout { layer, .. }
            | Self::Root { layer, .. }
            | Self::NoDigest { layer, .. }
            | Self::EmptyDigest { layer, .. }
            | Self::TooManyImplied { layer, .. }
            | Self::TooLarge { layer }
            | Self::TooManySteps { layer }
            | Self::TooManyInodes { layer } => *layer,
        }
    }
}

impl Tree {
    /// Merges `layers`, lowest first.
    pub fn merge(layers: &[LayerIndex]) -> Result<Self, TreeError> {
        merge::merge(layers, merge::Limits::default())
    }

    /// As [`Tree::merge`], of layers that lie in different places.
    pub fn merge_of<'a>(layers: impl IntoIterator<Item = &'a LayerIndex>) -> Result<Self, TreeError> {
        merge::merge(layers, merge::Limits::default())
    }

    /// The inode of an id of this tree.
    pub fn inode(&self, id: InodeId) -> Option<&Inode> {
        self.inodes.get(usize::try_from(id.0).ok()?)
    }

    /// The children of a directory; `None` for anything else.
    pub fn children(&self, id: InodeId) -> Option<&BTreeMap<Box<[u8]>, InodeId>> {
        match &self.inode(id)?.kind {
            InodeKind::Directory(children) => Some(children),
            _ => None,
        }
    }
}
