//! Images made entry by entry, in memory: ordinary ones, and ones that no tool would write.
//!
//! Tar headers are written here and not by the library under test. Layers become eStargz by the library, whose output is
//! compared with other tools in a test of its own; afterwards their tables of contents can be changed at will.

use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};
use std::ops::Range;

use flate2::Compression;
use flate2::read::MultiGzDecoder;
use flate2::write::GzEncoder;
use peel_image::Digest;
use peel_image::annotations::{
    PODMAN_MANIFEST_CHECKSUM, PODMAN_MANIFEST_POSITION, PODMAN_TARSPLIT_POSITION, STARGZ_MANIFEST_CHECKSUM,
    STARGZ_MANIFEST_POSITION, TOC_DIGEST,
};
use peel_image::estargz;
use peel_testkit::registry::Registry;
use serde_json::{Value, json};

/// Size of a tar record.
const RECORD: usize = 512;

/// Modification time of every entry, in seconds since the epoch.
pub const MTIME: u64 = 1_700_000_000;

/// A tar stream that is being written.
#[derive(Debug, Default, Clone)]
pub struct Tar {
    bytes: Vec<u8>,
}

impl Tar {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    /// Any entry: name, type flag, link target, mode, contents.
    #[must_use]
    pub fn entry(self, name: &str, kind: u8, link: &str, mode: u32, contents: &[u8]) -> Self {
        self.node(name.as_bytes(), kind, link, mode, (0, 0), contents)
    }

    /// A character device; numbers beyond seven octal digits are written in base 256.
    #[must_use]
    pub fn device(self, name: &str, major: u64, minor: u64) -> Self {
        self.node(name.as_bytes(), b'3', "", 0o600, (major, minor), b"")
    }

    /// An extended header before the next entry.
    #[must_use]
    pub fn pax(self, key: &str, value: &[u8]) -> Self {
        self.extended(b'x', key, value)
    }

    /// A global extended header.
    #[must_use]
    pub fn global(self, key: &str, value: &[u8]) -> Self {
        self.extended(b'g', key, value)
    }

    fn extended(self, kind: u8, key: &str, value: &[u8]) -> Self {
        let body = [b" ", key.as_bytes(), b"=", value, b"\n"].concat();
        let mut length = body.len() + 1;
        while length.to_string().len() + body.len() != length {
            length = length.to_string().len() + body.len();
        }
        let record = [length.to_string().as_bytes(), &body].concat();
        self.node(b"pax", kind, "", 0o644, (0, 0), &record)
    }

    /// The stream with so many of its last bytes cut off and no end.
    #[must_use]
    pub fn cut(mut self, bytes: usize) -> Vec<u8> {
        self.bytes.truncate(self.bytes.len() - bytes);
        self.bytes
    }

    /// Any entry at all.
    #[must_use]
    pub fn node(
        mut self,
        name: &[u8],
        kind: u8,
        link: &str,
        mode: u32,
        (major, minor): (u64, u64),
        contents: &[u8],
    ) -> Self {
        let mut header = [0_u8; RECORD];
        let number = |value: u64| -> Vec<u8> {
            match value {
                0..=0o777_7777 => format!("{value:07o}\0").into_bytes(),
                _ => {
                    let mut bytes = value.to_be_bytes().to_vec();
                    bytes[0] |= 0x80;
                    bytes
                }
            }
        };
        let mut put = |at: usize, text: &[u8]| header[at..at + text.len()].copy_from_slice(text);
        assert!(
            name.len() <= 100 && link.len() <= 100,
            "these headers have no room for long names"
        );
        put(0, name);
        put(100, format!("{mode:07o}\0").as_bytes());
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{:011o}\0", contents.len()).as_bytes());
        put(136, format!("{MTIME:011o}\0").as_bytes());
        put(148, b"        ");
        put(156, &[kind]);
        put(157, link.as_bytes());
        put(257, b"ustar\x0000");
        if kind == b'3' {
            put(329, &number(major));
            put(337, &number(minor));
        }
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.bytes.extend_from_slice(&header);
        self.bytes.extend_from_slice(contents);
        self.bytes.resize(self.bytes.len().next_multiple_of(RECORD), 0);
        self
    }

