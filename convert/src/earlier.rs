//! What the target's name holds from an earlier conversion: layers that were made of the same layer in the same way are used again,
//! without reading, converting or sending anything.
//!
//! Every converted descriptor says what it was made of ([`SOURCE`]) and how ([`RECIPE`]). The writers give the same bytes for the
//! same input and options, so a layer that agrees in both is what a conversion would make. Where its prioritized files end is
//! not kept, only the order that was made of that for the whole image; so layers with such files are used again only together
//! with all others of their image. That an earlier image tells the truth
//! is taken on trust: whoever can write to the target could as well replace what is written now. `--reconvert` trusts
//! nothing.

use std::collections::HashMap;

use oci_spec::image::{Descriptor, ImageManifest};
use peel_image::{Digest, Hasher, annotations};
use peel_registry::{ClientOptions, Error, ImageName, ResolvedImage, Source};
use peel_writer::{Dialect, Format, Options};

use super::plan::Plan;

/// Annotation: digest of the layer that a layer was made of.
pub const SOURCE: &str = "dev.peel.source.digest";
/// Annotation: digest of everything else that decides what a layer is made into: format, options, files that come first, and the
/// versions of the programs.
pub const RECIPE: &str = "dev.peel.source.options";

/// Raised whenever the writer makes other bytes of the same input with the same options: what was made with another number is not
/// used again.
const WRITER: u32 = 2;
/// Most images of the target's index that are looked at.
const IMAGES_MAX: usize = 64;

/// What a layer was made of, and how.
pub type Key = (Digest, Digest);

/// What the target's name holds.
#[derive(Debug, Default)]
pub struct Earlier {
    layers: HashMap<Key, Made>,
    images: Vec<MadeImage>,
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

/// An image that was made earlier.
#[derive(Debug, Clone)]
pub struct MadeImage {
    keys: Vec<Key>,
    /// Digests of its layers.
    pub layers: Vec<Digest>,
    /// The order in which a start reads across its layers.
    pub order: Option<String>,
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
        Ok(())
    }

    async fn add(&mut self, source: &Source, image: &ResolvedImage) -> Result<(), Error> {
        let config = source.blob(image.manifest.config())?;
        let diff_ids = super::diff_ids(&config.read_verified(super::CONFIG_MAX).await?);
        if diff_ids.len() != image.manifest.layers().len() {
            return Ok(());
        }
        let mut keys = Vec::new();
        let mut digests: Vec<Digest> = Vec::new();
        for (descriptor, diff_id) in image.manifest.layers().iter().zip(diff_ids) {
            if let (Some(key), Ok(digest)) = (key(descriptor), descriptor.digest().to_string().parse()) {
                let descriptor = descriptor.clone();
                self.layers.insert(key, Made { descriptor, diff_id });
                keys.push(key);
                digests.push(digest);
            }
        }
        let order = image.manifest.annotations().as_ref();
        let order = order
            .and_then(|all| all.get(annotations::PREFETCH_ORDER))
            .cloned();
        if keys.len() == image.manifest.layers().len() {
            self.images.push(MadeImage {
                keys,
                layers: digests,
                order,
            });
        }
        Ok(())
    }

    async fn read_tocs(&mut self, name: &ImageName, options: &ClientOptions) -> Result<(), Error> {
        let source = Source::open(name, options).await?;
        let image: ImageManifest = source.resolve(None).await?.manifest;
        let tocs = image.layers().iter().filter_map(|toc| {
            let layer = peel_layers::annotation(toc, annotations::LAYER_DIGEST)?;
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

    /// The image all of whose layers were made so.
    pub fn image(&self, keys: &[Key]) -> Option<&MadeImage> {
        self.images.iter().find(|image| image.keys == keys)
    }
}

/// What a layer was made of and how, if it says so.
fn key(descriptor: &Descriptor) -> Option<Key> {
    let digest = |name| peel_layers::annotation(descriptor, name)?.parse().ok();
    Some((digest(SOURCE)?, digest(RECIPE)?))
}

/// A digest of all that decides what a layer is made into, apart from the layer itself. `plan` is that of the whole image, if files of
/// this layer come first.
pub fn recipe(options: &Options, plan: Option<Digest>) -> Digest {
    let mut hasher = Hasher::new();
    let how = format!(
        "peel {} writer {WRITER}\n{}\n{}\n{:?}\n",
        env!("CARGO_PKG_VERSION"),
        options.format.compressor().unwrap_or_default(),
        format_text(options.format),
        options.orphans
    );
    hasher.update(how.as_bytes());
    if let Some(plan) = plan {
        hasher.update(plan.as_bytes());
    }
    for path in &options.prioritized {
        hasher.update(format!("{} ", path.len()).as_bytes());
        hasher.update(path);
    }
    hasher.finish()
}

/// A digest of the order of all files of a plan.
pub fn plan_digest(plan: &Plan) -> Digest {
    let mut hasher = Hasher::new();
    for file in &plan.files {
        for path in [&file.path, &file.content] {
            let path = path.as_bytes();
            hasher.update(format!("{} {} ", file.layer, path.len()).as_bytes());
            hasher.update(path);
        }
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
        let recipes: std::collections::HashSet<Digest> =
            all.iter().map(|options| recipe(options, None)).collect();
        assert_eq!(recipes.len(), all.len());
        let planned = |paths: &[&str]| {
            let paths: Vec<_> = paths
                .iter()
                .map(|path| peel_image::path::EntryPath::clean(path.as_bytes()).unwrap())
                .collect();
            recipe(
                &first(&["a"]),
                Some(plan_digest(&Plan::for_every_layer(&paths, 2))),
            )
        };
        assert_ne!(planned(&["a", "b"]), planned(&["b", "a"]));
        assert_eq!(planned(&["a", "b"]), planned(&["a", "b"]));
        let threads = Options {
            threads: 1,
            ..Options::default()
        };
        assert_eq!(recipe(&threads, None), recipe(&Options::default(), None));
    }
}
