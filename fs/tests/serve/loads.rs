//! Loads: what they tell, what they refuse, and what they leave when they fail.

use std::fs;
use std::sync::atomic::Ordering;

use peel_fs::{Error, Options, Progress, PullPolicy};
use peel_image::Digest;
use peel_store::Store;

use crate::support::{Host, eventually, expected, layer};
use crate::{oci, registry};

#[test]
fn layers_say_why_they_are_not_lazy() {
    let host = Host::new();
    let steps = std::sync::Mutex::new(Vec::new());
    let image = host
        .service
        .load(&host.request(&oci("org")), &|step| {
            steps.lock().unwrap().push(step);
        })
        .unwrap();
    let reason = image.layers()[0].not_lazy.clone().unwrap();
    assert!(
        reason.contains("containerd.io/snapshot/stargz/toc.digest"),
        "{reason}"
    );
    let steps = steps.into_inner().unwrap();
    assert!(
        matches!(steps.first(), Some(Progress::Resolved { layers: 3, .. })),
        "{steps:?}"
    );
    assert!(matches!(steps.last(), Some(Progress::Indexed)), "{steps:?}");
    assert!(
        steps
            .iter()
            .any(|step| matches!(step, Progress::Pulling { layer: 0, done, total, .. } if done == total)),
        "{steps:?}"
    );
}

#[test]
fn an_eager_load_leaves_nothing_to_fetch() {
    let registry = registry();
    let host = Host::new();
    let mut request = host.request(&registry.image("esgz"));
    request.eager = true;
    let image = host.service.load(&request, &|_| {}).unwrap();
    registry.behaviour.down.store(true, Ordering::SeqCst);
    assert_eq!(host.mount(&image).listing(), expected());
}

#[test]
fn pull_policies() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("esgz");
    let load = |pull| {
        let request = peel_fs::LoadRequest {
            pull,
            ..host.request(&name)
        };
        host.service.load(&request, &|_| {})
    };
    assert!(matches!(load(PullPolicy::Never), Err(Error::NotInStore { .. })));
    load(PullPolicy::Missing).unwrap();
    eventually("the name is kept", || load(PullPolicy::Never).is_ok());
    let before = registry.behaviour.requests.load(Ordering::SeqCst);
    load(PullPolicy::Missing).unwrap();
    assert_eq!(registry.behaviour.requests.load(Ordering::SeqCst), before);
    load(PullPolicy::Always).unwrap();
    assert!(registry.behaviour.requests.load(Ordering::SeqCst) > before);
}

#[test]
fn a_damaged_layer_that_is_pulled_whole_is_an_error() {
    let registry = registry();
    let host = Host::new();
    let image = host.load(&registry.image("org"));
    let layer = image.layers()[0].digest;
    drop(image);
    registry
        .behaviour
        .damage
        .lock()
        .unwrap()
        .insert(layer.hex(), vec![5000]);
    let fresh = Host::new();
    let error = fresh
        .service
        .load(&fresh.request(&registry.image("org")), &|_| {})
        .unwrap_err()
        .to_string();
    assert!(error.contains(&layer.to_string()), "{error}");
    registry.behaviour.damage.lock().unwrap().clear();
    assert_eq!(
        fresh.open(&registry.image("org")).listing(),
        expected(),
        "after the repair"
    );
}

#[test]
fn an_image_with_too_many_files_is_an_error_that_names_the_layer() {
    for tag in ["esgz", "org"] {
        let registry = registry();
        let name = registry.image(tag);
        let host = Host::with(Options {
            indexes_max: 20_000,
            ..Options::default()
        });
        let error = host.service.load(&host.request(&name), &|_| {}).unwrap_err();
        let error = error.to_string();
        // Two of the three layers have few files.
        let large = Host::new().load(&name).layers()[0].digest;
        assert!(
            error.contains(&large.to_string()) && error.contains("more than the 20000 that"),
            "{error}"
        );
    }
}

#[test]
fn loads_that_together_need_more_memory_than_there_is_come_one_by_one() {
    let registry = registry();
    // Each load needs more than that for each of its layers.
    let host = Host::with(Options {
        loads_max: 1000,
        ..Options::default()
    });
    let tags = [
        "esgz",
        "esgz-ext",
        "zstd-stargz",
        "zstd-podman",
        "org",
        "esgz-opt",
    ];
    let mounts: Vec<_> = std::thread::scope(|scope| {
        let loads = tags.map(|tag| {
            let (host, name) = (&host, registry.image(tag));
            scope.spawn(move || host.open(&name))
        });
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    });
    for (mount, tag) in mounts.iter().zip(tags) {
        assert_eq!(mount.listing(), expected(), "{tag}");
    }
    // Known images wait for the same memory.
    drop(mounts);
    let host = host.restart(Options {
        loads_max: 1000,
        ..Options::default()
    });
    for tag in tags {
        assert_eq!(host.open(&registry.image(tag)).listing(), expected(), "{tag}");
    }
}

#[test]
fn a_load_that_fails_ends_the_pulls_of_its_other_layers() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("org");
    let layers: Vec<Digest> = Host::new()
        .load(&name)
        .layers()
        .iter()
        .map(|layer| layer.digest)
        .collect();
    let (large, broken) = (layers[0], layers[2]);
    registry.behaviour.slow.lock().unwrap().insert(large.hex());
    registry
        .behaviour
        .damage
        .lock()
        .unwrap()
        .insert(broken.hex(), vec![20]);
    let error = host.service.load(&host.request(&name), &|_| {}).unwrap_err();
    assert!(error.to_string().contains(&broken.to_string()), "{error}");
    eventually("nobody takes the other layer any more", || {
        registry.behaviour.sending.load(Ordering::SeqCst) == 0
    });
    registry.behaviour.slow.lock().unwrap().clear();
    registry.behaviour.damage.lock().unwrap().clear();
    assert_eq!(
        host.open(&name).listing(),
        expected(),
        "what was left is no hindrance"
    );
    let objects = Store::open(&host.store).unwrap();
    let tmp = fs::read_dir(objects.root().join("tmp")).unwrap().count();
    assert_eq!(tmp, 0, "nothing half-written stays");
}

#[test]
fn a_toc_that_nobody_vouches_for_is_not_used() {
    let registry = registry();
    let (blob, index) = layer("esgz", 0);
    let end = index
        .entries
        .iter()
        .filter_map(|entry| match &entry.kind {
            peel_image::layer::EntryKind::Regular(content) => content.chunks.last().cloned(),
            _ => None,
        })
        .filter_map(|chunk| match chunk.source {
            peel_image::layer::ChunkSource::Blob {
                offset,
                compressed_size,
                ..
            } => Some(offset + compressed_size),
            peel_image::layer::ChunkSource::Zeros => None,
        })
        .max()
        .unwrap();
    registry
        .behaviour
        .damage
        .lock()
        .unwrap()
        .insert(blob, vec![usize::try_from(end).unwrap() + 600]);
    let host = Host::new();
    let error = host
        .service
        .load(&host.request(&registry.image("esgz")), &|_| {})
        .unwrap_err();
    // The layer is pulled whole instead, and then its digest is wrong.
    assert!(error.to_string().contains("sha256:"), "{error}");
}
