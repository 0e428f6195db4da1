//! One layer of an image that is being loaded: its index from the store, from its TOC, or from the whole blob.

use std::sync::Arc;

use oci_spec::image::Descriptor;
use peel_image::Digest;
use peel_image::layer::LayerIndex;
use peel_image::lazy::{Candidate, NotLazy};
use peel_registry::{Blob, Source, TocBytes, TocImage, fetch_toc_into};
use peel_store::LayerVerdict;
use tokio::sync::{Semaphore, mpsc};

use super::memory::Memory;
use super::{Job, blocking, candidate, known, whole};
use crate::error::Error;
use crate::fetch::Engine;
use crate::fetch::early::Brake;
use crate::verify::{self, Subject};
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
    /// Where its chunks come from, if it is lazy.
    pub(super) lazy: Option<Blob>,
}

/// What the manifest and the store say of a layer.
#[derive(Debug)]
pub(super) enum Found {
    /// The store has the index of this lazy layer.
    Kept {
        blob: Blob,
        key: Digest,
        index: Box<LayerIndex>,
    },
    /// Its TOC has to be fetched.
    Toc {
        blob: Blob,
        /// What the manifest says of it.
        candidate: Box<Candidate>,
        /// Name of the index in the store.
        key: Digest,
    },
    /// It cannot be lazy, for this reason.
    Whole { blob: Blob, reason: String },
}

impl Found {
    pub(super) fn blob(&self) -> &Blob {
        match self {
            Self::Kept { blob, .. } | Self::Toc { blob, .. } | Self::Whole { blob, .. } => blob,
        }
    }

    /// End of the prioritized bytes of a layer whose TOC has to be fetched, as far as the manifest knows it.
    pub(super) fn promised(&self) -> Option<u64> {
        match self {
            Self::Toc { candidate, .. } => candidate.prefetch_end(),
            _ => None,
        }
    }
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

impl Metadata {
    fn lazy(blob: Blob, key: Digest, index: LayerIndex) -> Self {
        Self::Lazy(Box::new(Indexed {
            key,
            index,
            report: LayerReport {
                digest: blob.digest(),
                size: blob.size(),
                not_lazy: None,
            },
            lazy: Some(blob),
        }))
    }
}

/// Fetches and reads the TOC of a layer of `image`; the inner error means that it has none that can be used. `fetched` is called in
/// between.
pub(super) async fn read_toc(
    engine: &Engine,
    memory: &Memory,
    image: &str,
    blob: &Blob,
    candidate: Box<Candidate>,
    beside: &TocImage,
    fetched: impl FnOnce(),
) -> Result<Result<LayerIndex, NotLazy>, Error> {
    let layer = blob.digest();
    let first = candidate.first_range();
    let mut bytes = first.end.saturating_sub(first.start);
    let (toc, room) = loop {
        // The turn first: nobody takes room for bytes that are not asked for yet.
        let turn = memory.fetches.acquire().await.map_err(|_| Error::Stopping)?;
        let room = memory.room(&layer, bytes).await?;
        let toc = fetch_toc_into(&room, blob, &candidate, beside)
            .await
            .map_err(|source| Error::Registry {
                image: image.to_owned(),
                source: Box::new(source),
            })?;
        drop(turn);
        match room.lacking() {
            None => break (toc, room),
            Some(lacking) => bytes = lacking,
        }
    };
    fetched();
    let (located, bytes) = match toc {
        Ok(TocBytes {
            located,
            bytes: Ok(bytes),
        }) => (located, bytes),
        Ok(TocBytes {
            bytes: Err(reason), ..
        })
        | Err(reason) => return Ok(Err(reason)),
    };
    // What is kept of a guess is at most half of something else.
    room.trim(2 * bytes.len() as u64);
    let holes = Arc::clone(&memory.holes);
    let read = memory.read_in_turn(engine, &layer, move || {
        candidate.read_within(&located, &bytes, &holes)
    });
    let index = read.await;
    drop(room);
    index
}

/// Loads layers. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) struct LayerLoader {
    job: Job,
    source: Source,
    pulls: Arc<Semaphore>,
    memory: Arc<Memory>,
    beside: TocImage,
}

