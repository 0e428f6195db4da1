//! From a name to a tree that can be mounted.
//!
//! A name that the store knows costs no request: manifest, configuration and EROFS image are there, and the layers'
//! indexes are read in the background, because they matter only for objects that are missing. Any other name is
//! resolved, and then everything else is asked for at once: the configuration, every layer's TOC, and the first
//! prioritized bytes. Layers that cannot be lazy are pulled whole.
//!
//! Whether a layer is lazy, and by which TOC, is decided by [`peel_image::lazy`]; an index is kept by [`Candidate::key`].

pub(crate) mod flight;
mod known;
mod layer;
mod memory;
mod order;
pub(crate) mod pool;
mod whole;

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use oci_spec::image::{Descriptor, ImageManifest};
use peel_image::layer::LayerIndex;
use peel_image::lazy::Candidate;
use peel_image::tree::Tree;
use peel_image::{Digest, annotations};
use peel_registry::{Blob, ImageName, ResolvedImage, Source, document};
use peel_store::{ImageRecord, Store};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::error::Error;
use crate::fetch::Engine;
use crate::fetch::early::Early;
use crate::fetch::layer::Layer;
use crate::fetch::prefetch::Segment;
use crate::service::{Image, Shared, Sources};
use crate::{LayerReport, LoadRequest, Progress, PullPolicy, verify};
use known::Care;
pub(crate) use known::rebuild;
use layer::{Found, Indexed, LayerLoader};
use memory::Memory;
pub(crate) use whole::{PullFailure, inspect};

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

    /// As [`Job::key`], where the name stands for what it meant when it was last looked up.
    fn name_key(&self) -> String {
        let request = &self.request;
        format!("{} {} {}", request.prefetch, request.eager, self.store_name())
    }

    fn live(&self, manifest: &Digest) -> Option<Outcome> {
        self.shared.live(&self.key(manifest)).map(Outcome::Live)
    }

    fn new_image(&self, loaded: Loaded) -> Outcome {
        Outcome::New {
            keys: [self.key(&loaded.manifest_digest), self.name_key()],
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
        keys: [String; 2],
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
        // Where files may be missing, an image that lacks some is looked up again rather than served with holes.
        let care = match request.pull {
            PullPolicy::Never => Care::Mountable,
            _ if shared.engine.store.has_lost_objects() => Care::Thorough,
            _ => Care::Readable,
        };
        let known = shared.engine.store.name(&job.store_name())?;
        // Loaded just now, and not written down yet.
        let live = match (known, request.pull) {
            (None, PullPolicy::Missing) => shared.live(&job.name_key()).map(Outcome::Live),
            _ => None,
        };
        if let Some(outcome) = live {
            progress(outcome.resolved());
            progress(Progress::Indexed);
            return Ok(outcome);
        }
        if let Some(manifest) = known {
            let outcome = match job.live(&manifest) {
                Some(outcome) => Some(outcome),
                None => known::load(&job, &manifest, care)?.map(|loaded| job.new_image(loaded)),
            };
            if let Some(outcome) = outcome {
                progress(outcome.resolved());
                progress(Progress::Indexed);
                return Ok(outcome);
            }
        }
        if request.pull == PullPolicy::Never {
            let image = job.image;
            return Err(match request.eager {
                true => Error::NotVerified { image },
                false => Error::NotInStore { image },
            });
        }
    }
    let engine = Arc::clone(&shared.engine);
    let mut known_job = job.clone();
    let loaded = engine.handle().block_on(async move {
        // Progress is told from the caller's thread: its closure need not outlive this call.
        let (sender, mut receiver) = mpsc::channel(64);
        let work = tokio::spawn(resolve(job, sender));
        while let Some(step) = receiver.recv().await {
            progress(step);
        }
        work.await.map_err(|_| Error::Stopping)?
    });
    if loaded.is_err() {
        // Layers may have been registered, and their prefetch begun, before another part of the load failed.
        known_job.sources.close(&engine);
        known_job.sources = Arc::default();
    }
    let outcome = match loaded {
        // Files that are here can be read without what the registry was asked for.
        Err(error @ Error::Registry { .. }) if !ask && !engine.store.has_lost_objects() => {
            let outcome = mountable(&known_job)?.ok_or(error)?;
            progress(outcome.resolved());
            outcome
        }
        loaded => loaded?,
    };
    progress(Progress::Indexed);
    Ok(outcome)
}

