//! Any layer through every format and back, and files too large to be held.

use super::formats::{check_podman, decompress, formats, open_podman, podman};
use super::*;

#[test]
fn a_hole_as_long_as_a_layer_takes_no_room() {
    /// Headers, zeros without end, and the rest.
    #[derive(Clone)]
    struct Zeros {
        before: std::io::Cursor<Vec<u8>>,
        zeros: u64,
        after: std::io::Cursor<Vec<u8>>,
    }
    impl Read for Zeros {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            let count = self.before.read(buffer)?;
            if count > 0 || buffer.is_empty() {
                return Ok(count);
            }
            if self.zeros == 0 {
                return self.after.read(buffer);
            }
            let count = buffer.len().min(usize::try_from(self.zeros).unwrap());
            buffer[..count].fill(0);
            self.zeros -= count as u64;
            Ok(count)
        }
    }
    let (zeros, length) = (300 << 20, (300 << 20) + 3);
    let header = tar::write::encode_header(&tar::write::NewEntry {
        name: b"big",
        metadata: &Metadata::default(),
        kind: &TarKind::Regular { size: length },
        user_name: b"",
        group_name: b"",
    })
    .unwrap();
    let mut after = b"end".to_vec();
    after.resize(512, 0);
    after.extend_from_slice(&tar_of(&[file("z", b"z")]));
    let input = Zeros {
        before: std::io::Cursor::new(header),
        zeros,
        after: std::io::Cursor::new(after),
    };
    let mut blob = Vec::new();
    let written = write(input.clone(), tempfile::tempfile().unwrap(), &mut blob, &podman()).unwrap();
    let mut straight = Vec::new();
    let options = refusing(&podman());
    let again = write(input, tempfile::tempfile().unwrap(), &mut straight, &options).unwrap();
    assert_eq!((straight == blob, again), (true, written.clone()));
    assert!(blob.len() < 100_000, "{}", blob.len());
    let (toc, _) = open_podman(&blob, &written.annotations);
    assert_eq!(toc["entries"][0]["chunkType"], "zeros");
    assert_eq!(toc["entries"][0]["chunkSize"], zeros);
    assert_eq!(toc["entries"][1]["chunkSize"], 3);
    assert_eq!(toc["entries"][2]["name"], "z");
    let mut hasher = peel_hash::Hasher::new();
    let mut stream = zstd::stream::Decoder::new(blob.as_slice()).unwrap();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = stream.read(&mut buffer).unwrap();
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
    }
    assert_eq!(hasher.finish(), written.diff_id);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn every_layer_round_trips_through_every_format(
        entries in proptest::collection::vec(
            ("[ab]{1,2}(/[ab]{1,2}){0,2}", 0usize..8, prop_oneof![Just(0usize), 1usize..3000, Just(512usize), Just(200_000usize)], any::<bool>()),
            0..20,
        ),
        paths in proptest::collection::vec("[ab]{1,2}(/[ab]{1,2}){0,2}", 0..4),
        threads in 1usize..4,
        trailer in 0usize..3,
    ) {
        let made: Vec<Made> = entries
            .iter()
            .enumerate()
            .map(|(index, (name, kind, size, zeros))| match kind {
                0 => dir(name),
                1 => link(name, "a"),
                2 => (name.clone(), TarKind::Symlink(b"../x".as_slice().into()), vec![]),
                _ => {
                    let mut content = noise(*size, index as u64);
                    if *zeros && *size > 2000 {
                        content[300..1900].fill(0);
                    }
                    file(name, &content)
                }
            })
            .collect();
        let mut tar = tar_of(&possible(made));
        tar.extend_from_slice(&vec![0; trailer * 512]);
        let mut trees = Vec::new();
        for format in formats() {
            let keeps = matches!(format, Format::Estargz { keep_diff_id: true, .. });
            let options = Options {
                format,
                prioritized: if keeps { vec![] } else { paths.iter().map(|path| path.clone().into_bytes()).collect() },
                threads,
                ..Options::default()
            };
            let (blob, written) = convert(&tar, &options);
            let unpacked = decompress(&blob);
            prop_assert_eq!(Digest::of(&unpacked), written.diff_id);
            match format {
                Format::ZstdChunked { dialect: Dialect::Podman, .. } => check_podman(&blob, &written),
                Format::Estargz { external_toc: false, .. } => check(&blob, &written),
                Format::Gzip { .. } | Format::Zstd { .. } | Format::Plain => prop_assert!(unpacked == tar),
                _ if keeps => prop_assert!(unpacked == tar),
                _ => {}
            }
            let (mut index, _) = tar::index_tar(unpacked.as_slice(), &mut tar::index::HashSink::default()).unwrap();
            index.entries.retain(|entry| !peel_image::estargz::is_reserved(entry.path.as_bytes()));
            trees.push((format, index));
        }
        // The same tree from every stream, over any lower layers.
        let is_tree = peel_image::tree::Tree::merge(std::slice::from_ref(&trees[0].1)).is_ok();
        for (format, tree) in trees.iter().filter(|_| is_tree) {
            let outcome = peel_image::views::compare(tree, &trees[0].1);
            prop_assert!(outcome.is_ok(), "{:?}: {:?}", format, outcome);
        }
    }
}

