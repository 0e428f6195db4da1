//! The formats other than plain eStargz: compared with what upstream's tools and Podman wrote, decoded chunk by chunk, and
//! taken back to ordinary layers.

use base64::Engine as _;
use serde_json::Value;

use super::*;
use peel_image::estargz::footer::{Footer, parse};
use peel_image::tar_split;
use peel_image::{annotations, media};

fn options(format: Format) -> Options {
    Options {
        format,
        ..Options::default()
    }
}

pub(super) fn podman() -> Options {
    options(Format::zstd_chunked(Dialect::Podman))
}

fn stargz() -> Options {
    options(Format::zstd_chunked(Dialect::Stargz))
}

fn external(keep_diff_id: bool) -> Options {
    options(Format::Estargz {
        chunk_size: 0,
        min_chunk_size: 0,
        level: 6,
        external_toc: true,
        keep_diff_id,
    })
}

fn sharing(min_chunk_size: u64) -> Options {
    options(Format::Estargz {
        chunk_size: 0,
        min_chunk_size,
        level: 6,
        external_toc: false,
        keep_diff_id: false,
    })
}

pub(super) fn unzstd(data: &[u8]) -> Vec<u8> {
    zstd::stream::decode_all(data).unwrap()
}

fn number(value: &Value, key: &str) -> usize {
    usize::try_from(value[key].as_u64().unwrap_or(0)).unwrap()
}

/// The numbers of a position annotation.
fn position(notes: &BTreeMap<String, String>, name: &str) -> Vec<usize> {
    notes[name].split(':').map(|text| text.parse().unwrap()).collect()
}

/// TOC and tar-split data of a blob of Podman's dialect, found by its annotations, both decompressed.
pub(super) fn open_podman(blob: &[u8], notes: &BTreeMap<String, String>) -> (Value, Vec<u8>) {
    let place = position(notes, annotations::PODMAN_MANIFEST_POSITION);
    let compressed = &blob[place[0]..place[0] + place[1]];
    assert_eq!(
        Digest::of(compressed).to_string(),
        notes[annotations::PODMAN_MANIFEST_CHECKSUM]
    );
    let json = unzstd(compressed);
    assert_eq!((json.len(), place[3]), (place[2], 1));
    let toc: Value = serde_json::from_slice(&json).unwrap();
    let place = position(notes, annotations::PODMAN_TARSPLIT_POSITION);
    let compressed = &blob[place[0]..place[0] + place[1]];
    assert_eq!(Digest::of(compressed).to_string(), toc["tarSplitDigest"]);
    let split = unzstd(compressed);
    assert_eq!(split.len(), place[2]);
    (toc, split)
}

/// The entries with what depends on the compressor taken out.
fn without_places(toc: &Value) -> Vec<Value> {
    let mut entries = toc["entries"].as_array().cloned().unwrap_or_default();
    for entry in &mut entries {
        let entry = entry.as_object_mut().unwrap();
        for key in ["offset", "endOffset", "innerOffset"] {
            entry.remove(key);
        }
    }
    entries
}

