//! From a name to a tree that can be mounted.
//!
//! A name that the store knows costs no request: manifest, configuration and EROFS image are there, and the layers'
//! indexes are read in the background, because they matter only for objects that are missing. Any other name is
//! resolved, and then everything else is asked for at once: the configuration, every layer's TOC, and the first
//! prioritized bytes. Layers that cannot be lazy are pulled whole.
//!
//! An index is kept by [`lazy_key`], which names the blob and the TOC that a manifest vouches for: lazy blobs are never
//! hashed whole, so another manifest's annotations must not reach this one's index.

mod known;
mod layer;
mod toc;
mod whole;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use oci_spec::image::{Descriptor, ImageConfiguration};
use peel_image::layer::LayerIndex;
use peel_image::tree::Tree;
use peel_image::{Digest, annotations};
use peel_registry::{ImageName, ResolvedImage, Source};
use peel_store::ImageRecord;
use tokio::sync::mpsc;

use crate::error::Error;
use crate::fetch::prefetch::Segment;
use crate::service::{Image, Shared, Sources};
use crate::{LayerReport, LoadRequest, Progress, PullPolicy};
use layer::{Indexed, LayerLoader};

/// Largest image configuration in bytes. Real ones have some KiB; histories of generated images reach a few hundred.
const CONFIG_MAX: u64 = 8 << 20;
/// Connections that are opened while the manifest is on its way: configuration and TOCs are wanted right after it.
const WARM_CONNECTIONS: usize = 4;

/// An image that is ready to be mounted.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) manifest_digest: Digest,
    pub(crate) manifest: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) reports: Vec<LayerReport>,
    pub(crate) erofs: PathBuf,
}

/// What a load works with. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    pub(crate) shared: Arc<Shared>,
    /// Number of the image in this service.
    pub(crate) number: u64,
    /// The image as the user wrote it.
    pub(crate) image: String,
    pub(crate) request: Arc<LoadRequest>,
    pub(crate) sources: Arc<Sources>,
}

impl Job {
    /// How the store knows the name: the same name means other images on other platforms.
    fn store_name(&self) -> String {
        match &self.request.platform {
            Some(platform) => format!("{} {platform}", self.image),
            None => self.image.clone(),
        }
    }

    /// Images are the same only if they were loaded in the same way.
    fn key(&self, manifest: &Digest) -> String {
        let request = &self.request;
        let (prefetch, eager) = (request.prefetch, request.eager);
        format!("{manifest} {prefetch} {eager} {}", self.image)
    }

    fn live(&self, manifest: &Digest) -> Option<Outcome> {
        self.shared.live(&self.key(manifest)).map(Outcome::Live)
    }

    fn new_image(&self, loaded: Loaded) -> Outcome {
        Outcome::New {
            key: self.key(&loaded.manifest_digest),
            loaded,
            sources: Arc::clone(&self.sources),
        }
    }

    fn registry_error(&self, source: peel_registry::Error) -> Error {
        Error::Registry {
            image: self.image.clone(),
            source: Box::new(source),
        }
    }

    /// Opens the place that the image comes from and counts what goes through it.
    async fn open(&self) -> Result<Source, Error> {
        let source = Source::open(&self.request.name, &self.request.client)
            .await
            .map_err(|error| self.registry_error(error))?;
        self.shared.engine.count(source.counters());
        Ok(source)
    }
}

/// What a load came to.
#[derive(Debug)]
pub(crate) enum Outcome {
    /// An image that has to be put together.
    New {
        /// What it is.
        loaded: Loaded,
        /// Where it comes from.
        sources: Arc<Sources>,
        /// Under which it is found again while it lives.
        key: String,
    },
    /// An image that lives already, loaded in the same way.
    Live(Arc<Image>),
}

