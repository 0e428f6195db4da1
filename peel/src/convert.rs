//! Images rewritten: every layer becomes eStargz, with the files of a plan first, and is pushed with a new configuration
//! and manifest.
//!
//! Layers stream: registry, decompression, writer, temporary file, target. At most [`AT_ONCE`] layers are under way, so
//! memory stays bounded whatever the image; the next layer arrives while the previous one is put together.

pub mod manifest;
pub mod order;
pub mod patterns;
pub mod plan;

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufWriter, Read, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use oci_spec::image::Descriptor;
use peel_image::estargz;
use peel_image::layer::{ChunkSource, EntryKind, LayerIndex};
use peel_image::path::EntryPath;
use peel_image::write::{self, Format, Options, Written};
use peel_image::{Digest, annotations, compression, media};
use peel_registry::{Blob, ResolvedImage, Source, Target, Upload};
use tokio::runtime::Handle;

use crate::layers;
use manifest::NewLayer;
use order::Read as PrioritizedRead;
use plan::{Plan, Prioritized};

/// Layers that are converted at the same time.
const AT_ONCE: usize = 2;
/// Largest configuration that is read, in bytes. Registries hold manifests to 4 MiB; configurations are no larger.
const CONFIG_MAX: u64 = 8 << 20;

/// How layers are written.
#[derive(Debug, Clone, Copy)]
pub struct Settings {
    /// Bytes per chunk; 0 for upstream's 4 MiB.
    pub chunk_size: u64,
    /// Compression level, 1 to 12.
    pub level: i32,
    /// Keep layers that are valid eStargz already and of which the plan has no file.
    pub reuse: bool,
    /// A file of the plan that a layer does not have is no error: the plan was made for no layer in particular.
    pub for_every_layer: bool,
}

/// What became of a layer.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct LayerOutcome {
    /// Digest of the blob that was read.
    pub source_digest: Digest,
    /// Its size in bytes.
    pub source_size: u64,
    /// Digest of the blob that was written.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// Whether it is the same blob.
    pub kept: bool,
    /// Whether the target had it already.
    pub was_there: bool,
    /// Number of files that come first.
    pub prioritized: usize,
    /// Where they end in the blob.
    pub prefetch_end: Option<u64>,
}

/// What became of an image.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Outcome {
    /// Digest of the new manifest.
    pub manifest_digest: Digest,
    /// The layers, lowest first.
    pub layers: Vec<LayerOutcome>,
}

/// One conversion.
#[derive(Debug)]
pub struct Conversion<'a> {
    /// Where the image is read from.
    pub source: &'a Source,
    /// The image.
    pub image: &'a ResolvedImage,
    /// Where it is written to.
    pub target: &'a Target,
    /// Which files come first.
    pub plan: &'a Plan,
    /// How.
    pub settings: Settings,
    /// Compressed bytes read so far, for whoever watches.
    pub progress: Arc<AtomicU64>,
}

/// A converted layer.
struct Done {
    new: NewLayer,
    outcome: LayerOutcome,
    /// Where the prioritized files end in the blob.
    ends: HashMap<EntryPath, u64>,
}

