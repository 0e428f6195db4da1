//! What the tests of this crate and of the layer writer share: the layers that the upstream tools made, and a plain way
//! to decode a chunk. Behind the feature `testing`; fails by panicking.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::BTreeMap;

use peel_testkit::vectors;

use super::{TocBytes, extract_toc, locate, read_index};
use crate::annotations::TOC_DIGEST;
use crate::compression::decode_chunk;
use crate::layer::{Chunk, ChunkSource, Encoding, LayerIndex};
use peel_hash::Digest;

/// A layer blob of the vectors.
#[derive(Debug)]
pub struct VectorLayer {
    /// The whole blob.
    pub blob: Vec<u8>,
    /// The digest of its annotation; that of nothing where there is no annotation.
    pub toc_digest: Digest,
    /// All annotations of its descriptor.
    pub annotations: BTreeMap<String, String>,
}

impl VectorLayer {
    /// Goes the whole way from the footer to the index.
    pub fn open(&self) -> (TocBytes, LayerIndex) {
        open(&self.blob)
    }
}

/// From the footer of an eStargz blob to its TOC and index.
pub fn open(blob: &[u8]) -> (TocBytes, LayerIndex) {
    let location = locate(blob, blob.len() as u64).unwrap();
    let start = usize::try_from(location.payload_end).unwrap();
    let end = start + usize::try_from(location.toc_size).unwrap();
    let toc = extract_toc(&blob[start..end]).unwrap();
    let index = read_index(&toc.json, location.payload_end).unwrap();
    (toc, index)
}

/// The layers of one image of the vectors, lowest first.
pub fn layers(tag: &str) -> Vec<VectorLayer> {
    let layer = |layer: &vectors::Layer| VectorLayer {
        annotations: layer.descriptor["annotations"]
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), value.as_str().unwrap().to_owned()))
            .collect(),
        blob: layer.blob(),
        toc_digest: layer
            .annotation(TOC_DIGEST)
            .map_or(Digest::EMPTY, |text| text.parse().unwrap()),
    };
    vectors::layers(tag).iter().map(layer).collect()
}

/// The uncompressed bytes of a chunk.
pub fn decode(blob: &[u8], chunk: &Chunk) -> Vec<u8> {
    let ChunkSource::Blob {
        offset,
        compressed_size,
        inner_offset,
        ..
    } = chunk.source
    else {
        panic!("{chunk:?} is not in the blob");
    };
    let start = usize::try_from(offset).unwrap();
    let end = start + usize::try_from(compressed_size).unwrap();
    decode_chunk(
        Encoding::Gzip,
        &blob[start..end],
        inner_offset,
        chunk.size,
        u64::MAX,
    )
    .unwrap()
}
