//! Images that the store knows: mounted without a request and without reading their indexes first.

use std::path::PathBuf;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use oci_spec::image::{Descriptor, ImageManifest};
use peel_image::Digest;
use peel_image::layer::{EntryKind, LayerIndex};
use peel_registry::{Blob, Source, TocImage, document};
use peel_store::{ImageRecord, Store};

use super::layer::read_toc;
use super::memory::Memory;
use super::{Job, Loaded, candidate, diff_ids, order, prefetch_order, put_tree, start_prefetch};
use crate::error::Error;
use crate::fetch::Engine;
use crate::fetch::layer::Layer;
use crate::object_fs::Registration;
use crate::service::Sources;
use crate::verify::Subject;
use crate::{LayerReport, LoadRequest, PullPolicy};

/// How long the indexes of a known image are left alone while no read needs them. Reading them costs some ten milliseconds
/// of one core, which a start from a full store has better use for.
const PATIENCE: Duration = Duration::from_secs(3);

/// How long the TOCs of damaged indexes may take together, with the wait for memory for them: lookups of files that the store does not know wait for them.
const REFETCH: Duration = Duration::from_secs(30);

/// How closely an image is looked at before it counts as known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Care {
    /// It can be mounted; nobody may be asked for what else is missing.
    Mountable,
    /// The indexes of its lazy layers are there too.
    Readable,
    /// Every file of its whole layers is there too.
    Thorough,
}

/// Keeps what the next load of the image needs. The name comes last: it makes the rest count.
pub(super) fn keep(
    job: &Job,
    record: &ImageRecord,
    keys: &[Digest],
    indexes: &[LayerIndex],
) -> Result<(), peel_store::Error> {
    let store = &job.shared.engine.store;
    for (key, index) in keys.iter().zip(indexes) {
        store.put_layer(key, index)?;
    }
    store.put_image(record)?;
    store.put_name(&job.store_name(), &record.manifest_digest)
}

/// The image of that manifest, if the store has all that is needed to mount it. Its layers become available in the
/// background; lookups of objects wait for that. What `care` asks for and is not there makes the image unknown: there is a
/// registry to get it from again. An image that is asked for whole is known only if every layer
/// was verified whole and is here; one with a layer that was found wrong is an error.
pub(super) fn load(job: &Job, manifest: &Digest, care: Care) -> Result<Option<Loaded>, Error> {
    let store = &job.shared.engine.store;
    let Some(record) = store.image(manifest)? else {
        return Ok(None);
    };
    let invalid = |reason: String| Error::Manifest {
        image: job.image.clone(),
        digest: *manifest,
        reason,
    };
    let parsed = document::manifest(&record.manifest).map_err(invalid)?;
    let diff_ids = diff_ids(&record.config).map_err(invalid)?;
    let mut reports = Vec::new();
    for ((descriptor, key), diff_id) in parsed.layers().iter().zip(&record.layers).zip(diff_ids) {
        let digest = descriptor
            .digest()
            .to_string()
            .parse::<Digest>()
            .map_err(|error| invalid(error.to_string()))?;
        let subject = Subject {
            blob: digest,
            index: *key,
            diff_id,
        };
        if let Some(reason) = subject.fault(store) {
            return Err(Error::Layer {
                image: job.image.clone(),
                layer: digest,
                reason: format!("it was found wrong before: {reason}"),
            });
        }
        let whole = || Ok::<_, Error>(store.layer(key)?.is_some_and(|index| is_here(store, &index)));
        if job.request.eager && !(subject.is_verified(store) && whole()?) {
            return Ok(None);
        }
        reports.push(LayerReport {
            digest,
            size: descriptor.size(),
            not_lazy: (*key == digest).then(|| "it was pulled whole when it was first needed".to_owned()),
        });
    }
    if reports.len() != parsed.layers().len() {
        return Ok(None);
    }
    for (report, key) in reports.iter().zip(&record.layers) {
        let here = match (care, &report.not_lazy) {
            (Care::Mountable, _) | (Care::Readable, Some(_)) => true,
            (Care::Readable | Care::Thorough, None) => store.has_layer(key),
            (Care::Thorough, Some(_)) => store.layer(key)?.is_some_and(|index| is_here(store, &index)),
        };
        if !here {
            tracing::info!(image = %job.image, layer = %report.digest, "the store has lost something of this layer");
            return Ok(None);
        }
    }
    let erofs = match store.erofs_image(manifest) {
        Some(erofs) => erofs,
        None => match rebuild(store, manifest) {
            Ok(Some(erofs)) => erofs,
            Ok(None) => return Ok(None),
            Err(error) => {
                tracing::warn!(image = %job.image, %error, "the EROFS image of its tree is lost and cannot be made from the store");
                return Ok(None);
            }
        },
    };
    register(job, &parsed, &record)?;
    Ok(Some(Loaded {
        manifest_digest: *manifest,
        manifest: record.manifest,
        config: record.config,
        reports,
        erofs,
    }))
}

/// Makes the EROFS image of a known image anew, in the place of one that is lost or damaged, from the indexes of its layers;
/// `None` when the store lacks one of them.
pub(crate) fn rebuild(store: &Store, manifest: &Digest) -> Result<Option<PathBuf>, Error> {
    let Some(record) = store.image(manifest)? else {
        return Ok(None);
    };
    let indexes = record.layers.iter().map(|key| store.layer(key));
    let Some(indexes) = indexes.collect::<Result<Option<Vec<LayerIndex>>, _>>()? else {
        return Ok(None);
    };
    let erofs = put_tree(store, &manifest.to_string(), manifest, &indexes, &record.layers)?;
    tracing::warn!(%manifest, "the EROFS image of a known tree was lost or damaged; made anew");
    Ok(Some(erofs))
}

