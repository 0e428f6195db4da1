//! Manifests, configurations and indexes of converted images.
//!
//! All are edited as JSON values, so that fields which nobody here knows survive. The media types become OCI's: Docker's
//! manifest has no annotations, and without those no reader could trust a TOC.

use std::collections::BTreeMap;

use anyhow::{Context, bail};
use oci_spec::image::Descriptor;
use peel_image::{Digest, annotations, media};
use serde_json::{Map, Value, json};

/// Annotations with these beginnings describe a blob; they must not be carried over to another.
const OF_THE_BLOB: [&str; 5] = [
    "containerd.io/snapshot/stargz/",
    "io.containers.estargz.",
    "io.containers.zstd-chunked.",
    "io.github.containers.zstd-chunked.",
    "dev.peel.",
];
/// Fields of a descriptor that describe what it names, beside media type, digest and size.
const OF_THE_CONTENT: [&str; 3] = ["data", "urls", "artifactType"];
/// The name that a layout gives an image is not the image's.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// On the entries of an index: the layers are in zstd, so that readers without it choose another entry (containers/image,
/// `OCI1InstanceAnnotationCompressionZSTD`).
const ZSTD: &str = "io.github.containers.compression.zstd";

/// A layer as the new manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLayer {
    /// Blob digest.
    pub digest: Digest,
    /// Blob size in bytes.
    pub size: u64,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
    /// OCI's media type of the blob.
    pub media_type: String,
    /// What the descriptor says of the blob.
    pub annotations: BTreeMap<String, String>,
}

impl NewLayer {
    /// End of the prioritized files in the blob, 0 if there are none.
    pub fn prefetch_end(&self) -> u64 {
        let end = self.annotations.get(annotations::PREFETCH_END);
        end.and_then(|text| text.parse().ok()).unwrap_or(0)
    }
}

/// The annotations of a descriptor that describe its blob.
pub fn of_the_blob(descriptor: &Descriptor) -> BTreeMap<String, String> {
    let all = descriptor.annotations().iter().flatten();
    all.filter(|(name, _)| is_of_the_blob(name))
        .map(|(name, value)| (name.clone(), value.clone()))
        .collect()
}

fn is_of_the_blob(name: &str) -> bool {
    OF_THE_BLOB.iter().any(|start| name.starts_with(start))
}

/// The configuration with other diff ids; everything else stays.
pub fn config(source: &[u8], layers: &[NewLayer]) -> anyhow::Result<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(source).context("configuration of the image")?;
    let Value::Object(fields) = &mut config else {
        bail!("the configuration of the image is not a JSON object");
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let unchanged = fields
        .get("rootfs")
        .and_then(|rootfs| rootfs.get("diff_ids"))
        .is_some_and(|old| *old == json!(diff_ids));
    if unchanged {
        // The same bytes, and so the same image id.
        return Ok(source.to_vec());
    }
    fields.insert(
        "rootfs".to_owned(),
        json!({"type": "layers", "diff_ids": diff_ids}),
    );
    Ok(serde_json::to_vec(&config)?)
}

/// The manifest with other layers and another configuration.
pub fn manifest(
    source: &[u8],
    config: &[u8],
    layers: &[NewLayer],
    order: Option<String>,
) -> anyhow::Result<Vec<u8>> {
    let mut manifest: Value = serde_json::from_slice(source).context("manifest of the image")?;
    let Value::Object(fields) = &mut manifest else {
        bail!("the manifest of the image is not a JSON object");
    };
    let old = match fields.remove("layers") {
        Some(Value::Array(old)) if old.len() == layers.len() => old,
        None | Some(Value::Null) if layers.is_empty() => Vec::new(),
        _ => bail!("the manifest of the image has not the layers that were converted"),
    };
    let new: Vec<Value> = old
        .iter()
        .zip(layers)
        .map(|(old, new)| descriptor(old, new))
        .collect();
    fields.insert("schemaVersion".to_owned(), json!(2));
    fields.insert("mediaType".to_owned(), json!(media::OCI_MANIFEST));
    fields.insert(
        "config".to_owned(),
        json!({
            "mediaType": media::OCI_CONFIG,
            "digest": Digest::of(config).to_string(),
            "size": config.len(),
        }),
    );
    fields.insert("layers".to_owned(), Value::Array(new));
    let mut kept = kept_annotations(fields.get("annotations"));
    if let Some(order) = order {
        kept.insert(annotations::PREFETCH_ORDER.to_owned(), json!(order));
    }
    annotate(fields, kept);
    Ok(serde_json::to_vec(&manifest)?)
}