/// Decodes every chunk that Podman's TOC names, and compares digests of chunks and files.
pub(super) fn check_podman(blob: &[u8], written: &Written) {
    if !written
        .annotations
        .contains_key(annotations::PODMAN_TARSPLIT_POSITION)
    {
        // Such a stream cannot be made again from names and contents.
        assert!(written.hidden > 0, "{written:?}");
        return;
    }
    let (toc, split) = open_podman(blob, &written.annotations);
    assert_eq!(Digest::of(blob), written.blob_digest);
    let tar = unzstd(blob);
    assert_eq!(Digest::of(&tar), written.diff_id);
    assert_eq!(tar.len() as u64, written.uncompressed_size);
    assert!(!written.annotations.contains_key(annotations::TOC_DIGEST));

    let entries = toc["entries"].as_array().unwrap();
    let mut contents = std::collections::HashMap::new();
    for (index, entry) in entries.iter().enumerate() {
        if entry["type"] != "reg" || number(entry, "size") == 0 {
            continue;
        }
        let end = number(entry, "endOffset");
        let content = unzstd(&blob[number(entry, "offset")..end]);
        assert_eq!(content.len(), number(entry, "size"), "{entry}");
        assert_eq!(Digest::of(&content).to_string(), entry["digest"]);
        let mut chunks = vec![entry];
        chunks.extend(
            entries[index + 1..]
                .iter()
                .take_while(|next| next["type"] == "chunk"),
        );
        for (index, chunk) in chunks.iter().enumerate().filter(|_| chunks.len() > 1) {
            let end = chunks.get(index + 1).map_or(end, |next| number(next, "offset"));
            let data = unzstd(&blob[number(chunk, "offset")..end]);
            let start = number(chunk, "chunkOffset");
            assert_eq!(data.len(), number(chunk, "chunkSize"));
            assert_eq!(Digest::of(&data).to_string(), chunk["chunkDigest"]);
            assert_eq!(data, content[start..start + data.len()]);
            assert_eq!(
                chunk["chunkType"] == "zeros",
                data.len() >= 1024 && data.iter().all(|byte| *byte == 0),
                "{chunk}"
            );
        }
        contents.insert(entry["name"].as_str().unwrap().as_bytes().to_vec(), content);
    }
    // The tar-split data and the contents are the stream, and its headers are the entries.
    let mut rebuilt = Vec::new();
    let mut names = Vec::new();
    for item in tar_split::Reader::new(split.as_slice()) {
        match item.unwrap() {
            tar_split::Item::Segment(bytes) => rebuilt.extend_from_slice(&bytes),
            tar_split::Item::File { name, size, crc64 } => {
                names.push(String::from_utf8(name.to_vec()).unwrap());
                if size > 0 {
                    let content = &contents[&name.to_vec()];
                    assert_eq!(Some(peel_image::tar_split::Crc64::of(content)), crc64);
                    rebuilt.extend_from_slice(content);
                }
            }
        }
    }
    assert!(rebuilt == tar);
    let listed: Vec<&str> = entries
        .iter()
        .filter(|entry| entry["type"] != "chunk")
        .map(|entry| entry["name"].as_str().unwrap())
        .collect();
    assert_eq!(listed, names);

    // The footer says the same as the annotations.
    let footer = &blob[blob.len() - 72..];
    assert_eq!(footer[..8], [0x50, 0x2a, 0x4d, 0x18, 64, 0, 0, 0]);
    let numbers: Vec<usize> = footer[8..64]
        .chunks_exact(8)
        .map(|bytes| usize::try_from(u64::from_le_bytes(bytes.try_into().unwrap())).unwrap())
        .collect();
    let mut expected = position(&written.annotations, annotations::PODMAN_MANIFEST_POSITION);
    expected.extend(position(
        &written.annotations,
        annotations::PODMAN_TARSPLIT_POSITION,
    ));
    assert_eq!(numbers, expected);
    assert_eq!(footer[64..], *b"GNUlInUx");
}

#[test]
fn podman_and_this_writer_write_the_same() {
    for (ours, theirs) in testing::layers("org").iter().zip(testing::layers("zstd-podman")) {
        let tar = inflate(&ours.blob);
        let (blob, written) = convert(&tar, &podman());
        check_podman(&blob, &written);
        assert_eq!(written.diff_id, Digest::of(&tar));
        assert_eq!((written.media_type, written.dropped), (media::OCI_LAYER_ZSTD, 0));
        let (our_toc, our_split) = open_podman(&blob, &written.annotations);
        let (their_toc, their_split) = open_podman(&theirs.blob, &theirs.annotations);
        assert_eq!(without_places(&our_toc), without_places(&their_toc));
        let lines = |split: &[u8]| -> Vec<String> {
            let text = String::from_utf8(split.to_vec()).unwrap();
            text.lines().map(str::to_owned).collect()
        };
        let (ours, theirs) = (lines(&our_split), lines(&their_split));
        // Podman cuts what follows the end of the archive where its reads happen to end.
        let entries = ours
            .iter()
            .rposition(|line| line.contains("\"type\":1"))
            .map_or(0, |last| last + 1);
        assert_eq!(ours[..=entries], theirs[..=entries]);
        let rest = |lines: &[String]| -> Vec<u8> {
            let bytes = |line: &String| {
                let item: Value = serde_json::from_str(line).unwrap();
                assert_eq!(item["type"], 2);
                base64::engine::general_purpose::STANDARD
                    .decode(item["payload"].as_str().unwrap())
                    .unwrap()
            };
            lines[entries + 1..].iter().flat_map(bytes).collect()
        };
        assert!(rest(&ours) == rest(&theirs));
    }
}