/// Whether the store has every file of a layer.
pub(super) fn is_here(store: &Store, index: &LayerIndex) -> bool {
    index.entries.iter().all(|entry| match &entry.kind {
        EntryKind::Regular(content) if content.size > 0 => {
            content.digest.is_some_and(|digest| store.has_object(&digest))
        }
        _ => true,
    })
}

/// Reads the indexes in a thread of its own, as soon as a lookup needs them.
fn register(job: &Job, manifest: &ImageManifest, record: &ImageRecord) -> Result<(), Error> {
    let registration = Registration::begin(&job.shared.lookups, &job.shared.engine);
    let deferred = Deferred {
        engine: Arc::clone(&job.shared.engine),
        sources: Arc::clone(&job.sources),
        request: Arc::clone(&job.request),
        number: job.number,
        image: job.image.clone(),
        layers: manifest
            .layers()
            .iter()
            .cloned()
            .zip(record.layers.iter().copied())
            .collect(),
        order: prefetch_order(manifest),
    };
    let name = "peel-register";
    thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            registration.wait(PATIENCE);
            let layers = deferred.register();
            drop(registration);
            deferred.prefetch(&layers);
        })
        .map(drop)
        .map_err(|source| Error::Thread {
            name: name.to_owned(),
            source,
        })
}

/// A registration that waits for its time. The image may be gone by then, and so may the service: this keeps neither
/// alive.
struct Deferred {
    engine: Arc<Engine>,
    sources: Arc<Sources>,
    request: Arc<LoadRequest>,
    number: u64,
    image: String,
    /// Descriptor, and name of the index in the store.
    layers: Vec<(Descriptor, Digest)>,
    order: Option<String>,
}

/// A layer, and the end of its prioritized bytes.
type Known = (Option<Arc<Layer>>, Option<u64>);

impl Deferred {
    /// Makes the layers available; none when nobody wants them any more.
    fn register(&self) -> Vec<Known> {
        if self.engine.is_stopping() || self.sources.is_closed() {
            return Vec::new();
        }
        let image = &self.image;
        let opening = Source::open(&self.request.name, &self.request.client);
        let source = match self.engine.handle().block_on(opening) {
            Ok(source) => source,
            Err(error) => {
                tracing::warn!(%image, %error, "files of this image that are not in the store cannot be read");
                return Vec::new();
            }
        };
        self.engine.count(source.counters());
        let beside = TocImage::new(&source, self.request.platform.as_deref());
        let memory = Memory::new(&self.engine, image);
        let deadline = Instant::now() + REFETCH;
        let indexes: Vec<Option<(LayerIndex, Blob)>> = self
            .layers
            .iter()
            .map(
                |(descriptor, key)| match self.index(&source, &beside, &memory, descriptor, key, deadline) {
                    Ok(found) => Some(found),
                    Err(reason) => {
                        let layer = descriptor.digest();
                        tracing::warn!(%image, %layer, reason, "missing files of this layer cannot be read");
                        None
                    }
                },
            )
            .collect();
        let profiled = indexes
            .iter()
            .flatten()
            .any(|(index, _)| index.prefetch_end.is_some());
        let mut known = Vec::new();
        for found in indexes {
            let Some((index, blob)) = found else {
                known.push((None, None));
                continue;
            };
            let layer = Arc::new(Layer::new(
                self.number,
                blob,
                &index,
                profiled,
                &self.engine.table,
            ));
            if !self.sources.add(&self.engine, &layer) {
                return Vec::new();
            }
            known.push((Some(layer), index.prefetch_end));
        }
        known
    }

    fn index(
        &self,
        source: &Source,
        beside: &TocImage,
        memory: &Memory,
        descriptor: &Descriptor,
        key: &Digest,
        deadline: Instant,
    ) -> Result<(LayerIndex, Blob), String> {
        let store = &self.engine.store;
        let blob = source.blob(descriptor).map_err(|error| error.to_string())?;
        if let Some(index) = store.layer(key).map_err(|error| error.to_string())? {
            // The image is mounted: without it, files would be missing.
            memory.hold_anyway(&index);
            return Ok((index, blob));
        }
        let candidate = candidate(descriptor);
        if self.request.pull == PullPolicy::Never || candidate.key(&blob.digest()) != *key {
            return Err("its index is not in the store".to_owned());
        }
        // A damaged record shows only now, after the mount.
        tracing::warn!(image = %self.image, layer = %blob.digest(), "the index of this layer is damaged; fetching its TOC again");
        let candidate = Box::new(candidate);
        let read = read_toc(&self.engine, memory, &self.image, &blob, candidate, beside, || {});
        let read = async { tokio::time::timeout_at(deadline.into(), read).await };
        let index = self
            .engine
            .handle()
            .block_on(read)
            .map_err(|_| format!("its TOC did not come within {} s", REFETCH.as_secs()))?
            .map_err(|error| error.to_string())?
            .map_err(|reason| reason.to_string())?;
        if let Err(error) = store.put_layer(key, &index) {
            tracing::warn!(image = %self.image, %error, "the index of a layer was not kept");
        }
        Ok((index, blob))
    }

    fn prefetch(&self, known: &[Known]) {
        if !self.request.prefetch || known.is_empty() {
            return;
        }
        let (layers, ends): (Vec<_>, Vec<_>) = known.iter().cloned().unzip();
        let plan = order::plan(self.order.as_deref(), &ends, &vec![0; ends.len()]);
        start_prefetch(&self.engine, &layers, plan);
    }
}
