//! The disk of the store fails: no read ever returns a wrong byte, whether it refuses pages after they were
//! written (a loop device over a full tmpfs) or is shut down and mounted again in the same boot.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails where it is")]

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use peel_tests::image::{Layer, Tar, noise, push};
use peel_tests::world::{World, end_process, eventually, read};
use rustix::fs::Advice;
use rustix::process::Signal;

/// Files of the image, and bytes of each: some are one chunk, some are several.
const FILES: u64 = 80;
const CHUNK: u64 = 128 << 10;

fn content(number: u64) -> Vec<u8> {
    let length = if number.is_multiple_of(4) { 400_000 } else { 60_000 };
    noise(number + 1, length)
}

fn layer() -> Layer {
    let mut tar = Tar::new().dir("data/");
    for number in 0..FILES {
        tar = tar.file(&format!("data/{number}"), &content(number));
    }
    Layer::estargz(&tar.finish(), CHUNK, &[])
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
}

/// A file system on a loop device over a file in a tmpfs; both are below the world's directory, which
/// unmounts them.
struct Disk {
    target: PathBuf,
    backing: PathBuf,
    kind: &'static str,
}

impl Disk {
    fn new(world: &World, kind: &'static str) -> Self {
        let disk = Self {
            target: world.store().parent().unwrap().to_owned(),
            backing: world.dir("backing"),
            kind,
        };
        run(
            "mount",
            &[
                "-t",
                "tmpfs",
                "-o",
                "size=256m",
                "peel-test",
                disk.backing.to_str().unwrap(),
            ],
        );
        // The smallest xfs has 300 MiB; most of the file is a hole.
        File::create(disk.image()).unwrap().set_len(400 << 20).unwrap();
        run(&format!("mkfs.{kind}"), &["-q", disk.image().to_str().unwrap()]);
        disk.mount();
        disk
    }

    fn image(&self) -> PathBuf {
        self.backing.join("image")
    }

    fn mount(&self) {
        let (image, target) = (self.image(), self.target.to_str().unwrap());
        run(
            "mount",
            &["-t", self.kind, "-o", "loop", image.to_str().unwrap(), target],
        );
    }

    fn remount(&self) {
        run("umount", &[self.target.to_str().unwrap()]);
        self.mount();
    }

    /// Leaves so many bytes to the tmpfs.
    fn fill(&self, left: u64) {
        let status = rustix::fs::statvfs(&self.backing).unwrap();
        let size = (status.f_bavail * status.f_frsize).saturating_sub(left);
        let filler = File::create(self.backing.join("filler")).unwrap();
        rustix::fs::fallocate(&filler, rustix::fs::FallocateFlags::empty(), 0, size).unwrap();
    }

    fn free(&self) {
        fs::remove_file(self.backing.join("filler")).unwrap();
    }

    /// Ends all writing at once, as if the disk were pulled out; what is not on it is lost.
    fn shut_down(&self) {
        // EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN, with the log not flushed: _IOR('X', 125, __u32), 2.
        let script = "import fcntl,os,struct,sys; \
                      fcntl.ioctl(os.open(sys.argv[1], os.O_RDONLY), 0x8004587d, struct.pack('I', 2))";
        run("python3", &["-c", script, self.target.to_str().unwrap()]);
    }
}

/// Has the kernel drop what it has cached of a file.
fn forget(path: &Path) {
    if let Ok(file) = File::open(path) {
        rustix::fs::fadvise(file.as_fd(), 0, None, Advice::DontNeed).unwrap();
    }
}

/// Reads all files of a mounted image; returns how many could not be read. A wrong byte fails the test.
fn read_all(dir: &Path, when: &str) -> usize {
    let mut failed = 0;
    for number in 0..FILES {
        let path = dir.join(format!("data/{number}"));
        match read(&path) {
            Ok(bytes) => {
                let right = content(number);
                let zeros = bytes.iter().filter(|byte| **byte == 0).count();
                assert!(
                    bytes == right,
                    "{when}: file {number} has {} bytes of {}, {zeros} of them zeros",
                    bytes.len(),
                    right.len()
                );
            }
            Err(_) => failed += 1,
        }
        forget(&path);
    }
    failed
}

fn sync(path: &Path) {
    // It reports what it should report, or somebody else has heard of it already.
    let _ = rustix::fs::syncfs(File::open(path).unwrap());
}

fn a_full_backing(kind: &'static str) {
    let world = World::new().with_store_below("disk").with_read_deadline(10);
    let disk = Disk::new(&world, kind);
    let registry = world.registry();
    let name = push(&registry, "app", "x", &[layer()]);
    let dir = world.dir("root");
    world.ok(&["mount", "--no-prefetch", &name, dir.to_str().unwrap()]);
    let server = world.server().unwrap();
    sync(&disk.target);
    disk.fill(2 << 20);
    let all_read = |when: &str| assert_eq!(read_all(&dir, when), 0, "{when}");
    all_read(&format!("{kind}, first"));
    for round in 0..4 {
        sync(&disk.target);
        // What the disk does not take is in memory, or comes once more.
        all_read(&format!("{kind}, full disk, round {round}"));
    }
    disk.free();
    // The journal may have been aborted: then only another mount of the disk is writable again.
    run("umount", &["-l", dir.to_str().unwrap()]);
    // Its log is on that disk too, and fails nothing.
    assert!(
        rustix::process::test_kill_process(server).is_ok(),
        "the server has ended"
    );
    end_process(server, Signal::KILL);
    disk.remount();
    let dir = world.mount(&name, "again");
    for round in 0..2 {
        assert_eq!(read_all(&dir, &format!("{kind}, with room, round {round}")), 0);
        sync(&disk.target);
    }
    world.umount(&dir);
    world.end_server(Signal::TERM);
}

#[test]
fn pages_that_ext4_cannot_write_are_never_read_as_zeros() {
    a_full_backing("ext4");
}

#[test]
fn pages_that_xfs_cannot_write_are_never_read_as_zeros() {
    a_full_backing("xfs");
}

fn a_disk_that_is_shut_down(kind: &'static str) {
    for wait in [false, true] {
        let world = World::new().with_store_below("disk").with_read_deadline(10);
        let disk = Disk::new(&world, kind);
        let registry = world.registry();
        let name = push(&registry, "app", "x", &[layer()]);
        let dir = world.mount(&name, "root");
        assert_eq!(read_all(&dir, kind), 0);
        if wait {
            eventually("files are objects", || !world.objects().is_empty());
        }
        // Its socket may not be found any more afterwards.
        let server = world.server().unwrap();
        disk.shut_down();
        read_all(&dir, &format!("{kind}, shut down"));
        assert!(
            rustix::process::test_kill_process(server).is_ok(),
            "the server has ended"
        );
        end_process(server, Signal::KILL);
        run("umount", &["-l", dir.to_str().unwrap()]);
        disk.remount();
        let dir = world.mount(&name, "again");
        for round in 0..2 {
            assert_eq!(
                read_all(&dir, &format!("{kind}, mounted again, round {round}")),
                0
            );
            sync(&disk.target);
        }
        world.umount(&dir);
        world.end_server(Signal::TERM);
    }
}

#[test]
fn an_ext4_that_was_shut_down_is_trusted_for_what_it_confirmed_only() {
    a_disk_that_is_shut_down("ext4");
}

#[test]
fn an_xfs_that_was_shut_down_is_trusted_for_what_it_confirmed_only() {
    a_disk_that_is_shut_down("xfs");
}
