//! One layer of a conversion: kept, used again from an earlier conversion, or made anew. [`Conversion`](super::Conversion) calls
//! it once for each layer that is different from all others.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context, bail};
use bytes::Bytes;
use oci_spec::image::Descriptor;
use peel_image::layer::Encoding;
use peel_image::path::EntryPath;
use peel_image::{Digest, annotations, media};
use peel_registry::{Blob, BlobUpload, Source, Target, TocImage, Upload};
use peel_writer::order::Orphans;
use peel_writer::{Dialect, Duplicates, Format, Options, WriteError, Written};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::Settings;
use super::earlier::{self, Earlier, Made};
use super::manifest::{self, NewLayer};
use super::stream::{self, Counted};
use super::toc_image::Toc;

/// How often a layer is begun again when a registry has lost its upload.
const RESTARTS: u32 = 3;
/// From which of these on it is sent only once it is whole: such a registry may not be able to take pieces.
const WHOLE_FROM: u32 = 2;

/// A layer to convert.
#[derive(Debug, Clone)]
pub(super) struct Job {
    /// As the source's manifest has it.
    pub(super) descriptor: Descriptor,
    /// Its DiffID by the configuration.
    pub(super) diff_id: Digest,
    /// Files that come first.
    pub(super) first: Vec<EntryPath>,
    /// Digest of the plan that they are part of; `None` without such files.
    pub(super) plan: Option<Digest>,
    /// Whether an earlier conversion's layer may be used.
    pub(super) again: bool,
}

impl Job {
    fn options(&self, settings: &Settings) -> Options {
        Options {
            format: settings.format,
            prioritized: self.first.iter().map(|path| path.as_bytes().to_vec()).collect(),
            // Many builders leave parent directories out of upper layers; their files must come first all the same.
            orphans: Orphans::Move,
            // So that the layer is sent while it is read; the few in which entries replace others are read again.
            duplicates: Duplicates::Refuse,
            threads: settings.threads,
        }
    }

    /// What the layer is made of, and how.
    pub(super) fn key(&self, settings: &Settings) -> Option<earlier::Key> {
        let source = self.descriptor.digest().to_string().parse().ok()?;
        Some((source, earlier::recipe(&self.options(settings), self.plan)))
    }
}

/// What every layer of a conversion needs.
#[derive(Debug)]
pub(super) struct Shared<'a> {
    pub(super) source: &'a Source,
    pub(super) target: &'a Target,
    pub(super) settings: &'a Settings,
    pub(super) earlier: Earlier,
    pub(super) progress: Arc<AtomicU64>,
}

/// What became of a layer.
#[derive(Debug, Clone)]
pub(super) struct Done {
    /// How the manifest names it.
    pub(super) new: NewLayer,
    /// What to tell.
    pub(super) outcome: LayerOutcome,
    /// Where the prioritized files end in the blob.
    pub(super) ends: HashMap<EntryPath, u64>,
    /// Its table of contents, if that is not in the blob.
    pub(super) toc: Option<Toc>,
}

/// How a layer came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum How {
    /// Made anew.
    Converted,
    /// What was asked for already.
    Kept,
    /// Made by an earlier conversion, whose result the target's name holds.
    Reused,
}

/// What became of a layer, for people and machines.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LayerOutcome {
    /// Digest of the blob that was read.
    pub source_digest: Digest,
    /// Its size in bytes.
    pub source_size: u64,
    /// Digest of the blob in the target.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// How it came about.
    pub how: How,
    /// Whether it was sent; not if the target had it, or took it from another of its repositories.
    pub sent: bool,
    /// Number of files that come first.
    pub prioritized: usize,
    /// Where they end in the blob.
    pub prefetch_end: Option<u64>,
}

