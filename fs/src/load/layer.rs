//! One layer of an image that is being loaded: its index from the store, from its TOC, or from the whole blob.

use std::sync::Arc;

use oci_spec::image::Descriptor;
use peel_image::layer::{ChunkSource, EntryKind, LayerIndex};
use peel_image::{Digest, annotations};
use peel_registry::{Blob, Source};
use tokio::sync::{Semaphore, mpsc};

use super::toc::{Toc, TocFailure};
use super::{Job, annotations_of, blocking, known, lazy_key, toc, whole};
use crate::error::Error;
use crate::fetch::layer::{CHUNK_MAX, Layer};
use crate::fetch::prefetch::Early;
use crate::{LayerReport, Progress};

/// Layers that are pulled whole at a time: containerd's default for concurrent downloads.
const PULLS: usize = 3;

/// A layer whose index is known.
#[derive(Debug)]
pub(super) struct Indexed {
    /// Name of the index in the store.
    pub(super) key: Digest,
    pub(super) index: LayerIndex,
    pub(super) report: LayerReport,
    /// Its chunks, if it is lazy.
    pub(super) layer: Option<Arc<Layer>>,
    /// Bytes of its prefetch range that are under way.
    pub(super) begun: u64,
}

/// A layer after its metadata was asked for.
#[derive(Debug)]
pub(super) enum Metadata {
    /// The index is here.
    Lazy(Box<Indexed>),
    /// It must be pulled whole.
    Whole {
        /// The blob.
        blob: Blob,
        /// Why, in one sentence.
        reason: String,
    },
}

/// Loads layers. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct LayerLoader {
    job: Job,
    source: Source,
    pulls: Arc<Semaphore>,
}

impl LayerLoader {
    pub(super) fn new(job: &Job, source: &Source) -> Self {
        Self {
            job: job.clone(),
            source: source.clone(),
            pulls: Arc::new(Semaphore::new(PULLS)),
        }
    }

    /// Gets the index without the files, if that is possible.
    pub(super) async fn metadata(self, descriptor: Descriptor) -> Result<Metadata, Error> {
        let blob = self
            .source
            .blob(&descriptor)
            .map_err(|error| self.job.registry_error(error))?;
        if self.job.request.eager {
            let reason = "the image was asked for whole".to_owned();
            return Ok(Metadata::Whole { blob, reason });
        }
        let annotations = annotations_of(&descriptor);
        let toc_digest = match annotations
            .get(annotations::TOC_DIGEST)
            .map(|text| text.parse::<Digest>())
        {
            Some(Ok(digest)) => digest,
            Some(Err(error)) => {
                let reason = format!("the annotation {} is unusable: {error}", annotations::TOC_DIGEST);
                return Ok(Metadata::Whole { blob, reason });
            }
            None => {
                let reason = format!(
                    "nothing vouches for a table of contents (no annotation {})",
                    annotations::TOC_DIGEST
                );
                return Ok(Metadata::Whole { blob, reason });
            }
        };
        let key = lazy_key(&blob.digest(), &toc_digest);
        let kept = {
            let store = self.job.shared.engine.store.clone();
            blocking(move || store.layer(&key)).await?
        };
        if let Ok(Some(index)) = kept {
            return self.lazy(blob, key, index, None).await;
        }
        let offset = number(&annotations, annotations::TOC_OFFSET).filter(|offset| *offset < blob.size());
        let limit = offset.unwrap_or(blob.size());
        let early = number(&annotations, annotations::PREFETCH_END)
            .filter(|end| *end > 0 && *end <= limit && self.job.request.prefetch)
            .map(|end| Early::start(&self.job.shared.engine, blob.clone(), end));
        let toc = match toc::fetch(&blob, offset, &toc_digest).await {
            Ok(toc) => toc,
            Err(TocFailure::Registry(error)) => return Err(self.job.registry_error(error)),
            Err(TocFailure::NotLazy(reason)) => return Ok(Metadata::Whole { blob, reason }),
            Err(TocFailure::Stopping) => return Err(Error::Stopping),
        };
        let Toc { index } = toc;
        match unservable(&index, blob.size()) {
            Some(reason) => Ok(Metadata::Whole { blob, reason }),
            None => self.lazy(blob, key, index, early).await,
        }
    }

