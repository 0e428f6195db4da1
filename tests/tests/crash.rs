//! The server is killed: complete files go on reading, incomplete ones fail, nothing reads as zeros, and `peel umount`
//! cleans up.

use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, read};
use rustix::process::Signal;

/// Two files; only the first will be complete.
fn layer() -> (Vec<u8>, Vec<u8>, Layer) {
    let (first, second) = (noise(1, 500_000), noise(2, 5_000_000));
    let tar = Tar::new()
        .dir("data/")
        .file("data/first", &first)
        .file("data/second", &second)
        .finish();
    let layer = Layer::estargz(&tar, 64 << 10, &[]);
    (first, second, layer)
}

/// Time for the server to give a file that has become complete back to the kernel.
fn give_back() {
    std::thread::sleep(std::time::Duration::from_secs(2));
}

#[test]
fn a_mount_survives_its_server_as_far_as_its_files_are_here() {
    let world = World::new();
    let registry = world.registry();
    let (first, second, layer) = layer();
    let name = push(&registry, "app", "x", &[layer]);
    let dir = world.dir("root");
    world.ok(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]);
    assert!(read(&dir.join("data/first")).unwrap() == first);
    give_back();
    // A part of the second file is read, so that it is half here.
    let head = std::process::Command::new("head")
        .args(["-c", "100000"])
        .arg(dir.join("data/second"))
        .output()
        .unwrap();
    assert!(head.stdout == second[..100_000]);
    world.end_server(Signal::KILL);

    assert!(
        read(&dir.join("data/first")).unwrap() == first,
        "a complete file does not need the server"
    );
    assert!(
        read(&dir.join("data/second")).is_err(),
        "an incomplete file must fail without a server"
    );
    world.umount(&dir);
    assert_eq!(world.mounts(), Vec::<std::path::PathBuf>::new());

    // A new server goes on with what is in the store.
    let dir = world.mount(&name, "again");
    assert!(read(&dir.join("data/second")).unwrap() == second);
    world.umount(&dir);
}

#[test]
fn a_container_whose_server_is_killed_reads_on_or_fails() {
    let world = World::new();
    let registry = world.registry();
    let (first, _, layer) = layer();
    let name = push(&registry, "app", "x", &[layer]);
    let script = "sha256sum < /data/first; read go; sha256sum < /data/first; \
                  if sha256sum < /data/second 2>/dev/null; then echo read; else echo failed; fi; exit 9";
    let mut arguments = vec!["run".to_owned(), "-i".into(), "--no-prefetch".into()];
    arguments.extend(world.host_programs());
    arguments.extend([name, "/usr/bin/sh".into(), "-c".into(), script.into()]);
    let mut running = world.start(&arguments);
    let digest = peel_image::Digest::of(&first).hex();
    assert!(running.line().starts_with(&digest));
    give_back();
    world.end_server(Signal::KILL);
    running.say("go");
    assert!(
        running.line().starts_with(&digest),
        "a complete file does not need the server"
    );
    let last = running.line();
    assert!(
        last == "failed" || running.line() == "failed",
        "an incomplete file gave {last:?}"
    );
    // The status is the program's own, whatever became of the server.
    assert_eq!(running.wait().code(), Some(9));
    assert!(world.mounts().is_empty());
}
