//! Footers of every age, positions, and TOCs that only this format allows.

use proptest::prelude::*;

use super::*;
use crate::layer::{ChunkSource, EntryKind, FileContent};

const TOC: Position = Position {
    offset: 1000,
    compressed_size: 50,
    size: 200,
};

fn skippable(payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_le_bytes();
    [&SKIPPABLE_MAGIC, &length[..], payload].concat()
}

fn numbers(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_le_bytes()).collect()
}

/// A blob's end with this footer payload, and the blob's size.
fn ended_by(payload: &[u8]) -> (Vec<u8>, u64) {
    let tail = [vec![b'x'; 100], skippable(payload)].concat();
    (tail, 1058 + 8 + payload.len() as u64)
}

#[test]
fn footers_of_every_age_are_told_apart() {
    let short = [numbers(&[1000, 50, 200, 1]), b"GnUlInUx".to_vec()].concat();
    let long = [numbers(&[1000, 50, 200, 1, 1058, 30, 90]), b"GNUlInUx".to_vec()].concat();
    let broken = [numbers(&[1000, 50, 200, 1]), b"GnUlInUx".to_vec(), vec![0; 16]].concat();
    let tar_split = Position {
        offset: 1058,
        compressed_size: 30,
        size: 90,
    };
    for (payload, split, dialect) in [
        (&short, None, Dialect::Stargz),
        (&long, Some(tar_split), Dialect::Podman),
    ] {
        let (tail, size) = ended_by(payload);
        let found = locate(&tail, size).unwrap();
        assert_eq!((found.footer.toc, found.footer.tar_split), (TOC, split));
        assert_eq!((found.toc, found.payload_end), (1000..1050, 992));
        assert_eq!(found.footer.dialect(), dialect);
        assert!(
            tail.ends_with(&found.footer.encode()),
            "{dialect:?} is written as it is read"
        );
        assert_eq!(
            locate(&tail[1..], size),
            locate(&tail, size),
            "more or less before it"
        );
        assert_eq!(
            locate(&tail[..tail.len() - 1], size - 1),
            Err(FooterError::NotZstdChunked)
        );
    }
    let (tail, size) = ended_by(&broken);
    assert_eq!(locate(&tail, size), Err(FooterError::Broken));
    for tail in [&[][..], b"GnUlInUx", &[0; 72]] {
        assert_eq!(locate(tail, 5000), Err(FooterError::NotZstdChunked));
    }
}

#[test]
fn impossible_places_are_errors() {
    let footer = |toc: [u64; 4]| ended_by(&[numbers(&toc), b"GnUlInUx".to_vec()].concat());
    for toc in [
        [0, 50, 200, 1],
        [7, 50, 200, 1],
        [1000, 0, 200, 1],
        [1000, 500, 200, 1],
        [u64::MAX, 50, 200, 1],
    ] {
        let (tail, size) = footer(toc);
        assert!(
            matches!(locate(&tail, size), Err(FooterError::Position { .. })),
            "{toc:?}"
        );
    }
    for toc in [[1000, u64::MAX, 200, 1], [1000, 50, u64::MAX, 1]] {
        let (tail, size) = footer(toc);
        assert!(
            matches!(locate(&tail, size), Err(FooterError::TooLarge(_))),
            "{toc:?}"
        );
    }
    let (tail, size) = footer([1000, 50, 200, 2]);
    assert_eq!(locate(&tail, size), Err(FooterError::Type(2)));
}

#[test]
fn positions_are_parsed_strictly() {
    for (text, expected) in [
        ("1000:50:200:1", Some(TOC)),
        ("1000:50:200", Some(TOC)),
        ("1000:50:200:2", None),
        ("1000:50:200:1:1", None),
        ("1000:50", None),
        ("1000:+50:200:1", None),
        ("-1:50:200:1", None),
        ("1000::200:1", None),
        ("99999999999999999999:50:200:1", None),
        ("", None),
    ] {
        assert_eq!(Position::parse(text), expected, "{text:?}");
    }
}

/// The content of the only file of a TOC.
fn content(json: &str, payload_end: u64) -> Result<FileContent, TocError> {
    let index = read_index(json.as_bytes(), payload_end, Dialect::Podman)?;
    match &index.entries.first().unwrap().kind {
        EntryKind::Regular(content) => Ok(content.clone()),
        kind => panic!("{kind:?}"),
    }
}

fn digest(text: &str) -> String {
    crate::Digest::of(text.as_bytes()).to_string()
}

#[test]
fn chunks_without_an_end_and_runs_of_zeros() {
    let (whole, one, two) = (digest("whole"), digest("one"), digest("two"));
    let json = format!(
        r#"{{"version":1,"entries":[
            {{"type":"reg","name":"f","size":3100,"digest":"{whole}","offset":40,"endOffset":400,"chunkSize":1000,"chunkDigest":"{one}"}},
            {{"type":"chunk","name":"f","offset":140,"chunkSize":2000,"chunkOffset":1000,"chunkType":"zeros","chunkDigest":"{two}"}},
            {{"type":"chunk","name":"f","offset":160,"chunkSize":100,"chunkOffset":3000,"chunkDigest":"{two}"}}],
            "tarSplitDigest":"{whole}"}}"#
    );
    let content = content(&json, 1000).unwrap();
    let places: Vec<Option<(u64, u64)>> = content
        .chunks
        .iter()
        .map(|chunk| match chunk.source {
            ChunkSource::Blob {
                offset,
                compressed_size,
                ..
            } => Some((offset, compressed_size)),
            ChunkSource::Zeros => None,
        })
        .collect();
    assert_eq!(places, [Some((40, 100)), None, Some((160, 240))]);
    assert_eq!(content.digest.unwrap().to_string(), whole);
}

