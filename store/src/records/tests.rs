//! Records: what goes in comes out, and what is damaged is gone.

use peel_image::layer::{Chunk, ChunkSource, Encoding, Entry, EntryKind, FileContent, Metadata};
use peel_image::path::EntryPath;
use proptest::prelude::*;

use super::*;
use crate::erofs::tests::build::{TreeBuilder, metadata};
use crate::tests::TestStore;

fn image_record() -> ImageRecord {
    ImageRecord {
        manifest_digest: Digest::of(b"manifest"),
        manifest: b"{\"manifest\": 1}".to_vec(),
        config: b"{}".to_vec(),
        layers: vec![Digest::of(b"a"), Digest::of(b"b")],
    }
}

fn layer_index(files: u64) -> LayerIndex {
    let entry = |number: u64| Entry {
        path: EntryPath::clean(format!("dir/{number}").as_bytes()).unwrap(),
        metadata: Metadata {
            mode: 0o644,
            mtime: -5,
            xattrs: [(b"user.x".as_slice().into(), b"\0".as_slice().into())].into(),
            ..Metadata::default()
        },
        kind: EntryKind::Regular(FileContent {
            size: number + 1,
            digest: Some(Digest::of(&number.to_le_bytes())),
            chunks: vec![Chunk {
                file_offset: 0,
                size: number + 1,
                digest: Digest::of(&number.to_le_bytes()),
                source: ChunkSource::Blob {
                    encoding: Encoding::Zstd,
                    offset: number << 32,
                    compressed_size: 77,
                    inner_offset: 3,
                },
            }],
        }),
    };
    LayerIndex {
        entries: (0..files).map(entry).collect(),
        prefetch_end: Some(12),
    }
}

#[test]
fn names_are_listed_but_for_unusable_ones() {
    let test = TestStore::new();
    assert_eq!(test.store.names().unwrap(), []);
    let names = ["a:1", "b:1 linux/arm64", "c:1"].map(|name| (name.to_owned(), Digest::of(name.as_bytes())));
    for (name, manifest) in names.iter().rev() {
        test.store.put_name(name, manifest).unwrap();
    }
    assert_eq!(test.store.names().unwrap(), names);
    let record = test.store.record_path("names", &Digest::of(b"b:1 linux/arm64"));
    fs::write(record, b"peel rec").unwrap();
    let [first, _, last] = names;
    assert_eq!(test.store.names().unwrap(), [first, last]);
}

#[test]
fn records_outlive_the_process() {
    let test = TestStore::new();
    let record = image_record();
    let (blob, index) = (Digest::of(b"blob"), layer_index(1000));
    assert_eq!(test.store.image(&record.manifest_digest).unwrap(), None);
    assert_eq!(test.store.name("debian:12 linux/amd64").unwrap(), None);
    assert_eq!(test.store.layer(&blob).unwrap(), None);
    test.store.put_image(&record).unwrap();
    test.store
        .put_name("debian:12 linux/amd64", &record.manifest_digest)
        .unwrap();
    test.store.put_layer(&blob, &index).unwrap();
    assert_eq!(test.store.verdict(&blob).unwrap(), None);
    let verdict = LayerVerdict {
        blob: true,
        fault: Some("it lies".to_owned()),
    };
    test.store.put_verdict(&blob, &verdict).unwrap();
    let test = test.reopen();
    assert_eq!(test.store.verdict(&blob).unwrap(), Some(verdict));
    assert_eq!(
        test.store.image(&record.manifest_digest).unwrap().unwrap(),
        record
    );
    assert_eq!(test.store.layer(&blob).unwrap().unwrap(), index);
    let name = test.store.name("debian:12 linux/amd64").unwrap();
    assert_eq!(name, Some(record.manifest_digest));
    test.store.put_name("debian:12 linux/amd64", &blob).unwrap();
    assert_eq!(test.store.name("debian:12 linux/amd64").unwrap(), Some(blob));
    assert_eq!(test.store.name("debian:12").unwrap(), None);
}

