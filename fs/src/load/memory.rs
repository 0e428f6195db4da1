//! Bounds the memory that the metadata of an image takes while the image is loaded, whatever its manifest asks for.
//!
//! What must hold: an image whose layers are each within the limits of one layer may still be refused, by an error that names the
//! layer that was too much; never the process grows with the number of layers without bound.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use peel_image::Digest;
use peel_image::layer::LayerIndex;
use peel_image::lazy::HoleBudget;
use peel_image::tree;
use peel_registry::{Room, TocRoom};
use tokio::sync::Semaphore;

use super::blocking;
use super::pool::Share;
use crate::error::Error;
use crate::fetch::Engine;

/// First requests for TOCs that are under way at once, for each image: each may bring 4 MiB before it is known how much of that is
/// the TOC. More than connections and registries make use of.
const FETCHES: usize = 64;

/// Longest wait for memory that other loads have. They have it for as long as their registries take to answer, or a layer to be pulled
/// whole.
const ROOM_WAIT: Duration = Duration::from_secs(300);

/// What the layers of one image share.
#[derive(Debug)]
pub(super) struct Memory {
    /// The image as the user wrote it.
    image: String,
    /// Room for compressed TOCs.
    tocs: TocRoom,
    /// What the image has of the memory for all loads.
    share: Arc<Share>,
    /// All there is of that.
    limit: u64,
    /// Turns to fetch one.
    pub(super) fetches: Semaphore,
    indexes: AtomicU64,
    indexes_max: u64,
    /// What may be hashed to find holes.
    pub(super) holes: Arc<HoleBudget>,
}

impl Memory {
    /// For one load.
    pub(super) fn new(engine: &Engine, image: &str) -> Self {
        Self {
            image: image.to_owned(),
            tocs: TocRoom::default(),
            share: engine.pool().share(),
            limit: engine.pool().limit(),
            fetches: Semaphore::new(FETCHES),
            indexes: AtomicU64::new(0),
            indexes_max: engine.indexes_max(),
            holes: Arc::default(),
        }
    }

    /// Takes memory for a layer, or waits for it as long as that may take.
    async fn reserve(&self, layer: &Digest, bytes: u64) -> Result<(), Error> {
        if self.share.reserve(bytes, ROOM_WAIT).await {
            return Ok(());
        }
        Err(Error::Layer {
            image: self.image.clone(),
            layer: *layer,
            reason: format!(
                "there was no memory for its list of files for {} s: those of other images that are being loaded take more than {} \
                 bytes; load fewer images at once",
                ROOM_WAIT.as_secs(),
                self.limit
            ),
        })
    }

    /// Room for the compressed TOC of a layer: at first for so many bytes, whether they are one or not.
    pub(super) async fn room(&self, layer: &Digest, bytes: u64) -> Result<LayerRoom<'_>, Error> {
        self.reserve(layer, bytes).await?;
        Ok(LayerRoom {
            memory: self,
            held: AtomicU64::new(bytes),
            asked: AtomicU64::new(0),
            of_image: AtomicU64::new(0),
            lacking: AtomicU64::new(0),
        })
    }

    /// Takes memory for an index that is here already.
    pub(super) async fn hold(&self, layer: &Digest, index: &LayerIndex) -> Result<(), Error> {
        self.reserve(layer, index.memory()).await
    }

    /// Takes memory for an index that is here already and that cannot be done without, whether there is memory or not.
    pub(super) fn hold_anyway(&self, index: &LayerIndex) {
        self.share.take_anyway(index.memory());
    }

    /// Takes memory for the tree of an image whose topmost layer is this one, while it is made; the memory for its implied directories comes
    /// on top, and is bounded by itself.
    pub(super) async fn hold_tree<'a>(
        &self,
        layer: &Digest,
        indexes: impl Iterator<Item = &'a LayerIndex>,
    ) -> Result<(), Error> {
        self.reserve(layer, indexes.map(tree::cost).fold(0, u64::saturating_add))
            .await
    }

    /// Reads an index when it is its turn and there is memory for it. How much that is shows when it is read: where there is not so
    /// much, it is dropped, and read again later.
    pub(super) async fn read_in_turn<E: Send + 'static>(
        &self,
        engine: &Engine,
        layer: &Digest,
        read: impl Fn() -> Result<LayerIndex, E> + Send + Sync + 'static,
    ) -> Result<Result<LayerIndex, E>, Error> {
        let read = Arc::new(read);
        let mut reserved = 0;
        loop {
            let turn = engine.reading_turn(&self.image, layer).await?;
            let (share, read) = (Arc::clone(&self.share), Arc::clone(&read));
            // The turn ends with the work, which goes on when nobody waits for it any more.
            let found = blocking(move || {
                let _turn = turn;
                let index = read();
                let more = index
                    .as_ref()
                    .map_or(0, LayerIndex::memory)
                    .saturating_sub(reserved);
                if share.take(more) { Ok(index) } else { Err(more) }
            })
            .await?;
            match found {
                Ok(index) => return Ok(index),
                Err(more) => {
                    self.reserve(layer, more).await?;
                    reserved += more;
                }
            }
        }
    }

    /// Counts the index of a layer; an error, as a sentence about the layer, when the indexes take too much together.
    pub(super) fn add(&self, index: &LayerIndex) -> Result<(), String> {
        let bytes = index.memory();
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

/// Room for the compressed TOC of one layer: of what the image may have, and of what all loads may have. Dropping it gives back only the
/// latter: what an image has had counts for good.
#[derive(Debug)]
pub(super) struct LayerRoom<'m> {
    memory: &'m Memory,
    /// What it has of the memory for all loads.
    held: AtomicU64,
    /// What it was asked for.
    asked: AtomicU64,
    /// What it has of the image's.
    of_image: AtomicU64,
    /// What it should have had of the memory for all loads when that was refused; else 0.
    lacking: AtomicU64,
}