#[test]
fn upstreams_zstd_chunked_and_this_one_have_the_same_toc() {
    let paths = prioritized(&["usr/lib/mod007.py", "bin/sh", "etc/os-release", "usr/lib/big.bin"]);
    for (tag, prioritized) in [("zstd-stargz", vec![]), ("zstd-stargz-opt", paths)] {
        for (ours, theirs) in testing::layers("org").iter().zip(testing::layers(tag)) {
            let tar = inflate(&ours.blob);
            let options = Options {
                prioritized: prioritized.clone(),
                ..stargz()
            };
            let (blob, written) = convert(&tar, &options);
            let json = |blob: &[u8], notes: &BTreeMap<String, String>| {
                let place = position(notes, annotations::STARGZ_MANIFEST_POSITION);
                let compressed = &blob[place[0]..place[0] + place[1]];
                assert_eq!(
                    Digest::of(compressed).to_string(),
                    notes[annotations::STARGZ_MANIFEST_CHECKSUM]
                );
                let json = unzstd(compressed);
                assert_eq!(Digest::of(&json).to_string(), notes[annotations::TOC_DIGEST]);
                assert_eq!((json.len(), place[3]), (place[2], 1));
                let footer = &blob[blob.len() - 48..];
                assert_eq!(footer[..8], [0x50, 0x2a, 0x4d, 0x18, 40, 0, 0, 0]);
                assert_eq!(footer[8..16], (place[0] as u64).to_le_bytes());
                assert_eq!(footer[40..], *b"GnUlInUx");
                String::from_utf8(json).unwrap()
            };
            // Even the layout of the text is the same.
            let lines = |json: &str| -> Vec<String> {
                let is_kept = |line: &&str| !line.contains("\"offset\":");
                json.split('\n').filter(is_kept).map(str::to_owned).collect()
            };
            let text = json(&blob, &written.annotations);
            assert_eq!(
                lines(&text),
                lines(&json(&theirs.blob, &theirs.annotations)),
                "{tag}"
            );
            assert_eq!(
                written.annotations[annotations::UNCOMPRESSED_SIZE],
                theirs.annotations[annotations::UNCOMPRESSED_SIZE]
            );
            let unpacked = unzstd(&blob);
            assert_eq!(Digest::of(&unpacked), written.diff_id);
            for entry in serde_json::from_str::<Value>(&text).unwrap()["entries"]
                .as_array()
                .unwrap()
            {
                let offset = number(entry, "offset");
                if offset > 0 {
                    let size = zstd::zstd_safe::find_frame_compressed_size(&blob[offset..]).unwrap();
                    let data = unzstd(&blob[offset..offset + size]);
                    assert_eq!(Digest::of(&data).to_string(), entry["chunkDigest"]);
                }
            }
        }
    }
}