#[test]
fn a_toc_that_no_reader_would_take_is_an_error() {
    let large = Metadata {
        xattrs: [(b"user.large".as_slice().into(), vec![b'x'; 65_536].into())].into(),
        ..Metadata::default()
    };
    let header = |name: &str| {
        let entry = tar::write::NewEntry {
            name: name.as_bytes(),
            metadata: &large,
            kind: &TarKind::Fifo,
            user_name: b"",
            group_name: b"",
        };
        tar::write::encode_header(&entry).unwrap()
    };
    // Base64 makes four bytes of three.
    let count = peel_image::estargz::TOC_JSON_MAX * 3 / 4 / 65_536 + 10;
    let headers: Vec<u8> = (0..count)
        .flat_map(|number| header(&number.to_string()))
        .collect();
    for options in [podman(), refusing(&podman()), Options::default()] {
        let outcome = write(
            headers.as_slice(),
            tempfile::tempfile().unwrap(),
            io::sink(),
            &options,
        );
        assert!(matches!(outcome, Err(WriteError::TocTooLarge)), "{outcome:?}");
    }
}

/// Runs of headers that are cut, headers that are too many to wait, chunks that end batches, and holes.
#[test]
fn a_blob_that_needs_no_spool_is_the_same() {
    let noise = |length: usize, seed: u32| -> Vec<u8> {
        (0..length)
            .map(|at| (u32::try_from(at).unwrap().wrapping_mul(2_654_435_761 ^ seed) >> 13).to_le_bytes()[0])
            .collect()
    };
    let with_attributes = |index: u32| {
        let mut metadata = metadata(0o600);
        let name = format!("user.{index}").into_bytes().into_boxed_slice();
        metadata.xattrs.insert(name, vec![b'x'; 60_000].into());
        metadata
    };
    let mut tar = Vec::new();
    for index in 0..9000_u32 {
        let (metadata, content) = match index {
            0..3000 => (metadata(0o644), Vec::new()),
            3000..3100 => (with_attributes(index), noise(700, index)),
            3100..3150 => (with_attributes(index), Vec::new()),
            3150..3155 => (
                metadata(0o644),
                [vec![0; 300_000], noise(900_000, index)].concat(),
            ),
            3155..3160 => (metadata(0o644), noise(5 << 20, index)),
            _ => (
                metadata(0o644),
                noise(usize::try_from(index % 7 * 311).unwrap(), index),
            ),
        };
        let header = tar::write::encode_header(&tar::write::NewEntry {
            name: format!("d/{index}").as_bytes(),
            metadata: &metadata,
            kind: &TarKind::Regular {
                size: content.len() as u64,
            },
            user_name: b"",
            group_name: b"",
        });
        tar.extend(header.unwrap());
        tar.extend_from_slice(&content);
        tar.resize(tar.len().next_multiple_of(512), 0);
    }
    tar.resize(tar.len() + (3 << 20), 0);
    let stargz = options_of(Format::zstd_chunked(Dialect::Stargz));
    for options in [podman(), stargz, options_of(estargz(100_000, 1))] {
        let (_, written) = convert(&tar, &options);
        assert_eq!((written.entries, written.dropped), (9000, 0));
    }
}
