//! Images opened where they are, for the commands that need neither store nor server.

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};
use peel_fs::INDEXES_MAX;
use peel_image::Digest;
use peel_image::layer::LayerIndex;
use peel_image::tree::Tree;
use peel_registry::{Blob, ResolvedImage, Source, TocImage};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

use crate::cli::Global;
use crate::describe::printable;

/// An image in its registry, layout or archive.
pub(super) struct OpenImage {
    /// Runs the requests.
    pub(super) runtime: Runtime,
    /// Where it is.
    pub(super) source: Source,
    /// Its manifest.
    pub(super) image: ResolvedImage,
}

/// The merged tree of an image and what is needed to read its files.
pub(super) struct Contents {
    /// The tree.
    pub(super) tree: Tree,
    /// The layers, lowest first.
    pub(super) layers: Vec<LayerIndex>,
    /// Their blobs.
    pub(super) blobs: Vec<Blob>,
}

/// Layers that are looked at at once: each may have a table of contents of hundreds of MiB.
const AT_ONCE: usize = 4;

/// Counts the memory of the index of a layer; an error when those of the image take more than a mount would allow.
fn count(memory: &AtomicU64, layer: Digest, index: &LayerIndex) -> anyhow::Result<()> {
    let bytes = index.memory();
    if memory.fetch_add(bytes, Ordering::Relaxed).saturating_add(bytes) > INDEXES_MAX {
        bail!(
            "layer {layer}: its list of files takes {bytes} bytes of memory, and with those of the image's other layers more than the \
             {INDEXES_MAX} that an image may have; make an image with fewer files"
        );
    }
    Ok(())
}

impl OpenImage {
    /// Finds the image's manifest.
    pub(super) fn open(global: &Global, name: &str, platform: Option<&str>) -> anyhow::Result<Self> {
        let name = super::image_name(name)?;
        let options = super::client_options(global)?;
        let runtime = super::runtime()?;
        let (source, image) = runtime.block_on(async {
            let source = Source::open(&name, &options).await?;
            let image = source.resolve(platform).await?;
            anyhow::Ok((source, image))
        })?;
        Ok(Self {
            runtime,
            source,
            image,
        })
    }

    /// The image beside it that may hold TOCs of its layers.
    pub(super) fn beside(&self) -> TocImage {
        let platform = self.image.platform.as_ref();
        let platform = platform.map(|platform| format!("{}/{}", platform.os(), platform.architecture()));
        TocImage::new(&self.source, platform.as_deref())
    }

    /// Reads the metadata of all layers and merges it. A layer without a usable TOC is read whole, which is said on
    /// standard error.
    pub(super) fn contents(&self) -> anyhow::Result<Contents> {
        let descriptors = self.image.manifest.layers();
        let blobs = descriptors
            .iter()
            .map(|descriptor| self.source.blob(descriptor))
            .collect::<Result<Vec<_>, _>>()?;
        let beside = self.beside();
        let turns = Arc::new(Semaphore::new(AT_ONCE));
        let memory = Arc::new(AtomicU64::new(0));
        let examined: Vec<_> = blobs
            .iter()
            .cloned()
            .zip(descriptors.iter().cloned())
            .map(|(blob, descriptor)| {
                let (beside, turns, memory) = (beside.clone(), Arc::clone(&turns), Arc::clone(&memory));
                self.runtime.spawn(async move {
                    let _turn = turns.acquire_owned().await?;
                    let examined = peel_layers::examine(&blob, &descriptor, &beside).await?;
                    if let Ok(index) = &examined.index {
                        count(&memory, blob.digest(), index)?;
                    }
                    anyhow::Ok(examined)
                })
            })
            .collect();
        let mut indexes = Vec::new();
        for (position, task) in examined.into_iter().enumerate() {
            let examined = self.runtime.block_on(task).context("task")??;
            let index = match examined.index {
                Ok(index) => index,
                Err(reason) => {
                    let blob = blobs.get(position).context("layer")?;
                    let index = self.whole(blob, position, blobs.len(), &reason.to_string())?;
                    count(&memory, blob.digest(), &index)?;
                    index
                }
            };
            indexes.push(index);
        }
        let tree = Tree::merge(&indexes).map_err(|error| {
            let layer = usize::try_from(error.layer())
                .ok()
                .and_then(|layer| blobs.get(layer));
            let digest = layer.map_or(self.image.manifest_digest, Blob::digest);
            anyhow::Error::new(error).context(format!("layer {digest}"))
        })?;
        Ok(Contents {
            tree,
            layers: indexes,
            blobs,
        })
    }

    fn whole(&self, blob: &Blob, position: usize, count: usize, reason: &str) -> anyhow::Result<LayerIndex> {
        let _ = writeln!(
            std::io::stderr(),
            "peel: layer {} of {count} is read whole ({} bytes): {}",
            position + 1,
            blob.size(),
            printable(reason.as_bytes())
        );
        let stream = self
            .runtime
            .block_on(peel_layers::reader(blob, self.runtime.handle()))?;
        peel_layers::index_whole(stream).with_context(|| format!("layer {}", blob.digest()))
    }
}