impl Conversion<'_> {
    /// Converts and pushes. Nothing is named in the target before everything is there.
    pub async fn run(&self) -> anyhow::Result<Outcome> {
        let descriptors = self.image.manifest.layers();
        let config = self.source.blob(self.image.manifest.config())?;
        let config = config.read_verified(CONFIG_MAX).await?;
        let diff_ids = diff_ids(&config);
        let layers: Vec<Done> = futures::stream::iter(descriptors.iter().enumerate())
            .map(|(position, descriptor)| {
                let diff_id = diff_ids.get(position).copied();
                async move {
                    self.layer(position, descriptor, diff_id).await.with_context(|| {
                        format!(
                            "layer {} of {} ({})",
                            position + 1,
                            descriptors.len(),
                            descriptor.digest()
                        )
                    })
                }
            })
            .buffered(AT_ONCE)
            .try_collect()
            .await?;

        let new: Vec<NewLayer> = layers.iter().map(|layer| layer.new.clone()).collect();
        let config = manifest::config(&config, &new)?;
        let manifest = manifest::manifest(&self.image.manifest_bytes, &config, &new, self.order(&layers))?;
        self.target.push_bytes(config.into()).await?;
        let manifest_digest = self
            .target
            .put_manifest(manifest.into(), media::OCI_MANIFEST)
            .await?;
        Ok(Outcome {
            manifest_digest,
            layers: layers.into_iter().map(|layer| layer.outcome).collect(),
        })
    }

    /// The cross-layer order, unless the plan says nothing about layers.
    fn order(&self, layers: &[Done]) -> Option<String> {
        let reads = |file: &Prioritized| {
            let end = layers.get(file.layer)?.ends.get(&file.content)?;
            Some(PrioritizedRead {
                layer: file.layer,
                end: *end,
            })
        };
        let reads: Vec<PrioritizedRead> = self.plan.files.iter().filter_map(reads).collect();
        let ends: Vec<u64> = layers
            .iter()
            .map(|layer| layer.new.prefetch_end.unwrap_or(0))
            .collect();
        order::annotation(&reads, &ends)
    }

    async fn layer(
        &self,
        position: usize,
        descriptor: &Descriptor,
        diff_id: Option<Digest>,
    ) -> anyhow::Result<Done> {
        let media_type = descriptor.media_type().to_string();
        if media::layer_encoding(&media_type).is_none() {
            bail!("its media type {media_type} is not that of a layer; such images cannot be converted");
        }
        let blob = self.source.blob(descriptor)?;
        let first: Vec<&Prioritized> = self.plan.of_layer(position).collect();
        if self.settings.reuse
            && first.is_empty()
            && let Some(new) = reusable(&blob, descriptor, diff_id).await?
        {
            return self.keep(&blob, new).await;
        }
        self.rewrite(&blob, &first).await
    }

    /// Passes a layer on as it is.
    async fn keep(&self, blob: &Blob, new: NewLayer) -> anyhow::Result<Done> {
        let sent = self
            .target
            .push_blob(new.digest, new.size, Upload::Blob(blob.clone()))
            .await?;
        self.progress.fetch_add(blob.size(), Ordering::Relaxed);
        let outcome = LayerOutcome {
            source_digest: blob.digest(),
            source_size: blob.size(),
            digest: new.digest,
            size: new.size,
            kept: true,
            was_there: !sent,
            prioritized: 0,
            prefetch_end: None,
        };
        Ok(Done {
            new,
            outcome,
            ends: HashMap::new(),
        })
    }

    async fn rewrite(&self, blob: &Blob, first: &[&Prioritized]) -> anyhow::Result<Done> {
        let options = Options {
            format: Format::Estargz {
                chunk_size: self.settings.chunk_size,
                min_chunk_size: 0,
                level: self.settings.level,
                external_toc: false,
                keep_diff_id: false,
            },
            prioritized: first.iter().map(|file| file.path.as_bytes().to_vec()).collect(),
            // Many builders leave parent directories out of upper layers; their files must come first all the same.
            orphans: write::order::Orphans::Move,
            threads: 0,
        };
        let stream = layers::reader(blob, &Handle::current()).await?;
        let progress = Arc::clone(&self.progress);
        let written = tokio::task::spawn_blocking(move || {
            write(
                Counted {
                    inner: stream,
                    count: progress,
                },
                &options,
            )
        });
        let (file, written) = written.await.context("conversion thread")??;
        if !self.settings.for_every_layer
            && let Some(missing) = written.not_found.first()
        {
            tracing::warn!(
                layer = %blob.digest(),
                "{} of {} recorded files could not be put first, among them {}",
                written.not_found.len(),
                first.len(),
                String::from_utf8_lossy(&missing.path)
            );
        }
        let ends = if first.is_empty() {
            HashMap::new()
        } else {
            let index = read_back(&file, &written)?;
            chunk_ends(&index)
        };
        let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        let sent = self
            .target
            .push_blob(written.blob_digest, written.blob_size, Upload::File(path))
            .await?;
        drop(file);
        let (Some(toc_digest), Some(toc_offset)) = (written.toc_digest, written.toc_offset) else {
            bail!("the layer was written without a TOC");
        };
        let moved = first.len().saturating_sub(written.not_found.len());
        let prefetch_end = written.prefetch_end.filter(|_| moved > 0);
        Ok(Done {
            new: NewLayer {
                digest: written.blob_digest,
                size: written.blob_size,
                diff_id: written.diff_id,
                toc_digest,
                toc_offset,
                uncompressed_size: Some(written.uncompressed_size),
                prefetch_end,
            },
            outcome: LayerOutcome {
                source_digest: blob.digest(),
                source_size: blob.size(),
                digest: written.blob_digest,
                size: written.blob_size,
                kept: false,
                was_there: !sent,
                prioritized: moved,
                prefetch_end,
            },
            ends,
        })
    }
}

