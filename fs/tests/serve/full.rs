//! A store whose disk is full: what was fetched is served, and not fetched again.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::Ordering;

use peel_fs::Options;
use rustix::mount::UnmountFlags;

use crate::support::{Host, eventually, expected};
use crate::{BIG, digest_of, registry};

/// A small disk for a store.
struct Disk(tempfile::TempDir);

impl Disk {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        File::create(&image).unwrap().set_len(64 << 20).unwrap();
        let run = |command: &mut Command| {
            let output = command.output().unwrap();
            assert!(output.status.success(), "{command:?}: {output:?}");
        };
        // No room for root alone, few inodes.
        run(Command::new("mkfs.ext4")
            .args(["-q", "-m", "0", "-N", "2048"])
            .arg(&image));
        fs::create_dir(directory.path().join("disk")).unwrap();
        let mount = directory.path().join("disk");
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&mount));
        Self(directory)
    }

    fn store(&self) -> PathBuf {
        self.0.path().join("disk/store")
    }

    /// Takes all inodes or all space that is left.
    fn fill(&self, what: &str) {
        if what == "inodes" {
            self.fill_inodes();
        } else {
            self.fill_space();
        }
    }

    fn fill_inodes(&self) {
        let filling = self.0.path().join("disk/filling");
        fs::create_dir(&filling).unwrap();
        while File::create(filling.join(format!("{}", fs::read_dir(&filling).unwrap().count()))).is_ok() {}
    }

    fn fill_space(&self) {
        let mut filling = File::create(self.0.path().join("disk/filling")).unwrap();
        for size in [1 << 20, 1] {
            let piece = vec![0; size];
            while std::io::Write::write_all(&mut filling, &piece).is_ok() {}
        }
    }

    /// Gives it back.
    fn empty(&self) {
        let filling = self.0.path().join("disk/filling");
        if filling.is_dir() {
            fs::remove_dir_all(filling).unwrap();
        } else {
            fs::remove_file(filling).unwrap();
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // The service may not be gone yet.
        rustix::mount::unmount(self.0.path().join("disk"), UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn what_a_full_store_does_not_take_is_fetched_once() {
    let registry = registry();
    let name = registry.image("esgz");
    let reading = |host: &Host, full: &dyn Fn()| {
        let mount = host.open(&name);
        let keeps = host.store.join("records/names");
        eventually("the image is kept", || {
            fs::read_dir(&keeps).unwrap().next().is_some()
        });
        full();
        let before = (registry.blob_requests(), host.service.stats().bytes);
        assert_eq!(mount.listing(), expected());
        let after = (registry.blob_requests(), host.service.stats().bytes);
        (mount, after.0 - before.0, after.1 - before.1)
    };
    let (_, requests, bytes) = reading(&Host::new(), &|| {});
    for what in ["inodes", "space"] {
        let disk = Disk::new();
        let host = Host::at(disk.store(), &Options::default());
        let (mount, full_requests, full_bytes) = reading(&host, &|| disk.fill(what));
        assert_eq!(
            (full_requests, full_bytes),
            (requests, bytes),
            "{what}: as with room in the store"
        );
        let before = registry.blob_requests();
        for file in [BIG, "etc/os-release"] {
            let file = File::open(mount.path(file)).unwrap();
            rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
        }
        let digests = [BIG, "etc/os-release"].map(|file| digest_of(&mount.path(file)));
        assert_eq!(
            registry.blob_requests(),
            before,
            "{what}: nothing is fetched again"
        );
        let [big, small] = digests.map(|digest| host.object(&digest));
        assert!(!big.exists() && !small.exists(), "{what}: there is no room");
        disk.empty();
        registry.behaviour.down.store(true, Ordering::SeqCst);
        eventually("what is in memory is kept", || small.exists() && big.exists());
        registry.behaviour.down.store(false, Ordering::SeqCst);
    }
}
