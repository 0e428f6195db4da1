//! What mounts, containers and stores may do to the host: set-user-id programs and devices of a mount, what a container is
//! handed from the host, directories of other users. And a store that repairs what it can.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::process::Stdio;

use peel_tests::image::{Layer, Tar, push};
use peel_tests::world::{World, errors, text};
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::Signal;

/// Debian's busybox-static, which `test.sh` installs.
const BUSYBOX: &str = "/bin/busybox";
/// Somebody else.
const OTHER: u32 = 65_534;

/// An image that can run a shell, and that has a device and a set-user-id program.
fn image(world: &World) -> (peel_testkit::registry::Registry, String) {
    let registry = world.registry();
    let busybox = fs::read(BUSYBOX).unwrap();
    let tar = Tar::new()
        .dir("bin/")
        .entry("bin/busybox", b'0', "", 0o755, &busybox)
        .symlink("bin/sh", "busybox")
        .entry("bin/suid", b'0', "", 0o4755, b"#!/bin/sh\n")
        .device("null", 1, 3)
        .file("file", b"contents")
        .finish();
    let name = push(&registry, "app", "x", &[Layer::estargz(&tar, 0, &[])]);
    (registry, name)
}

/// Options of the mount at a directory.
fn options(dir: &Path) -> Vec<String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let line = mounts
        .lines()
        .find(|line| line.split(' ').nth(4) == dir.to_str())
        .unwrap();
    line.split(' ')
        .nth(5)
        .unwrap()
        .split(',')
        .map(str::to_owned)
        .collect()
}

#[test]
fn a_mount_gives_no_rights_unless_asked() {
    let world = World::new();
    let (_registry, name) = image(&world);
    for (flags, nosuid, nodev) in [
        (&[][..], true, true),
        (&["--read-only"], true, true),
        (&["--suid"], false, true),
        (&["--dev", "-v"], true, false),
        (&["--suid", "--dev"], false, false),
    ] {
        let dir = world.dir("root");
        world.ok(&[&["mount"], flags, &[&name, dir.to_str().unwrap()]].concat());
        let options = options(&dir);
        assert_eq!(
            options.contains(&"nosuid".to_owned()),
            nosuid,
            "{flags:?} {options:?}"
        );
        assert_eq!(
            options.contains(&"nodev".to_owned()),
            nodev,
            "{flags:?} {options:?}"
        );
        let refused = fs::File::open(dir.join("null")).is_err();
        assert_eq!(refused, nodev, "{flags:?}");
        assert_eq!(
            fs::metadata(dir.join("bin/suid")).unwrap().mode() & 0o7777,
            0o4755
        );
        world.umount(&dir);
    }
}

#[test]
fn a_container_changes_nothing_of_the_host() {
    let world = World::new();
    let (_registry, name) = image(&world);
    let state = || -> Vec<(u32, u32, u64)> {
        ["null", "zero", "full", "random", "urandom", "tty"]
            .map(|name| fs::metadata(format!("/dev/{name}")).unwrap())
            .iter()
            .map(|found| (found.mode(), found.uid(), found.rdev()))
            .collect()
    };
    let before = state();
    // Standard output is a pipe with a name, which is a file of the host.
    let fifo = world.path("fifo");
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    let script = "for f in /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty /proc/self/fd/0 /proc/self/fd/1; do \
         /bin/busybox chmod 0 $f; /bin/busybox chown 7:7 $f; done; echo done";
    let mut child = world
        .command(&["run", "--net", "none", "-i", &name, "/bin/sh", "-c", script])
        .stdin(Stdio::null())
        .stdout(fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap())
        .spawn()
        .unwrap();
    assert!(child.wait().unwrap().success());
    assert_eq!(state(), before);
    let found = fs::metadata(&fifo).unwrap();
    assert_eq!((found.mode() & 0o7777, found.uid()), (0o600, 0));
    let output = world.run(&[
        "run",
        "--net",
        "none",
        "--read-only",
        "-w",
        "/made",
        &name,
        "/bin/sh",
        "-c",
        "pwd; echo x > /made/x",
    ]);
    assert_eq!(text(&output), "/made\n", "{}", errors(&output));
    assert!(
        errors(&output).contains("Read-only file system"),
        "{}",
        errors(&output)
    );
}

