//! Images that the store knows: mounted without a request and without reading their indexes first.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use oci_spec::image::{Descriptor, ImageManifest};
use peel_image::Digest;
use peel_image::layer::{EntryKind, LayerIndex};
use peel_store::{ImageRecord, Store};

use super::{Job, Loaded, order, prefetch_order, start_prefetch};
use crate::LayerReport;
use crate::error::Error;
use crate::fetch::layer::Layer;
use crate::object_fs::Registration;

/// How long the indexes of a known image are left alone while no read needs them. Reading them costs some ten milliseconds
/// of one core, which a start from a full store has better use for.
const PATIENCE: Duration = Duration::from_secs(3);

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
/// background; lookups of objects wait for that. With `thorough`, an image whose whole layers have lost a file does not
/// count as known: there is a registry to pull them from again.
pub(super) fn load(job: &Job, manifest: &Digest, thorough: bool) -> Result<Option<Loaded>, Error> {
    let store = &job.shared.engine.store;
    if job.request.eager {
        return Ok(None);
    }
    let (Some(record), Some(erofs)) = (store.image(manifest)?, store.erofs_image(manifest)) else {
        return Ok(None);
    };
    let invalid = |reason: String| Error::Manifest {
        image: job.image.clone(),
        digest: *manifest,
        reason,
    };
    let parsed =
        ImageManifest::from_reader(record.manifest.as_slice()).map_err(|error| invalid(error.to_string()))?;
    let mut reports = Vec::new();
    for (descriptor, key) in parsed.layers().iter().zip(&record.layers) {
        let digest = descriptor
            .digest()
            .to_string()
            .parse::<Digest>()
            .map_err(|error| invalid(error.to_string()))?;
        reports.push(LayerReport {
            digest,
            size: descriptor.size(),
            not_lazy: (*key == digest).then(|| "it was pulled whole when it was first needed".to_owned()),
        });
    }
    if reports.len() != parsed.layers().len() {
        return Ok(None);
    }
    if thorough {
        for (report, key) in reports.iter().zip(&record.layers) {
            if report.not_lazy.is_some() && !store.layer(key)?.is_some_and(|index| is_here(store, &index)) {
                return Ok(None);
            }
        }
    }
    register(job, &parsed, &record)?;
    Ok(Some(Loaded {
        manifest_digest: *manifest,
        manifest: record.manifest,
        config: record.config,
        reports,
        erofs,
    }))
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
    let layers: Vec<(Descriptor, Digest)> = manifest
        .layers()
        .iter()
        .cloned()
        .zip(record.layers.iter().copied())
        .collect();
    let order = prefetch_order(manifest);
    // The image may be gone before its layers are known: the thread must not keep the service alive.
    let engine = Arc::clone(&job.shared.engine);
    let (sources, number, image) = (Arc::clone(&job.sources), job.number, job.image.clone());
    let (name, client, prefetch) = (
        job.request.name.clone(),
        job.request.client.clone(),
        job.request.prefetch,
    );
    let thread_name = "peel-register";
    thread::Builder::new()
        .name(thread_name.to_owned())
        .spawn(move || {
            registration.wait(PATIENCE);
            if engine.is_stopping() || sources.is_closed() {
                return;
            }
            let source = match engine.handle().block_on(peel_registry::Source::open(&name, &client)) {
                Ok(source) => source,
                Err(error) => {
                    tracing::warn!(%image, %error, "files of this image that are not in the store cannot be read");
                    return;
                }
            };
            engine.count(source.counters());
            let mut known: Vec<Option<Arc<Layer>>> = Vec::new();
            let mut ends = Vec::new();
            for (descriptor, key) in &layers {
                let layer = match (engine.store.layer(key), source.blob(descriptor)) {
                    (Ok(Some(index)), Ok(blob)) => {
                        ends.push(index.prefetch_end);
                        Some(Arc::new(Layer::new(number, blob, &index, &engine.table)))
                    }
                    (index, blob) => {
                        let reason = match (index, blob) {
                            (Err(error), _) => error.to_string(),
                            (_, Err(error)) => error.to_string(),
                            _ => "its index is not in the store".to_owned(),
                        };
                        tracing::warn!(%image, layer = %descriptor.digest(), reason, "missing files of this layer cannot be read");
                        ends.push(None);
                        None
                    }
                };
                if layer.as_ref().is_some_and(|layer| !sources.add(&engine, layer)) {
                    return;
                }
                known.push(layer);
            }
            drop(registration);
            if prefetch {
                let plan = order::plan(order.as_deref(), &ends, &vec![0; ends.len()]);
                start_prefetch(&engine, &known, plan);
            }
        })
        .map(drop)
        .map_err(|source| Error::Thread {
            name: thread_name.to_owned(),
            source,
        })
}