fn descriptor(old: &Value, new: &NewLayer) -> Value {
    let mut annotations = kept_annotations(old.get("annotations"));
    for (name, value) in &new.annotations {
        annotations.insert(name.clone(), json!(value));
    }
    let mut fields = old.as_object().cloned().unwrap_or_default();
    for of_the_old in OF_THE_CONTENT {
        fields.remove(of_the_old);
    }
    fields.insert("mediaType".to_owned(), json!(new.media_type));
    fields.insert("digest".to_owned(), json!(new.digest.to_string()));
    fields.insert("size".to_owned(), json!(new.size));
    annotate(&mut fields, annotations);
    Value::Object(fields)
}

fn kept_annotations(old: Option<&Value>) -> Map<String, Value> {
    let old = old.and_then(Value::as_object).cloned().unwrap_or_default();
    old.into_iter()
        .filter(|(name, value)| value.is_string() && name != REF_NAME && !is_of_the_blob(name))
        .collect()
}

fn annotate(fields: &mut Map<String, Value>, annotations: Map<String, Value>) {
    fields.remove("annotations");
    if !annotations.is_empty() {
        fields.insert("annotations".to_owned(), Value::Object(annotations));
    }
}

/// A converted image as an index names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Instance {
    /// Position of its entry in the source's index.
    pub position: usize,
    /// Digest of the new manifest.
    pub digest: Digest,
    /// Its size in bytes.
    pub size: u64,
}

