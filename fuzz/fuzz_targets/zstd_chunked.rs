//! zstd:chunked layers as they come from a registry: the end of a blob, a compressed TOC, a TOC's JSON in both dialects, and all of
//! it by way of a descriptor's annotations. The first byte chooses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_fuzz::{check_index, check_merge};
use peel_image::lazy::Candidate;
use peel_image::zstd_chunked::{Dialect, Position, decompress_toc, locate, read_index};
use peel_image::{Digest, annotations, media};

const PAYLOAD: u64 = 8 << 20;

fn index(json: &[u8], dialect: Dialect) {
    if let Ok(index) = read_index(json, PAYLOAD, dialect) {
        check_index(&index, PAYLOAD);
        let layers = [index.clone(), index];
        check_merge(&layers[..1]);
        check_merge(&layers);
    }
}

/// Bytes are a whole blob whose compressed TOC has the digest that the manifest vouches for, wherever the footer says that it is.
fn layer(blob: &[u8]) {
    let size = u64::try_from(blob.len()).unwrap_or(u64::MAX);
    let Ok(location) = locate(blob, size) else {
        return;
    };
    let part = |at: u64| usize::try_from(at).unwrap_or(usize::MAX).min(blob.len());
    let toc = &blob[part(location.toc.start)..part(location.toc.end)];
    let digest = Digest::of(toc).to_string();
    let candidate = Candidate::new(media::OCI_LAYER_ZSTD, size, |name| {
        (name == annotations::PODMAN_MANIFEST_CHECKSUM).then_some(digest.as_str())
    });
    let first = candidate.first_range();
    let located = candidate.locate(&blob[part(first.start)..part(first.end)]);
    if let Ok(index) = located.and_then(|located| candidate.read(&located, toc)) {
        check_index(&index, location.payload_end);
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((way, rest)) = data.split_first() else {
        return;
    };
    match way % 5 {
        0 => index(rest, Dialect::Podman),
        1 => index(rest, Dialect::Stargz),
        2 => drop(decompress_toc(rest, Some(4096))),
        3 => layer(rest),
        _ => {
            if let Some(position) = std::str::from_utf8(rest).ok().and_then(Position::parse) {
                assert_eq!(Position::parse(&position.to_string()), Some(position));
            }
        }
    }
});
