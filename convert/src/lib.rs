//! Images rewritten: every layer in another format, with the files of a plan first, pushed with new configurations, manifests and,
//! for several platforms, an index.
//!
//! Layers stream: registry, decompression, writer, registry again, all at the same time ([`stream`]). At most [`AT_ONCE`] layers are
//! under way, so memory stays bounded whatever the image; each of them uses every core while it can, and the next one arrives
//! while the previous one ends. Nothing is written to disk but the writer's spool, which is no larger than the layer that it becomes,
//! for layers with files that come first, chunks that share streams, or a path that occurs twice. All others are sent while
//! they are read.
//!
//! Memory: a writer takes less than 100 MiB, queues and unconfirmed pieces of an upload add 20 MiB. Twice that stays below the
//! 256 MiB that a conversion may take. What a writer keeps of each entry adds to that: layers above [`LARGE_LAYER`] may have
//! a million of them and go alone. So do all layers with chunks above [`LARGE_CHUNK`] or with chunks that share streams, which
//! are held several times over, and with levels of zstd from [`LARGE_LEVEL`] on.

pub mod earlier;
mod layer;
pub mod manifest;
pub mod order;
pub mod patterns;
pub mod plan;
pub mod stream;
pub mod toc_image;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use peel_image::{Digest, media};
use peel_registry::{ClientOptions, ImageName, ResolvedImage, Source, Target};
use peel_writer::Format;
use tokio::sync::Semaphore;

use earlier::{Earlier, MadeImage};
use layer::{Done, Job, Shared};
pub use layer::{How, LayerOutcome};
use manifest::{Instance, NewLayer};
use order::Read as PrioritizedRead;
use plan::{Plan, Prioritized};
use toc_image::Toc;

/// Layers that are converted at the same time.
const AT_ONCE: usize = 2;
/// Layers larger than this, in compressed bytes, are converted alone.
const LARGE_LAYER: u64 = 256 << 20;
/// Chunks larger than this, in bytes, are converted one layer at a time.
const LARGE_CHUNK: u64 = 8 << 20;

/// zstd levels from this on need so much memory that they are used for one layer at a time.
const LARGE_LEVEL: i32 = 16;
/// Largest configuration that is read, in bytes. Registries hold manifests to 4 MiB; configurations are no larger.
const CONFIG_MAX: u64 = 8 << 20;

/// How layers are written.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Into which format.
    pub format: Format,
    /// Threads that compress a layer; 0 for one per core. The output does not depend on it.
    pub threads: usize,
    /// Keep layers that have that format already and of which the plan has no file.
    pub reuse: bool,
    /// Use layers again that the target's name holds from an earlier conversion of the same layers.
    pub earlier: bool,
    /// A file of the plan that a layer does not have is no error: the plan was made for no layer in particular.
    pub for_every_layer: bool,
    /// There is a plan: what came first in a layer that is kept no longer matters.
    pub planned: bool,
}

impl Settings {
    fn external_toc(&self) -> bool {
        matches!(
            self.format,
            Format::Estargz {
                external_toc: true,
                ..
            }
        )
    }

    /// Whether all layers end up compressed with zstd.
    fn zstd(&self) -> bool {
        matches!(self.format, Format::ZstdChunked { .. } | Format::Zstd { .. })
    }

    fn at_once(&self) -> usize {
        let large = match self.format {
            Format::Estargz {
                chunk_size,
                min_chunk_size,
                ..
            } => chunk_size > LARGE_CHUNK || min_chunk_size > 0,
            Format::ZstdChunked {
                chunk_size, level, ..
            } => chunk_size > LARGE_CHUNK || level >= LARGE_LEVEL,
            Format::Zstd { level } => level >= LARGE_LEVEL,
            Format::Gzip { .. } | Format::Plain => false,
        };
        if large { 1 } else { AT_ONCE }
    }
}

/// The image of one platform.
#[derive(Debug)]
pub struct Part {
    /// Its manifest.
    pub image: ResolvedImage,
    /// Its entry in the source's index; `None` if the target gets no index.
    pub position: Option<usize>,
    /// Its platform, for people.
    pub platform: Option<String>,
    /// Which of its files come first.
    pub plan: Plan,
}

/// What became of the image of one platform.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct ImageOutcome {
    /// `os/architecture[/variant]` by the source's index.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Digest of the new manifest.
    pub manifest_digest: Digest,
    /// The layers, lowest first.
    pub layers: Vec<LayerOutcome>,
}

/// What became of everything.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Outcome {
    /// Digest of what the target's name names now: a manifest, or an index.
    pub manifest_digest: Digest,
    /// The images, in the order of the index.
    pub images: Vec<ImageOutcome>,
    /// Names of images that were written beside the target.
    pub extra_images: Vec<String>,
}

