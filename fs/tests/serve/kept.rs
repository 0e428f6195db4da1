//! Images that the store knows already: no request where everything is kept, and the right ones where something was lost.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use peel_fs::Options;

use crate::support::{Host, eventually, expected};
use crate::{BIG, digest_of, registry};

#[test]
fn a_known_image_starts_without_a_request_and_keeps_its_chunks() {
    let registry = registry();
    let mut host = Host::new();
    let first = registry.image("esgz");
    {
        let mount = host.open(&first);
        let mut start = vec![0; 1 << 20];
        File::open(mount.path(BIG))
            .unwrap()
            .read_exact_at(&mut start, 0)
            .unwrap();
        assert_eq!(fs::read(mount.path("etc/os-release")).unwrap().len(), 24);
    }
    let keeps = host.store.join("records/names");
    eventually("the name is kept", || {
        fs::read_dir(&keeps).unwrap().next().is_some()
    });
    host = host.restart(Options::default());
    let before = registry.behaviour.requests.load(Ordering::SeqCst);
    let mount = host.open(&first);
    let mut start = vec![0; 1 << 20];
    File::open(mount.path(BIG))
        .unwrap()
        .read_exact_at(&mut start, 0)
        .unwrap();
    assert_eq!(fs::read(mount.path("etc/os-release")).unwrap().len(), 24);
    assert_eq!(
        registry.behaviour.requests.load(Ordering::SeqCst),
        before,
        "everything that is read is here"
    );
    assert_eq!(mount.listing(), expected(), "the rest is fetched");
}

/// The files of the indexes of layers in a store.
fn index_records(host: &Host) -> Vec<std::path::PathBuf> {
    let directory = host.store.join("records/layers");
    let entries = fs::read_dir(directory).unwrap();
    entries.map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn an_index_that_the_store_has_lost_is_fetched_again() {
    type Loss = fn(&std::path::Path);
    let losses: [(&str, Loss); 3] = [
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("cut", |path| {
            let length = fs::metadata(path).unwrap().len();
            File::options()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(length / 2)
                .unwrap();
        }),
        ("damaged", |path| {
            let last = fs::metadata(path).unwrap().len() - 1;
            let file = File::options().read(true).write(true).open(path).unwrap();
            let mut byte = [0];
            file.read_exact_at(&mut byte, last).unwrap();
            file.write_all_at(&[!byte[0]], last).unwrap();
        }),
    ];
    for (what, lose) in losses {
        let registry = registry();
        let host = Host::new();
        let name = registry.image("esgz");
        drop(host.load(&name));
        let keeps = host.store.join("records/names");
        eventually("the name is kept", || {
            fs::read_dir(&keeps).unwrap().next().is_some()
        });
        let host = host.restart(Options::default());
        let records = index_records(&host);
        assert_eq!(records.len(), 3);
        for record in &records {
            lose(record);
        }
        let mount = host.open(&name);
        assert_eq!(
            fs::read(mount.path("etc/os-release")).unwrap().len(),
            24,
            "{what}"
        );
        drop(mount);
        eventually("the indexes are kept again", || index_records(&host).len() == 3);
        // What is whole is not fetched again.
        let host = host.restart(Options::default());
        let before = registry.behaviour.requests.load(Ordering::SeqCst);
        let mount = host.open(&name);
        assert_eq!(
            fs::read(mount.path("etc/os-release")).unwrap().len(),
            24,
            "{what}"
        );
        assert_eq!(
            registry.behaviour.requests.load(Ordering::SeqCst),
            before,
            "{what}"
        );
    }
}

#[test]
fn files_that_are_here_need_no_index() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("esgz");
    let digest = digest_of(&host.open(&name).path("etc/os-release"));
    let keeps = host.store.join("records/names");
    eventually("the name is kept", || {
        fs::read_dir(&keeps).unwrap().next().is_some()
    });
    let host = host.restart(Options::default());
    for record in index_records(&host) {
        fs::remove_file(record).unwrap();
    }
    registry.behaviour.down.store(true, Ordering::SeqCst);
    let mount = host.open(&name);
    assert_eq!(digest_of(&mount.path("etc/os-release")), digest);
    registry.behaviour.down.store(false, Ordering::SeqCst);
    assert_eq!(
        fs::read(mount.path("etc/passwd")).unwrap().len(),
        26,
        "the next chance is taken"
    );
}

#[test]
fn what_a_power_loss_took_from_a_whole_image_is_pulled_again() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("org");
    let digest = digest_of(&host.open(&name).path("etc/os-release"));
    let keeps = host.store.join("records/names");
    eventually("the name is kept", || {
        fs::read_dir(&keeps).unwrap().next().is_some()
    });
    let object = host.object(&digest);
    // What the store's recovery does with an object that is damaged.
    fs::remove_file(&object).unwrap();
    fs::write(host.store.join("lost-objects"), "").unwrap();
    let host = host.restart(Options::default());
    let before = registry.blob_requests();
    let mount = host.open(&name);
    assert_eq!(digest_of(&mount.path("etc/os-release")), digest);
    assert!(registry.blob_requests() > before);
}
