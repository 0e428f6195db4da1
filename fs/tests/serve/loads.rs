//! Loads: what they tell, what they refuse, and what they leave when they fail.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use peel_fs::{Error, Image, Options, Progress, PullPolicy};
use peel_image::Digest;
use peel_store::Store;

use crate::registry::Registry;
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

/// Starts loads of the image at once and lets the registry answer when all of them wait.
fn load_together(
    host: &Host,
    registry: &Registry,
    name: &str,
    loads: usize,
) -> Vec<Result<Arc<Image>, Error>> {
    registry.behaviour.hold.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let begin = || scope.spawn(|| host.service.load(&host.request(name), &|_| {}));
        let threads: Vec<_> = (0..loads).map(|_| begin()).collect();
        eventually("all loads to wait", || host.service.loads_waiting() == loads);
        registry.behaviour.hold.store(false, Ordering::SeqCst);
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn loads_of_one_image_at_once_are_one_load() {
    let registry = registry();
    let name = registry.image("esgz");
    let alone = Host::new();
    drop(alone.load(&name));
    let requests = registry.behaviour.requests.swap(0, Ordering::SeqCst);
    let host = Host::new();
    let images = load_together(&host, &registry, &name, 40);
    assert_eq!(
        registry.behaviour.requests.load(Ordering::SeqCst),
        requests,
        "as one load makes"
    );
    let first = images[0].as_ref().unwrap();
    for image in &images {
        assert!(Arc::ptr_eq(image.as_ref().unwrap(), first));
    }
    assert_eq!(host.mount(first).listing(), expected());
    assert_eq!(host.service.loads_waiting(), 0);
    let before = registry.behaviour.requests.load(Ordering::SeqCst);
    let later = host.load(&name);
    assert!(Arc::ptr_eq(&later, first), "it lives");
    assert_eq!(registry.behaviour.requests.load(Ordering::SeqCst), before);
}

#[test]
fn an_error_is_for_those_who_waited_for_it() {
    let registry = registry();
    let name = registry.image("esgz");
    let host = Host::new();
    registry.behaviour.down.store(true, Ordering::SeqCst);
    let errors = load_together(&host, &registry, &name, 10);
    let texts: Vec<String> = errors
        .into_iter()
        .map(|error| error.unwrap_err().to_string())
        .collect();
    assert!(texts[0].contains("503"), "{}", texts[0]);
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:?}");
    registry.behaviour.down.store(false, Ordering::SeqCst);
    assert_eq!(
        host.open(&name).listing(),
        expected(),
        "who asks later begins anew"
    );
}

#[test]
fn loads_that_want_something_else_are_loads_of_their_own() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("esgz");
    let lazy = host.request(&name);
    let mut eager = lazy.clone();
    eager.eager = true;
    registry.behaviour.hold.store(true, Ordering::SeqCst);
    let [lazy, eager] = std::thread::scope(|scope| {
        let loads =
            [&lazy, &eager].map(|request| scope.spawn(|| host.service.load(request, &|_| {}).unwrap()));
        eventually("both loads to wait", || host.service.loads_waiting() == 2);
        registry.behaviour.hold.store(false, Ordering::SeqCst);
        loads.map(|load| load.join().unwrap())
    });
    assert!(!Arc::ptr_eq(&lazy, &eager));
}

#[test]
fn all_who_wait_are_told_how_it_goes() {
    let registry = registry();
    let host = Host::new();
    let name = registry.image("org");
    registry.behaviour.hold.store(true, Ordering::SeqCst);
    let told: Vec<Vec<Progress>> = std::thread::scope(|scope| {
        let begin = || {
            scope.spawn(|| {
                let steps = std::sync::Mutex::new(Vec::new());
                let tell = |step| steps.lock().unwrap().push(step);
                host.service.load(&host.request(&name), &tell).unwrap();
                steps.into_inner().unwrap()
            })
        };
        let loads: Vec<_> = (0..5).map(|_| begin()).collect();
        eventually("all loads to wait", || host.service.loads_waiting() == 5);
        registry.behaviour.hold.store(false, Ordering::SeqCst);
        loads.into_iter().map(|load| load.join().unwrap()).collect()
    });
    for steps in told {
        assert!(
            matches!(steps.first(), Some(Progress::Resolved { .. })),
            "{steps:?}"
        );
        assert!(matches!(steps.last(), Some(Progress::Indexed)), "{steps:?}");
        let pulled = |layer| {
            let is_whole = |step: &Progress| matches!(step, Progress::Pulling { layer: of, done, total, .. } if *of == layer && done == total);
            steps.iter().any(is_whole)
        };
        assert!((0..3).all(pulled), "{steps:?}");
    }
}