impl Shared<'_> {
    /// Converts one layer.
    pub(super) async fn layer(&self, job: &Job) -> anyhow::Result<Done> {
        let blob = self.source.blob(&job.descriptor)?;
        let media_type = job.descriptor.media_type().to_string();
        // Another media type tells nothing: the layer is read as a mount reads it, by its first bytes.
        if let Some(encoding) = media::layer_encoding(&media_type)
            && self.settings.reuse
            && job.first.is_empty()
            && let Some(annotations) = self.already(&blob, job).await?
        {
            return self.keep(&blob, job, encoding, annotations).await;
        }
        let mut options = job.options(self.settings);
        let recipe = earlier::recipe(&options, job.plan);
        if job.again
            && let Some(made) = self.earlier.layer(blob.digest(), recipe)
            && let Some(done) = self.again(&blob, job, made).await?
        {
            return Ok(done);
        }
        let mut restarts = 0;
        loop {
            let counted = Arc::new(AtomicU64::new(0));
            let error = match self
                .convert(&blob, job, &options, recipe, (&counted, restarts))
                .await
            {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let lost = matches!(
                error.downcast_ref(),
                Some(peel_registry::Error::UploadLost { .. })
            );
            // A table of contents may be too large for entries that are not to be in it.
            let twice = options.duplicates == Duplicates::Refuse
                && matches!(
                    error.downcast_ref(),
                    Some(WriteError::Duplicate { .. } | WriteError::TocTooLarge)
                );
            if !twice && (!lost || restarts >= RESTARTS) {
                return Err(error);
            }
            self.progress
                .fetch_sub(counted.load(Ordering::Relaxed), Ordering::Relaxed);
            if twice {
                tracing::debug!(layer = %blob.digest(), "{error}; reading the layer again");
                options.duplicates = Duplicates::Drop;
                continue;
            }
            restarts += 1;
            tracing::warn!(
                layer = %blob.digest(),
                "{error}; converting the layer again ({restarts} of at most {RESTARTS} times)"
            );
        }
    }

    /// Passes a layer on as it is.
    async fn keep(
        &self,
        blob: &Blob,
        job: &Job,
        encoding: Encoding,
        annotations: std::collections::BTreeMap<String, String>,
    ) -> anyhow::Result<Done> {
        let sent = self
            .target
            .push_blob(blob.digest(), blob.size(), Upload::Blob(blob.clone()))
            .await?;
        self.progress.fetch_add(blob.size(), Ordering::Relaxed);
        let media_type = match encoding {
            Encoding::Gzip => media::OCI_LAYER_GZIP,
            Encoding::Zstd => media::OCI_LAYER_ZSTD,
            Encoding::Plain => media::OCI_LAYER,
        };
        let new = NewLayer {
            digest: blob.digest(),
            size: blob.size(),
            diff_id: job.diff_id,
            media_type: media_type.to_owned(),
            annotations,
        };
        Ok(self.done(blob, new, How::Kept, sent, 0))
    }

    fn done(&self, blob: &Blob, new: NewLayer, how: How, sent: bool, prioritized: usize) -> Done {
        let outcome = LayerOutcome {
            source_digest: blob.digest(),
            source_size: blob.size(),
            digest: new.digest,
            size: new.size,
            how,
            sent,
            prioritized,
            prefetch_end: Some(new.prefetch_end()).filter(|end| *end > 0),
        };
        Done {
            new,
            outcome,
            ends: HashMap::new(),
            toc: None,
        }
    }

    /// The annotations of a layer that need not be rewritten: it has the format that is asked for, and the manifest vouches
    /// for its TOC.
    async fn already(
        &self,
        blob: &Blob,
        job: &Job,
    ) -> anyhow::Result<Option<std::collections::BTreeMap<String, String>>> {
        let beside = TocImage::new(self.source, None);
        let examined = peel_layers::examine(blob, &job.descriptor, &beside).await?;
        if !is_asked_for(&examined, self.settings.format) {
            return Ok(None);
        }
        let mut kept = manifest::of_the_blob(&job.descriptor);
        if let Some(offset) = examined.toc_offset {
            kept.insert(annotations::TOC_OFFSET.to_owned(), offset.to_string());
        }
        if self.settings.planned {
            // Nothing of it was read: what came first in it for another start is of no use for this one.
            kept.remove(annotations::PREFETCH_END);
        }
        Ok(Some(kept))
    }

    /// The layer that an earlier conversion made, if all of it is still there.
    async fn again(&self, blob: &Blob, job: &Job, made: &Made) -> anyhow::Result<Option<Done>> {
        let digest: Digest = made.descriptor.digest().to_string().parse()?;
        let size = made.descriptor.size();
        let media_type = made.descriptor.media_type().to_string();
        let changed = keeps_tar(self.settings.format, job) && made.diff_id != job.diff_id;
        if changed || media_type != media_type_of(self.settings.format) {
            return Ok(None);
        }
        let toc = match (self.settings.format, self.earlier.toc(&digest)) {
            (
                Format::Estargz {
                    external_toc: true, ..
                },
                None,
            ) => return Ok(None),
            (
                Format::Estargz {
                    external_toc: true, ..
                },
                Some(toc),
            ) => {
                let (toc_digest, toc_size) = (toc.digest().to_string().parse()?, toc.size());
                if !self.has(&toc_digest, toc_size).await {
                    return Ok(None);
                }
                Some(Toc {
                    digest: toc_digest,
                    size: toc_size,
                    layer: digest,
                })
            }
            _ => None,
        };
        if !self.has(&digest, size).await {
            return Ok(None);
        }
        self.progress.fetch_add(blob.size(), Ordering::Relaxed);
        let new = NewLayer {
            digest,
            size,
            diff_id: made.diff_id,
            media_type,
            annotations: manifest::of_the_blob(&made.descriptor),
        };
        Ok(Some(Done {
            toc,
            ..self.done(blob, new, How::Reused, false, job.first.len())
        }))
    }

    /// Whether the target surely has a blob. What an earlier manifest says of it may be wrong, which is no error here.
    async fn has(&self, digest: &Digest, size: u64) -> bool {
        match self.target.has_blob(digest, size).await {
            Ok(has) => has,
            Err(error) => {
                tracing::debug!(%error, "not used again");
                false
            }
        }
    }

    /// Makes a layer and sends it meanwhile.
    async fn convert(
        &self,
        blob: &Blob,
        job: &Job,
        options: &Options,
        recipe: Digest,
        (counted, restarts): (&Arc<AtomicU64>, u32),
    ) -> anyhow::Result<Done> {
        let hash = !keeps_tar(options.format, job) || options.duplicates == Duplicates::Drop;
        let mut upload = match restarts {
            WHOLE_FROM.. => self.target.begin_whole_blob().await?,
            _ => self.target.begin_blob().await?,
        };
        let compressed = peel_layers::reader(blob, &Handle::current()).await?;
        let compressed = Counted::new(compressed, Arc::clone(&self.progress), Arc::clone(counted));
        let (sink, pieces) = stream::sink();
        let failed = sink.failed();
        let writing = {
            let options = options.clone();
            tokio::task::spawn_blocking(move || stream::write(compressed, sink, &options, hash))
        };
        let sent = forward(&mut upload, pieces, &failed).await;
        let written = writing.await.context("conversion thread")?;
        let (written, source_diff_id) = match (sent, written) {
            (Ok(()), Ok(written)) => written,
            // The writer's complaint that nobody takes its output says less than why.
            (Err(error), _) => {
                upload.abort().await;
                return Err(error.into());
            }
            (Ok(()), Err(error)) => {
                upload.abort().await;
                return Err(error);
            }
        };
        let found = match source_diff_id {
            Some(found) => found,
            None if written.diff_id == job.diff_id => written.diff_id,
            // The layer was rewritten by an earlier conversion, which nothing told, or it is not what it should be.
            None => diff_id(blob).await?,
        };
        if found != job.diff_id {
            upload.abort().await;
            bail!(
                "its uncompressed bytes are {found}, but the configuration of the image says {}: manifest and configuration do not \
                 belong together, or the layer was altered; pull or build the image again",
                job.diff_id
            );
        }
        if keeps_diff_id(options.format) && written.diff_id != job.diff_id {
            upload.abort().await;
            bail!(
                "its DiffID cannot be kept: its uncompressed bytes would change; convert it without keeping DiffIDs"
            );
        }
        let sent = upload.finish(written.blob_digest, written.blob_size).await?;
        let toc = match &written.external_toc {
            None => None,
            Some(bytes) => Some(Toc {
                digest: self.target.push_bytes(Bytes::from(bytes.clone())).await?,
                size: bytes.len() as u64,
                layer: written.blob_digest,
            }),
        };
        self.tell_missing(blob, job, &written);
        let prioritized = job.first.len().saturating_sub(written.not_found.len());
        let mut annotations = written.annotations;
        annotations.insert(earlier::SOURCE.to_owned(), blob.digest().to_string());
        annotations.insert(earlier::RECIPE.to_owned(), recipe.to_string());
        let new = NewLayer {
            digest: written.blob_digest,
            size: written.blob_size,
            diff_id: written.diff_id,
            media_type: written.media_type.to_owned(),
            annotations,
        };
        Ok(Done {
            ends: written.file_ends,
            toc,
            ..self.done(blob, new, How::Converted, sent, prioritized)
        })
    }

    fn tell_missing(&self, blob: &Blob, job: &Job, written: &Written) {
        if self.settings.for_every_layer {
            return;
        }
        if let Some(missing) = written.not_found.first() {
            tracing::warn!(
                layer = %blob.digest(),
                "{} of {} recorded files could not be put first, among them {}",
                written.not_found.len(),
                job.first.len(),
                String::from_utf8_lossy(&missing.path)
            );
        }
    }
}