/// Loads an image; see [`crate::Service::load`].
pub(crate) fn load(
    shared: &Arc<Shared>,
    number: u64,
    request: &LoadRequest,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Outcome, Error> {
    let job = Job {
        shared: Arc::clone(shared),
        number,
        image: request.name.to_string(),
        request: Arc::new(request.clone()),
        sources: Arc::default(),
    };
    let remote = matches!(request.name, ImageName::Registry(_));
    let ask = match request.pull {
        PullPolicy::Always => true,
        PullPolicy::Missing => !remote,
        PullPolicy::Never => false,
    };
    if !ask {
        if let Some(manifest) = shared.engine.store.name(&job.store_name())? {
            let outcome = match job.live(&manifest) {
                Some(outcome) => Some(outcome),
                None => known::load(&job, &manifest, false)?.map(|loaded| job.new_image(loaded)),
            };
            if let Some(outcome) = outcome {
                progress(outcome.resolved());
                progress(Progress::Indexed);
                return Ok(outcome);
            }
        }
        if request.pull == PullPolicy::Never {
            return Err(Error::NotInStore { image: job.image });
        }
    }
    let engine = Arc::clone(&shared.engine);
    let outcome = engine.handle().block_on(async move {
        // Progress is told from the caller's thread: its closure need not outlive this call.
        let (sender, mut receiver) = mpsc::channel(64);
        let work = tokio::spawn(resolve(job, sender));
        while let Some(step) = receiver.recv().await {
            progress(step);
        }
        work.await.map_err(|_| Error::Stopping)?
    })?;
    progress(Progress::Indexed);
    Ok(outcome)
}

impl Outcome {
    fn resolved(&self) -> Progress {
        let (manifest, layers) = match self {
            Self::New { loaded, .. } => (loaded.manifest_digest, loaded.reports.as_slice()),
            Self::Live(image) => (image.manifest_digest(), image.layers()),
        };
        Progress::Resolved {
            manifest,
            layers: layers.len(),
            bytes: layers.iter().map(|layer| layer.size).sum(),
        }
    }
}

async fn resolve(job: Job, progress: mpsc::Sender<Progress>) -> Result<Outcome, Error> {
    let source = job.open().await?;
    let warming = tokio::spawn({
        let source = source.clone();
        async move { source.warm(WARM_CONNECTIONS).await }
    });
    let image = source
        .resolve(job.request.platform.as_deref())
        .await
        .map_err(|error| job.registry_error(error))?;
    warming.abort();
    let layers = image.manifest.layers();
    let step = Progress::Resolved {
        manifest: image.manifest_digest,
        layers: layers.len(),
        bytes: layers.iter().map(Descriptor::size).sum(),
    };
    // Nobody listens any more when the load is abandoned; it ends by itself then.
    let _ = progress.send(step).await;
    let known = {
        let (job, manifest) = (job.clone(), image.manifest_digest);
        blocking(move || match job.live(&manifest) {
            Some(outcome) => Ok(Some(outcome)),
            None => known::load(&job, &manifest, true).map(|known| known.map(|loaded| job.new_image(loaded))),
        })
        .await??
    };
    if let Some(outcome) = known {
        let manifest = image.manifest_digest;
        blocking(move || job.shared.engine.store.put_name(&job.store_name(), &manifest)).await??;
        return Ok(outcome);
    }
    let loaded = fetch(&job, &source, &image, &progress).await?;
    Ok(job.new_image(loaded))
}

/// Fetches all metadata and builds the tree.
async fn fetch(
    job: &Job,
    source: &Source,
    image: &ResolvedImage,
    progress: &mpsc::Sender<Progress>,
) -> Result<Loaded, Error> {
    let loader = LayerLoader::new(job, source);
    let configuration = tokio::spawn(configuration(job.clone(), source.clone(), image.clone()));
    let mut lazy = Vec::new();
    for descriptor in image.manifest.layers() {
        lazy.push(tokio::spawn(loader.clone().metadata(descriptor.clone())));
    }
    let (config, diff_ids) = configuration.await.map_err(|_| Error::Stopping)??;
    let mut waiting = Vec::new();
    for (position, task) in lazy.into_iter().enumerate() {
        let state = task.await.map_err(|_| Error::Stopping)??;
        let diff_id = diff_ids.get(position).copied();
        waiting.push(tokio::spawn(loader.clone().complete(
            position,
            state,
            diff_id,
            progress.clone(),
        )));
    }
    let mut layers = Vec::new();
    for task in waiting {
        layers.push(task.await.map_err(|_| Error::Stopping)??);
    }
    if job.request.prefetch && !job.request.eager {
        start_prefetch(job, image, &layers);
    }
    let reports = layers.iter().map(|layer| layer.report.clone()).collect();
    let record = ImageRecord {
        manifest_digest: image.manifest_digest,
        manifest: image.manifest_bytes.to_vec(),
        config: config.clone(),
        layers: layers.iter().map(|layer| layer.key).collect(),
    };
    let erofs = build(job, layers, record).await?;
    Ok(Loaded {
        manifest_digest: image.manifest_digest,
        manifest: image.manifest_bytes.to_vec(),
        config,
        reports,
        erofs,
    })
}

/// The configuration, byte for byte, and the digests of the uncompressed layers.
async fn configuration(
    job: Job,
    source: Source,
    image: ResolvedImage,
) -> Result<(Vec<u8>, Vec<Digest>), Error> {
    let descriptor = image.manifest.config();
    let blob = source
        .blob(descriptor)
        .map_err(|error| job.registry_error(error))?;
    let bytes = blob
        .read_verified(CONFIG_MAX)
        .await
        .map_err(|error| job.registry_error(error))?;
    let invalid = |reason: String| Error::Config {
        image: job.image.clone(),
        digest: blob.digest(),
        reason,
    };
    let parsed =
        ImageConfiguration::from_reader(bytes.as_ref()).map_err(|error| invalid(error.to_string()))?;
    let diff_ids = parsed
        .rootfs()
        .diff_ids()
        .iter()
        .map(|text| text.parse::<Digest>().map_err(|error| invalid(error.to_string())))
        .collect::<Result<Vec<_>, _>>()?;
    let layers = image.manifest.layers().len();
    if diff_ids.len() != layers {
        return Err(invalid(format!(
            "it lists {} layers, the manifest {layers}",
            diff_ids.len()
        )));
    }
    Ok((bytes.to_vec(), diff_ids))
}

/// Starts to fetch the prioritized bytes of all layers, in the order that the manifest gives.
fn start_prefetch(job: &Job, image: &ResolvedImage, layers: &[Indexed]) {
    let order = image
        .manifest
        .annotations()
        .as_ref()
        .and_then(|annotations| annotations.get(annotations::PREFETCH_ORDER))
        .map(String::as_str);
    let ends: Vec<Option<u64>> = layers.iter().map(|layer| layer.index.prefetch_end).collect();
    let begun: Vec<u64> = layers.iter().map(|layer| layer.begun).collect();
    let segments = plan(order, &ends, &begun)
        .into_iter()
        .filter_map(|(layer, range)| {
            Some(Segment {
                layer: Arc::clone(layers.get(layer)?.layer.as_ref()?),
                range,
            })
        })
        .collect();
    let engine = Arc::clone(&job.shared.engine);
    job.shared
        .engine
        .handle()
        .spawn(async move { engine.prefetch(segments).await });
}

/// Which bytes of which layer to prefetch, in order. `order` is the manifest's annotation; what it leaves out follows,
/// lowest layer first. `begun` is how far each layer is under way already.
fn plan(order: Option<&str>, ends: &[Option<u64>], begun: &[u64]) -> Vec<(usize, std::ops::Range<u64>)> {
    let mut at: Vec<u64> = begun.to_vec();
    let mut segments = Vec::new();
    let mut add = |layer: usize, end: u64| {
        let Some(limit) = ends.get(layer).copied().flatten() else {
            return;
        };
        let Some(start) = at.get_mut(layer) else { return };
        let end = end.min(limit);
        if end > *start {
            segments.push((layer, *start..end));
            *start = end;
        }
    };
    for pair in order.unwrap_or_default().split(',') {
        if let Some((layer, end)) = pair.split_once(':')
            && let (Ok(layer), Ok(end)) = (layer.trim().parse(), end.trim().parse())
        {
            add(layer, end);
        }
    }
    for layer in 0..ends.len() {
        add(layer, u64::MAX);
    }
    segments
}

/// Merges the layers, writes the EROFS image, and keeps the rest in the store behind the caller's back.
async fn build(job: &Job, layers: Vec<Indexed>, record: ImageRecord) -> Result<PathBuf, Error> {
    let job = job.clone();
    blocking(move || {
        let store = &job.shared.engine.store;
        let (keys, indexes): (Vec<Digest>, Vec<LayerIndex>) =
            layers.into_iter().map(|layer| (layer.key, layer.index)).unzip();
        let tree = Tree::merge(&indexes).map_err(|source| Error::Tree {
            image: job.image.clone(),
            source: Box::new(source),
        })?;
        let erofs = store.put_erofs_image(&record.manifest_digest, &tree)?;
        drop(tree);
        let keep = job.clone();
        job.shared.engine.handle().spawn_blocking(move || {
            if let Err(error) = known::keep(&keep, &record, &keys, &indexes) {
                tracing::warn!(image = %keep.image, %error, "the image was not kept; the next start fetches its metadata again");
            }
        });
        Ok(erofs)
    })
    .await?
}

/// Runs work that blocks on the disk or computes for long.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Stopping)
}

