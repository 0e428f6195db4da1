//! Makes images for the tests: a layout of one-layer eStargz images, honest ones and ones whose TOC lies.

use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

use flate2::Compression;
use flate2::write::GzEncoder;
use peel_image::estargz::{self, TOC_NAME, footer};
use peel_image::layer::Metadata;
use peel_image::tar::TarKind;
use peel_image::tar::write::{NewEntry, Writer};
use peel_image::{Digest, annotations, media};
use peel_writer::{DEFAULT_GZIP_LEVEL, Format, Options, write};
use serde_json::{Value, json};

/// A layout that is being made.
#[derive(Debug)]
pub(crate) struct Forge {
    directory: tempfile::TempDir,
    manifests: Vec<Value>,
}

/// One image to make.
#[derive(Debug, Default)]
pub(crate) struct Forged<'a> {
    pub(crate) files: &'a [(&'a str, &'a [u8])],
    pub(crate) chunk_size: u64,
    pub(crate) prioritized: &'a [&'a str],
    /// What the TOC says, falsely, about the digests of files.
    pub(crate) lies: &'a [(&'a str, Digest)],
    /// Write peel's annotations, so that the prefetch starts before the TOC is here.
    pub(crate) hints: bool,
}

impl Forge {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        fs::write(
            directory.path().join("oci-layout"),
            r#"{"imageLayoutVersion":"1.0.0"}"#,
        )
        .unwrap();
        Self {
            directory,
            manifests: Vec::new(),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    fn blob(&self, bytes: &[u8], media_type: &str) -> Value {
        let digest = Digest::of(bytes);
        fs::write(self.path().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()})
    }

    /// Adds an image under a tag.
    pub(crate) fn image(&mut self, tag: &str, forged: &Forged<'_>) {
        let mut blob = Vec::new();
        let options = Options {
            format: Format::Estargz {
                chunk_size: forged.chunk_size,
                min_chunk_size: 0,
                level: DEFAULT_GZIP_LEVEL,
                external_toc: false,
                keep_diff_id: false,
            },
            prioritized: forged
                .prioritized
                .iter()
                .map(|path| path.as_bytes().to_vec())
                .collect(),
            ..Options::default()
        };
        let mut written = write(
            tar(forged.files).as_slice(),
            Cursor::new(Vec::new()),
            &mut blob,
            &options,
        )
        .unwrap();
        if !forged.lies.is_empty() {
            let (lying, toc) = lie(&blob, forged.lies);
            (blob, written.toc_digest) = (lying, Some(toc));
        }
        let mut layer = self.blob(&blob, media::OCI_LAYER_GZIP);
        let mut notes = json!({annotations::TOC_DIGEST: written.toc_digest.unwrap().to_string()});
        if forged.hints {
            notes[annotations::TOC_OFFSET] = json!(written.toc_offset.unwrap().to_string());
            if let Some(end) = written.prefetch_end {
                notes[annotations::PREFETCH_END] = json!(end.to_string());
            }
        }
        layer["annotations"] = notes;
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {},
            "rootfs": {"type": "layers", "diff_ids": [written.diff_id.to_string()]},
        });
        let config = self.blob(&serde_json::to_vec(&config).unwrap(), media::OCI_CONFIG);
        let manifest = json!({
            "schemaVersion": 2, "mediaType": media::OCI_MANIFEST, "config": config, "layers": [layer],
        });
        let mut manifest = self.blob(&serde_json::to_vec(&manifest).unwrap(), media::OCI_MANIFEST);
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": tag});
        self.manifests.push(manifest);
        let index = json!({"schemaVersion": 2, "manifests": self.manifests});
        fs::write(
            self.path().join("index.json"),
            serde_json::to_vec(&index).unwrap(),
        )
        .unwrap();
    }
}

fn tar(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new());
    for (path, content) in files {
        append(&mut writer, path, content);
    }
    writer.finish().unwrap()
}

fn append(writer: &mut Writer<Vec<u8>>, path: &str, mut content: &[u8]) {
    let metadata = Metadata {
        mode: 0o644,
        ..Metadata::default()
    };
    let kind = TarKind::Regular {
        size: content.len() as u64,
    };
    let entry = NewEntry {
        name: path.as_bytes(),
        metadata: &metadata,
        kind: &kind,
        user_name: b"",
        group_name: b"",
    };
    writer.append(&entry, &mut content).unwrap();
}

/// The blob with other digests for files in its TOC.
fn lie(blob: &[u8], lies: &[(&str, Digest)]) -> (Vec<u8>, Digest) {
    let location = estargz::locate(blob, blob.len() as u64).unwrap();
    let end = usize::try_from(location.payload_end).unwrap();
    let length = usize::try_from(location.toc_size).unwrap();
    let toc = estargz::extract_toc(&blob[end..end + length]).unwrap();
    let mut json: Value = serde_json::from_slice(&toc.json).unwrap();
    let entries = json["entries"].as_array_mut().unwrap();
    for position in 0..entries.len() {
        let in_chunks = entries
            .get(position + 1)
            .is_some_and(|next| next["type"] == "chunk");
        let entry = &mut entries[position];
        let lie = lies.iter().find(|(path, _)| entry["name"] == *path);
        if let (true, Some((_, digest))) = (entry["type"] == "reg", lie) {
            entry["digest"] = json!(digest.to_string());
            // The only chunk is the file, and a reader requires that they have the same digest.
            if !in_chunks {
                entry["chunkDigest"] = json!(digest.to_string());
            }
        }
    }
    let json = serde_json::to_vec(&json).unwrap();
    let mut writer = Writer::new(Vec::new());
    append(&mut writer, TOC_NAME, &json);
    let mut member = GzEncoder::new(Vec::new(), Compression::default());
    member.write_all(&writer.finish().unwrap()).unwrap();
    let mut forged = blob[..end].to_vec();
    forged.extend_from_slice(&member.finish().unwrap());
    forged.extend_from_slice(&footer::encode(location.payload_end));
    (forged, Digest::of(&json))
}

/// Bytes that do not compress well and differ by seed.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    std::iter::repeat_with(next).flatten().take(length).collect()
}