#[test]
fn external_and_shared_tocs_are_those_of_upstream() {
    for (tag, options) in [
        ("esgz-ext", external(false)),
        ("esgz-keep", external(true)),
        ("esgz-min50k", sharing(50_000)),
    ] {
        let tocs = testing::layers(&format!("{tag}-esgztoc").replace("esgz-min50k-esgztoc", "esgz-min50k"));
        for (ours, theirs) in testing::layers("org").iter().zip(testing::layers(tag)) {
            let tar = inflate(&ours.blob);
            let (blob, written) = convert(&tar, &options);
            let unpacked = inflate(&blob);
            assert_eq!(Digest::of(&unpacked), written.diff_id);
            let toc = if let Some(external) = &written.external_toc {
                assert_eq!(parse(&blob), Some(Footer::External));
                assert_eq!(written.toc_offset, None);
                assert_eq!(blob[blob.len() - 46..], theirs.blob[theirs.blob.len() - 46..]);
                assert_eq!(
                    written.annotations[annotations::UNCOMPRESSED_SIZE],
                    theirs.annotations[annotations::UNCOMPRESSED_SIZE],
                    "{tag}"
                );
                extract_toc(external).unwrap()
            } else {
                testing::open(&blob).0
            };
            if tag == "esgz-keep" {
                assert!(unpacked == tar);
            }
            assert_eq!(Some(toc.digest), written.toc_digest);
            // The TOC images are sorted by digest.
            let mut candidates = tocs.iter().filter_map(|layer| {
                let start = match locate(&layer.blob, layer.blob.len() as u64) {
                    Ok(location) => usize::try_from(location.payload_end).unwrap(),
                    Err(_) => 0,
                };
                extract_toc(&layer.blob[start..]).ok()
            });
            let wanted: Digest = theirs.annotations[annotations::TOC_DIGEST].parse().unwrap();
            let their_toc = candidates.find(|toc| toc.digest == wanted).unwrap();
            let entries = |json: &[u8]| without_places(&serde_json::from_slice(json).unwrap());
            assert_eq!(entries(&toc.json), entries(&their_toc.json), "{tag}");
            check_chunks(&blob, &toc.json, blob.len() as u64);
        }
    }
}

/// Decodes every chunk of an eStargz blob through the index.
fn check_chunks(blob: &[u8], json: &[u8], payload_end: u64) {
    let index = peel_image::estargz::read_index(json, payload_end).unwrap();
    for entry in &index.entries {
        let EntryKind::Regular(content) = &entry.kind else {
            continue;
        };
        let pieces: Vec<Vec<u8>> = content.chunks.iter().map(|chunk| decode(blob, chunk)).collect();
        for (piece, chunk) in pieces.iter().zip(&content.chunks) {
            assert_eq!(Digest::of(piece), chunk.digest, "{}", entry.path);
        }
        assert_eq!(content.digest, Some(Digest::of(&pieces.concat())));
    }
}

#[test]
fn small_files_share_members() {
    let tar = tar_of(&sample());
    let list = prioritized(&["usr/f7", "usr/f299", "usr/link"]);
    for prioritized in [vec![], list] {
        let options = |threads| Options {
            prioritized: prioritized.clone(),
            threads,
            ..sharing(50_000)
        };
        let (blob, written) = convert(&tar, &options(1));
        check(&blob, &written);
        assert!(convert(&tar, &options(3)) == (blob.clone(), written.clone()));
        let alone = Options {
            prioritized: prioritized.clone(),
            ..super::options_of(estargz(0, 6))
        };
        assert!(blob.len() < convert(&tar, &alone).0.len());
        let toc: Value = serde_json::from_slice(&testing::open(&blob).0.json).unwrap();
        let entries = toc["entries"].as_array().unwrap();
        let inner = entries
            .iter()
            .filter(|entry| number(entry, "innerOffset") > 0)
            .count();
        assert!(inner > 200, "{inner}");
        let landmark = entries
            .iter()
            .find(|entry| entry["name"].as_str().unwrap().ends_with("landmark"))
            .unwrap();
        assert_eq!(number(landmark, "innerOffset"), 0);
        // No member has bytes of both sides of the landmark.
        let before = entries.iter().take_while(|entry| *entry != landmark);
        assert!(
            before
                .into_iter()
                .all(|entry| number(entry, "offset") < number(landmark, "offset"))
        );
    }
}

#[test]
fn every_format_is_the_same_bytes_on_any_number_of_threads() {
    let tar = tar_of(&sample());
    for format in formats() {
        for list in [vec![], prioritized(&["usr/f7", "usr/link", "usr/big"])] {
            let options = |threads| Options {
                format,
                prioritized: list.clone(),
                threads,
                ..Options::default()
            };
            if matches!(
                format,
                Format::Estargz {
                    keep_diff_id: true,
                    ..
                }
            ) && !list.is_empty()
            {
                continue;
            }
            let (blob, written) = convert(&tar, &options(1));
            assert_eq!(Digest::of(&blob), written.blob_digest);
            assert_eq!(Digest::of(&decompress(&blob)), written.diff_id, "{format:?}");
            assert!(convert(&tar, &options(3)) == (blob, written), "{format:?}");
        }
    }
}