/// Decompresses a layer and writes it anew into a temporary file.
fn write(stream: impl Read + Send + 'static, options: &Options) -> anyhow::Result<(File, Written)> {
    let dir = temporary_directory();
    let temporary = || format!("temporary file in {}; TMPDIR names another place", dir.display());
    let (_, tar) = compression::decoder(stream, compression::Guard::default())?;
    // Without a name, so that nothing is left when this process is killed.
    let spool = tempfile::tempfile_in(&dir).with_context(temporary)?;
    let file = tempfile::tempfile_in(&dir).with_context(temporary)?;
    let written = write::write(tar, spool, BufWriter::new(&file), options)?;
    Ok((file, written))
}

/// Where layers wait between the writer and the target: like Podman's, a place that is not memory.
fn temporary_directory() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Counts what is read.
struct Counted<R> {
    inner: R,
    count: Arc<AtomicU64>,
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.count.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

/// The index of the blob that was just written, from the blob itself.
fn read_back(mut file: &File, written: &Written) -> anyhow::Result<LayerIndex> {
    file.seek(SeekFrom::Start(written.toc_offset.unwrap_or(0)))
        .context("temporary file")?;
    let mut tail = Vec::new();
    file.take(estargz::TOC_MEMBER_MAX)
        .read_to_end(&mut tail)
        .context("temporary file")?;
    let location = estargz::locate(&tail, written.blob_size)?;
    let toc = estargz::extract_toc(&tail)?;
    Ok(estargz::read_index(&toc.json, location.payload_end)?)
}

/// Where each file ends in the blob.
fn chunk_ends(index: &LayerIndex) -> HashMap<EntryPath, u64> {
    let end_of = |kind: &EntryKind| {
        let EntryKind::Regular(content) = kind else {
            return None;
        };
        content.chunks.iter().filter_map(|chunk| end(&chunk.source)).max()
    };
    index
        .entries
        .iter()
        .filter_map(|entry| Some((entry.path.clone(), end_of(&entry.kind)?)))
        .collect()
}

fn end(source: &ChunkSource) -> Option<u64> {
    match source {
        ChunkSource::Blob {
            offset,
            compressed_size,
            ..
        } => offset.checked_add(*compressed_size),
        ChunkSource::Zeros => None,
    }
}

/// A layer that need not be rewritten: eStargz whose TOC the manifest vouches for, and whose diff id is known.
async fn reusable(
    blob: &Blob,
    descriptor: &Descriptor,
    diff_id: Option<Digest>,
) -> Result<Option<NewLayer>, peel_registry::Error> {
    let examined = layers::examine(blob, descriptor).await?;
    let (layers::TocState::Verified { digest: toc_digest }, Ok(_)) = (examined.toc, &examined.index) else {
        return Ok(None);
    };
    let (Some(diff_id), Some(toc_offset)) = (diff_id, examined.toc_offset) else {
        return Ok(None);
    };
    Ok(Some(NewLayer {
        digest: blob.digest(),
        size: blob.size(),
        diff_id,
        toc_digest,
        toc_offset,
        uncompressed_size: layers::annotation(descriptor, annotations::UNCOMPRESSED_SIZE)
            .and_then(|text| text.parse().ok()),
        prefetch_end: None,
    }))
}

/// The diff ids of a configuration, as far as they are there.
fn diff_ids(config: &Bytes) -> Vec<Digest> {
    let config: serde_json::Value = serde_json::from_slice(config).unwrap_or_default();
    config
        .pointer("/rootfs/diff_ids")
        .and_then(serde_json::Value::as_array)
        .map(|ids| ids.iter().filter_map(|id| id.as_str()?.parse().ok()).collect())
        .unwrap_or_default()
}
