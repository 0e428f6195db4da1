//! The writer of layers, in every format: what it makes of any tar stream is read back as the same tree, by its TOC and as a
//! whole, and its digests are right.
#![no_main]

use std::io::{Cursor, Read};

use libfuzzer_sys::fuzz_target;
use peel_fuzz::{SmallSink, check_index, check_merge, with_checksums};
use peel_image::compression::{Guard, decoder};
use peel_image::estargz::{extract_toc, is_reserved, locate, read_index};
use peel_image::layer::LayerIndex;
use peel_image::tar::index::index_tar;
use peel_image::tree::{InodeKind, Tree};
use peel_writer::{Dialect, Duplicates, Format, Options, WriteError, Written, write};
use peel_image::{Digest, annotations, tar_split};

/// The tree as far as every format keeps it: names, types, contents. Times lose their fractions in a TOC, and the format's own
/// files are no part of it.
fn names(index: LayerIndex) -> Option<Vec<(Vec<u8>, InodeKind, u16)>> {
    let mut index = index;
    index.entries.retain(|entry| !is_reserved(entry.path.as_bytes()));
    let tree: Tree = check_merge(&[index])?;
    let entry = |(path, id)| {
        let inode = tree.inode(id).expect("an inode");
        let kind = match &inode.kind {
            InodeKind::Directory(_) => InodeKind::Directory(Default::default()),
            InodeKind::Regular(file) => InodeKind::Regular(peel_image::tree::FileRef {
                layer: 0,
                entry: 0,
                ..file.clone()
            }),
            other => other.clone(),
        };
        (path, kind, inode.metadata.mode)
    };
    Some(tree.walk().map(entry).collect())
}

fn format(selector: u8) -> Format {
    let chunk_size = 64 * u64::from(selector / 10);
    let estargz = |min_chunk_size, external_toc, keep_diff_id| Format::Estargz {
        chunk_size,
        min_chunk_size,
        level: 1,
        external_toc,
        keep_diff_id,
    };
    match selector % 10 {
        0 | 1 => estargz(0, false, false),
        2 => estargz(700, false, false),
        3 => estargz(0, true, false),
        4 => estargz(0, true, true),
        5 => Format::ZstdChunked {
            dialect: Dialect::Stargz,
            chunk_size,
            level: 1,
        },
        6 => Format::ZstdChunked {
            dialect: Dialect::Podman,
            chunk_size: 0,
            level: 1,
        },
        7 => Format::Gzip { level: 1 },
        8 => Format::Zstd { level: 1 },
        _ => Format::Plain,
    }
}

/// The index in the TOC of an eStargz blob.
fn toc_of(blob: &[u8], written: &Written) -> LayerIndex {
    let location = locate(blob, blob.len() as u64).expect("our own footer");
    let toc = match &written.external_toc {
        Some(toc) => extract_toc(toc).expect("our own TOC"),
        None => {
            assert_eq!(Some(location.payload_end), written.toc_offset);
            let at = usize::try_from(location.payload_end).expect("a small blob");
            let length = usize::try_from(location.toc_size).expect("a small blob");
            extract_toc(&blob[at..at + length]).expect("our own TOC")
        }
    };
    assert_eq!(Some(toc.digest), written.toc_digest);
    let index = read_index(&toc.json, location.payload_end).expect("our own TOC");
    check_index(&index, location.payload_end);
    index
}