#[test]
fn a_file_of_zeros_alone_has_the_digest_of_the_file() {
    let (whole, other) = (digest("whole"), digest("other"));
    let json = format!(
        r#"{{"entries":[
            {{"type":"reg","name":"f","size":3000,"digest":"{whole}","offset":40,"endOffset":60,"chunkSize":1000,"chunkType":"zeros","chunkDigest":"{other}"}},
            {{"type":"chunk","name":"f","offset":50,"chunkSize":2000,"chunkOffset":1000,"chunkType":"zeros"}}]}}"#
    );
    let content = content(&json, 1000).unwrap();
    assert_eq!(content.chunks.len(), 1);
    assert_eq!(content.chunks[0].source, ChunkSource::Zeros);
    assert_eq!(content.chunks[0].digest.to_string(), whole);
    assert_eq!(content.chunks[0].size, 3000);
}

#[test]
fn what_cannot_be_is_refused() {
    let whole = digest("whole");
    let one = |fields: &str| {
        format!(r#"{{"entries":[{{"type":"reg","name":"f","size":10,"digest":"{whole}",{fields}}}]}}"#)
    };
    assert!(content(&one(r#""offset":40,"endOffset":60"#), 1000).is_ok());
    assert!(content(&one(r#""offset":40"#), 1000).is_ok(), "no end at all");
    for (fields, problem) in [
        (r#""offset":40,"endOffset":1001"#, "behind the end of the payload"),
        (r#""offset":1000"#, "not before the end of the payload"),
        (r#""offset":-1"#, "out of range"),
        (r#""offset":40,"chunkType":"holes""#, "unknown"),
    ] {
        let error = content(&one(fields), 1000).unwrap_err().to_string();
        assert!(error.contains(problem), "{fields}: {error}");
    }
    // Files may lie in any order, but not on top of each other in part.
    let two = |first: &str, second: &str| {
        let json = format!(
            r#"{{"entries":[{{"type":"reg","name":"a","size":10,"digest":"{whole}",{first}}},
                {{"type":"reg","name":"b","size":10,"digest":"{whole}",{second}}}]}}"#
        );
        read_index(json.as_bytes(), 1000, Dialect::Podman)
    };
    assert!(two(r#""offset":400,"endOffset":500"#, r#""offset":40,"endOffset":60"#).is_ok());
    assert!(
        two(r#""offset":40,"endOffset":60"#, r#""offset":40,"endOffset":60"#).is_ok(),
        "shared"
    );
    let error = two(r#""offset":40,"endOffset":60"#, r#""offset":50,"endOffset":70"#).unwrap_err();
    assert!(error.to_string().contains("reach into those at 50"), "{error}");
}

#[test]
fn landmarks_are_files_for_podman() {
    let whole = digest("\u{f}");
    let json = format!(
        r#"{{"entries":[{{"type":"reg","name":".prefetch.landmark","size":1,"digest":"{whole}","offset":40}}]}}"#
    );
    let podman = read_index(json.as_bytes(), 1000, Dialect::Podman).unwrap();
    let stargz = read_index(json.as_bytes(), 1000, Dialect::Stargz).unwrap();
    assert_eq!((podman.entries.len(), podman.prefetch_end), (1, None));
    assert_eq!((stargz.entries.len(), stargz.prefetch_end), (0, Some(40)));
}

#[test]
fn compressed_tocs_have_limits() {
    let json = b"{\"entries\":[]}";
    let frame = zstd::encode_all(&json[..], 3).unwrap();
    let empty = zstd::encode_all(&b""[..], 3).unwrap();
    let frames = [&empty[..], &frame, &empty].concat();
    for hint in [None, Some(0), Some(json.len() as u64), Some(u64::MAX)] {
        assert_eq!(decompress_toc(&frames, hint).unwrap(), json);
        assert!(decompress_toc(&frame[..frame.len() - 1], hint).is_err());
        assert!(decompress_toc(b"no zstd", hint).is_err());
    }
    let bomb = zstd::encode_all(std::io::Read::take(std::io::repeat(b' '), TOC_JSON_MAX + 1), 1).unwrap();
    for hint in [None, Some(TOC_JSON_MAX), Some(TOC_JSON_MAX + 1)] {
        assert!(matches!(decompress_toc(&bomb, hint), Err(TocError::TooLarge(_))));
    }
}

proptest! {
    #[test]
    fn footers_round_trip(
        offset in 8u64..1 << 40, compressed_size in 1u64..1 << 20, size in 0u64..1 << 20,
        split in proptest::option::of((1u64..1 << 40, any::<u64>(), any::<u64>())),
    ) {
        let toc = Position { offset, compressed_size, size };
        let tar_split = split.map(|(offset, compressed_size, size)| Position { offset, compressed_size, size });
        let footer = Footer { toc, tar_split };
        let encoded = footer.encode();
        let found = locate(&encoded, offset + compressed_size + encoded.len() as u64).unwrap();
        prop_assert_eq!(found.footer, footer);
        prop_assert_eq!(Position::parse(&toc.to_string()), Some(toc));
    }

    #[test]
    fn noise_never_panics(tail in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>()) {
        let _outcome = locate(&tail, size);
        let _outcome = decompress_toc(&tail, Some(size % 1000));
        let _outcome = read_index(&tail, size, Dialect::Podman);
    }
}