impl LayerLoader {
    pub(super) fn new(job: &Job, source: &Source) -> Self {
        Self {
            job: job.clone(),
            source: source.clone(),
            pulls: Arc::new(Semaphore::new(PULLS)),
            memory: Arc::new(Memory::new(&job.shared.engine, &job.image)),
            beside: TocImage::new(source, job.request.platform.as_deref()),
        }
    }

    /// What the layers of the image share. While it lives, what they took of the memory for all loads is taken.
    pub(super) fn memory(&self) -> Arc<Memory> {
        Arc::clone(&self.memory)
    }

    /// Takes memory for an index that came with a whole layer; an error when there is none in time.
    async fn hold(&self, layer: Digest, index: &LayerIndex) -> Result<(), Error> {
        self.memory.hold(&layer, index).await?;
        self.count(layer, index)
    }

    /// Counts the index of a layer; an error when the image has too many files.
    fn count(&self, layer: Digest, index: &LayerIndex) -> Result<(), Error> {
        self.memory.add(index).map_err(|reason| Error::Layer {
            image: self.job.image.clone(),
            layer,
            reason,
        })
    }

    /// Finds out what is to be done for a layer, without a request.
    pub(super) async fn look(self, descriptor: Descriptor) -> Result<Found, Error> {
        let blob = self
            .source
            .blob(&descriptor)
            .map_err(|error| self.job.registry_error(error))?;
        let whole = |blob, reason| Ok(Found::Whole { blob, reason });
        let candidate = candidate(&descriptor);
        if let Err(reason) = candidate.vouched() {
            return whole(blob, reason.to_string());
        }
        let key = candidate.key(&blob.digest());
        let store = self.job.shared.engine.store.clone();
        // A record that cannot be read is as good as none: the TOC is fetched again.
        let kept = self
            .memory
            .read_in_turn(&self.job.shared.engine, &blob.digest(), move || {
                store.layer(&key).ok().flatten().ok_or(())
            })
            .await?;
        if let Ok(index) = kept {
            self.count(blob.digest(), &index)?;
            let index = Box::new(index);
            return Ok(Found::Kept { blob, key, index });
        }
        let candidate = Box::new(candidate);
        Ok(Found::Toc { blob, candidate, key })
    }

    /// Gets the index without the files, if that is possible.
    pub(super) async fn metadata(self, found: Found, brake: Brake) -> Result<Metadata, Error> {
        let (blob, candidate, key) = match found {
            Found::Whole { blob, reason } => return Ok(Metadata::Whole { blob, reason }),
            Found::Kept { blob, key, index } => return Ok(Metadata::lazy(blob, key, *index)),
            Found::Toc { blob, candidate, key } => (blob, candidate, key),
        };
        let read = read_toc(
            &self.job.shared.engine,
            &self.memory,
            &self.job.image,
            &blob.only_ranges(),
            candidate,
            &self.beside,
            || drop(brake),
        )
        .await?;
        Ok(match read {
            Ok(index) => {
                self.count(blob.digest(), &index)?;
                tracing::debug!(layer = %blob.digest(), entries = index.entries.len(), "TOC read");
                Metadata::lazy(blob, key, index)
            }
            Err(reason) => Metadata::Whole {
                blob,
                reason: reason.to_string(),
            },
        })
    }