/// The index with only these entries, in its own order; they keep their platforms and all that does not describe the manifest
/// that was. `zstd` tells readers that the layers are in zstd.
pub fn index(source: &[u8], instances: &[Instance], zstd: bool) -> anyhow::Result<Vec<u8>> {
    let mut index: Value = serde_json::from_slice(source).context("index of the image")?;
    let Value::Object(fields) = &mut index else {
        bail!("the index of the image is not a JSON object");
    };
    let old = match fields.remove("manifests") {
        Some(Value::Array(old)) => old,
        _ => bail!("the index of the image has no manifests"),
    };
    let mut new = Vec::new();
    for (position, mut entry) in old.into_iter().enumerate() {
        let Some(instance) = instances.iter().find(|instance| instance.position == position) else {
            continue;
        };
        let Value::Object(entry_fields) = &mut entry else {
            bail!("entry {position} of the index is not a JSON object");
        };
        for of_the_old in OF_THE_CONTENT {
            entry_fields.remove(of_the_old);
        }
        entry_fields.insert("mediaType".to_owned(), json!(media::OCI_MANIFEST));
        entry_fields.insert("digest".to_owned(), json!(instance.digest.to_string()));
        entry_fields.insert("size".to_owned(), json!(instance.size));
        let mut kept = kept_annotations(entry_fields.get("annotations"));
        kept.remove(ZSTD);
        if zstd {
            kept.insert(ZSTD.to_owned(), json!("true"));
        }
        annotate(entry_fields, kept);
        new.push(entry);
    }
    if new.len() != instances.len() {
        bail!("the index of the image has not the entries that were converted");
    }
    fields.insert("schemaVersion".to_owned(), json!(2));
    fields.insert("mediaType".to_owned(), json!(media::OCI_INDEX));
    fields.insert("manifests".to_owned(), Value::Array(new));
    let kept = kept_annotations(fields.get("annotations"));
    annotate(fields, kept);
    Ok(serde_json::to_vec(&index)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(prefetch_end: Option<u64>) -> NewLayer {
        let mut all = BTreeMap::from([(annotations::TOC_DIGEST.to_owned(), "toc".to_owned())]);
        if let Some(end) = prefetch_end {
            all.insert(annotations::PREFETCH_END.to_owned(), end.to_string());
        }
        NewLayer {
            digest: Digest::of(b"blob"),
            size: 100,
            diff_id: Digest::of(b"tar"),
            media_type: media::OCI_LAYER_ZSTD.to_owned(),
            annotations: all,
        }
    }

    #[test]
    fn unknown_fields_of_a_configuration_survive() {
        let source = br#"{"config": {"Cmd": ["x"], "Odd": 1}, "rootfs": {"type": "layers", "diff_ids": ["sha256:old"]},
            "history": [{"created_by": "me", "empty_layer": true}], "moby": {"x": null}}"#;
        let new: Value = serde_json::from_slice(&config(source, &[layer(None)]).unwrap()).unwrap();
        let mut expected: Value = serde_json::from_slice(source).unwrap();
        expected["rootfs"]["diff_ids"] = json!([Digest::of(b"tar").to_string()]);
        assert_eq!(new, expected);
        assert!(config(b"[]", &[]).is_err());
    }

    #[test]
    fn a_configuration_that_stays_stays_byte_for_byte() {
        let odd = format!(
            r#"{{ "z":1,  "rootfs": {{"diff_ids": ["{}"], "type": "layers"}}, "a":2}}"#,
            Digest::of(b"tar")
        );
        assert_eq!(config(odd.as_bytes(), &[layer(None)]).unwrap(), odd.as_bytes());
    }

    #[test]
    fn a_manifest_becomes_an_oci_one() {
        let source = json!({
            "schemaVersion": 2,
            "mediaType": media::DOCKER_MANIFEST,
            "config": {"mediaType": media::DOCKER_CONFIG, "digest": "sha256:x", "size": 1},
            "layers": [{"mediaType": media::DOCKER_LAYER_GZIP, "digest": "sha256:y", "size": 2, "annotations": {
                "mine": "kept", annotations::TOC_DIGEST: "stale", "io.containers.zstd-chunked.manifest-checksum": "stale"}}],
            "annotations": {"org.opencontainers.image.title": "t", annotations::PREFETCH_ORDER: "9:9"},
        });
        let source = serde_json::to_vec(&source).unwrap();
        let new = manifest(&source, b"{}", &[layer(Some(30))], Some("0:30".to_owned())).unwrap();
        let new: Value = serde_json::from_slice(&new).unwrap();
        assert_eq!(
            new,
            json!({
                "schemaVersion": 2,
                "mediaType": media::OCI_MANIFEST,
                "config": {"mediaType": media::OCI_CONFIG, "digest": Digest::of(b"{}").to_string(), "size": 2},
                "layers": [{"mediaType": media::OCI_LAYER_ZSTD, "digest": Digest::of(b"blob").to_string(), "size": 100,
                    "annotations": {
                        "mine": "kept",
                        annotations::TOC_DIGEST: "toc",
                        annotations::PREFETCH_END: "30",
                    }}],
                "annotations": {"org.opencontainers.image.title": "t", annotations::PREFETCH_ORDER: "0:30"},
            })
        );
        let plain = manifest(&source, b"{}", &[layer(None)], None).unwrap();
        let plain: Value = serde_json::from_slice(&plain).unwrap();
        assert_eq!(
            plain["annotations"],
            json!({"org.opencontainers.image.title": "t"})
        );
        assert!(manifest(&source, b"{}", &[], None).is_err());
    }

    #[test]
    fn an_index_keeps_what_it_says_of_its_entries() {
        let source = json!({
            "schemaVersion": 2,
            "mediaType": media::DOCKER_INDEX,
            "annotations": {"title": "t", "dev.peel.x": "stale"},
            "odd": true,
            "manifests": [
                {"mediaType": media::DOCKER_MANIFEST, "digest": "sha256:a", "size": 1, "data": "e30=",
                    "platform": {"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["x"]}},
                {"mediaType": media::DOCKER_MANIFEST, "digest": "sha256:b", "size": 1,
                    "platform": {"os": "unknown", "architecture": "unknown"}},
                {"mediaType": media::DOCKER_MANIFEST, "digest": "sha256:c", "size": 1, "annotations": {"mine": "kept"},
                    "platform": {"os": "linux", "architecture": "amd64"}},
            ],
        });
        let source = serde_json::to_vec(&source).unwrap();
        let instance = |position: usize| Instance {
            position,
            digest: Digest::of(&[u8::try_from(position).unwrap()]),
            size: 10 + position as u64,
        };
        let new: Value =
            serde_json::from_slice(&index(&source, &[instance(2), instance(0)], true).unwrap()).unwrap();
        assert_eq!(
            new,
            json!({
                "schemaVersion": 2,
                "mediaType": media::OCI_INDEX,
                "annotations": {"title": "t"},
                "odd": true,
                "manifests": [
                    {"mediaType": media::OCI_MANIFEST, "digest": instance(0).digest.to_string(), "size": 10,
                        "annotations": {ZSTD: "true"},
                        "platform": {"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["x"]}},
                    {"mediaType": media::OCI_MANIFEST, "digest": instance(2).digest.to_string(), "size": 12,
                        "annotations": {"mine": "kept", ZSTD: "true"},
                        "platform": {"os": "linux", "architecture": "amd64"}},
                ],
            })
        );
        let again = index(&serde_json::to_vec(&new).unwrap(), &[instance(1)], false).unwrap();
        let again: Value = serde_json::from_slice(&again).unwrap();
        assert_eq!(again["manifests"][0]["annotations"], json!({"mine": "kept"}));
        assert!(index(&source, &[instance(3)], true).is_err());
    }
}