#[test]
fn damaged_records_are_absent_and_removed() {
    let test = TestStore::new();
    let record = image_record();
    let path = test.store.record_path("images", &record.manifest_digest);
    test.store.put_image(&record).unwrap();
    let good = fs::read(&path).unwrap();
    let mut other_version = good.clone();
    other_version[8] ^= 2;
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut longer = good.clone();
    longer.push(0);
    for bad in [
        &[][..],
        &good[..10],
        &good[..good.len() - 1],
        &other_version,
        &flipped,
        &longer,
        &[0; 100],
    ] {
        fs::write(&path, bad).unwrap();
        assert_eq!(test.store.image(&record.manifest_digest).unwrap(), None);
        assert!(!path.exists(), "{} bytes", bad.len());
    }
    // A record under another's name cannot pass for it.
    test.store.put_name("a", &record.manifest_digest).unwrap();
    let name = |text: &str| test.store.record_path("names", &Digest::of(text.as_bytes()));
    fs::rename(name("a"), name("b")).unwrap();
    assert_eq!(test.store.name("b").unwrap(), None);
}

#[test]
fn erofs_images_are_kept_until_they_are_damaged() {
    let test = TestStore::new();
    let manifest = Digest::of(b"manifest");
    assert_eq!(test.store.erofs_image(&manifest), None);
    let mut tree = TreeBuilder::new();
    tree.file("file", metadata(0o644), 5);
    let tree = tree.finish();
    let path = test.store.put_erofs_image(&manifest, &tree).unwrap();
    let test = test.reopen();
    assert_eq!(test.store.erofs_image(&manifest), Some(path.clone()));
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_len(8192).unwrap();
    assert_eq!(test.store.erofs_image(&manifest), None);
    assert!(!path.exists());

    test.store.put_erofs_image(&manifest, &tree).unwrap();
    let old = path.with_file_name("0123.v0.erofs");
    fs::write(&old, "of an older writer").unwrap();
    let test = test.reopen();
    assert!(!old.exists());
    assert!(test.store.erofs_image(&manifest).is_some());

    let mut bad = TreeBuilder::new();
    bad.symlink("link", "");
    let result = test.store.put_erofs_image(&Digest::of(b"bad"), &bad.finish());
    assert!(matches!(result, Err(Error::Image { name, .. }) if name == "/link"));
    assert_eq!(fs::read_dir(test.store.root().join("tmp")).unwrap().count(), 0);
}

proptest! {
    #[test]
    fn any_bytes_decode_or_do_not(bytes in proptest::collection::vec(any::<u8>(), 0..200), length: u64) {
        let _ = decode::<LayerIndex>(&bytes);
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: crc32c::crc32c(&bytes).into(),
            length: (bytes.len() as u64).into(),
        };
        // The checksum is right, so the decoder proper sees the bytes.
        let record = [header.as_bytes(), &bytes].concat();
        let _ = decode::<LayerIndex>(&record);
        let _ = decode::<ImageRecord>(&record);
        let mut lying = record;
        lying[16..24].copy_from_slice(&length.to_le_bytes());
        prop_assert!(length == bytes.len() as u64 || decode::<ImageRecord>(&lying).is_err());
    }
}

#[test]
fn any_image_record_comes_back() {
    let test = TestStore::new();
    let bytes = || proptest::collection::vec(any::<u8>(), 0..300);
    let layers = proptest::collection::vec(any::<[u8; 32]>().prop_map(Digest::from_bytes), 0..10);
    proptest!(|(manifest in bytes(), config in bytes(), layers in layers)| {
        let record = ImageRecord { manifest_digest: Digest::of(&manifest), manifest, config, layers };
        test.store.put_image(&record).unwrap();
        prop_assert_eq!(test.store.image(&record.manifest_digest).unwrap(), Some(record));
    });
}