#[test]
fn a_damaged_tree_is_made_anew() {
    let world = World::new();
    let (registry, name) = image(&world);
    let dir = world.mount(&name, "root");
    world.umount(&dir);
    drop(registry);
    let erofs = || -> PathBuf {
        let found = fs::read_dir(world.store().join("erofs")).unwrap();
        found.map(|entry| entry.unwrap().path()).next().unwrap()
    };
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 5] = [
        ("removed", |path| fs::remove_file(path).unwrap()),
        ("cut off", |path| {
            fs::OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .set_len(4096)
                .unwrap();
        }),
        ("empty", |path| fs::write(path, b"").unwrap()),
        ("superblock", |path| {
            fs::OpenOptions::new()
                .write(true)
                .open(path)
                .unwrap()
                .write_all_at(b"xxxx", 1024)
                .unwrap();
        }),
        ("first inode", |path| {
            let file = fs::OpenOptions::new().write(true).open(path).unwrap();
            file.write_all_at(&[0xff; 64], 4096).unwrap();
        }),
    ];
    let path = erofs();
    for (what, damage) in damages {
        for server_ends in [true, false] {
            if server_ends {
                world.end_server(Signal::TERM);
            }
            damage(&path);
            let dir = world.dir("root");
            world.ok(&["mount", "--pull", "never", &name, dir.to_str().unwrap()]);
            assert_eq!(fs::metadata(dir.join("file")).unwrap().len(), 8, "{what}");
            assert_eq!(
                fs::metadata(dir.join("bin/suid")).unwrap().mode() & 0o7777,
                0o4755,
                "{what}"
            );
            world.umount(&dir);
            assert_eq!(erofs(), path, "{what}");
        }
    }
    assert!(world.log().contains("made anew"), "{}", world.log());
    world.assert_sound();
}

#[test]
fn a_store_of_another_user_is_not_touched() {
    let world = World::new();
    let (_registry, name) = image(&world);
    let dir = world.dir("root");
    let aim = world.dir("aim");
    fs::set_permissions(&aim, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(aim.join("file"), "as it was").unwrap();
    let store = world.dir("theirs");
    let run = world.dir("theirs/run");
    for file in ["daemon.log", "start.lock", "daemon.lock"] {
        symlink(aim.join(file), run.join(file)).unwrap();
    }
    symlink(aim.join("file"), run.join("peel.sock")).unwrap();
    chown(&run, Some(OTHER), None).unwrap();
    chown(&store, Some(OTHER), None).unwrap();
    let below = world.path("theirs/below");
    let link = world.path("link");
    symlink(&aim, &link).unwrap();
    std::os::unix::fs::lchown(&link, Some(OTHER), None).unwrap();
    for refused in [&store, &below, &link] {
        let text = refused.to_str().unwrap();
        for command in [
            &["mount", &name, dir.to_str().unwrap()][..],
            &["run", &name, "true"],
            &["daemon"],
            &["doctor"],
            &["umount", dir.to_str().unwrap()],
        ] {
            let output = world.run(&[&["--store", text], command].concat());
            assert!(!output.status.success(), "{command:?} {text}");
            let said = format!("{}{}", errors(&output), peel_tests::world::text(&output));
            assert!(said.contains("user 65534"), "{command:?} {text}: {said}");
        }
    }
    assert_eq!(fs::read_dir(&aim).unwrap().count(), 1);
    assert_eq!(fs::read_to_string(aim.join("file")).unwrap(), "as it was");
    assert!(!below.exists());
}
