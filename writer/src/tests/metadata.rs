//! What a TOC cannot tell as the tar headers do, or what its readers would misunderstand: far times, the owner 4294967295, modes of
//! symbolic links.

use super::formats::podman;
use super::*;
use peel_image::annotations;
use peel_image::estargz::time;
use peel_image::lazy::Candidate;
use peel_image::views;

fn tar_with(entries: &[(&str, TarKind, Metadata)]) -> Vec<u8> {
    let mut writer = tar::write::Writer::new(Vec::new());
    for (name, kind, metadata) in entries {
        let entry = tar::write::NewEntry {
            name: name.as_bytes(),
            metadata,
            kind,
            user_name: b"",
            group_name: b"",
        };
        writer.append(&entry, &mut io::empty()).unwrap();
    }
    writer.finish().unwrap()
}

fn at(mtime: i64, mtime_nanoseconds: u32) -> Metadata {
    Metadata {
        mtime,
        mtime_nanoseconds,
        ..metadata(0o644)
    }
}

/// The JSON of the blob's TOC, and whether a mount shows what its tar stream says.
fn toc_of(blob: &[u8], written: &Written) -> (Value, Result<(), views::Difference>) {
    let notes = &written.annotations;
    let candidate = Candidate::new(written.media_type, blob.len() as u64, |name| {
        notes.get(name).map(String::as_str)
    });
    let first = candidate.first_range();
    let range = usize::try_from(first.start).unwrap()..usize::try_from(first.end).unwrap();
    let located = candidate.locate(&blob[range]).unwrap();
    let place = located.toc.clone().unwrap();
    let range = usize::try_from(place.start).unwrap()..usize::try_from(place.end).unwrap();
    let toc = located.open(&blob[range]).unwrap();
    let index = candidate.index(&located, &toc).unwrap();
    let stream = io::Cursor::new(blob.to_vec());
    let (_, stream) =
        peel_image::compression::decoder(stream, peel_image::compression::Guard::default()).unwrap();
    let (unpacked, _) = tar::index_tar(stream, &mut tar::index::HashSink::default()).unwrap();
    let json = serde_json::from_slice(&toc.json).unwrap();
    (json, views::compare(&index, &unpacked))
}

fn all() -> [Options; 3] {
    [
        options_of(estargz(0, 6)),
        options_of(Format::zstd_chunked(Dialect::Stargz)),
        podman(),
    ]
}

#[test]
fn far_times_are_cut_in_every_toc() {
    let kind = || TarKind::Fifo;
    for (what, metadata, is_tellable) in [
        ("late", at(253_402_300_800, 0), false),
        ("latest", at(i64::MAX, 999_999_999), false),
        ("last", at(253_402_300_799, 999_999_999), true),
        ("early", at(-62_167_219_201, 500_000_000), false),
        ("first", at(-62_167_219_200, 0), true),
        ("nobody's", at(time::GO_ZERO, 0), true),
        ("negative", at(-6, 500_000_000), true),
        ("epoch", at(0, 700_000_000), true),
    ] {
        let tar = tar_with(&[("a", kind(), metadata), ("b", kind(), at(7, 0))]);
        for options in all() {
            let (blob, written) = convert(&tar, &options);
            let (toc, difference) = toc_of(&blob, &written);
            assert_eq!(difference, Ok(()), "{what}");
            for entry in toc["entries"].as_array().unwrap() {
                let text = entry["modtime"].as_str().unwrap_or("1970-01-01T00:00:00Z");
                assert!(
                    text.as_bytes()[4] == b'-' && text.ends_with('Z'),
                    "{what}: {text}"
                );
                assert!(
                    text.bytes().take(4).all(|byte| byte.is_ascii_digit()),
                    "{what}: {text}"
                );
                assert!(time::parse(text).is_some(), "{what}: {text}");
            }
            // Podman compares its TOC with the headers, unless the tar-split data are nobody's.
            if written
                .annotations
                .contains_key(annotations::PODMAN_TARSPLIT_POSITION)
            {
                assert_eq!(toc["tarSplitDigest"].is_string(), is_tellable, "{what}");
            }
        }
    }
}

#[test]
fn owners_and_modes_are_those_that_readers_show() {
    let nobody = Metadata {
        uid: u32::MAX,
        ..metadata(0o644)
    };
    let link = TarKind::Symlink(b"a"[..].into());
    let tar = tar_with(&[("a", TarKind::Fifo, nobody), ("s", link, metadata(0o644))]);
    for options in all() {
        let (blob, written) = convert(&tar, &options);
        let (toc, difference) = toc_of(&blob, &written);
        assert_eq!(difference, Ok(()));
        let entry = |name: &str| {
            let entries = toc["entries"].as_array().unwrap();
            entries.iter().find(|entry| entry["name"] == name).unwrap()
        };
        // Podman's has what the headers have.
        let is_podman = toc["tarSplitDigest"].is_string();
        let uid = entry("a")["uid"].as_u64().unwrap_or(0);
        assert_eq!(uid, if is_podman { u64::from(u32::MAX) } else { 0 });
        let mode = entry("s")["mode"].as_u64();
        assert_eq!(mode, Some(if is_podman { 0o644 } else { 0o777 }));
    }
}
