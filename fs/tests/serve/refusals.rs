//! Registries that refuse, want a pause, or send whole blobs: what reads that wait get, how soon, and for how many requests. Reads would
//! wait for an hour here, so a test that ends has not waited for the deadline.

use std::fs;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use peel_fs::Options;

use crate::support::{Host, expected};
use crate::{libc_eio, registry};

fn patient() -> Host {
    Host::with(Options {
        read_deadline: Duration::from_secs(3600),
        ..Options::default()
    })
}

fn is_eio(error: &std::io::Error) -> bool {
    error.raw_os_error() == Some(libc_eio())
}

#[test]
fn a_refusal_fails_reads_at_once_and_the_next_read_asks_again() {
    for status in [401, 403, 404, 410, 416] {
        let registry = registry();
        let host = patient();
        let mount = host.open(&registry.image("esgz"));
        registry.behaviour.refusal.store(status, Ordering::SeqCst);
        let error = fs::read(mount.path("etc/os-release")).unwrap_err();
        assert!(is_eio(&error), "{status}: {error}");
        registry.behaviour.refusal.store(0, Ordering::SeqCst);
        assert_eq!(
            fs::read(mount.path("etc/os-release")).unwrap().len(),
            24,
            "{status}"
        );
    }
}

#[test]
fn a_range_that_was_not_asked_for_fails_reads_at_once() {
    let registry = registry();
    let host = patient();
    let mount = host.open(&registry.image("esgz"));
    registry.behaviour.shifted.store(true, Ordering::SeqCst);
    let error = fs::read(mount.path("etc/os-release")).unwrap_err();
    assert!(is_eio(&error), "{error}");
    registry.behaviour.shifted.store(false, Ordering::SeqCst);
    assert_eq!(fs::read(mount.path("etc/os-release")).unwrap().len(), 24);
}

#[test]
fn bytes_that_another_registry_has_are_not_refused() {
    let (refusing, other) = (registry(), registry());
    let host = patient();
    let first = host.open(&refusing.image("esgz"));
    let _second = host.open(&other.image("esgz"));
    refusing.behaviour.refusal.store(404, Ordering::SeqCst);
    assert_eq!(first.listing(), expected());
}

#[test]
fn a_long_pause_costs_no_requests() {
    let registry = registry();
    // Reads have less time than the pause lasts.
    let host = Host::new();
    let mount = host.open(&registry.image("esgz"));
    let before = registry.behaviour.requests.load(Ordering::SeqCst);
    registry.behaviour.refusal.store(429, Ordering::SeqCst);
    for _ in 0..3 {
        thread::scope(|scope| {
            for _ in 0..8 {
                for path in ["etc/os-release", "etc/passwd", crate::BIG] {
                    let path = mount.path(path);
                    scope.spawn(move || {
                        let error = fs::read(path).unwrap_err();
                        assert!(is_eio(&error), "{error}");
                    });
                }
            }
        });
    }
    let asked = registry.behaviour.requests.load(Ordering::SeqCst) - before;
    // Requests that were under way together when the first of them was answered.
    assert!(
        (1..=16).contains(&asked),
        "{asked} requests to a registry that wants a pause"
    );
}

#[test]
fn a_registry_that_ignores_ranges_has_its_layers_pulled_whole() {
    let registry = registry();
    registry.behaviour.whole.store(true, Ordering::SeqCst);
    let host = patient();
    let image = host.load(&registry.image("esgz"));
    for layer in image.layers() {
        let reason = layer.not_lazy.as_deref().unwrap_or_default();
        assert!(reason.contains("ignores range requests"), "{reason}");
    }
    assert_eq!(host.mount(&image).listing(), expected());
}

#[test]
fn ranges_that_end_while_an_image_is_read_cost_one_more_request() {
    let registry = registry();
    let host = patient();
    let mount = host.open(&registry.image("esgz"));
    let before = registry.blob_requests();
    registry.behaviour.whole.store(true, Ordering::SeqCst);
    assert_eq!(mount.listing(), expected());
    let layers = host.load(&registry.image("esgz")).layers().len();
    let asked = registry.blob_requests() - before;
    // Requests that are under way together when the first of a layer is answered.
    assert!(asked <= 16 * layers, "{asked} requests for {layers} layers");
}
