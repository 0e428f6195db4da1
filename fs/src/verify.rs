//! Checks of whole layers: what no check of single chunks can find.
//!
//! A lazy start trusts the table of contents that the manifest vouches for. Whether the layer's tar stream has the DiffID
//! that the configuration lists, and whether it says the same as the table of contents, only somebody who has all of the
//! layer can tell. [`crate::load`] asks for that before a start (`eager`), [`background`] afterwards. What was found is kept
//! as a verdict on a [`Subject`], so that it is found once; a layer that was found wrong is not loaded again.

pub(crate) mod background;

use std::time::SystemTime;

use oci_spec::image::Descriptor;
use peel_image::Digest;
use peel_image::layer::LayerIndex;
use peel_image::views;
use peel_store::{LayerVerdict, Store};

/// What a verdict is about: everything that was compared. The same blob under another table of contents or another DiffID is
/// another subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Subject {
    /// Digest of the layer blob.
    pub(crate) blob: Digest,
    /// Name of its index in the store: it stands for the table of contents.
    pub(crate) index: Digest,
    /// Digest of the uncompressed layer by the configuration.
    pub(crate) diff_id: Digest,
}

impl Subject {
    fn key(&self) -> Digest {
        let Self { blob, index, diff_id } = self;
        Digest::of(format!("layer {blob} by {index} is {diff_id}").as_bytes())
    }

    /// What is known of it. A record that cannot be read is as good as none.
    pub(crate) fn verdict(&self, store: &Store) -> Option<LayerVerdict> {
        store.verdict(&self.key()).ok().flatten()
    }

    /// What is known to be wrong with it.
    pub(crate) fn fault(&self, store: &Store) -> Option<String> {
        self.verdict(store)?.fault
    }

    /// Whether it was found right, its blob included.
    pub(crate) fn is_verified(&self, store: &Store) -> bool {
        self.verdict(store)
            .is_some_and(|verdict| verdict.blob && verdict.fault.is_none())
    }

    /// Keeps a verdict. Without it the layer is only checked again.
    pub(crate) fn keep(&self, store: &Store, verdict: &LayerVerdict) {
        if let Err(error) = store.put_verdict(&self.key(), verdict) {
            tracing::warn!(layer = %self.blob, %error, "the check of this layer was not kept; it is made again");
        }
    }
}

/// What a check of a whole layer came to, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerCheck {
    /// What it came to.
    pub verdict: LayerVerdict,
    /// When; `None` if the clock of the disk makes no sense.
    pub when: Option<SystemTime>,
}

/// What is known in `store` of the layer that `descriptor` names, whose uncompressed digest is `diff_id` by the configuration:
/// `None` if nobody checked it, or if its digest is none. A fault counts before anything that was found right.
pub fn layer_check(store: &Store, descriptor: &Descriptor, diff_id: Digest) -> Option<LayerCheck> {
    let blob: Digest = descriptor.digest().to_string().parse().ok()?;
    let candidate = crate::load::candidate(descriptor);
    // As it is served: by its table of contents, or whole.
    let listed = candidate.vouched().is_ok().then(|| candidate.key(&blob));
    let mut checks = listed.into_iter().chain([blob]).filter_map(|index| {
        let subject = Subject { blob, index, diff_id };
        let verdict = subject.verdict(store)?;
        let when = store.verdict_time(&subject.key());
        Some(LayerCheck { verdict, when })
    });
    let first = checks.next()?;
    match first.verdict.fault {
        None => Some(
            checks
                .find(|check| check.verdict.fault.is_some())
                .unwrap_or(first),
        ),
        Some(_) => Some(first),
    }
}

/// The layers of an image that `store` knows to be wrong, and what is wrong with each, in a sentence. None for an image that it does not
/// know, or whose record makes no sense.
pub fn image_faults(store: &Store, manifest: &Digest) -> Result<Vec<(Digest, String)>, peel_store::Error> {
    let Some(record) = store.image(manifest)? else {
        return Ok(Vec::new());
    };
    let manifest = peel_registry::document::manifest(&record.manifest);
    let (Ok(manifest), Ok(diff_ids)) = (manifest, crate::load::diff_ids(&record.config)) else {
        return Ok(Vec::new());
    };
    let layers = manifest.layers().iter().zip(diff_ids);
    let faults = layers.filter_map(|(descriptor, diff_id)| {
        let fault = layer_check(store, descriptor, diff_id)?.verdict.fault?;
        Some((descriptor.digest().to_string().parse().ok()?, fault))
    });
    Ok(faults.collect())
}

/// The digest by which the manifest names a layer's table of contents, whichever way.
pub(crate) fn vouched(descriptor: &Descriptor) -> Option<Digest> {
    crate::load::candidate(descriptor).digest()
}

fn annotation<'a>(descriptor: &'a Descriptor, name: &str) -> Option<&'a String> {
    descriptor.annotations().as_ref()?.get(name)
}

/// What is wrong with a layer whose tar stream has another digest than the configuration lists.
pub(crate) fn wrong_diff_id(found: &Digest, expected: &Digest) -> String {
    format!("its uncompressed bytes have the digest {found}, the configuration says {expected}")
}

/// What is wrong with a layer whose table of contents `toc` says something else than its tar stream.
pub(crate) fn disagreement(
    toc: &Digest,
    listed: &LayerIndex,
    diff_id: &Digest,
    unpacked: &LayerIndex,
) -> Option<String> {
    let views::Difference { path, what } = views::compare(listed, unpacked).err()?;
    Some(format!(
        "its table of contents {toc} is not what its tar stream {diff_id} holds: they disagree about {path}: {what}; \
         a lazy mount shows other files than a tool that unpacks the layer"
    ))
}
