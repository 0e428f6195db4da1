//! Opening a store, and what the other tests share.

use std::os::unix::fs::chown;

use peel_image::Digest;

use super::*;

/// A locked store of its own that goes with the value.
pub(crate) struct TestStore {
    pub(crate) directory: tempfile::TempDir,
    pub(crate) store: Store,
}

impl TestStore {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        store.lock().unwrap();
        Self { directory, store }
    }

    /// Ends this process's use of the store and begins a new one.
    pub(crate) fn reopen(self) -> Self {
        let Self { directory, store } = self;
        drop(store);
        let store = Store::open(&directory.path().join("store")).unwrap();
        store.lock().unwrap();
        Self { directory, store }
    }
}

/// Bytes that do not repeat within a chunk.
pub(crate) fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[3]
    })
    .take(length)
    .collect()
}

fn mode_of(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o7777
}

#[test]
fn a_new_store_is_private_and_complete() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("deep/store");
    let store = Store::open(&root).unwrap();
    assert_eq!(mode_of(&root), 0o700);
    assert_eq!(
        fs::read_to_string(root.join("version")).unwrap(),
        "peel store 1\n"
    );
    assert_eq!(fs::read_dir(store.objects_dir()).unwrap().count(), 256);
    assert!(store.mounts_dir().is_dir() && store.run_dir().is_dir());
    let again = Store::open(&root).unwrap();
    assert_eq!(again.root(), store.root());
}

#[test]
fn an_empty_directory_becomes_a_store() {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    // What an interrupted first open and a fresh ext4 leave.
    fs::create_dir(directory.path().join("objects")).unwrap();
    fs::create_dir(directory.path().join("lost+found")).unwrap();
    Store::open(directory.path()).unwrap();
    assert_eq!(mode_of(directory.path()), 0o700);
}

#[test]
fn a_store_whose_version_a_power_loss_emptied_is_a_store() {
    let directory = tempfile::tempdir().unwrap();
    let digest = Digest::of(b"x");
    {
        let store = Store::open(directory.path()).unwrap();
        store.lock().unwrap();
        store.add_verified(&digest, b"x").unwrap();
        store.settle().unwrap();
    }
    let version = directory.path().join("version");
    fs::write(&version, "").unwrap();
    let store = Store::open(directory.path()).unwrap();
    store.lock().unwrap();
    assert!(store.has_object(&digest));
    assert_eq!(fs::read_to_string(&version).unwrap().trim_end(), LAYOUT);
    drop(store);
    // An empty file of that name makes nothing else a store.
    fs::write(&version, "").unwrap();
    fs::write(directory.path().join("other"), "").unwrap();
    assert!(matches!(Store::open(directory.path()), Err(Error::NotAStore(_))));
}

#[test]
fn foreign_directories_are_refused_and_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("other");
    fs::create_dir(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(root.join("thesis.tex"), "important").unwrap();
    assert!(matches!(Store::open(&root), Err(Error::NotAStore(_))));
    assert_eq!(mode_of(&root), 0o755);
    assert_eq!(fs::read_dir(&root).unwrap().count(), 1);

    let root = directory.path().join("later");
    Store::open(&root).unwrap();
    fs::write(root.join("version"), "peel store 2\n").unwrap();
    assert!(matches!(Store::open(&root), Err(Error::Layout { found, .. }) if found == "peel store 2"));

    let root = directory.path().join("loose");
    Store::open(&root).unwrap();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o750)).unwrap();
    assert!(matches!(Store::open(&root), Err(Error::Mode { mode: 0o750, .. })));

    let root = directory.path().join("stolen");
    Store::open(&root).unwrap();
    chown(&root, Some(1234), None).expect("this test needs root");
    assert!(matches!(
        Store::open(&root),
        Err(Error::Owner { owner: 1234, .. })
    ));

    let file = directory.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(Store::open(&file).is_err());
}

#[test]
fn writing_needs_the_lock() {
    let directory = tempfile::tempdir().unwrap();
    let store = Store::open(directory.path()).unwrap();
    let digest = Digest::of(b"x");
    assert!(matches!(
        store.add_verified(&digest, b"x"),
        Err(Error::NotLocked(_))
    ));
    assert!(matches!(store.checkpoint(), Err(Error::NotLocked(_))));
    assert!(!store.has_object(&digest));
    store.lock().unwrap();
    store.lock().unwrap();
    store.add_verified(&digest, b"x").unwrap();
}

#[test]
fn usage_counts_what_is_there() {
    let test = TestStore::new();
    assert_eq!(test.store.usage().unwrap(), Usage::default());
    for content in [b"one".as_slice(), b"three"] {
        test.store.add_verified(&Digest::of(content), content).unwrap();
    }
    let usage = test.store.usage().unwrap();
    assert_eq!((usage.objects.files, usage.objects.bytes), (2, 8));
    assert!(usage.objects.disk_bytes >= 8);
    assert_eq!(usage.partials, Count::default());
}
