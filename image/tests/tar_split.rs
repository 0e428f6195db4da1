//! The tar-splits of layers that Podman and Skopeo made: written again they are the same lines, and with the contents
//! they give the layer's tar stream back, and so its DiffID.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::PathBuf;

use peel_image::compression::{Guard, decoder};
use peel_image::tar::{Reader as TarReader, TarKind};
use peel_image::tar_split::{Crc64, Item, Reader, TRAILER_PIECE, Writer, rebuild};
use peel_image::{Digest, Hasher};
use peel_testkit::vectors;

/// For each layer of `tag`: its blob, its tar-split and its DiffID.
fn layers(tag: &str) -> Vec<(PathBuf, Vec<u8>, Digest)> {
    const POSITION: &str = "io.github.containers.zstd-chunked.tarsplit-position";
    let read = |layer: &vectors::Layer| {
        let position = layer.annotation(POSITION).unwrap();
        let numbers: Vec<usize> = position
            .split(':')
            .map(|number| number.parse().unwrap())
            .collect();
        let compressed = layer.blob()[numbers[0]..][..numbers[1]].to_vec();
        let mut lines = Vec::new();
        let (_, mut plain) = decoder(Cursor::new(compressed), Guard::default()).unwrap();
        plain.read_to_end(&mut lines).unwrap();
        assert_eq!(lines.len(), numbers[2]);
        let diff_id = layer.diff_id.as_ref().unwrap();
        (layer.path.clone(), lines, diff_id.parse().unwrap())
    };
    vectors::layers(tag).iter().map(read).collect()
}

fn plain(path: &PathBuf) -> Box<dyn Read + Send> {
    decoder(File::open(path).unwrap(), Guard::default()).unwrap().1
}

#[test]
fn upstreams_lines_are_written_again() {
    for tag in ["zstd-podman", "zstd-skopeo"] {
        for (path, lines, _) in layers(tag) {
            let mut writer = Writer::new(Vec::new());
            for item in Reader::new(lines.as_slice()) {
                match item.unwrap() {
                    Item::Segment(bytes) => writer.segment(&bytes).unwrap(),
                    Item::File { name, size, crc64 } => writer.file(&name, size, crc64).unwrap(),
                }
            }
            assert!(writer.finish().unwrap() == lines, "{tag}, {}", path.display());
        }
    }
}

#[test]
fn a_layer_is_split_as_upstream_does() {
    for (path, lines, _) in layers("zstd-podman") {
        let mut reader = TarReader::new(plain(&path));
        let mut writer = Writer::new(Vec::new());
        let mut padding = 0;
        while let Some(entry) = reader.next_entry().unwrap() {
            let mut segment = vec![0; padding];
            segment.extend_from_slice(&entry.raw_headers);
            writer.segment(&segment).unwrap();
            let size = entry.kind.size();
            let mut crc = Crc64::new();
            if matches!(entry.kind, TarKind::Regular { .. }) {
                let mut content = Vec::new();
                reader.read_to_end(&mut content).unwrap();
                assert_eq!(content.len() as u64, size);
                crc.update(&content);
            }
            writer
                .file(&entry.name, size, (size > 0).then(|| crc.finish()))
                .unwrap();
            padding = usize::try_from(size.wrapping_neg() % 512).unwrap();
        }
        let trailer = reader.finish().unwrap();
        assert!(!trailer.has_data);
        // Two blocks of zeros end an archive; what follows them is cut at 1 MiB, or wherever a read of upstream ended.
        let mut rest = usize::try_from(trailer.size).unwrap() - 1024;
        writer.segment(&vec![0; padding + 1024]).unwrap();
        while rest > 0 {
            let piece = rest.min(TRAILER_PIECE);
            writer.segment(&vec![0; piece]).unwrap();
            rest -= piece;
        }
        let ours = writer.finish().unwrap();
        let items = |lines: &[u8]| Reader::new(lines).collect::<Result<Vec<_>, _>>().unwrap();
        let (mut ours, mut theirs) = (items(&ours), items(&lines));
        let start = ours.iter().rposition(|item| matches!(item, Item::File { .. }));
        let start = start.map_or(0, |last| last + 1) + 1;
        let bytes = |items: Vec<Item>| -> usize {
            let length = |item: &Item| match item {
                Item::Segment(bytes) => bytes.len(),
                Item::File { .. } => panic!("a file after the last one"),
            };
            items.iter().map(length).sum()
        };
        let rest = |items: &mut Vec<Item>| bytes(items.split_off(start));
        assert_eq!(rest(&mut ours), rest(&mut theirs));
        assert_eq!(ours.len(), theirs.len());
        for (ours, theirs) in ours.iter().zip(&theirs) {
            assert!(ours == theirs, "{}", path.display());
        }
    }
}

#[test]
fn layers_are_rebuilt_to_their_diff_ids() {
    struct Hashing(Hasher);
    impl io::Write for Hashing {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            self.0.update(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    for tag in ["zstd-podman", "zstd-skopeo"] {
        for (path, lines, diff_id) in layers(tag) {
            let mut contents: HashMap<Vec<u8>, Vec<u8>> = HashMap::new();
            let mut reader = TarReader::new(plain(&path));
            while let Some(entry) = reader.next_entry().unwrap() {
                let mut content = Vec::new();
                reader.read_to_end(&mut content).unwrap();
                contents.insert(entry.name.into(), content);
            }
            let mut out = Hashing(Hasher::new());
            let open = |name: &[u8], _| Ok(Cursor::new(contents[name].clone()));
            rebuild(Reader::new(lines.as_slice()), open, &mut out).unwrap();
            assert_eq!(out.0.finish(), diff_id, "{tag}, {}", path.display());
        }
    }
}
