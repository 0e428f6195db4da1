//! Images share the server: one that asks for much waits for itself, and what several ask for is brought once.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicUsize, Ordering};

use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, eventually, listing};

/// Files of one chunk each, of which the registry sends little and which take long to inflate and to hash.
const LARGE_FILES: usize = 24;
const LARGE_BYTES: usize = 32 << 20;

fn first_bytes(path: &std::path::Path) -> Vec<u8> {
    let mut bytes = vec![0; 3000];
    File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

#[test]
fn a_small_read_is_answered_while_large_chunks_of_another_image_wait() {
    let world = World::new();
    let registry = world.registry();
    let mut contents = vec![b'x'; LARGE_BYTES];
    let mut tar = Tar::new();
    for number in 0..LARGE_FILES {
        contents[0] = u8::try_from(number).unwrap();
        tar = tar.file(&format!("large-{number}"), &contents);
    }
    let large = Layer::estargz(&tar.finish(), LARGE_BYTES as u64, &[]);
    let wanted = noise(7, 3000);
    let small = Layer::estargz(&Tar::new().file("small", &wanted).finish(), 0, &[]);
    let large = world.mount(&push(&registry, "large", "x", &[large]), "large");
    let small = world.mount(&push(&registry, "small", "x", &[small]), "small");
    let read = AtomicUsize::new(0);
    let read_before = std::thread::scope(|scope| {
        for number in 0..LARGE_FILES {
            let (path, read) = (large.join(format!("large-{number}")), &read);
            scope.spawn(move || {
                assert_eq!(first_bytes(&path)[1..], [b'x'; 2999]);
                read.fetch_add(1, Ordering::SeqCst);
            });
        }
        eventually("the first large chunk", || read.load(Ordering::SeqCst) > 0);
        assert_eq!(first_bytes(&small.join("small")), wanted);
        read.load(Ordering::SeqCst)
    });
    assert!(
        read_before < LARGE_FILES / 2,
        "the small read waited for {read_before} of {LARGE_FILES} large chunks"
    );
    for dir in [large, small] {
        world.umount(&dir);
    }
    world.assert_sound();
}

#[test]
fn starts_of_one_image_at_once_ask_as_one_start_does() {
    let tar = Tar::new()
        .dir("data/")
        .file("data/file", &noise(8, 100_000))
        .finish();
    let layers = [Layer::estargz(&tar, 0, &[])];
    let start = |starts: usize| {
        let world = World::new();
        let registry = world.registry();
        let name = push(&registry, "app", "x", &layers);
        // The server is there, so that all of them meet in it.
        let other = world.mount(&push(&registry, "other", "x", &[]), "other");
        registry.reset_counters();
        registry.faults().pause();
        let dirs: Vec<_> = (0..starts)
            .map(|number| world.dir(&format!("root-{number}")))
            .collect();
        let mut running: Vec<_> = dirs
            .iter()
            .map(|dir| world.start(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]))
            .collect();
        eventually("all starts to wait", || {
            let mut client = peel::client::Client::connect_if_running(world.store())
                .unwrap()
                .unwrap();
            client.status().unwrap().connections > starts
        });
        registry.faults().resume();
        for start in &mut running {
            assert!(start.wait().success());
        }
        let counters = registry.counters();
        let trees: Vec<String> = dirs.iter().map(|dir| listing(dir)).collect();
        assert!(trees.iter().all(|tree| tree == &trees[0]));
        for dir in dirs.iter().chain([&other]) {
            world.umount(dir);
        }
        world.assert_sound();
        (counters.requests, counters.body_bytes)
    };
    let ((requests, bytes), (requests_of_one, bytes_of_one)) = (start(12), start(1));
    assert_eq!(bytes, bytes_of_one);
    // How many chunks a request covers depends on how far the reader has come.
    assert!(
        requests <= 2 * requests_of_one,
        "{requests} requests, {requests_of_one} of one start"
    );
}