pub(super) fn formats() -> Vec<Format> {
    let mut formats = vec![
        Format::ESTARGZ,
        sharing(1000).format,
        external(false).format,
        external(true).format,
        podman().format,
        stargz().format,
        Format::Gzip { level: 4 },
        Format::Zstd { level: 2 },
        Format::Plain,
    ];
    formats.push(Format::ZstdChunked {
        dialect: Dialect::Stargz,
        chunk_size: 3000,
        level: 1,
    });
    formats
}

pub(super) fn decompress(blob: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    let guard = peel_image::compression::Guard::default();
    let (_, mut stream) =
        peel_image::compression::decoder(std::io::Cursor::new(blob.to_vec()), guard).unwrap();
    stream.read_to_end(&mut out).unwrap();
    out
}

#[test]
fn what_kept_the_stream_goes_back_to_it() {
    let mut tar = tar_of(&sample());
    // A padding and a trailer as no tool of today writes them.
    let at = tar.windows(7).position(|window| window == b"./pipe\0").unwrap();
    tar[at - 700] ^= 0;
    tar.extend_from_slice(&[0; 9000]);
    tar.extend_from_slice(b"and some more");
    let diff_id = Digest::of(&tar);
    for kept in [podman(), external(true)] {
        let (blob, written) = convert(&tar, &kept);
        assert_eq!(written.diff_id, diff_id);
        for plain in [
            Format::Gzip { level: 6 },
            Format::Zstd { level: 3 },
            Format::Plain,
        ] {
            let (back, again) = convert(&decompress(&blob), &options(plain));
            assert_eq!((again.diff_id, again.toc_digest), (diff_id, None));
            assert!(decompress(&back) == tar);
        }
        let (_, there) = convert(&decompress(&blob), &podman());
        assert_eq!(there.diff_id, diff_id);
    }
    // The additions of the other formats do not stay.
    for other in [options(Format::ESTARGZ), stargz()] {
        let (blob, _) = convert(&tar, &other);
        let (back, written) = convert(&decompress(&blob), &options(Format::Plain));
        let names = |tar: &[u8]| -> Vec<Vec<u8>> {
            list(tar)
                .into_iter()
                .map(|(entry, _)| entry.raw_headers)
                .collect()
        };
        assert_eq!(names(&back), names(&tar));
        assert_eq!(written.entries, sample().len() as u64);
        // Their end of the archive was left out.
        assert!(back.ends_with(&[0; 1024]) && back.len().is_multiple_of(512));
        let (blob, _) = convert(&[0; 1024], &other);
        let (back, _) = convert(&decompress(&blob), &options(Format::Plain));
        assert_eq!(back, [0; 1024]);
    }
}

#[test]
fn a_stream_that_breaks_off_gets_no_end() {
    let cut = |mut tar: Vec<u8>| {
        tar.truncate(tar.len() - 1024 - 400);
        tar
    };
    let landmark = [file(".no.prefetch.landmark", b"\x0f"), file("a", &[b'x'; 700])];
    let (back, _) = convert(&cut(tar_of(&landmark)), &options(Format::Plain));
    let [_, kept] = &landmark;
    assert!(
        back.ends_with(&[b'x'; 624]),
        "what there is of the file, and no more"
    );
    assert!(tar_of(std::slice::from_ref(kept)).starts_with(&back));
    // Without its last padding only, a stream is whole.
    let mut tar = tar_of(&landmark);
    tar.truncate(tar.len() - 1024 - 324);
    let (back, _) = convert(&tar, &options(Format::Plain));
    assert!(back == tar_of(std::slice::from_ref(kept)));
}

#[test]
fn paddings_that_are_not_zeros_are_kept() {
    let content = vec![b'x'; 700];
    let mut tar = tar_of(&[file("a", &content), file("b", b"b"), dir("c/")]);
    let end = tar.windows(700).position(|window| window == content).unwrap() + 700;
    tar[end..end + 324].fill(b'?');
    let (blob, written) = convert(&tar, &podman());
    check_podman(&blob, &written);
    assert_eq!(written.diff_id, Digest::of(&tar));
    let (_, written) = convert(&tar, &external(true));
    assert_eq!(written.diff_id, Digest::of(&tar));
    let moved = Options {
        prioritized: prioritized(&["b"]),
        ..podman()
    };
    let (blob, written) = convert(&tar, &moved);
    check_podman(&blob, &written);
}

