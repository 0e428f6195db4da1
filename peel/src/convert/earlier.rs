//! What the target's name holds from an earlier conversion: layers that were made of the same layer in the same way are used again,
//! without reading, converting or sending anything.
//!
//! Every converted descriptor says what it was made of ([`SOURCE`]) and how ([`RECIPE`]). The writers give the same bytes for the
//! same input and options, so a layer that agrees in both is what a conversion would make. That an earlier image tells the truth
//! is taken on trust: whoever can write to the target could as well replace what is written now. `--reconvert` trusts
//! nothing.

use std::collections::HashMap;

use oci_spec::image::{Descriptor, ImageManifest};
use peel_image::write::{Dialect, Format, Options};
use peel_image::{Digest, Hasher};
use peel_registry::{ClientOptions, Error, ImageName, ResolvedImage, Source};

use super::toc_image;
use crate::layers;

/// Annotation: digest of the layer that a layer was made of.
pub const SOURCE: &str = "dev.peel.source.digest";
/// Annotation: digest of everything else that decides what a layer is made into: format, options, files that come first, and the
/// versions of the programs.
pub const RECIPE: &str = "dev.peel.source.options";

/// Most images of the target's index that are looked at.
const IMAGES_MAX: usize = 64;

/// What the target's name holds.
#[derive(Debug, Default)]
pub struct Earlier {
    source: Option<Source>,
    layers: HashMap<(Digest, Digest), Made>,
    /// The tables of contents beside it, by the layer that each belongs to.
    tocs: HashMap<Digest, Descriptor>,
}

/// A layer that was made earlier.
#[derive(Debug, Clone)]
pub struct Made {
    /// Its descriptor.
    pub descriptor: Descriptor,
    /// Its DiffID.
    pub diff_id: Digest,
}

impl Earlier {
    /// Looks at `target`, and at the image of tables of contents beside it. Whatever cannot be read is not used.
    pub async fn load(target: &ImageName, tocs: Option<&ImageName>, options: &ClientOptions) -> Self {
        let mut earlier = Self::default();
        if let Err(error) = earlier.read(target, options).await {
            tracing::debug!(%error, "{target}: nothing of it is used again");
        }
        if let Some(name) = tocs
            && let Err(error) = earlier.read_tocs(name, options).await
        {
            tracing::debug!(%error, "{name}: nothing of it is used again");
        }
        earlier
    }

    async fn read(&mut self, target: &ImageName, options: &ClientOptions) -> Result<(), Error> {
        let source = Source::open(target, options).await?;
        let images = match source.index().await? {
            None => vec![source.resolve(None).await?],
            Some(index) => {
                let mut images = Vec::new();
                for entry in index.index.manifests().iter().take(IMAGES_MAX) {
                    images.extend(source.image(entry).await.ok());
                }
                images
            }
        };
        for image in images {
            let made = |descriptor: &Descriptor| key(descriptor).is_some();
            if image.manifest.layers().iter().any(made)
                && let Err(error) = self.add(&source, &image).await
            {
                tracing::debug!(%error, image = %image.manifest_digest, "not used again");
            }
        }
        self.source = Some(source);
        Ok(())
    }

    async fn add(&mut self, source: &Source, image: &ResolvedImage) -> Result<(), Error> {
        let (bytes, _) = source.config(image).await?;
        let diff_ids = super::diff_ids(&bytes);
        if diff_ids.len() != image.manifest.layers().len() {
            return Ok(());
        }
        for (descriptor, diff_id) in image.manifest.layers().iter().zip(diff_ids) {
            if let Some(key) = key(descriptor) {
                let descriptor = descriptor.clone();
                self.layers.insert(key, Made { descriptor, diff_id });
            }
        }
        Ok(())
    }

    async fn read_tocs(&mut self, name: &ImageName, options: &ClientOptions) -> Result<(), Error> {
        let source = Source::open(name, options).await?;
        let image: ImageManifest = source.resolve(None).await?.manifest;
        let tocs = image.layers().iter().filter_map(|toc| {
            let layer = layers::annotation(toc, toc_image::LAYER_DIGEST)?;
            Some((layer.parse().ok()?, toc.clone()))
        });
        self.tocs = tocs.collect();
        Ok(())
    }

    /// The layer that was made of `source` by `recipe`.
    pub fn layer(&self, source: Digest, recipe: Digest) -> Option<&Made> {
        self.layers.get(&(source, recipe))
    }

    /// The table of contents of a layer, in the image beside.
    pub fn toc(&self, layer: &Digest) -> Option<&Descriptor> {
        self.tocs.get(layer)
    }

    /// Where the earlier image can be read.
    pub fn source(&self) -> Option<&Source> {
        self.source.as_ref()
    }
}

/// What a layer was made of and how, if it says so.
fn key(descriptor: &Descriptor) -> Option<(Digest, Digest)> {
    let digest = |name| layers::annotation(descriptor, name)?.parse().ok();
    Some((digest(SOURCE)?, digest(RECIPE)?))
}

/// A digest of all that decides what a layer is made into, apart from the layer itself.
pub fn recipe(options: &Options) -> Digest {
    let mut hasher = Hasher::new();
    let version = env!("CARGO_PKG_VERSION");
    let how = format!(
        "peel {version}\n{}\n{:?}\n",
        format_text(options.format),
        options.orphans
    );
    hasher.update(how.as_bytes());
    for path in &options.prioritized {
        hasher.update(format!("{} ", path.len()).as_bytes());
        hasher.update(path);
    }
    hasher.finish()
}

fn format_text(format: Format) -> String {
    match format {
        Format::Estargz {
            chunk_size,
            min_chunk_size,
            level,
            external_toc,
            keep_diff_id,
        } => format!(
            "estargz {level} chunk {chunk_size} {min_chunk_size} external {external_toc} keep {keep_diff_id}"
        ),
        Format::ZstdChunked {
            dialect,
            chunk_size,
            level,
        } => {
            let dialect = match dialect {
                Dialect::Podman => "podman",
                Dialect::Stargz => "stargz",
            };
            format!("zstdchunked {dialect} {level} chunk {chunk_size}")
        }
        Format::Gzip { level } => format!("gzip {level}"),
        Format::Zstd { level } => format!("zstd {level}"),
        Format::Plain => "plain".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recipes_differ_by_all_that_matters() {
        let plain = |format| Options {
            format,
            ..Options::default()
        };
        let first = |paths: &[&str]| Options {
            prioritized: paths.iter().map(|path| path.as_bytes().to_vec()).collect(),
            ..Options::default()
        };
        let all = [
            plain(Format::ESTARGZ),
            plain(Format::Gzip { level: 6 }),
            plain(Format::Gzip { level: 7 }),
            plain(Format::Zstd { level: 6 }),
            plain(Format::Plain),
            plain(Format::zstd_chunked(Dialect::Podman)),
            plain(Format::zstd_chunked(Dialect::Stargz)),
            first(&["a", "b"]),
            first(&["b", "a"]),
            first(&["ab"]),
            first(&["a 1 b"]),
        ];
        let recipes: std::collections::HashSet<Digest> = all.iter().map(recipe).collect();
        assert_eq!(recipes.len(), all.len());
        let threads = Options {
            threads: 1,
            ..Options::default()
        };
        assert_eq!(recipe(&threads), recipe(&Options::default()));
    }
}
