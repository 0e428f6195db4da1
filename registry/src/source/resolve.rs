//! From a name to the manifest of one platform.

use std::sync::Arc;

use bytes::Bytes;
use oci_spec::image::{Descriptor, ImageIndex, ImageManifest, Platform};
use peel_image::{Digest, media};

use super::blob::Blob;
use super::nested::{self, MAX_DEPTH};
use super::{Inner, Source, platform};
use crate::document::{self, Configuration};
use crate::error::Error;

/// Largest image configuration in bytes; histories of long builds reach some hundred KiB.
const MAX_CONFIG: u64 = 8 << 20;
/// Layers of one image: Docker stops at 127; a hostile manifest of 4 MiB could name 20,000.
const MAX_LAYERS: usize = 1000;
/// Entries of an index whose configurations are asked for because they do not say their platforms. Builders that leave them out write
/// one or a few.
const MAX_SILENT: usize = 16;

/// One manifest of one platform, and where it came from.
#[derive(Debug, Clone)]
pub struct ResolvedImage {
    /// Digest of the manifest (not of the index).
    pub manifest_digest: Digest,
    /// The manifest as it came, byte for byte.
    pub manifest_bytes: Bytes,
    /// The manifest, parsed.
    pub manifest: ImageManifest,
    /// Media type of the manifest (OCI or Docker).
    pub media_type: String,
    /// The index that the name itself names, byte for byte, if it is one.
    pub index_bytes: Option<Bytes>,
    /// The platform by the index; `None` if there is no index or it does not say.
    pub platform: Option<Platform>,
}

/// The index that a name names: one manifest per platform. Indexes within it are laid out flat.
#[derive(Debug, Clone)]
pub struct ResolvedIndex {
    /// Digest of the index as it came.
    pub digest: Digest,
    /// The index: as it came, byte for byte, if there is no other within it.
    pub bytes: Bytes,
    /// The index, parsed.
    pub index: ImageIndex,
    /// Media type of the index (OCI or Docker).
    pub media_type: String,
}

impl ResolvedIndex {
    /// The platforms of all entries, for people: `os/architecture[/variant]`, joined by commas.
    pub fn platforms(&self) -> String {
        platform::list(self.index.manifests(), &[])
    }
}

/// A manifest or an index.
#[derive(Debug, Clone)]
pub(crate) struct Document {
    pub(crate) digest: Digest,
    pub(crate) bytes: Bytes,
    pub(crate) media_type: String,
    pub(crate) content: Content,
}

#[derive(Debug, Clone)]
pub(crate) enum Content {
    Index(Box<ImageIndex>),
    Manifest(Box<ImageManifest>),
}

