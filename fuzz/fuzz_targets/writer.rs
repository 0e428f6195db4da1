//! The eStargz writer: what it makes of any tar stream is read back as the same tree, by its TOC and as a plain layer.
#![no_main]

use std::io::{Cursor, Read};

use flate2::read::MultiGzDecoder;
use libfuzzer_sys::fuzz_target;
use peel_fuzz::{SmallSink, check_index, check_merge, with_checksums};
use peel_image::Digest;
use peel_image::estargz::{extract_toc, locate, read_index};
use peel_image::write::{Format, Options, write};
use peel_image::layer::LayerIndex;
use peel_image::tar::index::index_tar;
use peel_image::tree::{InodeKind, Tree};

/// The tree as far as every format keeps it: names, types, contents. Times lose their fractions in a TOC.
fn names(index: LayerIndex) -> Option<Vec<(Vec<u8>, InodeKind, u16)>> {
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

fuzz_target!(|input: (u8, &[u8])| {
    let (chunk_size, tar) = input;
    let tar = with_checksums(tar);
    let tar = tar.as_slice();
    let Ok((plain, _)) = index_tar(tar, &mut SmallSink::default()) else {
        return;
    };
    let first = plain.entries.iter().rev().take(2);
    let options = Options {
        format: Format::Estargz { chunk_size: 64 * u64::from(chunk_size), min_chunk_size: 0, level: 1, external_toc: false, keep_diff_id: false },
        prioritized: first.map(|entry| entry.path.as_bytes().to_vec()).collect(),
        threads: 1,
        ..Options::default()
    };
    let mut blob = Vec::new();
    let Ok(written) = write(tar, Cursor::new(Vec::new()), &mut blob, &options) else {
        return;
    };
    assert_eq!(
        (written.blob_digest, written.blob_size),
        (Digest::of(&blob), blob.len() as u64)
    );
    let location = locate(&blob, blob.len() as u64).expect("our own footer");
    assert_eq!(location.payload_end, written.toc_offset.unwrap());
    let at = usize::try_from(location.payload_end).expect("a small blob");
    let length = usize::try_from(location.toc_size).expect("a small blob");
    let toc = extract_toc(&blob[at..at + length]).expect("our own TOC");
    assert_eq!(toc.digest, written.toc_digest.unwrap());
    let lazy = read_index(&toc.json, location.payload_end).expect("our own TOC");
    check_index(&lazy, location.payload_end);

    let mut unpacked = Vec::new();
    MultiGzDecoder::new(blob.as_slice())
        .read_to_end(&mut unpacked)
        .expect("our own members");
    assert_eq!(Digest::of(&unpacked), written.diff_id);
    let (whole, _) = index_tar(unpacked.as_slice(), &mut SmallSink::default()).expect("our own tar stream");
    let plain = names(plain);
    assert_eq!(names(lazy), plain);
    assert_eq!(names(whole), plain);
});
