//! Objects: naming, writing, races, damage.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use proptest::prelude::*;

use super::*;
use crate::tests::{TestStore, noise};

/// Both ways to make a file that nobody sees yet.
fn each_way(test: impl Fn(&Store)) {
    for named in [false, true] {
        let fixture = TestStore::new();
        fixture
            .store
            .inner
            .named_temporaries
            .store(named, Ordering::Relaxed);
        test(&fixture.store);
        let left = fs::read_dir(fixture.store.root().join("tmp")).unwrap().count();
        assert_eq!(left, 0, "temporary files stay behind (named: {named})");
    }
}

fn read(store: &Store, digest: &Digest) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    io::Read::read_to_end(&mut store.open_object(digest).unwrap()?, &mut content).unwrap();
    Some(content)
}

#[test]
fn names_are_split_after_two_digits() {
    let name = Store::object_name(&Digest::EMPTY);
    assert_eq!(name, format!("e3/{}", &Digest::EMPTY.hex()[2..]));
    assert_eq!(digest_of_name("e3", Path::new(&name[3..])), Some(Digest::EMPTY));
    assert_eq!(digest_of_name("e3", Path::new("x")), None);
}

#[test]
fn an_object_is_added_once() {
    each_way(|store| {
        let content = b"some bytes";
        let digest = Digest::of(content);
        assert!(!store.has_object(&digest));
        assert_eq!(read(store, &digest), None);
        store.add_verified(&digest, content).unwrap();
        assert!(!store.has_object(&digest) && store.pending_size(&digest) == Some(10));
        store.add_verified(&digest, content).unwrap();
        store.settle().unwrap();
        let first = fs::metadata(store.object_path(&digest)).unwrap();
        assert_eq!(first.mode() & 0o7777, 0o444);
        store.add_verified(&digest, content).unwrap();
        assert_eq!(
            fs::metadata(store.object_path(&digest)).unwrap().ino(),
            first.ino()
        );
        assert_eq!(read(store, &digest).as_deref(), Some(content.as_slice()));
    });
}

#[test]
fn zeros_of_the_right_length_are_not_enough() {
    let test = TestStore::new();
    let (content, size) = (b"no zeros", 8);
    let digest = Digest::of(content);
    test.store.add_verified(&digest, content).unwrap();
    assert_eq!(test.store.pending_size(&digest), Some(size));
    assert!(!test.store.add_zeros(&digest, size).unwrap());
    let zeros = Digest::of_zeros(size);
    for _ in 0..2 {
        assert!(test.store.add_zeros(&zeros, size).unwrap());
    }
    assert!(!test.store.add_zeros(&zeros, size - 1).unwrap());
}

#[test]
fn publishing_never_replaces() {
    each_way(|store| {
        let digest = Digest::of(b"first");
        store.add_verified(&digest, b"first").unwrap();
        let mut temporary = store.temporary(".").unwrap();
        temporary.file.write_all(b"second").unwrap();
        let begun = store.inner.syncs.begin_write();
        store.publish(temporary, &digest, 6, &begun).unwrap();
        assert_eq!(store.pending_size(&digest), Some(5));
        store.settle().unwrap();
        assert_eq!(read(store, &digest).as_deref(), Some(b"first".as_slice()));
    });
}

#[test]
fn a_wrong_digest_leaves_nothing() {
    each_way(|store| {
        for length in [0, 10, WRITER_BUFFER, 3 * WRITER_BUFFER] {
            let content = noise(length, 1);
            let expected = Digest::of(b"something else");
            let mut writer = store.object_writer().unwrap();
            writer.write_all(&content).unwrap();
            match writer.finish(Some(&expected)) {
                Err(Error::DigestMismatch { expected: e, found }) => {
                    assert_eq!((e, found), (expected, Digest::of(&content)));
                }
                other => panic!("{other:?}"),
            }
            let mut abandoned = store.object_writer().unwrap();
            abandoned.write_all(&content).unwrap();
            drop(abandoned);
        }
        assert_eq!(store.usage().unwrap().objects.files, 0);
    });
}

#[test]
fn damage_is_found() {
    let test = TestStore::new();
    let digest = Digest::of(b"content");
    assert_eq!(test.store.verify_object(&digest).unwrap(), Verdict::Absent);
    test.store.add_verified(&digest, b"content").unwrap();
    test.store.settle().unwrap();
    assert_eq!(test.store.verify_object(&digest).unwrap(), Verdict::Intact);
    let path = test.store.object_path(&digest);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    fs::write(&path, b"contents").unwrap();
    assert_eq!(test.store.verify_object(&digest).unwrap(), Verdict::Damaged);
    assert!(test.store.remove_object(&digest).unwrap());
    assert!(!test.store.remove_object(&digest).unwrap());
}

#[test]
fn threads_may_add_the_same_objects() {
    each_way(|store| {
        let contents: Vec<Vec<u8>> = (0..100).map(|seed| noise(2000, seed)).collect();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for content in &contents {
                        store.add_verified(&Digest::of(content), content).unwrap();
                    }
                });
                scope.spawn(|| {
                    for content in contents.iter().rev() {
                        let mut writer = store.object_writer().unwrap();
                        writer.write_all(content).unwrap();
                        assert_eq!(writer.finish(None).unwrap(), Digest::of(content));
                    }
                });
            }
        });
        assert_eq!(store.usage().unwrap().objects.files, 100);
        store.settle().unwrap();
        assert_eq!(store.usage().unwrap().objects.files, 100);
        for content in &contents {
            assert_eq!(
                store.verify_object(&Digest::of(content)).unwrap(),
                Verdict::Intact
            );
        }
    });
}

#[test]
fn a_failed_write_spoils_the_object() {
    let test = TestStore::new();
    let mut writer = test.store.object_writer().unwrap();
    writer.broken = true;
    assert!(writer.write(b"x").is_err());
    assert!(matches!(writer.finish(None), Err(Error::Io { .. })));
}

#[test]
fn pieces_of_any_size_make_the_same_object() {
    let test = TestStore::new();
    let size = prop_oneof![0..5000_usize, 200_000..600_000_usize];
    let sizes = proptest::collection::vec(size, 0..6);
    proptest!(ProptestConfig::with_cases(32), |(sizes in sizes, seed: u64)| {
        let content = noise(sizes.iter().sum(), seed);
        let mut writer = test.store.object_writer().unwrap();
        let mut rest = content.as_slice();
        for size in sizes {
            let (piece, after) = rest.split_at(size);
            writer.write_all(piece).unwrap();
            rest = after;
        }
        let digest = writer.finish(Some(&Digest::of(&content))).unwrap();
        test.store.settle().unwrap();
        prop_assert!(read(&test.store, &digest).unwrap() == content);
    });
}