/// One conversion.
#[derive(Debug)]
pub struct Conversion<'a> {
    /// Where the images are read from.
    pub source: &'a Source,
    /// The images: one without a position, or any number with one.
    pub parts: &'a [Part],
    /// The source's index, if the target gets one.
    pub index: Option<&'a [u8]>,
    /// Where they are written to.
    pub target: &'a ImageName,
    /// How registries are reached.
    pub client: &'a ClientOptions,
    /// How layers are written.
    pub settings: Settings,
    /// Compressed bytes read so far, for whoever watches.
    pub progress: Arc<AtomicU64>,
}

/// The layers of all images, each of those that are the same only once.
#[derive(Debug, Default)]
struct Jobs {
    jobs: Vec<Job>,
    /// For each image, the jobs of its layers.
    of_parts: Vec<Vec<usize>>,
}

impl Jobs {
    fn new(parts: &[Part], configs: &[Bytes]) -> anyhow::Result<Self> {
        let mut all = Self::default();
        let mut known = HashMap::new();
        for (part, config) in parts.iter().zip(configs) {
            let layers = part.image.manifest.layers();
            let config = peel_registry::document::configuration(config).map_err(|reason| {
                anyhow::anyhow!(
                    "configuration {}: {reason}",
                    part.image.manifest.config().digest()
                )
            })?;
            let diff_ids = config.diff_ids;
            if diff_ids.len() != layers.len() {
                bail!(
                    "the configuration of the image {} has {} DiffIDs for {} layers; it is damaged, or no container image",
                    part.image.manifest_digest,
                    diff_ids.len(),
                    layers.len()
                );
            }
            let plan = earlier::plan_digest(&part.plan);
            let mut of_part = Vec::new();
            for (position, (descriptor, diff_id)) in layers.iter().zip(diff_ids).enumerate() {
                let first: Vec<_> = part
                    .plan
                    .of_layer(position)
                    .map(|file| file.path.clone())
                    .collect();
                let plan = (!first.is_empty()).then_some(plan);
                let same = (
                    descriptor.digest().to_string(),
                    descriptor.media_type().to_string(),
                    diff_id,
                    first.clone(),
                    plan,
                );
                let number = *known.entry(same).or_insert_with(|| {
                    all.jobs.push(Job {
                        descriptor: descriptor.clone(),
                        diff_id,
                        first,
                        plan,
                        again: true,
                    });
                    all.jobs.len() - 1
                });
                of_part.push(number);
            }
            all.of_parts.push(of_part);
        }
        Ok(all)
    }

    /// The orders of images that an earlier conversion made in the same way; layers with files that come first in other images are not
    /// used again, because it is not known any more where those files end.
    fn orders(&mut self, settings: &Settings, earlier: &Earlier) -> Vec<Option<MadeImage>> {
        let mut orders = Vec::new();
        for numbers in &self.of_parts {
            let jobs = numbers.iter().filter_map(|number| self.jobs.get(*number));
            let keys: Option<Vec<_>> = jobs.map(|job| job.key(settings)).collect();
            let made = keys.and_then(|keys| earlier.image(&keys)).cloned();
            for number in numbers.iter().filter(|_| made.is_none()) {
                if let Some(job) = self.jobs.get_mut(*number) {
                    job.again &= job.first.is_empty();
                }
            }
            orders.push(made);
        }
        orders
    }
}