/// The image that the name meant, if it can be mounted, whatever else is lost.
fn mountable(job: &Job) -> Result<Option<Outcome>, Error> {
    let Some(manifest) = job.shared.engine.store.name(&job.store_name())? else {
        return Ok(None);
    };
    let loaded = known::load(job, &manifest, Care::Mountable)?;
    if loaded.is_some() {
        tracing::warn!(image = %job.image, "the registry cannot be asked for what the store has lost; missing files cannot be read");
    }
    Ok(loaded.map(|loaded| job.new_image(loaded)))
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
            None => known::load(&job, &manifest, Care::Thorough)
                .map(|known| known.map(|loaded| job.new_image(loaded))),
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
    // Dropping a set, as an error does, ends what it holds: pulls of other layers do not outlive the load.
    let mut configuring = JoinSet::new();
    configuring.spawn(configuration(job.clone(), source.clone(), image.clone()));
    let mut known = JoinSet::new();
    for (position, descriptor) in image.manifest.layers().iter().enumerate() {
        let look = loader.clone().look(descriptor.clone());
        known.spawn(async move { Ok((position, look.await?)) });
    }
    let found = all(known).await?;
    let order = prefetch_order(&image.manifest);
    let early = begin_prefetch(job, order.as_deref(), &found);
    let brake = Early::brake(early.as_ref());
    let mut lazy = JoinSet::new();
    for (position, found) in found.into_iter().enumerate() {
        let metadata = loader.clone().metadata(found, brake.clone());
        lazy.spawn(async move { Ok::<_, Error>((position, metadata.await?)) });
    }
    drop(brake);
    let configured = configuring.join_next().await.ok_or(Error::Stopping)?;
    let (config, diff_ids) = configured.map_err(|_| Error::Stopping)??;
    let mut waiting = JoinSet::new();
    while let Some(metadata) = lazy.join_next().await {
        let (position, metadata) = metadata.map_err(|_| Error::Stopping)??;
        let diff_id = diff_ids.get(position).copied();
        let toc = image.manifest.layers().get(position).and_then(verify::vouched);
        let complete = loader
            .clone()
            .complete(position, metadata, toc, diff_id, progress.clone());
        waiting.spawn(async move { Ok((position, complete.await?)) });
    }
    let layers = all(waiting).await?;
    let reports = layers.iter().map(|layer| layer.report.clone()).collect();
    let record = ImageRecord {
        manifest_digest: image.manifest_digest,
        manifest: image.manifest_bytes.to_vec(),
        config: config.clone(),
        layers: layers.iter().map(|layer| layer.key).collect(),
    };
    let erofs = {
        let job = job.clone();
        let memory = loader.memory();
        let indexes = layers.iter().map(|layer| &layer.index);
        let top = layers
            .last()
            .map_or(image.manifest_digest, |layer| layer.report.digest);
        memory.hold_tree(&top, indexes).await?;
        blocking(move || build(&job, layers, record, order.as_deref(), early.as_ref(), memory)).await??
    };
    Ok(Loaded {
        manifest_digest: image.manifest_digest,
        manifest: image.manifest_bytes.to_vec(),
        config,
        reports,
        erofs,
    })
}

/// The results of tasks, by the numbers that they give them; the first error ends the others.
async fn all<T: 'static>(mut tasks: JoinSet<Result<(usize, T), Error>>) -> Result<Vec<T>, Error> {
    let mut results = Vec::with_capacity(tasks.len());
    while let Some(result) = tasks.join_next().await {
        results.push(result.map_err(|_| Error::Stopping)??);
    }
    results.sort_unstable_by_key(|(position, _)| *position);
    Ok(results.into_iter().map(|(_, result)| result).collect())
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
    let diff_ids = diff_ids(&bytes).map_err(invalid)?;
    let layers = image.manifest.layers().len();
    if diff_ids.len() != layers {
        return Err(invalid(format!(
            "it lists {} layers, the manifest {layers}",
            diff_ids.len()
        )));
    }
    Ok((bytes.to_vec(), diff_ids))
}

/// The digests of the uncompressed layers, lowest first, that a configuration lists; else what is wrong with it.
pub(crate) fn diff_ids(config: &[u8]) -> Result<Vec<Digest>, String> {
    Ok(document::configuration(config)?.diff_ids)
}

/// The annotation that orders the prefetch.
pub(crate) fn prefetch_order(manifest: &ImageManifest) -> Option<String> {
    manifest
        .annotations()
        .as_ref()?
        .get(annotations::PREFETCH_ORDER)
        .cloned()
}

/// Requests the prioritized bytes that the manifest promises, of the layers whose TOC has yet to come.
fn begin_prefetch(job: &Job, order: Option<&str>, found: &[Found]) -> Option<Early> {
    let ends: Vec<Option<u64>> = found.iter().map(Found::promised).collect();
    let wanted = job.request.prefetch && !job.request.eager;
    if !wanted || ends.iter().all(Option::is_none) {
        return None;
    }
    let segments = order::plan(order, &ends, &vec![0; ends.len()]);
    let blobs = found.iter().map(|found| found.blob().only_ranges()).collect();
    Some(Early::start(&job.shared.engine, job.number, blobs, segments))
}