    /// A directory.
    #[must_use]
    pub fn dir(self, name: &str) -> Self {
        self.entry(name, b'5', "", 0o755, b"")
    }

    /// A regular file.
    #[must_use]
    pub fn file(self, name: &str, contents: &[u8]) -> Self {
        self.entry(name, b'0', "", 0o644, contents)
    }

    /// A symbolic link.
    #[must_use]
    pub fn symlink(self, name: &str, target: &str) -> Self {
        self.entry(name, b'2', target, 0o777, b"")
    }

    /// A hard link.
    #[must_use]
    pub fn hard_link(self, name: &str, target: &str) -> Self {
        self.entry(name, b'1', target, 0o644, b"")
    }

    /// The finished stream.
    pub fn finish(mut self) -> Vec<u8> {
        self.bytes.resize(self.bytes.len() + 2 * RECORD, 0);
        self.bytes
    }
}

/// Bytes that do not compress, the same ones for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .flatten()
    .take(length)
    .collect()
}

/// eStargz as it is written unless something else is asked for.
pub const ESTARGZ: peel_writer::Format = estargz_with(0, 0, false);

/// eStargz with chunks of these sizes, 0 for the defaults.
pub const fn estargz_with(chunk_size: u64, min_chunk_size: u64, external_toc: bool) -> peel_writer::Format {
    peel_writer::Format::Estargz {
        chunk_size,
        min_chunk_size,
        level: peel_writer::DEFAULT_GZIP_LEVEL,
        external_toc,
        keep_diff_id: false,
    }
}

/// zstd:chunked as it is written unless something else is asked for.
pub const fn zstd_chunked(dialect: peel_writer::Dialect) -> peel_writer::Format {
    peel_writer::Format::ZstdChunked {
        dialect,
        chunk_size: 0,
        level: 3,
    }
}

/// One layer as it is pushed.
#[derive(Debug, Clone)]
pub struct Layer {
    /// The blob.
    pub blob: Vec<u8>,
    /// sha256 of the uncompressed stream.
    pub diff_id: Digest,
    /// sha256 of the table of contents, for layers that have one.
    pub toc: Option<Digest>,
    /// Annotations of the descriptor beside the one of `toc`.
    pub annotations: BTreeMap<String, String>,
    /// End of the media type, after `tar`.
    pub suffix: &'static str,
}

impl Layer {
    /// An ordinary gzip layer.
    pub fn plain(tar: &[u8]) -> Self {
        Self {
            blob: gzip(tar),
            diff_id: Digest::of(tar),
            toc: None,
            annotations: BTreeMap::new(),
            suffix: "+gzip",
        }
    }

    /// An eStargz layer with chunks of this many bytes, 0 for the default; `first` are prioritized.
    pub fn estargz(tar: &[u8], chunk_size: u64, first: &[&str]) -> Self {
        let options = peel_writer::Options {
            format: estargz_with(chunk_size, 0, false),
            prioritized: first.iter().map(|path| path.as_bytes().to_vec()).collect(),
            ..peel_writer::Options::default()
        };
        let mut blob = Vec::new();
        let written = peel_writer::write(tar, Cursor::new(Vec::new()), &mut blob, &options).unwrap();
        Self {
            blob,
            diff_id: written.diff_id,
            toc: written.toc_digest,
            annotations: BTreeMap::new(),
            suffix: "+gzip",
        }
    }

    /// A layer in any format that the writer has.
    pub fn written(tar: &[u8], format: peel_writer::Format) -> Result<Self, peel_writer::WriteError> {
        let options = peel_writer::Options {
            format,
            ..peel_writer::Options::default()
        };
        let mut blob = Vec::new();
        let written = peel_writer::write(tar, Cursor::new(Vec::new()), &mut blob, &options)?;
        let suffix = if written.media_type.ends_with("+zstd") {
            "+zstd"
        } else {
            "+gzip"
        };
        Ok(Self {
            blob,
            diff_id: written.diff_id,
            toc: None,
            annotations: written.annotations,
            suffix,
        })
    }