/// The tar-split data covers the stream, and no path is there twice.
fn check_split(blob: &[u8], written: &Written) {
    let Some(position) = written.annotations.get(annotations::PODMAN_TARSPLIT_POSITION) else {
        // Names do not tell which of several contents is meant.
        assert!(written.hidden > 0);
        return;
    };
    let numbers: Vec<usize> = position
        .split(':')
        .map(|number| number.parse().expect("a number"))
        .collect();
    let data = &blob[numbers[0]..numbers[0] + numbers[1]];
    let lines = zstd_of(data);
    assert_eq!(lines.len(), numbers[2]);
    let (mut size, mut paths) = (0, std::collections::HashSet::new());
    for item in tar_split::Reader::new(lines.as_slice()) {
        match item.expect("our own tar-split data") {
            tar_split::Item::Segment(bytes) => size += bytes.len() as u64,
            tar_split::Item::File {
                name, size: of_file, ..
            } => {
                size += of_file;
                assert!(paths.insert(name), "a path twice");
            }
        }
    }
    assert_eq!(size, written.uncompressed_size);
}

fn zstd_of(data: &[u8]) -> Vec<u8> {
    let (_, mut stream) = decoder(Cursor::new(data.to_vec()), Guard::default()).expect("our own frames");
    let mut out = Vec::new();
    stream.read_to_end(&mut out).expect("our own frames");
    out
}

/// Where no entry moves or is left out, the blob is the same without the spool.
fn check_straight(tar: &[u8], options: &Options) {
    let spooled = Options {
        prioritized: Vec::new(),
        ..options.clone()
    };
    let straight = Options {
        duplicates: Duplicates::Refuse,
        ..spooled.clone()
    };
    let write = |options| write(tar, Cursor::new(Vec::new()), std::io::sink(), options);
    match (write(&straight), write(&spooled)) {
        // Its meaning depends on the order: only the whole tells.
        (Err(WriteError::Duplicate { .. }), _) => {}
        (straight, spooled) => assert_eq!(straight.ok(), spooled.ok()),
    }
}

fuzz_target!(|input: (u8, &[u8])| {
    let (selector, tar) = input;
    let tar = with_checksums(tar);
    let tar = tar.as_slice();
    let Ok((plain, _)) = index_tar(tar, &mut SmallSink::default()) else {
        return;
    };
    let format = format(selector);
    let keeps = matches!(
        format,
        Format::Estargz {
            keep_diff_id: true,
            ..
        }
    );
    let first = plain.entries.iter().rev().take(if keeps { 0 } else { 2 });
    let options = Options {
        format,
        prioritized: first.map(|entry| entry.path.as_bytes().to_vec()).collect(),
        threads: 1,
        ..Options::default()
    };
    let mut blob = Vec::new();
    let written = match write(tar, Cursor::new(Vec::new()), &mut blob, &options) {
        Ok(written) => written,
        Err(WriteError::ThreadLost | WriteError::SpoolDamaged) => panic!("no fault of the input"),
        Err(_) => return,
    };
    assert_eq!(
        (written.blob_digest, written.blob_size),
        (Digest::of(&blob), blob.len() as u64)
    );
    check_straight(tar, &options);
    let mut unpacked = Vec::new();
    let (_, mut stream) = decoder(Cursor::new(blob.clone()), Guard::default()).expect("our own blob");
    stream.read_to_end(&mut unpacked).expect("our own blob");
    assert_eq!(
        (Digest::of(&unpacked), unpacked.len() as u64),
        (written.diff_id, written.uncompressed_size)
    );
    if keeps {
        assert!(unpacked == tar);
    }
    let plain = names(plain);
    let (whole, _) = index_tar(unpacked.as_slice(), &mut SmallSink::default()).expect("our own tar stream");
    match format {
        Format::Gzip { .. } | Format::Zstd { .. } | Format::Plain => assert_eq!(names(whole), plain),
        Format::Estargz { .. } => {
            // A name with U+FFFD and something that JSON escapes might be one that a builder could not write down.
            if !tar.windows(3).any(|bytes| bytes == "\u{fffd}".as_bytes()) {
                assert_eq!(names(toc_of(&blob, &written)), plain);
            }
            assert_eq!(names(whole), plain);
        }
        Format::ZstdChunked { dialect, .. } => {
            if dialect == Dialect::Podman {
                check_split(&blob, &written);
            }
            assert_eq!(names(whole), plain);
        }
    }
});