#[test]
fn podman_gets_no_path_twice() {
    let tar = tar_of(&[
        file("a", b"old"),
        dir("d/"),
        file("./a", b"new"),
        file(".prefetch.landmark", b"\x0f"),
        dir("d"),
    ]);
    let (blob, written) = convert(&tar, &podman());
    check_podman(&blob, &written);
    assert_eq!((written.entries, written.dropped), (2, 2));
    let names: Vec<_> = list(&unzstd(&blob))
        .into_iter()
        .map(|(entry, _)| entry.name)
        .collect();
    assert_eq!(
        names,
        [
            b"d/".to_vec().into_boxed_slice(),
            b"./a".to_vec().into_boxed_slice()
        ]
    );
}

#[test]
fn podmans_prioritized_files_come_first_without_a_landmark() {
    let tar = tar_of(&sample());
    let options = Options {
        prioritized: prioritized(&["usr/f7", "nothing", "usr/link"]),
        ..podman()
    };
    let (blob, written) = convert(&tar, &options);
    check_podman(&blob, &written);
    let names: Vec<String> = list(&unzstd(&blob))
        .into_iter()
        .map(|(entry, _)| String::from_utf8(entry.name.into_vec()).unwrap())
        .collect();
    assert_eq!(
        names[..5],
        ["./", "./usr/", "./usr/f7", "./usr/big", "./usr/link"]
    );
    assert_eq!(names.len(), sample().len());
    let end = written.prefetch_end.unwrap();
    assert_eq!(written.annotations[annotations::PREFETCH_END], end.to_string());
    let clean = |name: &[u8]| EntryPath::clean(name).unwrap();
    assert_eq!(written.file_ends.len(), 2);
    assert_eq!(written.file_ends[&clean(b"usr/big")], end);
    assert!(written.file_ends[&clean(b"usr/f7")] < end);
    assert_eq!(written.not_found.len(), 1);
    let (_, none) = convert(&tar, &podman());
    assert_eq!((none.prefetch_end, none.file_ends.len()), (None, 0));
    assert_eq!(
        none.annotations[annotations::COMPRESSOR],
        "zstd 1.5.7 level 3, chunks to 256 KiB fast, headers level -1, TOC level 1"
    );
}