    /// A zstd:chunked layer with its table of contents changed, as [`Layer::with_contents`].
    #[must_use]
    pub fn with_zstd_contents(self, change: impl FnOnce(&mut Vec<Value>)) -> Self {
        self.with_zstd_json(|json| changed(json, change))
    }

    /// A zstd:chunked layer with other JSON in place of its table of contents, as [`Layer::with_contents`].
    #[must_use]
    pub fn with_zstd_json(mut self, change: impl FnOnce(&[u8]) -> Vec<u8>) -> Self {
        let places = |name: &str| -> Option<Vec<usize>> {
            let numbers = self.annotations.get(name)?.split(':');
            Some(numbers.map(|number| number.parse().unwrap()).collect())
        };
        let split = places(PODMAN_TARSPLIT_POSITION);
        let (checksum, position) = match split {
            Some(_) => (PODMAN_MANIFEST_CHECKSUM, PODMAN_MANIFEST_POSITION),
            None => (STARGZ_MANIFEST_CHECKSUM, STARGZ_MANIFEST_POSITION),
        };
        let toc = places(position).expect("no zstd:chunked layer");
        let bytes = |place: &[usize]| self.blob[place[0]..][..place[1]].to_vec();
        let json = change(&zstd::decode_all(bytes(&toc).as_slice()).unwrap());
        let compressed = zstd::encode_all(json.as_slice(), 3).unwrap();
        let mut footer = vec![toc[0], compressed.len(), json.len(), 1];
        let mut tail = frame(&compressed);
        self.annotations
            .insert(checksum.to_owned(), Digest::of(&compressed).to_string());
        let colons = |numbers: &[usize]| -> String {
            let texts: Vec<String> = numbers.iter().map(usize::to_string).collect();
            texts.join(":")
        };
        self.annotations.insert(position.to_owned(), colons(&footer));
        if let Some(split) = split {
            let lines = bytes(&split);
            let place = [toc[0] + compressed.len() + 8, lines.len(), split[2]];
            footer.extend(place);
            tail.extend(frame(&lines));
            self.annotations
                .insert(PODMAN_TARSPLIT_POSITION.to_owned(), colons(&place));
        } else {
            self.annotations
                .insert(TOC_DIGEST.to_owned(), Digest::of(&json).to_string());
        }
        let magic: &[u8] = if footer.len() > 4 {
            b"GNUlInUx"
        } else {
            b"GnUlInUx"
        };
        let numbers = footer.iter().flat_map(|number| (*number as u64).to_le_bytes());
        let footer: Vec<u8> = numbers.chain(magic.iter().copied()).collect();
        tail.extend(frame(&footer));
        self.blob.truncate(toc[0] - 8);
        self.blob.extend_from_slice(&tail);
        self
    }

    /// Digest of the blob.
    pub fn digest(&self) -> Digest {
        Digest::of(&self.blob)
    }

    /// Where the table of contents is, and what it says.
    fn contents(&self) -> (usize, Vec<u8>) {
        let location = estargz::locate(&self.blob, self.blob.len() as u64).unwrap();
        let start = usize::try_from(location.payload_end).unwrap();
        let end = start + usize::try_from(location.toc_size).unwrap();
        (start, estargz::extract_toc(&self.blob[start..end]).unwrap().json)
    }

    /// The same layer with a table of contents that `change` has changed; everything that vouches for it is made anew, so
    /// only its claims about the files are wrong.
    #[must_use]
    pub fn with_contents(&self, change: impl FnOnce(&mut Vec<Value>)) -> Self {
        self.with_json(|json| changed(json, change))
    }

    /// The same with any other JSON.
    #[must_use]
    pub fn with_json(&self, change: impl FnOnce(&[u8]) -> Vec<u8>) -> Self {
        let json = change(&self.contents().1);
        let member = gzip(&Tar::new().file("stargz.index.json", &json).finish());
        self.with_member(&member, Digest::of(&json))
    }