    /// Pulls the layer whole if there is no other way, or if the image was asked for whole. An error for a layer that is known
    /// to be wrong. `toc` is the digest by which the manifest names the table of contents, for messages.
    pub(super) async fn complete(
        self,
        position: usize,
        metadata: Metadata,
        toc: Option<Digest>,
        diff_id: Option<Digest>,
        progress: mpsc::Sender<Progress>,
    ) -> Result<Indexed, Error> {
        let (blob, reason, lazy) = match metadata {
            Metadata::Lazy(mut indexed) => match indexed.lazy.take() {
                Some(blob) if self.job.request.eager => {
                    (blob, "the image was asked for whole".to_owned(), Some(indexed))
                }
                blob => {
                    indexed.lazy = blob;
                    self.refuse(indexed.report.digest, indexed.key, diff_id).await?;
                    return Ok(*indexed);
                }
            },
            Metadata::Whole { blob, reason } => (blob, reason, None),
        };
        let key = blob.digest();
        let broken = |reason: String| Error::Layer {
            image: self.job.image.clone(),
            layer: key,
            reason,
        };
        let diff_id = diff_id.ok_or_else(|| broken("the configuration does not list it".to_owned()))?;
        let mut subjects = vec![self.refuse(key, key, Some(diff_id)).await?];
        if let Some(lazy) = &lazy {
            subjects.push(self.refuse(key, lazy.key, Some(diff_id)).await?);
        }
        let subjects: Vec<Subject> = subjects.into_iter().flatten().collect();
        let indexed = |index| Indexed {
            key,
            index,
            report: LayerReport {
                digest: key,
                size: blob.size(),
                not_lazy: Some(reason.clone()),
            },
            lazy: None,
        };
        if let Some(index) = self.kept_whole(key, subjects.clone()).await? {
            self.hold(key, &index).await?;
            return Ok(indexed(index));
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
        let pulled = whole::pull(&store, blob.clone(), diff_id, position, tell).await;
        drop(permit);
        let index = match pulled {
            Ok(index) => {
                self.hold(key, &index).await?;
                index
            }
            Err(whole::PullFailure::Registry(error)) => return Err(self.job.registry_error(error)),
            Err(whole::PullFailure::Store(error)) => return Err(error.into()),
            Err(whole::PullFailure::Broken(reason)) => return Err(broken(reason)),
            Err(whole::PullFailure::DiffId(found)) => {
                let fault = verify::wrong_diff_id(&found, &diff_id);
                self.judge(&subjects, Some(&fault)).await?;
                return Err(broken(fault));
            }
            Err(whole::PullFailure::Thread(source)) => {
                let name = format!("peel-pull-{position}");
                return Err(Error::Thread { name, source });
            }
        };
        if let Some(lazy) = lazy {
            let (index, fault) = blocking(move || {
                let fault = verify::disagreement(&toc.unwrap_or(lazy.key), &lazy.index, &diff_id, &index);
                (index, fault)
            })
            .await?;
            // The blob alone is right; only what its table of contents says of it is not.
            let (alone, listed) = subjects.split_at(1);
            self.judge(alone, None).await?;
            self.judge(listed, fault.as_deref()).await?;
            return match fault {
                Some(fault) => Err(broken(fault)),
                None => Ok(indexed(index)),
            };
        }
        self.judge(&subjects, None).await?;
        Ok(indexed(index))
    }

    /// An error if that layer is known to be wrong.
    async fn refuse(
        &self,
        blob: Digest,
        index: Digest,
        diff_id: Option<Digest>,
    ) -> Result<Option<Subject>, Error> {
        let Some(diff_id) = diff_id else {
            return Ok(None);
        };
        let subject = Subject { blob, index, diff_id };
        let store = self.job.shared.engine.store.clone();
        match blocking(move || subject.fault(&store)).await? {
            None => Ok(Some(subject)),
            Some(reason) => Err(Error::Layer {
                image: self.job.image.clone(),
                layer: blob,
                reason: format!("it was found wrong before: {reason}"),
            }),
        }
    }

    /// Keeps what a whole pull found.
    async fn judge(&self, subjects: &[Subject], fault: Option<&str>) -> Result<(), Error> {
        let verdict = LayerVerdict {
            blob: true,
            fault: fault.map(str::to_owned),
        };
        let (store, subjects) = (self.job.shared.engine.store.clone(), subjects.to_vec());
        blocking(move || {
            for subject in subjects {
                subject.keep(&store, &verdict);
            }
        })
        .await
    }

    /// The index of a layer that was pulled whole before and found right, if all of its files are still here.
    async fn kept_whole(&self, blob: Digest, subjects: Vec<Subject>) -> Result<Option<LayerIndex>, Error> {
        let store = self.job.shared.engine.store.clone();
        blocking(move || {
            if !subjects.iter().all(|subject| subject.is_verified(&store)) {
                return None;
            }
            let Ok(Some(index)) = store.layer(&blob) else {
                return None;
            };
            known::is_here(&store, &index).then_some(index)
        })
        .await
    }
}
