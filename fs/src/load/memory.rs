//! Bounds the memory that the metadata of an image takes while the image is loaded, whatever its manifest asks for.
//!
//! What must hold: an image whose layers are each within the limits of one layer may still be refused, by an error that names the
//! layer that was too much; never the process grows with the number of layers without bound.

use std::sync::atomic::{AtomicU64, Ordering};

use peel_image::layer::{Chunk, Entry, EntryKind, LayerIndex};
use peel_registry::TocRoom;
use tokio::sync::Semaphore;

/// First requests for TOCs that are under way at once, for each image: each may bring 4 MiB before it is known how much of that is
/// the TOC. More than connections and registries make use of.
const FETCHES: usize = 64;

/// What the layers of one image share.
#[derive(Debug)]
pub(super) struct Memory {
    /// Room for compressed TOCs.
    pub(super) tocs: TocRoom,
    /// Turns to fetch one.
    pub(super) fetches: Semaphore,
    indexes: AtomicU64,
    indexes_max: u64,
}

impl Memory {
    /// For one load; its indexes may take `indexes_max` bytes.
    pub(super) fn new(indexes_max: u64) -> Self {
        Self {
            tocs: TocRoom::default(),
            fetches: Semaphore::new(FETCHES),
            indexes: AtomicU64::new(0),
            indexes_max,
        }
    }

    /// Counts the index of a layer; an error, as a sentence about the layer, when the indexes take too much together.
    pub(super) fn add(&self, index: &LayerIndex) -> Result<(), String> {
        let bytes = weight(index);
        let before = self.indexes.fetch_add(bytes, Ordering::Relaxed);
        if before.saturating_add(bytes) <= self.indexes_max {
            return Ok(());
        }
        Err(format!(
            "its list of files takes {bytes} bytes of memory, and with those of the image's other layers more than the {} that \
             an image may have; make an image with fewer files",
            self.indexes_max
        ))
    }
}

/// Bytes of memory that an index takes, but for what allocations cost beyond their length.
fn weight(index: &LayerIndex) -> u64 {
    let entries = index.entries.iter().map(|entry| {
        let path = entry.path.as_bytes().len();
        let attributes = entry.metadata.xattrs.iter();
        let attributes: usize = attributes.map(|(name, value)| name.len() + value.len()).sum();
        let content = match &entry.kind {
            EntryKind::Regular(content) => content.chunks.len() * size_of::<Chunk>(),
            EntryKind::Symlink(target) => target.len(),
            EntryKind::Hardlink(target) => target.as_bytes().len(),
            _ => 0,
        };
        (size_of::<Entry>() + path + attributes + content) as u64
    });
    entries.sum()
}
