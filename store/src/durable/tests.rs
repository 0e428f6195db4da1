//! Which writes a sync confirms, what becomes of those it does not, and who hears of it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::{Arc, Mutex};

use super::*;
use crate::ObjectWriter;
use crate::tests::{TestStore, noise};

/// Fails the next syncs.
fn fail(store: &Store, times: u32) {
    store.inner.failures.store(times, Ordering::SeqCst);
}

fn add(store: &Store, seed: u64) -> Digest {
    let content = noise(3000, seed);
    let digest = Digest::of(&content);
    store.add_verified(&digest, &content).unwrap();
    digest
}

/// What a disk leaves that did not take a page.
fn lose(store: &Store, digest: &Digest) {
    let path = store.pending_path(digest);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 1000], 1000).unwrap();
}

#[test]
fn a_write_is_confirmed_by_a_sync_that_began_after_it() {
    let syncs = Syncs::default();
    assert!(!syncs.confirm(Stamp::FOREIGN) && syncs.suspect(Stamp::FOREIGN));
    let begun = syncs.begin_write();
    let number = syncs.begin();
    // It ends while a sync is under way, which may have missed it.
    let straddling = syncs.end_write(&begun);
    let during = syncs.end_write(&syncs.begin_write());
    syncs.end(number, true);
    assert!(!syncs.confirm(straddling) && !syncs.confirm(during));
    assert!(!syncs.suspect(straddling) && !syncs.suspect(during));
    let number = syncs.begin();
    syncs.end(number, true);
    assert!(syncs.confirm(straddling) && syncs.confirm(during));
    assert_eq!(Stamp::unpack(straddling.pack()), straddling);
}

#[test]
fn a_sync_that_failed_makes_what_it_may_have_met_suspect_for_good() {
    let syncs = Syncs::default();
    let before = syncs.end_write(&syncs.begin_write());
    let number = syncs.begin();
    let during = syncs.end_write(&syncs.begin_write());
    syncs.end(number, false);
    let after = syncs.end_write(&syncs.begin_write());
    for _ in 0..3 {
        for stamp in [before, during, before.join(after)] {
            assert!(syncs.suspect(stamp) && !syncs.confirm(stamp), "{stamp:?}");
        }
        let number = syncs.begin();
        syncs.end(number, true);
    }
    assert!(!syncs.suspect(after) && syncs.confirm(after));
    assert!(
        !syncs.confirm(after.join(during)),
        "a file is as good as its worst chunk"
    );
}

#[derive(Default)]
struct Log {
    named: Vec<Digest>,
    lost: Vec<Digest>,
}

struct Listener(Arc<Mutex<Log>>);

impl Watch for Listener {
    fn written(&self) {}
    fn confirmed(&self) {}
    fn named(&self, objects: &[Digest]) {
        self.0.lock().unwrap().named.extend(objects);
    }
    fn lost(&self, objects: &[Digest]) {
        self.0.lock().unwrap().lost.extend(objects);
    }
}

#[test]
fn nothing_is_an_object_before_the_disk_has_it() {
    let test = TestStore::new();
    let store = &test.store;
    let log = Arc::<Mutex<Log>>::default();
    store.watch(Box::new(Listener(Arc::clone(&log))));
    let single = add(store, 1);
    let mut writer: ObjectWriter = store.object_writer().unwrap();
    io::Write::write_all(&mut writer, &noise(600_000, 2)).unwrap();
    let written = writer.finish(None).unwrap();
    let zeros = Digest::of_zeros(50_000);
    assert!(store.add_zeros(&zeros, 50_000).unwrap());
    let all = [single, written, zeros];
    for digest in &all {
        assert!(!store.has_object(digest) && store.pending_size(digest).is_some());
    }
    fail(store, 2);
    for _ in 0..2 {
        assert!(store.settle().is_err());
    }
    // The next sync succeeds, because the kernel has told of the error; that proves nothing for these.
    store.settle().unwrap();
    assert!(!all.iter().any(|digest| store.has_object(digest)));
    assert_eq!(store.suspect_count(), 3);
    lose(store, &written);
    assert_eq!(store.heal().unwrap(), 2);
    assert_eq!(log.lock().unwrap().lost, [written]);
    assert!(log.lock().unwrap().named.is_empty() && !store.has_object(&single));
    store.settle().unwrap();
    assert!(store.has_object(&single) && store.has_object(&zeros) && !store.has_object(&written));
    assert_eq!(log.lock().unwrap().named.len(), 2);
    assert_eq!(store.verify_object(&single).unwrap(), crate::Verdict::Intact);
    let mode = fs::metadata(store.object_path(&single))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o7777, 0o444);
    assert_eq!(store.pending_count(), 0);
}

#[test]
fn what_a_killed_process_left_pending_is_looked_at() {
    let test = TestStore::new();
    let (good, bad) = (add(&test.store, 1), add(&test.store, 2));
    lose(&test.store, &bad);
    fs::write(test.store.root().join("pending/not a digest"), "x").unwrap();
    let test = test.reopen();
    assert_eq!(test.store.pending_count(), 2);
    test.store.settle().unwrap();
    assert!(!test.store.has_object(&good), "nobody has looked yet");
    test.store.checkpoint().unwrap();
    assert!(test.store.has_object(&good) && !test.store.has_object(&bad));
    assert_eq!(test.store.pending_size(&bad), None);
}

#[test]
fn a_caller_can_wait_for_the_disk() {
    let test = TestStore::new();
    let objects = [add(&test.store, 1), add(&test.store, 2)];
    fail(&test.store, 1);
    test.store.make_durable(objects.iter()).unwrap();
    assert!(objects.iter().all(|digest| test.store.has_object(digest)));
    let more = [add(&test.store, 3)];
    fail(&test.store, 9);
    assert!(test.store.make_durable(more.iter()).is_err());
    fail(&test.store, 0);
    let absent = [Digest::of(b"absent")];
    assert!(matches!(
        test.store.make_durable(absent.iter()),
        Err(Error::NotKept(_))
    ));
}