/// Name under which the index of a lazy layer is kept: the blob, and the TOC that the manifest vouches for.
pub(crate) fn lazy_key(blob: &Digest, toc: &Digest) -> Digest {
    Digest::of(format!("lazy layer {blob} {toc}").as_bytes())
}

/// The annotations of a descriptor.
pub(crate) fn annotations_of(descriptor: &Descriptor) -> HashMap<String, String> {
    descriptor.annotations().clone().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefetch_follows_the_annotation_then_the_layers() {
        let ends = [Some(100), None, Some(50)];
        for (order, begun, expected) in [
            (None, [0, 0, 0], vec![(0, 0..100), (2, 0..50)]),
            (None, [100, 0, 20], vec![(2, 20..50)]),
            (
                Some("2:10,0:40,2:50"),
                [0, 0, 0],
                vec![(2, 0..10), (0, 0..40), (2, 10..50), (0, 40..100)],
            ),
            (
                Some("2:10, 0:40"),
                [60, 0, 0],
                vec![(2, 0..10), (0, 60..100), (2, 10..50)],
            ),
            (
                Some("1:10,9:10,0:99999,x:y,,0"),
                [0, 0, 0],
                vec![(0, 0..100), (2, 0..50)],
            ),
        ] {
            assert_eq!(plan(order, &ends, &begun), expected, "{order:?}");
        }
    }

    #[test]
    fn a_lazy_index_is_bound_to_its_toc() {
        let (blob, toc) = (Digest::of(b"blob"), Digest::of(b"toc"));
        assert_ne!(lazy_key(&blob, &toc), lazy_key(&blob, &blob));
        assert_ne!(lazy_key(&blob, &toc), blob);
    }
}