/// Sends what the writer makes, as it makes it, until it has `failed`. The writer's end of the queue fails once this has returned.
async fn forward(
    upload: &mut BlobUpload,
    mut pieces: mpsc::Receiver<Bytes>,
    failed: &AtomicBool,
) -> Result<(), peel_registry::Error> {
    while let Some(piece) = pieces.recv().await {
        if failed.load(Ordering::Relaxed) {
            break;
        }
        upload.write(piece).await?;
    }
    Ok(())
}

/// sha256 of the uncompressed layer.
async fn diff_id(blob: &Blob) -> anyhow::Result<Digest> {
    let compressed = peel_layers::reader(blob, &Handle::current()).await?;
    let hashing = tokio::task::spawn_blocking(move || stream::diff_id(compressed));
    hashing.await.context("hashing thread")?
}

/// Whether the written layer should uncompress to the very bytes that are read, so that one DiffID tells about both. What lazy
/// formats have added to a layer is taken out again, so their layers are not kept to the byte.
fn keeps_tar(format: Format, job: &Job) -> bool {
    let rewritten = peel_layers::annotation(&job.descriptor, annotations::TOC_DIGEST).is_some();
    match format {
        Format::Estargz { .. } => keeps_diff_id(format),
        Format::ZstdChunked { dialect, .. } => {
            dialect == Dialect::Podman && job.first.is_empty() && !rewritten
        }
        Format::Gzip { .. } | Format::Zstd { .. } | Format::Plain => !rewritten,
    }
}