#[test]
fn what_podman_would_read_otherwise_gets_new_headers() {
    let plain = tar_of(&[file("a", b"content"), dir("d/")]);
    let mut pax = Vec::new();
    let mut header = plain[..512].to_vec();
    header[156] = b'g';
    header[124..136].copy_from_slice(b"00000000013\0");
    header[148..156].fill(b' ');
    let sum: u32 = header.iter().copied().map(u32::from).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    pax.extend_from_slice(&header);
    pax.extend_from_slice(b"11 uid=999\n");
    pax.resize(1024, 0);
    pax.extend_from_slice(&plain);
    let (blob, written) = convert(&pax, &podman());
    check_podman(&blob, &written);
    assert_ne!(written.diff_id, Digest::of(&pax));
    let entries = list(&unzstd(&blob));
    assert_eq!(entries.len(), 2);
    assert!(entries.iter().all(|(entry, _)| entry.self_contained));
    assert_eq!(
        entries
            .iter()
            .map(|(entry, _)| entry.metadata.clone())
            .collect::<Vec<_>>(),
        list(&pax)
            .iter()
            .map(|(entry, _)| entry.metadata.clone())
            .collect::<Vec<_>>()
    );
    // Where the DiffID is to be kept, the header stays.
    let (blob, written) = convert(&pax, &external(true));
    assert!(decompress(&blob) == pax);
    assert_eq!(written.diff_id, Digest::of(&pax));

    // A regular file of a type and a directory of a type that Podman does not know as such.
    for (at, kind) in [(512 * 5, b'7'), (512 * 7, b'0')] {
        let mut odd = plain.clone();
        let at = odd
            .chunks_exact(512)
            .position(|block| block[156] == if kind == b'7' { b'0' } else { b'5' })
            .map_or(at, |block| block * 512);
        odd[at + 156] = kind;
        odd[at + 148..at + 156].fill(b' ');
        let sum: u32 = odd[at..at + 512].iter().copied().map(u32::from).sum();
        odd[at + 148..at + 156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        let (blob, written) = convert(&odd, &podman());
        check_podman(&blob, &written);
        assert_ne!(written.diff_id, Digest::of(&odd));
        assert!(
            unzstd(&blob)
                .chunks_exact(512)
                .all(|block| !block.starts_with(&odd[at..at + 157]))
        );
    }
}

#[test]
fn the_spool_is_smaller_than_the_blob() {
    struct Growing(std::io::Cursor<Vec<u8>>, std::rc::Rc<std::cell::Cell<u64>>);
    impl Read for Growing {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }
    impl Write for Growing {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let count = self.0.write(data)?;
            self.1.set(self.1.get().max(self.0.position()));
            Ok(count)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Seek for Growing {
        fn seek(&mut self, to: io::SeekFrom) -> io::Result<u64> {
            self.0.seek(to)
        }
    }
    let tiny: Vec<Made> = (0..2000)
        .map(|index| file(&format!("d/{index}"), format!("{index}").as_bytes()))
        .collect();
    let empty: Vec<Made> = (0..2000).map(|index| file(&format!("d/{index}"), b"")).collect();
    for made in [tiny, empty, sample()] {
        let tar = tar_of(&made);
        for format in formats() {
            let size = std::rc::Rc::new(std::cell::Cell::new(0));
            let spool = Growing(std::io::Cursor::new(Vec::new()), std::rc::Rc::clone(&size));
            let written = write(tar.as_slice(), spool, io::sink(), &options(format)).unwrap();
            assert!(
                size.get() <= written.blob_size,
                "{format:?}: {} > {}",
                size.get(),
                written.blob_size
            );
            let has_spool = match format {
                Format::Estargz { .. } | Format::ZstdChunked { .. } => true,
                Format::Gzip { .. } | Format::Zstd { .. } | Format::Plain => false,
            };
            assert_eq!(size.get() > 0, has_spool);
        }
    }
}

#[test]
fn what_cannot_be_kept_is_an_error() {
    let fails = |tar: &[u8], options: &Options| {
        write(tar, tempfile::tempfile().unwrap(), io::sink(), options).unwrap_err()
    };
    let tar = tar_of(&sample());
    let toc = tar_of(&[file("stargz.index.json", b"{}")]);
    assert!(matches!(fails(&toc, &external(true)), WriteError::AlreadyEstargz));
    let moving = Options {
        prioritized: prioritized(&["usr/f7"]),
        ..external(true)
    };
    assert!(matches!(fails(&tar, &moving), WriteError::Options(_)));
    for format in [
        Format::Estargz {
            chunk_size: 0,
            min_chunk_size: 0,
            level: 6,
            external_toc: false,
            keep_diff_id: true,
        },
        Format::ZstdChunked {
            dialect: Dialect::Podman,
            chunk_size: 1000,
            level: 3,
        },
    ] {
        assert!(matches!(fails(&tar, &options(format)), WriteError::Options(_)));
    }
    for level in [0, 23] {
        let format = Format::Zstd { level };
        assert!(matches!(
            fails(&tar, &options(format)),
            WriteError::Level { max: 22, .. }
        ));
    }
    let header = |kind: u8, size: usize| {
        let mut header = tar[..512].to_vec();
        header[156] = kind;
        header[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        header[148..156].fill(b' ');
        let sum: u32 = header.iter().copied().map(u32::from).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header
    };
    // The label of a volume belongs to no entry; what GNU tar lists in a directory is no content of it.
    let labelled = [header(b'V', 0), tar.clone()].concat();
    let listed = [header(b'D', 512), vec![b'Y'; 512], tar.clone()].concat();
    for tar in [labelled, listed] {
        assert!(matches!(
            fails(&tar, &external(true)),
            WriteError::NotLossless { .. }
        ));
        let (blob, written) = convert(&tar, &podman());
        check_podman(&blob, &written);
    }
}
