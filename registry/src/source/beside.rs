//! The image beside an image that holds the TOCs of its layers: the same repository or layout, the tag with
//! [`TOC_IMAGE_SUFFIX`] behind it.
//!
//! It is a place to find bytes and nothing else: what it holds counts only if the layer's own manifest vouches for it. It is asked
//! for once, by the first layer that needs it, and never for an image without such a layer. Whatever is wrong with it is a reason to
//! pull those layers whole, not an error.

use std::collections::HashMap;
use std::sync::Arc;

use oci_spec::image::Descriptor;
use peel_image::Digest;
use peel_image::annotations::{LAYER_DIGEST, TOC_IMAGE_SUFFIX};
use tokio::sync::OnceCell;

use super::blob::Blob;
use super::{Home, Inner, Source};
use crate::error::Error;
use crate::toc::Room;

/// The image beside one image. Cheap to clone; clones share what was found.
#[derive(Debug, Clone)]
pub struct TocImage {
    inner: Arc<Search>,
}

#[derive(Debug)]
struct Search {
    source: Source,
    platform: Option<String>,
    found: OnceCell<Result<Found, String>>,
}

/// The TOC image, and its layers by the layer whose TOC they hold.
#[derive(Debug)]
struct Found {
    source: Source,
    tag: String,
    tocs: HashMap<Digest, Descriptor>,
}

impl TocImage {
    /// The image beside the one that `source` names. No request is made before a layer needs it. `platform` matters only if what
    /// is found is an index; upstream's tools write one manifest for all platforms.
    pub fn new(source: &Source, platform: Option<&str>) -> Self {
        Self {
            inner: Arc::new(Search {
                source: source.clone(),
                platform: platform.map(str::to_owned),
                found: OnceCell::new(),
            }),
        }
    }

    /// The TOC of a layer as it is in the image beside, compressed, its blob's digest checked; or in half a sentence why not.
    pub(crate) async fn read(
        &self,
        layer: &Digest,
        limit: u64,
        room: &dyn Room,
    ) -> Result<bytes::Bytes, String> {
        let blob = self.blob(layer).await?;
        if !room.take(blob.size()) {
            return Err(room.refusal());
        }
        blob.read_verified(limit)
            .await
            .map_err(|error: Error| format!("it cannot be read there: {error}"))
    }

    /// The blob that holds the TOC of this layer, or in half a sentence why there is none.
    async fn blob(&self, layer: &Digest) -> Result<Blob, String> {
        let search = &self.inner;
        let found = search.found.get_or_init(|| search.find()).await;
        let found = found.as_ref().map_err(Clone::clone)?;
        let descriptor = found
            .tocs
            .get(layer)
            .ok_or_else(|| format!("the image {} has none for this layer", found.tag))?;
        found.source.blob(descriptor).map_err(|error| error.to_string())
    }
}

impl Search {
    async fn find(&self) -> Result<Found, String> {
        let (source, tag) = self.source.beside(TOC_IMAGE_SUFFIX)?;
        let image = source
            .resolve(self.platform.as_deref())
            .await
            .map_err(|error| match error {
                error if error.is_not_found() => format!("there is no image with the tag {tag}"),
                error => format!("the image {tag} cannot be read: {error}"),
            })?;
        let tocs = image
            .manifest
            .layers()
            .iter()
            .filter_map(|descriptor| {
                let layer = descriptor.annotations().as_ref()?.get(LAYER_DIGEST)?;
                Some((layer.parse().ok()?, descriptor.clone()))
            })
            .collect();
        Ok(Found { source, tag, tocs })
    }
}

impl Source {
    /// The place of the image whose tag is this one's with a suffix, and that tag; or in half a sentence why there is none.
    fn beside(&self, suffix: &str) -> Result<(Self, String), String> {
        let by_digest = "this one is named by its digest, which leads to no other image";
        let (home, tag) = match &self.inner.home {
            Home::Registry { session, tag, digest } => {
                let tag = match (tag, digest) {
                    (Some(tag), _) => tag,
                    (None, None) => "latest",
                    (None, Some(_)) => return Err(by_digest.to_owned()),
                };
                let tag = format!("{tag}{suffix}");
                let home = Home::Registry {
                    session: Arc::clone(session),
                    tag: Some(tag.clone()),
                    digest: None,
                };
                (home, tag)
            }
            Home::Layout { layout, tag } => {
                let tag = match tag {
                    Some(tag) if tag.parse::<Digest>().is_ok() => return Err(by_digest.to_owned()),
                    Some(tag) => format!("{tag}{suffix}"),
                    None => return Err("there is no other image in its layout".to_owned()),
                };
                if !layout.has_tag(&tag) {
                    return Err(format!("its layout has no image with the tag {tag}"));
                }
                let home = Home::Layout {
                    layout: Arc::clone(layout),
                    tag: Some(tag.clone()),
                };
                (home, tag)
            }
            Home::DockerArchive(_) => return Err("archives of Docker have none".to_owned()),
        };
        let inner = Inner {
            home,
            place: self.inner.place.clone(),
            counters: Arc::clone(&self.inner.counters),
            top: OnceCell::new(),
        };
        Ok((
            Self {
                inner: Arc::new(inner),
            },
            tag,
        ))
    }
}