    /// The same with any gzip member in place of its table of contents, vouched for by this digest.
    #[must_use]
    pub fn with_member(&self, member: &[u8], toc: Digest) -> Self {
        let (start, _) = self.contents();
        let footer = estargz::footer::encode(start as u64);
        let blob = [&self.blob[..start], member, &footer].concat();
        let mut plain = Vec::new();
        MultiGzDecoder::new(blob.as_slice())
            .read_to_end(&mut plain)
            .unwrap();
        Self {
            blob,
            diff_id: Digest::of(&plain),
            toc: Some(toc),
            annotations: BTreeMap::new(),
            suffix: "+gzip",
        }
    }

    /// The same layer under a configuration that lists another DiffID for it.
    #[must_use]
    pub fn with_diff_id(mut self, diff_id: Digest) -> Self {
        self.diff_id = diff_id;
        self
    }

    /// The bytes of the blob that hold a file, by the table of contents.
    pub fn place_of(&self, path: &str) -> Range<u64> {
        let (end, json) = self.contents();
        let toc: Value = serde_json::from_slice(&json).unwrap();
        let entries = toc["entries"].as_array().unwrap();
        let offsets = |value: &Value| value["offset"].as_u64().filter(|offset| *offset > 0);
        let entry = entries
            .iter()
            .position(|entry| entry["name"] == path)
            .expect("no such file");
        let start = offsets(&entries[entry]).expect("a file without bytes");
        let all = entries.iter().filter_map(offsets);
        start..all.filter(|offset| *offset > start).min().unwrap_or(end as u64)
    }
}

/// A table of contents with its entries changed.
fn changed(json: &[u8], change: impl FnOnce(&mut Vec<Value>)) -> Vec<u8> {
    let mut toc: Value = serde_json::from_slice(json).unwrap();
    change(toc["entries"].as_array_mut().unwrap());
    serde_json::to_vec(&toc).unwrap()
}

/// One gzip member.
pub fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// A skippable zstd frame.
fn frame(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap();
    [&[0x50, 0x2a, 0x4d, 0x18][..], &length.to_le_bytes(), payload].concat()
}

/// The entry of that name in a table of contents.
pub fn entry<'a>(entries: &'a mut [Value], name: &str) -> &'a mut Value {
    entries
        .iter_mut()
        .find(|entry| entry["name"] == name)
        .expect("no such entry")
}

/// Pushes an image of these layers and returns its name.
pub fn push(registry: &Registry, repository: &str, tag: &str, layers: &[Layer]) -> String {
    let content = registry.content();
    let descriptors: Vec<Value> = layers
        .iter()
        .map(|layer| {
            let digest = content.put_blob(&layer.blob).unwrap();
            let mut descriptor = json!({
                "mediaType": format!("application/vnd.oci.image.layer.v1.tar{}", layer.suffix),
                "digest": digest.to_string(),
                "size": layer.blob.len(),
            });
            if !layer.annotations.is_empty() {
                descriptor["annotations"] = json!(layer.annotations);
            }
            if let Some(toc) = &layer.toc {
                descriptor["annotations"][TOC_DIGEST] = json!(toc.to_string());
            }
            descriptor
        })
        .collect();
    let architecture = if cfg!(target_arch = "aarch64") {
        "arm64"
    } else {
        "amd64"
    };
    let diff_ids: Vec<String> = layers.iter().map(|layer| layer.diff_id.to_string()).collect();
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": { "Cmd": ["/bin/sh"] },
        "rootfs": { "type": "layers", "diff_ids": diff_ids },
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {
            "mediaType": "application/vnd.oci.image.config.v1+json",
            "digest": content.put_blob(config.as_bytes()).unwrap().to_string(),
            "size": config.len(),
        },
        "layers": descriptors,
    })
    .to_string();
    let kind = "application/vnd.oci.image.manifest.v1+json";
    content
        .put_manifest(repository, tag, kind, manifest.as_bytes())
        .unwrap();
    format!("{}/{repository}:{tag}", registry.addr())
}
