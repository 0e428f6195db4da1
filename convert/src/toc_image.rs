//! The image that holds tables of contents which are not in their layers: `NAME:TAG-esgztoc` beside `NAME:TAG` (stargz-snapshotter,
//! "External TOC").
//!
//! An OCI manifest with an empty configuration; each of its layers is the gzip blob of one table of contents and says in an
//! annotation which layer it belongs to. All platforms of an image share one, sorted by digest.

use std::collections::BTreeMap;

use anyhow::bail;
use peel_image::annotations::{LAYER_DIGEST, TOC_IMAGE_SUFFIX};
use peel_image::{Digest, media};
use peel_registry::{ImageName, Reference};
use serde_json::{Value, json};

/// The configuration.
pub const CONFIG: &[u8] = b"{}";

/// A table of contents as the manifest names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Toc {
    /// Digest of the gzip blob.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
    /// The layer that it belongs to.
    pub layer: Digest,
}

/// The name beside `target`. Readers find it by the tag, so there must be one.
pub fn name(target: &ImageName) -> anyhow::Result<ImageName> {
    let suffixed = |tag: &str| format!("{tag}{TOC_IMAGE_SUFFIX}");
    match target {
        ImageName::Registry(Reference {
            registry,
            repository,
            tag: Some(tag),
            digest: None,
        }) => Ok(ImageName::Registry(Reference {
            registry: registry.clone(),
            repository: repository.clone(),
            tag: Some(suffixed(tag)),
            digest: None,
        })),
        ImageName::Layout { dir, tag: Some(tag) } => Ok(ImageName::Layout {
            dir: dir.clone(),
            tag: Some(suffixed(tag)),
        }),
        _ => bail!(
            "{target}: with --estargz-external-toc the target needs a tag: the tables of contents go to TAG{TOC_IMAGE_SUFFIX} beside it"
        ),
    }
}

/// The manifest.
pub fn manifest(tocs: &[Toc]) -> anyhow::Result<Vec<u8>> {
    // Layers that occur twice have one table; two layers never share one, but the annotation has room for one only.
    let sorted: BTreeMap<(String, Digest), u64> = tocs
        .iter()
        .map(|toc| ((toc.digest.to_string(), toc.layer), toc.size))
        .collect();
    let layers: Vec<Value> = sorted
        .into_iter()
        .map(|((digest, layer), size)| {
            json!({
                "mediaType": media::OCI_LAYER_GZIP,
                "digest": digest,
                "size": size,
                "annotations": { LAYER_DIGEST: layer.to_string() },
            })
        })
        .collect();
    Ok(serde_json::to_vec(&json!({
        "schemaVersion": 2,
        "mediaType": media::OCI_MANIFEST,
        "config": {
            "mediaType": media::OCI_CONFIG,
            "digest": Digest::of(CONFIG).to_string(),
            "size": CONFIG.len(),
        },
        "layers": layers,
    }))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use peel_testkit::vectors;

    #[test]
    fn names_beside_the_target() {
        for (target, expected) in [
            ("localhost:5000/a/b:v1", Some("localhost:5000/a/b:v1-esgztoc")),
            ("localhost:5000/a/b", Some("localhost:5000/a/b:latest-esgztoc")),
            ("oci:/x:v1", Some("oci:/x:v1-esgztoc")),
            ("oci:/x", None),
            (
                "localhost:5000/a@sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a",
                None,
            ),
            ("oci-archive:/x.tar:v1", None),
        ] {
            let result = name(&target.parse().unwrap());
            match expected {
                Some(expected) => assert_eq!(result.unwrap(), expected.parse().unwrap(), "{target}"),
                None => assert!(
                    result.unwrap_err().to_string().contains("needs a tag"),
                    "{target}"
                ),
            }
        }
    }

    #[test]
    fn the_shape_is_upstreams() {
        let toc = |name: &str, size| Toc {
            digest: Digest::of(name.as_bytes()),
            size,
            layer: Digest::of(format!("layer of {name}").as_bytes()),
        };
        let (one, two) = (toc("one", 1), toc("two", 2));
        let made: Value = serde_json::from_slice(&manifest(&[two, one, two]).unwrap()).unwrap();
        let blob = "sha256:f80b414621def3e4d31281e3d97e0bc52c99d7c8b7e60dfdb71042e71cf67d69";
        let bytes = std::fs::read(vectors::blob_path(blob)).unwrap();
        let mut upstream: Value = serde_json::from_slice(&bytes).unwrap();
        let mut expected = [one, two];
        expected.sort_by_key(|toc| toc.digest.to_string());
        let layers = upstream["layers"].as_array_mut().unwrap();
        layers.truncate(2);
        for (layer, toc) in layers.iter_mut().zip(expected) {
            layer["digest"] = json!(toc.digest.to_string());
            layer["size"] = json!(toc.size);
            layer["annotations"][LAYER_DIGEST] = json!(toc.layer.to_string());
        }
        assert_eq!(made, upstream);
    }
}