impl Document {
    /// Parses a document that came as `media_type`. Content that says another type of itself, or that is both a manifest and an
    /// index, is refused: two readers would see two images (CVE-2021-41190).
    pub(crate) fn parse(
        place: &str,
        name: &str,
        media_type: Option<&str>,
        bytes: Bytes,
    ) -> Result<Self, Error> {
        let fail = |reason: String| Error::Manifest {
            place: place.to_owned(),
            what: format!("manifest {name}"),
            reason,
        };
        let json: serde_json::Value =
            serde_json::from_slice(&bytes).map_err(|error| fail(format!("no JSON: {error}")))?;
        let inside = json.get("mediaType").and_then(|value| value.as_str());
        let inside = inside.filter(|text| !text.is_empty());
        // Go writes `null` for a list that was never made.
        let has = |name: &str| json.get(name).is_some_and(|value| !value.is_null());
        let is_named = |name: &str| json.get(name).is_some();
        let known = |text: &&str| {
            matches!(
                *text,
                media::OCI_INDEX | media::OCI_MANIFEST | media::DOCKER_INDEX | media::DOCKER_MANIFEST
            )
        };
        let media_type = match (media_type.filter(known), inside) {
            (Some(outside), Some(inside)) if outside != inside => {
                return Err(fail(format!("it came as {outside} and calls itself {inside}")));
            }
            (Some(media_type), _) | (None, Some(media_type)) => media_type,
            // OCI manifests need not name their type, and servers of plain files do not know it.
            (None, None) if has("manifests") => media::OCI_INDEX,
            (None, None) if has("layers") || has("config") => media::OCI_MANIFEST,
            (None, None) if is_named("manifests") => media::OCI_INDEX,
            (None, None) => media_type.unwrap_or("a document without a media type"),
        }
        .to_owned();
        if has("manifests") && (has("layers") || has("config")) {
            return Err(fail("it is both a manifest and an index".into()));
        }
        let content = if media::is_index(&media_type) {
            document::index(&bytes).map(|index| Content::Index(Box::new(index)))
        } else if known(&media_type.as_str()) {
            document::manifest(&bytes).map(|manifest| Content::Manifest(Box::new(manifest)))
        } else if json.get("schemaVersion").and_then(serde_json::Value::as_u64) == Some(1) {
            return Err(fail(
                "Docker schema 1, which has no digests of its layers; push the image again with a newer client".into(),
            ));
        } else {
            return Err(fail(format!(
                "{media_type:.200} is no image manifest and no index"
            )));
        };
        let content = content.map_err(fail)?;
        if let Content::Manifest(manifest) = &content
            && manifest.layers().len() > MAX_LAYERS
        {
            return Err(fail(format!(
                "{} layers, more than {MAX_LAYERS}",
                manifest.layers().len()
            )));
        }
        Ok(Self {
            digest: Digest::of(&bytes),
            bytes,
            media_type,
            content,
        })
    }

    fn image(&self, index_bytes: Option<Bytes>, platform: Option<Platform>) -> Option<ResolvedImage> {
        let Content::Manifest(manifest) = &self.content else {
            return None;
        };
        Some(ResolvedImage {
            manifest_digest: self.digest,
            manifest_bytes: self.bytes.clone(),
            manifest: ImageManifest::clone(manifest),
            media_type: self.media_type.clone(),
            index_bytes,
            platform,
        })
    }
}

impl Source {
    /// Finds the manifest for `platform` (`os/architecture[/variant]`; `None` is this machine). One request per document: one for
    /// an image, two for an index, one more for each index within it. What the name itself names is asked for once in the life of this source.
    ///
    /// An image that is not in an index is taken as it is; its configuration tells its platform. So is the only image of an index that
    /// does not say its platform; of several, the configurations decide.
    pub async fn resolve(&self, platform: Option<&str>) -> Result<ResolvedImage, Error> {
        let wanted = match platform {
            None => platform::Wanted::host(),
            Some(text) => platform::Wanted::parse(text).ok_or_else(|| Error::PlatformText {
                text: text.to_owned(),
            })?,
        };
        let top = self.inner.top().await?;
        if let Some(image) = top.image(None, None) {
            return Ok(image);
        }
        let mut document = top.clone();
        let mut found = None;
        // An entry may hide what it is: then what is behind it is an index once more.
        for _ in 0..MAX_DEPTH {
            let Some(flat) = nested::flatten(&self.inner, &document).await? else {
                break;
            };
            let manifests = flat.index.manifests();
            let chosen = match choose(&self.inner, &wanted, manifests).await? {
                Ok(position) => manifests.get(position).cloned(),
                Err(available) => {
                    return Err(Error::Platform {
                        place: self.inner.place().to_owned(),
                        wanted: platform.map_or_else(|| wanted.to_string(), str::to_owned),
                        available,
                    });
                }
            };
            let Some(child) = chosen else { break };
            found = child.platform().clone().or(found);
            document = self.inner.child(&child).await?;
        }
        let image = document.image(Some(top.bytes.clone()), found);
        image.ok_or_else(|| {
            let reason = format!("more than {MAX_DEPTH} indexes within each other");
            self.inner.manifest_error(format!("index {}", top.digest), reason)
        })
    }

