//! Lock, marker, and the loss of what was not on the disk.

use std::os::unix::fs::PermissionsExt;

use peel_image::Digest;

use super::*;
use crate::erofs::tests::build::TreeBuilder;
use crate::marker::Mark;
use crate::tests::{TestStore, noise};

fn mark(store: &Store) -> Option<Mark> {
    store.inner.marker.read().unwrap()
}

/// Rewrites the marker on disk as an earlier boot might have left it.
fn set_mark(store: &Store, change: impl FnOnce(&mut Mark)) {
    let mut mark = mark(store).unwrap();
    change(&mut mark);
    fs::write(store.root().join("marker"), serde_json::to_string(&mark).unwrap()).unwrap();
}

fn add(store: &Store, seed: u64) -> Digest {
    let content = noise(3000, seed);
    let digest = Digest::of(&content);
    store.add_verified(&digest, &content).unwrap();
    store.settle().unwrap();
    digest
}

/// What a power loss does to a file whose blocks were never written.
fn cut(store: &Store, digest: &Digest) {
    let path = store.object_path(digest);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(1000)
        .unwrap();
}

#[test]
fn a_store_has_one_owner() {
    let test = TestStore::new();
    let second = Store::open(test.store.root()).unwrap();
    match second.lock() {
        Err(Error::Locked { holder, .. }) => assert_eq!(holder, std::process::id().to_string()),
        other => panic!("{other:?}"),
    }
    let clone = test.store.clone();
    drop(test.store);
    assert!(second.lock().is_err(), "a clone still holds it");
    drop(clone);
    second.lock().unwrap();
}

#[test]
fn the_marker_follows_writes_and_checkpoints() {
    let test = TestStore::new();
    assert_eq!(mark(&test.store), None, "nothing to lose, nothing to write");
    add(&test.store, 1);
    assert!(!mark(&test.store).unwrap().clean);
    let early = now();
    test.store.checkpoint().unwrap();
    let after = mark(&test.store).unwrap();
    assert!(after.clean && after.checkpoint >= early);
    test.store.checkpoint().unwrap();
    assert_eq!(
        mark(&test.store),
        Some(after),
        "a clean store needs no second checkpoint"
    );
    add(&test.store, 1);
    assert!(
        mark(&test.store).unwrap().clean,
        "an object that is there is no write"
    );
    add(&test.store, 2);
    assert!(!mark(&test.store).unwrap().clean);
}

#[test]
fn a_kill_alone_changes_nothing() {
    let test = TestStore::new();
    let digest = add(&test.store, 1);
    cut(&test.store, &digest);
    let test = test.reopen();
    assert!(
        test.store.has_object(&digest),
        "same boot: the page cache has everything, nothing is hashed"
    );
    assert!(!mark(&test.store).unwrap().clean);
}

#[test]
fn after_a_power_loss_damaged_objects_are_gone() {
    let test = TestStore::new();
    let manifest = Digest::of(b"manifest");
    test.store
        .put_erofs_image(&manifest, &TreeBuilder::new().finish())
        .unwrap();
    let good: Vec<Digest> = (0..50).map(|seed| add(&test.store, seed)).collect();
    let bad: Vec<Digest> = (100..110).map(|seed| add(&test.store, seed)).collect();
    for digest in &bad {
        cut(&test.store, digest);
    }
    let stray = test.store.objects_dir().join("ab/not a digest");
    fs::write(&stray, "x").unwrap();
    set_mark(&test.store, |mark| mark.boot_id = "another boot".into());
    let test = test.reopen();
    assert!(good.iter().all(|digest| test.store.has_object(digest)));
    assert!(!bad.iter().any(|digest| test.store.has_object(digest)));
    assert!(!stray.exists());
    assert!(test.store.has_lost_objects());
    assert_eq!(test.store.erofs_image(&manifest), None);
    assert!(
        mark(&test.store).unwrap().clean,
        "recovery ends with a checkpoint"
    );
}

#[test]
fn objects_before_the_checkpoint_are_trusted() {
    let test = TestStore::new();
    let digest = add(&test.store, 1);
    cut(&test.store, &digest);
    set_mark(&test.store, |mark| {
        mark.boot_id = "another boot".into();
        mark.checkpoint = now() + 60 * 1_000_000_000;
    });
    let test = test.reopen();
    assert!(test.store.has_object(&digest));

    add(&test.store, 2);
    set_mark(&test.store, |mark| {
        (mark.boot_id, mark.clean) = ("another boot".into(), true);
    });
    let test = test.reopen();
    assert!(test.store.has_object(&digest), "a clean store is not checked");
}

#[test]
fn without_a_marker_everything_is_checked() {
    for damage in [true, false] {
        let test = TestStore::new();
        let (good, bad) = (add(&test.store, 1), add(&test.store, 2));
        test.store.checkpoint().unwrap();
        cut(&test.store, &bad);
        let path = test.store.root().join("marker");
        if damage {
            fs::write(path, "{").unwrap();
        } else {
            fs::remove_file(path).unwrap();
        }
        let test = test.reopen();
        assert!(test.store.has_object(&good) && !test.store.has_object(&bad));
    }
}