impl Conversion<'_> {
    /// Converts and pushes. Nothing is named in the target before everything is there.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let beside = match self.settings.external_toc() {
            true => Some(toc_image::name(self.target)?),
            false => None,
        };
        let mut configs = Vec::new();
        for part in self.parts {
            let config = self.source.blob(part.image.manifest.config())?;
            configs.push(config.read_verified(CONFIG_MAX).await?);
        }
        let mut jobs = Jobs::new(self.parts, &configs)?;
        let earlier = match self.settings.earlier {
            true => Earlier::load(self.target, beside.as_ref(), self.client).await,
            false => Earlier::default(),
        };
        let orders = jobs.orders(&self.settings, &earlier);
        let target = Target::open(self.target, self.client).await?;
        let shared = Shared {
            source: self.source,
            target: &target,
            settings: &self.settings,
            earlier,
            progress: Arc::clone(&self.progress),
        };
        let done = self.layers(&shared, &jobs).await?;
        let extra_images = match &beside {
            Some(name) => {
                self.push_tocs(name, &done).await?;
                vec![name.to_string()]
            }
            None => Vec::new(),
        };
        let mut images = Vec::new();
        let mut instances = Vec::new();
        for (((part, config), numbers), made) in
            self.parts.iter().zip(&configs).zip(&jobs.of_parts).zip(orders)
        {
            let layers: Vec<&Done> = numbers.iter().filter_map(|number| done.get(*number)).collect();
            let order = match made {
                Some(made) if layers.iter().map(|layer| &layer.new.digest).eq(&made.layers) => made.order,
                _ => order(&part.plan, &layers),
            };
            let (manifest_digest, size) = push_image(&target, part, config, &layers, order).await?;
            if let Some(position) = part.position {
                instances.push(Instance {
                    position,
                    digest: manifest_digest,
                    size,
                });
            }
            images.push(ImageOutcome {
                platform: part.platform.clone(),
                manifest_digest,
                layers: layers.iter().map(|layer| layer.outcome.clone()).collect(),
            });
        }
        let manifest_digest = match (self.index, images.as_slice()) {
            (Some(index), _) => {
                let index = manifest::index(index, &instances, self.settings.zstd())?;
                target.put_manifest(index.into(), media::OCI_INDEX).await?
            }
            (None, [only]) => only.manifest_digest,
            (None, _) => bail!("{} images and no index", images.len()),
        };
        Ok(Outcome {
            manifest_digest,
            images,
            extra_images,
        })
    }

    /// Converts all layers; in the order of the jobs.
    async fn layers(&self, shared: &Shared<'_>, jobs: &Jobs) -> anyhow::Result<Vec<Done>> {
        let count = jobs.jobs.len();
        let at_once = self.settings.at_once();
        let room = &Semaphore::new(at_once);
        let mut done: Vec<(usize, Done)> = futures::stream::iter(jobs.jobs.iter().enumerate())
            .map(|(number, job)| async move {
                let all = job.descriptor.size() > LARGE_LAYER;
                let share = if all {
                    u32::try_from(at_once).unwrap_or(u32::MAX)
                } else {
                    1
                };
                let _room = room.acquire_many(share).await.context("room for a layer")?;
                let done = shared.layer(job).await.with_context(|| {
                    format!("layer {} of {count} ({})", number + 1, job.descriptor.digest())
                })?;
                anyhow::Ok((number, done))
            })
            .buffer_unordered(at_once)
            .try_collect()
            .await?;
        done.sort_by_key(|(number, _)| *number);
        Ok(done.into_iter().map(|(_, done)| done).collect())
    }

    /// Writes the image of the tables of contents, before the image that needs it has a name.
    async fn push_tocs(&self, name: &ImageName, done: &[Done]) -> anyhow::Result<()> {
        let tocs: Vec<Toc> = done.iter().filter_map(|layer| layer.toc).collect();
        let target = Target::open(name, self.client).await?;
        target.push_bytes(Bytes::from_static(toc_image::CONFIG)).await?;
        let manifest = toc_image::manifest(&tocs)?;
        target.put_manifest(manifest.into(), media::OCI_MANIFEST).await?;
        Ok(())
    }
}

/// Writes configuration and manifest of one image; digest and size of the manifest.
async fn push_image(
    target: &Target,
    part: &Part,
    config: &[u8],
    layers: &[&Done],
    order: Option<String>,
) -> anyhow::Result<(Digest, u64)> {
    let new: Vec<NewLayer> = layers.iter().map(|layer| layer.new.clone()).collect();
    let config = manifest::config(config, &new)?;
    let manifest = manifest::manifest(&part.image.manifest_bytes, &config, &new, order)?;
    target.push_bytes(config.into()).await?;
    let size = manifest.len() as u64;
    let digest = match part.position {
        Some(_) => {
            target
                .put_untagged_manifest(manifest.into(), media::OCI_MANIFEST)
                .await?
        }
        None => target.put_manifest(manifest.into(), media::OCI_MANIFEST).await?,
    };
    Ok((digest, size))
}

/// The cross-layer order, unless there is nothing to say about it.
fn order(plan: &Plan, layers: &[&Done]) -> Option<String> {
    let reads = |file: &Prioritized| {
        let end = layers.get(file.layer)?.ends.get(&file.content)?;
        Some(PrioritizedRead {
            layer: file.layer,
            end: *end,
        })
    };
    let reads: Vec<PrioritizedRead> = plan.files.iter().filter_map(reads).collect();
    let ends: Vec<u64> = layers.iter().map(|layer| layer.new.prefetch_end()).collect();
    order::annotation(&reads, &ends)
}

/// The diff ids of a configuration, as far as they are there.
pub fn diff_ids(config: &Bytes) -> Vec<Digest> {
    peel_registry::document::configuration(config)
        .map(|config| config.diff_ids)
        .unwrap_or_default()
}