    /// Position of the entry of `index` for `platform` (`os/architecture[/variant]`; `None` is this machine), as [`Source::resolve`]
    /// would choose it; `None` if there is none or the text is no platform. Asks for configurations only where the entries do not
    /// say their platforms.
    pub async fn choose(
        &self,
        index: &ResolvedIndex,
        platform: Option<&str>,
    ) -> Result<Option<usize>, Error> {
        let wanted = match platform {
            None => platform::Wanted::host(),
            Some(text) => match platform::Wanted::parse(text) {
                Some(wanted) => wanted,
                None => return Ok(None),
            },
        };
        Ok(choose(&self.inner, &wanted, index.index.manifests()).await?.ok())
    }

    /// The index that the name names, those within it laid out flat; `None` if it names an image. Shares its first request with
    /// [`Source::resolve`].
    pub async fn index(&self) -> Result<Option<ResolvedIndex>, Error> {
        let top = self.inner.top().await?;
        let flat = nested::flatten(&self.inner, top).await?;
        Ok(flat.map(|flat| ResolvedIndex {
            digest: top.digest,
            bytes: flat.bytes,
            index: flat.index,
            media_type: top.media_type.clone(),
        }))
    }

    /// The image that one entry of [`Source::index`] names.
    pub async fn image(&self, descriptor: &Descriptor) -> Result<ResolvedImage, Error> {
        let document = self.inner.child(descriptor).await?;
        let image = document.image(None, descriptor.platform().clone());
        image.ok_or_else(|| {
            self.inner.manifest_error(
                format!("manifest {}", document.digest),
                "it is an index, not an image",
            )
        })
    }

    /// The configuration of an image, its digest checked: the bytes and what they say.
    pub async fn config(&self, image: &ResolvedImage) -> Result<(Bytes, Configuration), Error> {
        self.inner.config(&image.manifest).await
    }
}

impl Inner {
    async fn config(self: &Arc<Self>, manifest: &ImageManifest) -> Result<(Bytes, Configuration), Error> {
        let descriptor = manifest.config();
        let bytes = Blob::new(self, descriptor)?.read_verified(MAX_CONFIG).await?;
        let config = document::configuration(&bytes)
            .map_err(|error| self.manifest_error(format!("configuration {}", descriptor.digest()), error))?;
        Ok((bytes, config))
    }

    /// What is behind an entry that does not say its platform.
    async fn look(self: &Arc<Self>, entry: &Descriptor) -> Result<Behind, Error> {
        let document = match self.child(entry).await {
            Ok(document) => document,
            Err(error) if says_no(&error) => return Ok(Behind::NoImage),
            Err(error) => return Err(error),
        };
        let Content::Manifest(manifest) = &document.content else {
            return Ok(Behind::Unknown);
        };
        match self.config(manifest).await {
            // The configuration of an artifact knows nothing of its layers.
            Ok((_, config)) if config.diff_ids.len() != manifest.layers().len() => Ok(Behind::NoImage),
            Ok((_, config)) if config.architecture.is_empty() => Ok(Behind::Unknown),
            Ok((_, config)) => Ok(Behind::Image(config)),
            Err(error) if says_no(&error) => Ok(Behind::NoImage),
            Err(error) => Err(error),
        }
    }
}

/// What an entry of an index leads to.
#[derive(Debug)]
enum Behind {
    /// An image that says its platform.
    Image(Configuration),
    /// An image that does not, or an index.
    Unknown,
    /// Something else, or nothing.
    NoImage,
}

/// Whether an error says that there is no image, rather than that nobody knows.
fn says_no(error: &Error) -> bool {
    error.is_not_found()
        || matches!(
            error,
            Error::Manifest { .. } | Error::TooLarge { .. } | Error::Layout { .. } | Error::Foreign { .. }
        )
}

