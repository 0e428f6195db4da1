//! The server's log on a disk that is full, and standard output that nobody reads: nothing else fails.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs::{self, File};
use std::io::Write;
use std::process::Stdio;

use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, eventually, read, vector};
use rustix::mount::{MountFlags, UnmountFlags};

/// A small disk; unmounted when dropped.
struct Disk(std::path::PathBuf);

impl Drop for Disk {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn a_log_on_a_full_disk_fails_nothing() {
    let world = World::new();
    let registry = world.registry();
    // The log has a disk of its own: the store is not full.
    let run = world.store().join("run");
    fs::create_dir_all(&run).unwrap();
    let options = c"size=256k,mode=0700";
    rustix::mount::mount("tmpfs", &run, "tmpfs", MountFlags::empty(), options).unwrap();
    let _disk = Disk(run.clone());
    let bytes = noise(1, 100_000);
    let image = |name: &str| {
        let tar = Tar::new().file("file", &bytes).file(name, b"").finish();
        push(&registry, name, "x", &[Layer::estargz(&tar, 0, &[])])
    };
    let first = world.mount(&image("first"), "first");
    let server = world.server();
    let filling = run.join("filling");
    let mut file = File::create(&filling).unwrap();
    while file.write_all(&[0]).is_ok() {}
    // Each of them is a line of the log, from several threads.
    let second = world.mount(&image("second"), "second");
    // More of them than the last page has room for.
    let nowhere = format!(
        "{}/{}:x",
        registry.addr(),
        "nowhere/".repeat(20).trim_end_matches('/')
    );
    for _ in 0..12 {
        assert!(!world.run(&["mount", &nowhere, "/mnt"]).status.success());
    }
    assert_eq!(read(&first.join("file")).unwrap(), bytes);
    world.umount(&second);
    assert_eq!(world.server(), server, "it is still the same one");
    drop(file);
    fs::remove_file(filling).unwrap();
    let third = world.mount(&image("third"), "third");
    assert_eq!(read(&third.join("file")).unwrap(), bytes);
    let log = world.log();
    assert!(log.contains("log lines were lost"), "{log}");
    assert_eq!(world.server(), server);
    for dir in [first, third] {
        world.umount(&dir);
    }
    world.assert_sound();
    world.end_server(rustix::process::Signal::TERM);
}

#[test]
fn a_server_whose_standard_error_is_full_serves() {
    let world = World::new();
    let full = || Stdio::from(File::options().write(true).open("/dev/full").unwrap());
    let mut server = world
        .command(&["--verbose", "daemon", "--idle-exit", "0"])
        .stdout(Stdio::piped())
        .stderr(full())
        .spawn()
        .unwrap();
    eventually("the server", || world.server().is_some());
    let dir = world.mount(&vector("esgz"), "root");
    assert_eq!(read(&dir.join("etc/os-release")).unwrap().len(), 24);
    world.umount(&dir);
    world.end_server(rustix::process::Signal::TERM);
    assert!(server.wait().unwrap().success());
}

#[test]
fn output_that_nobody_reads_is_no_panic() {
    let world = World::new();
    let image = vector("esgz");
    let commands: [&[&str]; 7] = [
        &["ls", "--recursive", &image],
        &["--json", "ls", "--recursive", &image],
        &["cat", &image, "/usr/lib/big.bin"],
        &["inspect", &image],
        &["--json", "inspect", &image],
        &["completions", "bash"],
        &["--help"],
    ];
    for arguments in commands {
        // The reading end is gone before the program begins.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let output = world
            .command(arguments)
            .env("PEEL_LOG", "trace")
            .stdout(Stdio::from(writer))
            .output()
            .unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!errors.contains("panicked"), "{arguments:?}: {errors}");
        assert!(
            output.status.success(),
            "{arguments:?}: {}: {errors}",
            output.status
        );
        // The same where nobody reads what it logs.
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let status = world
            .command(arguments)
            .env("PEEL_LOG", "trace")
            .stdout(Stdio::null())
            .stderr(Stdio::from(writer))
            .status()
            .unwrap();
        assert!(status.success(), "{arguments:?}: {status}");
    }
}
