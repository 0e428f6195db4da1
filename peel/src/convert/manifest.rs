//! Manifest and configuration of a converted image.
//!
//! Both are edited as JSON values, so that fields which nobody here knows survive. The media types become OCI's: Docker's
//! manifest has no annotations, and without those no reader could trust a TOC.

use anyhow::{Context, bail};
use peel_image::{Digest, annotations, media};
use serde_json::{Map, Value, json};

/// Annotations with these beginnings describe the blob that was; they must not be carried over to another.
const STALE: [&str; 6] = [
    "containerd.io/snapshot/stargz/",
    "io.containers.estargz.",
    "io.containers.zstd-chunked.",
    "io.github.containers.zstd-chunked.",
    "dev.peel.",
    "org.opencontainers.image.ref.name",
];

/// A layer as the new manifest names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewLayer {
    /// Blob digest.
    pub digest: Digest,
    /// Blob size in bytes.
    pub size: u64,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
    /// sha256 of the TOC JSON.
    pub toc_digest: Digest,
    /// Offset of the TOC in the blob.
    pub toc_offset: u64,
    /// Bytes of the uncompressed tar stream; `None` for a layer that was kept and does not say.
    pub uncompressed_size: Option<u64>,
    /// End of the prioritized range, if there is one.
    pub prefetch_end: Option<u64>,
}

impl NewLayer {
    fn annotations(&self) -> Vec<(&'static str, String)> {
        let mut all = vec![
            (annotations::TOC_DIGEST, self.toc_digest.to_string()),
            (annotations::TOC_OFFSET, self.toc_offset.to_string()),
        ];
        if let Some(size) = self.uncompressed_size {
            all.push((annotations::UNCOMPRESSED_SIZE, size.to_string()));
        }
        if let Some(end) = self.prefetch_end {
            all.push((annotations::PREFETCH_END, end.to_string()));
        }
        all
    }
}

/// The configuration with other diff ids; everything else stays.
pub fn config(source: &[u8], layers: &[NewLayer]) -> anyhow::Result<Vec<u8>> {
    let mut config: Value = serde_json::from_slice(source).context("configuration of the image")?;
    let Value::Object(fields) = &mut config else {
        bail!("the configuration of the image is not a JSON object");
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
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
    fields.remove("annotations");
    if !kept.is_empty() {
        fields.insert("annotations".to_owned(), Value::Object(kept));
    }
    Ok(serde_json::to_vec(&manifest)?)
}

fn descriptor(old: &Value, new: &NewLayer) -> Value {
    let mut annotations = kept_annotations(old.get("annotations"));
    for (name, value) in new.annotations() {
        annotations.insert(name.to_owned(), json!(value));
    }
    json!({
        "mediaType": media::OCI_LAYER_GZIP,
        "digest": new.digest.to_string(),
        "size": new.size,
        "annotations": annotations,
    })
}

fn kept_annotations(old: Option<&Value>) -> Map<String, Value> {
    let old = old.and_then(Value::as_object).cloned().unwrap_or_default();
    old.into_iter()
        .filter(|(name, value)| value.is_string() && !STALE.iter().any(|stale| name.starts_with(stale)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(prefetch_end: Option<u64>) -> NewLayer {
        NewLayer {
            digest: Digest::of(b"blob"),
            size: 100,
            diff_id: Digest::of(b"tar"),
            toc_digest: Digest::of(b"toc"),
            toc_offset: 40,
            uncompressed_size: Some(1000),
            prefetch_end,
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
                "layers": [{"mediaType": media::OCI_LAYER_GZIP, "digest": Digest::of(b"blob").to_string(), "size": 100,
                    "annotations": {
                        "mine": "kept",
                        annotations::TOC_DIGEST: Digest::of(b"toc").to_string(),
                        annotations::UNCOMPRESSED_SIZE: "1000",
                        annotations::TOC_OFFSET: "40",
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
}