/// Whether the DiffID is to stay what it is.
fn keeps_diff_id(format: Format) -> bool {
    matches!(
        format,
        Format::Estargz {
            keep_diff_id: true,
            ..
        }
    )
}

/// OCI's media type of the layers of a format.
fn media_type_of(format: Format) -> &'static str {
    match format {
        Format::Estargz { .. } | Format::Gzip { .. } => media::OCI_LAYER_GZIP,
        Format::ZstdChunked { .. } | Format::Zstd { .. } => media::OCI_LAYER_ZSTD,
        Format::Plain => media::OCI_LAYER,
    }
}

/// Whether a layer is what a conversion to `format` would make of it, chunk sizes and levels aside.
fn is_asked_for(examined: &peel_layers::Examined, format: Format) -> bool {
    let wanted = match format {
        Format::Estargz {
            external_toc: false, ..
        } => peel_layers::Format::Estargz,
        Format::Estargz {
            external_toc: true, ..
        } => return false,
        Format::ZstdChunked { dialect, .. } => peel_layers::Format::ZstdChunked(dialect),
        Format::Gzip { .. } => return examined.format == peel_layers::Format::Gzip,
        Format::Zstd { .. } => return examined.format == peel_layers::Format::Zstd,
        Format::Plain => return examined.format == peel_layers::Format::Tar,
    };
    examined.format == wanted
        && matches!(examined.toc, peel_layers::TocState::Verified { .. })
        && examined.index.is_ok()
}
