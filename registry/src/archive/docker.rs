//! What `docker save` and `podman save` write: a tar file with `manifest.json`, a configuration and one tar file per layer.
//!
//! Such an archive has no registry manifest, so one is made here. A plain layer's digest is its diff ID, which the
//! configuration tells; for a compressed one it is the file's name (newer Docker) or computed. None of them is believed: whoever
//! reads a blob whole checks it.

use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use oci_spec::image::{Descriptor, ImageManifestBuilder, MediaType};
use peel_image::{Digest, Hasher, media};
use serde::Deserialize;

use super::TarIndex;
use crate::document;
use crate::error::Error;
use crate::layout::read_small;
use crate::name::Reference;
use crate::source::resolve::{Content, Document};
use crate::transfer::file::Stretch;

/// Largest manifest.json and configuration, in bytes.
const MAX_JSON: u64 = 8 << 20;
/// Layers of one image.
const MAX_LAYERS: usize = 1000;

/// One image of a `docker save` archive.
#[derive(Debug)]
pub(crate) struct DockerArchive {
    path: std::path::PathBuf,
    blobs: HashMap<Digest, Stretch>,
    document: Document,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Image {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Option<Vec<String>>,
}

impl DockerArchive {
    /// Looks through the archive and finds the image `tag` in it; without a tag the only one. Blocks on the disk.
    pub(crate) fn open(path: &Path, tag: Option<&str>) -> Result<Self, Error> {
        let fail = |reason: String| Error::layout(path, reason);
        let tar = TarIndex::open(path)?;
        let manifest = tar.get("manifest.json").map_err(|error| {
            if error.is_not_found() {
                fail("has no manifest.json, so it is no archive of docker save".into())
            } else {
                error
            }
        })?;
        let images: Option<Vec<Image>> = serde_json::from_slice(&read_small(&manifest, MAX_JSON)?)
            .map_err(|error| fail(format!("manifest.json: {error}")))?;
        let images = images.unwrap_or_default();
        let image = choose(path, &images, tag)?;
        let names = image.layers.as_deref().unwrap_or_default();
        if names.len() > MAX_LAYERS {
            return Err(fail(format!("{} layers, more than {MAX_LAYERS}", names.len())));
        }
        let config = tar.get(&image.config)?;
        let config_bytes = read_small(&config, MAX_JSON)?;
        let diff_ids = document::configuration(&config_bytes)
            .map_err(|error| fail(format!("configuration {}: {error}", image.config)))?
            .diff_ids;
        if diff_ids.len() != names.len() {
            return Err(fail(format!(
                "{} layers, but the configuration tells of {}",
                names.len(),
                diff_ids.len()
            )));
        }
        let mut blobs = HashMap::new();
        let mut layers = Vec::with_capacity(names.len());
        for (name, diff_id) in names.iter().zip(diff_ids) {
            let stretch = tar.get(name)?;
            let (media_type, plain) = media_type(&stretch)?;
            let digest = match name.strip_prefix("blobs/sha256/").map(Digest::from_hex) {
                _ if plain => diff_id,
                Some(Ok(digest)) => digest,
                _ => hash(&stretch)?,
            };
            layers.push(descriptor(path, media_type, stretch.size, digest)?);
            blobs.insert(digest, stretch);
        }
        let digest = Digest::of(&config_bytes);
        let config_descriptor = descriptor(path, media::DOCKER_CONFIG, config.size, digest)?;
        blobs.insert(digest, config);
        Ok(Self {
            path: path.to_path_buf(),
            blobs,
            document: document(path, config_descriptor, layers)?,
        })
    }

    pub(crate) fn document(&self) -> Document {
        self.document.clone()
    }

    pub(crate) fn blob(&self, digest: &Digest) -> Result<Stretch, Error> {
        let stretch = self.blobs.get(digest).cloned();
        stretch.ok_or_else(|| Error::layout(&self.path, format!("blob {digest} is not in it")))
    }
}

fn choose<'a>(path: &Path, images: &'a [Image], tag: Option<&str>) -> Result<&'a Image, Error> {
    let all = || {
        let tags: Vec<_> = images
            .iter()
            .flat_map(|image| image.repo_tags.iter().flatten())
            .collect();
        tags.iter().map(|tag| tag.as_str()).collect::<Vec<_>>().join(", ")
    };
    let Some(tag) = tag else {
        return match images {
            [only] => Ok(only),
            [] => Err(Error::layout(path, "holds no image")),
            _ => Err(Error::layout(
                path,
                format!(
                    "holds several images; add :NAME:TAG to its name; there is: {}",
                    all()
                ),
            )),
        };
    };
    let wanted: Reference = tag.parse()?;
    let named = |image: &&Image| {
        let mut tags = image.repo_tags.iter().flatten();
        tags.any(|tag| tag.parse::<Reference>().is_ok_and(|known| known == wanted))
    };
    let found = images.iter().find(named);
    found.ok_or_else(|| Error::layout(path, format!("has no image {tag:?}; there is: {}", all())))
}

/// Media type by the first bytes, and whether the layer is plain tar.
fn media_type(layer: &Stretch) -> Result<(&'static str, bool), Error> {
    Ok(match layer.head(4)?.as_slice() {
        [0x1f, 0x8b, ..] => (media::DOCKER_LAYER_GZIP, false),
        [0x28, 0xb5, 0x2f, 0xfd] => (media::DOCKER_LAYER_ZSTD, false),
        _ => (media::DOCKER_LAYER, true),
    })
}

fn hash(stretch: &Stretch) -> Result<Digest, Error> {
    let path = stretch.path.as_path();
    let fail = || Error::file(path, "cannot be read");
    let file = File::open(path).map_err(fail())?;
    let mut hasher = Hasher::new();
    let mut piece = vec![0; 1 << 20];
    let (mut offset, end) = (stretch.start, stretch.start + stretch.size);
    while offset < end {
        let length = usize::try_from(end - offset)
            .unwrap_or(usize::MAX)
            .min(piece.len());
        let (part, _) = piece.split_at_mut(length);
        file.read_exact_at(part, offset).map_err(fail())?;
        hasher.update(part);
        offset += length as u64;
    }
    Ok(hasher.finish())
}

fn descriptor(path: &Path, media_type: &str, size: u64, digest: Digest) -> Result<Descriptor, Error> {
    let digest: oci_spec::image::Digest = digest
        .to_string()
        .parse()
        .map_err(|error| Error::layout(path, format!("digest {digest}: {error}")))?;
    Ok(Descriptor::new(MediaType::from(media_type), size, digest))
}

fn document(path: &Path, config: Descriptor, layers: Vec<Descriptor>) -> Result<Document, Error> {
    let fail = |error: String| Error::layout(path, format!("its manifest cannot be made: {error}"));
    let manifest = ImageManifestBuilder::default()
        .schema_version(oci_spec::image::SCHEMA_VERSION)
        .media_type(MediaType::from(media::DOCKER_MANIFEST))
        .config(config)
        .layers(layers)
        .build()
        .map_err(|error| fail(error.to_string()))?;
    let bytes = serde_json::to_vec(&manifest).map_err(|error| fail(error.to_string()))?;
    Ok(Document {
        digest: Digest::of(&bytes),
        bytes: bytes.into(),
        media_type: media::DOCKER_MANIFEST.to_owned(),
        content: Content::Manifest(Box::new(manifest)),
    })
}