/// Makes the chunks of the layers available and prefetches the prioritized ones, while another thread merges the layers
/// and writes the EROFS image. What else the store should have is written behind the caller's back.
fn build(
    job: &Job,
    layers: Vec<Indexed>,
    record: ImageRecord,
    order: Option<&str>,
    early: Option<&Early>,
    memory: Arc<Memory>,
) -> Result<PathBuf, Error> {
    let digests: Vec<Digest> = layers.iter().map(|layer| layer.report.digest).collect();
    let (indexes, rest): (Vec<LayerIndex>, Vec<(Digest, Option<Blob>)>) = layers
        .into_iter()
        .map(|layer| (layer.index, (layer.key, layer.lazy)))
        .unzip();
    let erofs = thread::scope(|scope| {
        let merge = || -> Result<PathBuf, Error> {
            let store = &job.shared.engine.store;
            put_tree(store, &job.image, &record.manifest_digest, &indexes, &digests)
        };
        let name = "peel-tree";
        let merged = thread::Builder::new()
            .name(name.to_owned())
            .spawn_scoped(scope, merge)
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        let blobs = rest.iter().map(|(_, blob)| blob.as_ref());
        register(job, &indexes, blobs, order, early);
        tracing::debug!(image = %job.image, "layers registered");
        merged.join().unwrap_or(Err(Error::Stopping))
    })?;
    let keep = job.clone();
    job.shared.engine.handle().spawn_blocking(move || {
        let keys: Vec<Digest> = rest.into_iter().map(|(key, _)| key).collect();
        if let Err(error) = known::keep(&keep, &record, &keys, &indexes) {
            tracing::warn!(image = %keep.image, %error, "the image was not kept; the next start fetches its metadata again");
        }
        drop((indexes, memory));
    });
    Ok(erofs)
}

/// Merges the layers, whose digests are `layers`, and writes the EROFS image of their tree.
fn put_tree(
    store: &Store,
    image: &str,
    manifest: &Digest,
    indexes: &[LayerIndex],
    layers: &[Digest],
) -> Result<PathBuf, Error> {
    let tree = Tree::merge(indexes).map_err(|source| Error::Tree {
        image: image.to_owned(),
        layer: usize::try_from(source.layer())
            .ok()
            .and_then(|layer| layers.get(layer).copied())
            .unwrap_or(*manifest),
        source: Box::new(source),
    })?;
    tracing::debug!(image, inodes = tree.inodes.len(), "layers merged");
    let erofs = store
        .put_erofs_image(manifest, &tree)
        .map_err(|source| Error::Unshowable {
            image: image.to_owned(),
            source,
        })?;
    tracing::debug!(image, "EROFS image written");
    Ok(erofs)
}

/// Lets reads find the chunks of the layers that have a blob here, and starts the prefetch.
fn register<'a>(
    job: &Job,
    indexes: &[LayerIndex],
    blobs: impl Iterator<Item = Option<&'a Blob>>,
    order: Option<&str>,
    early: Option<&Early>,
) {
    let engine = &job.shared.engine;
    let profiled = indexes.iter().any(|index| index.prefetch_end.is_some());
    let mut layers = Vec::new();
    let mut begun = Vec::new();
    for ((index, blob), position) in indexes.iter().zip(blobs).zip(0..) {
        let layer = blob.map(|blob| {
            Arc::new(Layer::new(
                job.number,
                blob.clone(),
                index,
                profiled,
                &engine.table,
            ))
        });
        if let Some(layer) = &layer {
            job.sources.add(engine, layer);
        }
        begun.push(match (&layer, early) {
            (Some(layer), Some(early)) => early.known(engine, position, layer),
            _ => 0,
        });
        layers.push(layer);
    }
    if job.request.prefetch {
        let ends: Vec<Option<u64>> = indexes.iter().map(|index| index.prefetch_end).collect();
        start_prefetch(engine, &layers, order::plan(order, &ends, &begun));
    }
}

/// Fetches segments in the background.
pub(crate) fn start_prefetch(
    engine: &Arc<Engine>,
    layers: &[Option<Arc<Layer>>],
    plan: Vec<(usize, std::ops::Range<u64>)>,
) {
    let segments = plan
        .into_iter()
        .filter_map(|(layer, range)| {
            Some(Segment {
                layer: Arc::clone(layers.get(layer)?.as_ref()?),
                range,
            })
        })
        .collect();
    let engine_of_task = Arc::clone(engine);
    engine
        .handle()
        .spawn(async move { engine_of_task.prefetch(segments).await });
}

/// Runs work that blocks on the disk or computes for long.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Stopping)
}

/// What a descriptor says of its layer.
pub(crate) fn candidate(descriptor: &Descriptor) -> Candidate {
    let annotations = descriptor.annotations().as_ref();
    Candidate::new(descriptor.media_type().as_ref(), descriptor.size(), |name| {
        annotations?.get(name).map(String::as_str)
    })
}