    async fn lazy(
        self,
        blob: Blob,
        key: Digest,
        index: LayerIndex,
        early: Option<Early>,
    ) -> Result<Metadata, Error> {
        let indexed = blocking(move || {
            let engine = &self.job.shared.engine;
            let layer = Arc::new(Layer::new(self.job.number, blob.clone(), &index, &engine.table));
            self.job.sources.add(engine, &layer);
            Indexed {
                key,
                begun: early.map_or(0, |early| early.known(&layer)),
                index,
                report: LayerReport {
                    digest: blob.digest(),
                    size: blob.size(),
                    not_lazy: None,
                },
                layer: Some(layer),
            }
        })
        .await?;
        Ok(Metadata::Lazy(Box::new(indexed)))
    }

    /// Pulls the layer whole if there is no other way.
    pub(super) async fn complete(
        self,
        position: usize,
        metadata: Metadata,
        diff_id: Option<Digest>,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Indexed, Error> {
        let (blob, reason) = match metadata {
            Metadata::Lazy(indexed) => return Ok(*indexed),
            Metadata::Whole { blob, reason } => (blob, reason),
        };
        let report = LayerReport {
            digest: blob.digest(),
            size: blob.size(),
            not_lazy: Some(reason.clone()),
        };
        let key = blob.digest();
        if let Some(index) = self.kept_whole(key).await? {
            return Ok(Indexed {
                key,
                index,
                report,
                layer: None,
                begun: 0,
            });
        }
        let permit = Arc::clone(&self.pulls)
            .acquire_owned()
            .await
            .map_err(|_| Error::Stopping)?;
        tracing::info!(image = %self.job.image, layer = %key, reason, "pulling a layer whole");
        let total = blob.size();
        let told = reason.clone();
        let tell = move |done: u64| {
            // A listener that is slow misses steps, not the end of the work.
            let _ = progress.try_send(Progress::Pulling {
                layer: position,
                reason: told.clone(),
                done,
                total,
            });
        };
        let store = self.job.shared.engine.store.clone();
        let index =
            whole::pull(&store, blob, diff_id, position, tell)
                .await
                .map_err(|failure| match failure {
                    whole::PullFailure::Registry(error) => self.job.registry_error(error),
                    whole::PullFailure::Store(error) => error.into(),
                    whole::PullFailure::Broken(reason) => Error::Layer {
                        image: self.job.image.clone(),
                        layer: key,
                        reason,
                    },
                    whole::PullFailure::Thread(source) => Error::Thread {
                        name: format!("peel-pull-{position}"),
                        source,
                    },
                })?;
        drop(permit);
        Ok(Indexed {
            key,
            index,
            report,
            layer: None,
            begun: 0,
        })
    }

    /// The index of a layer that was pulled whole before, if all of its files are still here.
    async fn kept_whole(&self, blob: Digest) -> Result<Option<LayerIndex>, Error> {
        let store = self.job.shared.engine.store.clone();
        blocking(move || {
            let Ok(Some(index)) = store.layer(&blob) else {
                return None;
            };
            known::is_here(&store, &index).then_some(index)
        })
        .await
    }
}

fn number(annotations: &std::collections::HashMap<String, String>, name: &str) -> Option<u64> {
    annotations.get(name)?.parse().ok()
}

/// Why the files of a layer cannot be fetched one by one, in one sentence.
fn unservable(index: &LayerIndex, blob_size: u64) -> Option<String> {
    for entry in &index.entries {
        let EntryKind::Regular(content) = &entry.kind else {
            continue;
        };
        let path = &entry.path;
        if !content.is_lazy() {
            return Some(format!("its table of contents does not say how to verify {path}"));
        }
        if content.chunks.iter().any(|chunk| chunk.size > CHUNK_MAX) {
            return Some(format!(
                "a chunk of {path} is larger than {} MiB",
                CHUNK_MAX >> 20
            ));
        }
        let outside = content.chunks.iter().any(|chunk| match chunk.source {
            ChunkSource::Blob { offset, .. } => offset >= blob_size,
            ChunkSource::Zeros => false,
        });
        if outside {
            return Some(format!("its table of contents places {path} outside the layer"));
        }
        if let ([chunk], Some(digest)) = (content.chunks.as_slice(), content.digest)
            && chunk.digest != digest
        {
            return Some(format!("its table of contents gives two digests for {path}"));
        }
    }
    None
}