/// Position of the entry for a platform; else the platforms that there are. Entries that say their platform come first; of the others,
/// the only image of the index is taken as it is, and among several the configurations decide.
async fn choose(
    source: &Arc<Inner>,
    wanted: &platform::Wanted,
    manifests: &[Descriptor],
) -> Result<Result<usize, String>, Error> {
    if let Some(position) = wanted.choose(manifests) {
        return Ok(Ok(position));
    }
    let images = || {
        manifests
            .iter()
            .enumerate()
            .filter(|(_, entry)| !platform::is_statement(entry))
    };
    let silent = || images().filter(|(_, entry)| !platform::says_platform(entry));
    if let (Some((only, _)), 1) = (silent().next(), images().count()) {
        return Ok(Ok(only));
    }
    let mut best: Option<((bool, platform::Rank), usize)> = None;
    let mut unknown = None;
    let mut found = Vec::new();
    for (position, entry) in silent().take(MAX_SILENT) {
        match source.look(entry).await? {
            Behind::Image(config) => {
                let rank = wanted.rank(&config.os, &config.architecture, &config.variant);
                let rank = rank.map(|rank| (!platform::is_artifact(entry), rank));
                if let Some(rank) = rank
                    && best.is_none_or(|(known, _)| rank > known)
                {
                    best = Some((rank, position));
                }
                let text = [config.os, config.architecture, config.variant];
                found.push((position, text.join("/").trim_end_matches('/').to_owned()));
            }
            Behind::Unknown => unknown = unknown.or(Some(position)),
            Behind::NoImage => found.push((position, "(no image)".to_owned())),
        }
    }
    let chosen = best.map(|(_, position)| position).or(unknown);
    Ok(chosen.ok_or_else(|| platform::list(manifests, &found)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(media_type: Option<&str>, json: &str) -> Result<Document, Error> {
        Document::parse(
            "here",
            "latest",
            media_type,
            Bytes::copy_from_slice(json.as_bytes()),
        )
    }

    #[test]
    fn documents_by_their_type() {
        let config = format!(r#"{{"mediaType":"c","digest":"{}","size":1}}"#, Digest::EMPTY);
        let manifest = format!(r#"{{"schemaVersion":2,"config":{config},"layers":[]}}"#);
        let index = r#"{"schemaVersion":2,"manifests":[]}"#;
        for (media_type, json, is_index) in [
            (Some(media::OCI_MANIFEST), manifest.as_str(), false),
            (Some(media::DOCKER_MANIFEST), &manifest, false),
            (None, &manifest, false),
            (Some("application/octet-stream"), &manifest, false),
            (Some(media::OCI_INDEX), index, true),
            (Some(media::DOCKER_INDEX), index, true),
            (None, index, true),
            (
                None,
                r#"{"schemaVersion":2,"manifests":null,"mediaType":null}"#,
                true,
            ),
            (
                Some(media::OCI_INDEX),
                r#"{"mediaType":"","manifests":null}"#,
                true,
            ),
            (None, &manifest.replace("[]", "null"), false),
            (None, &manifest.replace("[]", "[],\"manifests\":null"), false),
        ] {
            let document = parse(media_type, json).unwrap();
            assert_eq!(
                matches!(document.content, Content::Index(_)),
                is_index,
                "{media_type:?} {json}"
            );
            assert_eq!(document.digest, Digest::of(json.as_bytes()));
        }
    }

    #[test]
    fn odd_documents_are_refused() {
        let inside = format!(
            r#"{{"mediaType":"{}","manifests":[],"schemaVersion":2}}"#,
            media::OCI_INDEX
        );
        for (media_type, json, reason) in [
            (None, "", "no JSON"),
            (None, "{}", "without a media type"),
            (Some(media::OCI_MANIFEST), inside.as_str(), "calls itself"),
            (None, r#"{"manifests":[],"layers":[]}"#, "both"),
            (Some(media::OCI_MANIFEST), "{}", "missing field"),
            (None, r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1"),
            (None, r#"{"mediaType":"text/plain"}"#, "no image manifest"),
        ] {
            let error = parse(media_type, json).expect_err(json).to_string();
            assert!(
                error.contains(reason) && error.contains("here"),
                "{json}: {error}"
            );
        }
    }
}