impl LayerRoom<'_> {
    /// With how much it should be tried again, when other loads had what was asked for.
    pub(super) fn lacking(&self) -> Option<u64> {
        let lacking = self.lacking.load(Ordering::Relaxed);
        (lacking > 0).then(|| {
            // The same is asked for again then.
            self.memory
                .tocs
                .give_back(self.of_image.swap(0, Ordering::Relaxed));
            lacking
        })
    }

    /// Gives back what it has of the memory for all loads beyond so many bytes.
    pub(super) fn trim(&self, bytes: u64) {
        let beyond = self.held.load(Ordering::Relaxed).saturating_sub(bytes);
        self.held.fetch_sub(beyond, Ordering::Relaxed);
        self.memory.share.give_back(beyond);
    }
}

impl Room for LayerRoom<'_> {
    fn take(&self, bytes: u64) -> bool {
        let asked = self
            .asked
            .fetch_add(bytes, Ordering::Relaxed)
            .saturating_add(bytes);
        if !self.memory.tocs.take(bytes) {
            return false;
        }
        self.of_image.fetch_add(bytes, Ordering::Relaxed);
        let more = asked.saturating_sub(self.held.load(Ordering::Relaxed));
        if !self.memory.share.take(more) {
            self.lacking.store(asked, Ordering::Relaxed);
            return false;
        }
        self.held.fetch_add(more, Ordering::Relaxed);
        true
    }

    fn refusal(&self) -> String {
        self.memory.tocs.refusal()
    }
}

impl Drop for LayerRoom<'_> {
    fn drop(&mut self) {
        self.memory.share.give_back(self.held.load(Ordering::Relaxed));
    }
}

#[cfg(test)]
mod tests {
    use super::super::pool::Pool;
    use super::*;

    #[tokio::test]
    async fn a_toc_that_other_loads_left_no_room_for_is_asked_for_again() {
        let pool = Pool::new(1000);
        let memory = Memory {
            image: "image".to_owned(),
            tocs: TocRoom::new(100),
            share: pool.share(),
            limit: pool.limit(),
            fetches: Semaphore::new(1),
            indexes: AtomicU64::new(0),
            indexes_max: 0,
            holes: Arc::default(),
        };
        let room = memory.room(&Digest::EMPTY, 10).await.unwrap();
        let other = pool.share();
        assert!(other.take(2000));
        assert!(room.take(5), "it has that");
        assert!(!room.take(50));
        let lacking = room.lacking().unwrap();
        assert_eq!(lacking, 55);
        drop((room, other));
        let room = memory.room(&Digest::EMPTY, lacking).await.unwrap();
        assert!(room.take(5) && room.take(50));
        assert!(!room.take(46), "the image has its own bound");
        assert_eq!(room.lacking(), None);
        room.trim(30);
        room.trim(40);
        let other = pool.share();
        assert!(other.take(970));
        // The first that finds the pool full may exceed it.
        assert!(memory.share.take(1) && !other.take(1), "30 were still taken");
    }
}