#[test]
fn a_clock_that_is_set_back_takes_the_checkpoint_along() {
    let test = TestStore::new();
    add(&test.store, 1);
    let future = now() + 3600 * 1_000_000_000;
    set_mark(&test.store, |mark| mark.checkpoint = future);
    let test = test.reopen();
    assert!(!test.store.has_lost_objects());
    add(&test.store, 2);
    assert!(mark(&test.store).unwrap().checkpoint < future - 3000 * 1_000_000_000);
}

#[test]
fn half_finished_work_is_cleared() {
    let test = TestStore::new();
    let digest = add(&test.store, 1);
    let root = test.store.root().to_owned();
    let (data, map) = test.store.partial_paths(&digest);
    let (lone, _) = test.store.partial_paths(&Digest::of(b"lone"));
    for path in [
        &root.join("tmp/1-1"),
        &data,
        &map,
        &lone,
        &data.with_extension("junk"),
    ] {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "x").unwrap();
    }
    let test = test.reopen();
    assert_eq!(fs::read_dir(root.join("tmp")).unwrap().count(), 0);
    assert_eq!(test.store.usage().unwrap().partials.files, 0);
    assert!(!map.exists() && !data.with_extension("junk").exists());
    assert!(test.store.has_object(&digest));
}

/// Marks of the boot before and of another mount, and what they mean for an object that is damaged.
#[test]
fn only_a_marker_of_this_boot_and_this_mount_is_trusted() {
    type Change<'a> = &'a dyn Fn(&mut Mark);
    let cases: [(&str, bool, Change<'_>); 6] = [
        ("as it was", true, &|_| ()),
        ("another boot", false, &|mark| {
            mark.boot_id = "another boot".into();
        }),
        ("another mount", false, &|mark| {
            mark.mount = mark.mount.map(|mount| mount + 1);
        }),
        ("an earlier version", false, &|mark| mark.mount = None),
        ("a failed sync", false, &|mark| mark.failed = true),
        ("clean, another mount", true, &|mark| {
            (mark.clean, mark.mount) = (true, mark.mount.map(|mount| mount + 1));
        }),
    ];
    for (name, trusted, change) in cases {
        let test = TestStore::new();
        let digest = add(&test.store, 1);
        assert!(mark(&test.store).unwrap().mount.is_some());
        cut(&test.store, &digest);
        set_mark(&test.store, change);
        let test = test.reopen();
        assert_eq!(test.store.has_object(&digest), trusted, "{name}");
    }
}

#[test]
fn a_store_is_not_clean_after_a_sync_that_failed() {
    let test = TestStore::new();
    let first = add(&test.store, 1);
    let content = noise(3000, 2);
    let second = Digest::of(&content);
    test.store.add_verified(&second, &content).unwrap();
    test.store.inner.failures.store(1, Ordering::SeqCst);
    assert!(test.store.settle().is_err());
    let after = mark(&test.store).unwrap();
    assert!(!after.clean && after.failed, "{after:?}");
    for _ in 0..3 {
        test.store.checkpoint().unwrap();
        let after = mark(&test.store).unwrap();
        assert!(!after.clean && after.failed, "{after:?}");
    }
    assert!(test.store.has_object(&second), "it was written once more");
    // The next process looks.
    cut(&test.store, &second);
    let test = test.reopen();
    assert!(test.store.has_object(&first) && !test.store.has_object(&second));
    assert!(mark(&test.store).unwrap().clean);
}

#[test]
fn a_failure_that_could_not_be_noted_is_in_the_next_marker() {
    let test = TestStore::new();
    let first = add(&test.store, 1);
    let before = mark(&test.store).unwrap();
    // No marker can be written where its new file would stand.
    let obstacle = test.store.root().join("marker.new");
    fs::create_dir(&obstacle).unwrap();
    let content = noise(3000, 2);
    test.store.add_verified(&Digest::of(&content), &content).unwrap();
    test.store.inner.failures.store(1, Ordering::SeqCst);
    assert!(test.store.settle().is_err());
    assert_eq!(mark(&test.store), Some(before.clone()), "it could not be written");
    let content = noise(3000, 3);
    test.store.add_verified(&Digest::of(&content), &content).unwrap();
    assert!(test.store.settle().is_err(), "nothing is named without a marker");
    fs::remove_dir(&obstacle).unwrap();
    add(&test.store, 4);
    let after = mark(&test.store).unwrap();
    assert!(!after.clean && after.failed, "{after:?}");
    assert_eq!(after.checkpoint, before.checkpoint, "the earliest counts");
    cut(&test.store, &first);
    let test = test.reopen();
    assert!(!test.store.has_object(&first), "the next process looks");
}

#[test]
fn a_failure_is_noted_where_there_was_no_marker() {
    let test = TestStore::new();
    test.store.inner.failures.store(1, Ordering::SeqCst);
    assert!(test.store.settle().is_err());
    let after = mark(&test.store).unwrap();
    assert!(!after.clean && after.failed, "{after:?}");
    assert_eq!(after.checkpoint, i64::MIN);
    let digest = add(&test.store, 1);
    let test = test.reopen();
    assert!(test.store.has_object(&digest));
    assert!(mark(&test.store).unwrap().clean);
}
