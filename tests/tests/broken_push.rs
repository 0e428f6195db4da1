//! Connections that break while layers are pushed: the upload goes on where the registry is, or the layer is made again where the
//! registry has forgotten it.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use peel_testkit::registry::{Action, Rule};
use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::service::DockerRegistry;
use peel_tests::world::{World, errors};

/// Bytes of the test's only file: several pieces of an upload.
const LENGTH: usize = 30 << 20;

/// A way to a registry on which one connection breaks: the one that carries the byte number `limit` of all that goes to the registry.
/// Its threads end with the test's process.
fn breaking_way(registry: SocketAddr, limit: u64) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let left = Arc::new(AtomicU64::new(limit));
    let shared = Arc::clone(&left);
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let (Ok(client), Ok(server)) = (client, TcpStream::connect(registry)) else {
                continue;
            };
            let (up, down) = (client.try_clone().unwrap(), server.try_clone().unwrap());
            let left = Arc::clone(&shared);
            std::thread::spawn(move || copy(up, server, Some(&left)));
            std::thread::spawn(move || copy(down, client, None));
        }
    });
    (address, left)
}

/// Passes bytes on until either side ends, or until `left` bytes have passed; then both sides end.
fn copy(mut from: TcpStream, mut to: TcpStream, left: Option<&AtomicU64>) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if let Some(left) = left {
            let length = length as u64;
            let before = left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                Some(n.saturating_sub(length))
            });
            let before = before.unwrap_or(0);
            if before > 0 && before <= length {
                break;
            }
        }
        if to.write_all(&buffer[..length]).is_err() {
            break;
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

#[test]
fn an_upload_goes_on_where_the_registry_is() {
    let world = World::new();
    let registry = world.registry();
    let content = noise(3, LENGTH);
    let tar = Tar::new().file("noise", &content).finish();
    let source = push(&registry, "broken", "v1", &[Layer::plain(&tar)]);
    let (way, left) = breaking_way(registry.addr(), 20 << 20);
    let from = registry.log().len();
    let output = world.run(&["convert", &source, &format!("{way}/broken:esgz")]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(left.load(Ordering::Relaxed), 0, "no connection broke");
    let log = registry.log();
    let count = |method: &str| {
        let of_uploads = log.iter().skip(from).filter(|r| r.target.contains("/uploads/"));
        of_uploads.filter(|request| request.method == method).count()
    };
    // One upload for the layer and one for the configuration; the broken one was asked about.
    assert_eq!((count("POST"), count("GET")), (2, 1), "{log:?}");
    assert!(!errors(&output).contains("again"), "{}", errors(&output));
    let name = format!("{}/broken:esgz", registry.addr());
    assert!(world.run(&["cat", &name, "/noise"]).stdout == content);
}

#[test]
fn a_layer_is_made_again_for_a_registry_that_has_forgotten_it() {
    let world = World::new();
    let registry = world.registry();
    let content = noise(4, LENGTH);
    let tar = Tar::new().file("noise", &content).finish();
    let source = push(&registry, "forgotten", "v1", &[Layer::plain(&tar)]);
    let refused = Rule {
        method: Some("PATCH".into()),
        ..Rule::get("/uploads/", Action::Status(404))
    };
    registry.faults().add(refused.after(2).times(1));
    registry
        .faults()
        .add(Rule::get("/uploads/", Action::Status(404)).times(1));
    let target = format!("{}/forgotten:esgz", registry.addr());
    let output = world.run(&["convert", &source, &target]);
    let message = errors(&output);
    assert!(output.status.success(), "{message}");
    assert!(
        message.contains("has lost the upload") && message.contains("again"),
        "{message}"
    );
    assert!(world.run(&["cat", &target, "/noise"]).stdout == content);

    // A registry that takes no second piece gets the layer whole in the end.
    registry.faults().clear();
    let first = Rule {
        method: Some("PATCH".into()),
        ..Rule::get("/uploads/", Action::Delay(std::time::Duration::ZERO))
    };
    registry.faults().add(first.times(1));
    registry.faults().add(Rule {
        method: Some("PATCH".into()),
        ..Rule::get("/uploads/", Action::Status(400))
    });
    let again = [
        "convert",
        "--reconvert",
        "--estargz-chunk-size",
        "65536",
        &source,
        &target,
    ];
    let output = world.run(&again);
    assert!(output.status.success(), "{}", errors(&output));
    assert!(world.run(&["cat", &target, "/noise"]).stdout == content);

    // A registry that always forgets is an error, not an endless loop.
    registry.faults().clear();
    registry.faults().add(Rule {
        method: Some("PUT".into()),
        ..Rule::get("/uploads/", Action::Status(404))
    });
    let more = [
        "convert",
        "--reconvert",
        "--estargz-chunk-size",
        "131072",
        &source,
        &target,
    ];
    let output = world.run(&more);
    let message = errors(&output);
    assert!(!output.status.success());
    assert!(
        message.contains("layer 1 of 1") && message.contains("HTTP 404"),
        "{message}"
    );
}

#[test]
fn docker_registry_gets_the_layer_in_the_end() {
    let world = World::new();
    let embedded = world.registry();
    let registry = DockerRegistry::start(&world.dir("docker-registry"));
    let content = noise(5, LENGTH);
    let tar = Tar::new().file("noise", &content).finish();
    let source = push(&embedded, "broken", "v1", &[Layer::plain(&tar)]);
    let (way, left) = breaking_way(registry.addr, 20 << 20);
    let output = world.run(&["convert", &source, &format!("{way}/broken:esgz")]);
    assert!(output.status.success(), "{}", errors(&output));
    assert_eq!(left.load(Ordering::Relaxed), 0, "no connection broke");
    let name = format!("{}/broken:esgz", registry.addr);
    assert!(world.run(&["cat", &name, "/noise"]).stdout == content);
}
