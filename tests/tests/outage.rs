//! The registry stops in the middle of a run: readers wait and go on, or get EIO after the deadline and recover without a
//! restart.

use std::time::{Duration, Instant};

use peel_testkit::registry::{Action, Faults, Rule};
use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, read};

fn layer(seed: u64) -> (Vec<u8>, Layer) {
    let bytes = noise(seed, 1_000_000);
    let tar = Tar::new().dir("data/").file("data/file", &bytes).finish();
    (bytes, Layer::estargz(&tar, 64 << 10, &[]))
}

/// The registry goes away for this long; the default read deadline is longer.
const OUTAGE: Duration = Duration::from_secs(20);

#[test]
fn a_registry_that_does_not_answer_for_20_s_only_costs_time() {
    outage(Faults::pause, Faults::resume);
}

#[test]
fn a_registry_that_is_gone_for_20_s_only_costs_time() {
    outage(Faults::refuse, Faults::accept);
}

/// A switch of the fault plan.
type Switch = fn(&Faults);

fn outage(stop: Switch, go_on: Switch) {
    let world = World::new();
    let registry = world.registry();
    let (bytes, layer) = layer(1);
    let name = push(&registry, "app", "x", &[layer]);
    let mut arguments = vec!["run".to_owned(), "-i".into(), "--no-prefetch".into()];
    arguments.extend(world.host_programs());
    let script = "read go; sha256sum < /data/file";
    arguments.extend([
        name,
        "/usr/bin/sh".into(),
        "-c".into(),
        format!("echo ready; {script}"),
    ]);
    let mut running = world.start(&arguments);
    assert_eq!(running.line(), "ready");
    stop(registry.faults());
    let begin = Instant::now();
    running.say("go");
    std::thread::sleep(OUTAGE);
    go_on(registry.faults());
    let digest = peel_image::Digest::of(&bytes).hex();
    assert!(running.line().starts_with(&digest), "after {:?}", begin.elapsed());
    assert!(running.wait().success());
    world.assert_sound();
}

#[test]
fn a_registry_that_stays_away_is_an_error_until_it_is_back() {
    let world = World::new().with_read_deadline(3);
    let registry = world.registry();
    let (bytes, lower) = layer(3);
    // In a layer of its own, so that it does not come along when its neighbour is fetched.
    let other = noise(4, 1000);
    let upper = Layer::estargz(
        &Tar::new().dir("data/").file("data/other", &other).finish(),
        0,
        &[],
    );
    let name = push(&registry, "app", "x", &[lower, upper]);
    let dir = world.dir("root");
    world.ok(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]);
    let server = world.server();
    let cases: [(&str, Vec<u8>, Switch, Switch); 2] = [
        ("data/file", bytes, Faults::refuse, Faults::accept),
        ("data/other", other, Faults::pause, Faults::resume),
    ];
    for (file, bytes, stop, go_on) in cases {
        let path = dir.join(file);
        stop(registry.faults());
        assert_eq!(read(&path).err(), Some(5), "{file}: EIO after the deadline");
        go_on(registry.faults());
        assert!(
            read(&path).unwrap() == bytes,
            "{file}: the next read after it is back succeeds"
        );
    }
    assert_eq!(world.server(), server, "nothing was restarted");
    world.umount(&dir);
    world.assert_sound();
}

#[test]
fn many_readers_of_a_registry_that_does_not_answer_are_few_lines_in_the_log() {
    const FILES: u64 = 24;
    let world = World::new().with_read_deadline(4);
    let registry = world.registry();
    let tar = (0..FILES).fold(Tar::new(), |tar, file| {
        tar.file(&format!("file-{file}"), &noise(file, 5000))
    });
    let name = push(&registry, "app", "x", &[Layer::estargz(&tar.finish(), 0, &[])]);
    let dir = world.dir("root");
    world.ok(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]);
    let before = world.log().lines().count();
    registry.faults().refuse();
    std::thread::scope(|scope| {
        for file in 0..FILES {
            let path = dir.join(format!("file-{file}"));
            scope.spawn(move || assert_eq!(read(&path).err(), Some(5), "{}", path.display()));
        }
    });
    let log = world.log();
    let lines = log.lines().count() - before;
    assert!(lines < 20, "{log}");
    registry.faults().accept();
    assert_eq!(read(&dir.join("file-3")).unwrap(), noise(3, 5000));
    world.umount(&dir);
    world.assert_sound();
}

#[test]
fn a_blob_that_is_not_there_is_an_error_without_a_wait() {
    // A read would wait for longer than a test may take.
    let world = World::new().with_read_deadline(10_000);
    let registry = world.registry();
    let bytes = noise(5, 5000);
    let layer = Layer::estargz(&Tar::new().file("file", &bytes).finish(), 0, &[]);
    let blob = peel_image::Digest::of(&layer.blob).to_string();
    let name = push(&registry, "app", "x", &[layer]);
    let dir = world.dir("root");
    world.ok(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]);
    for status in [403, 404, 416] {
        registry
            .faults()
            .add(Rule::get(blob.as_str(), Action::Status(status)));
        assert_eq!(read(&dir.join("file")).err(), Some(5), "{status}");
        registry.faults().clear();
    }
    assert_eq!(read(&dir.join("file")).unwrap(), bytes, "when it is there again");
    world.umount(&dir);
    world.assert_sound();
}
