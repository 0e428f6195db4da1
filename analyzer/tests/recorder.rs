//! Records of real runs on a real overlay. Needs root, and Debian's busybox-static.
//!
//! Containers execute this binary again, so it has a `main` of its own that calls `become_init_if_asked` first. An
//! argument runs the tests with it in their name.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test without the harness is not known as one"
)]

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use peel_analyzer::{Access, Recorder};
use peel_sandbox::{Container, Exit, Isolation, Network, Process, Stdio, become_init_if_asked};
use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree, unmount,
};

const BUSYBOX: &str = "/bin/busybox";
/// As many files as a large image has.
const MANY: usize = 50_000;

fn main() -> ExitCode {
    become_init_if_asked();
    let wanted = std::env::args().nth(1).filter(|name| !name.starts_with('-'));
    let tests: &[(&str, fn())] = &[
        ("kinds_of_access", kinds_of_access),
        ("a_container_is_seen_whole", a_container_is_seen_whole),
        ("other_mounts_of_the_same_root", other_mounts_of_the_same_root),
        ("removed_copied_and_odd_names", removed_copied_and_odd_names),
        ("special_files_do_no_harm", special_files_do_no_harm),
        ("many_reads_are_one_entry", many_reads_are_one_entry),
        ("fifty_thousand_files", fifty_thousand_files),
        ("no_descriptor_is_left", no_descriptor_is_left),
    ];
    let mut failed = Vec::new();
    for (name, test) in tests {
        if wanted.as_deref().is_some_and(|wanted| !name.contains(wanted)) {
            continue;
        }
        let ok = std::panic::catch_unwind(test).is_ok();
        eprintln!("test {name} ... {}", if ok { "ok" } else { "FAILED" });
        if !ok {
            failed.push(*name);
        }
    }
    if failed.is_empty() {
        return ExitCode::SUCCESS;
    }
    eprintln!("failed: {}", failed.join(", "));
    ExitCode::FAILURE
}

/// An overlay over a temporary directory, detached.
struct Root {
    directory: tempfile::TempDir,
    mount: OwnedFd,
}

impl Root {
    /// `fill` makes the lower layer.
    fn make(fill: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let layer = |name: &str| {
            let path = directory.path().join(name);
            fs::create_dir(&path).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            path
        };
        let (lower, upper, work) = (layer("lower"), layer("upper"), layer("work"));
        fill(&lower);
        let context =
            fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).expect("these tests need root and overlayfs");
        for (key, value) in [("lowerdir", &lower), ("upperdir", &upper), ("workdir", &work)] {
            fsconfig_set_string(context.as_fd(), key, value).unwrap();
        }
        fsconfig_create(context.as_fd()).unwrap();
        let mount = fsmount(
            context.as_fd(),
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )
        .unwrap();
        Self { directory, mount }
    }

    fn open(&self, path: &str) -> File {
        open(self.mount.as_fd(), path)
    }
}

fn open(at: BorrowedFd<'_>, path: &str) -> File {
    File::from(openat(at, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap())
}

/// A root with busybox under some names. Its shell has the others built in: only a path with `/` executes a file.
fn with_busybox(lower: &Path) {
    assert!(
        Path::new(BUSYBOX).exists(),
        "these tests need {BUSYBOX}: apt-get install busybox-static"
    );
    for name in ["bin", "etc", "proc", "sys", "dev", "tmp", "data"] {
        fs::create_dir(lower.join(name)).unwrap();
    }
    // Copies, so that each program is a file of its own.
    for name in ["sh", "cat", "sleep"] {
        fs::copy(BUSYBOX, lower.join("bin").join(name)).unwrap();
    }
    fs::write(lower.join("bin/script"), "#!/bin/sh\n/bin/cat /data/script\n").unwrap();
    fs::set_permissions(lower.join("bin/script"), fs::Permissions::from_mode(0o755)).unwrap();
    for name in ["one", "two", "three", "script", "never"] {
        fs::write(lower.join("data").join(name), name).unwrap();
    }
}

fn names(record: &[Access]) -> Vec<String> {
    record
        .iter()
        .map(|access| String::from_utf8(access.path.as_bytes().to_vec()).unwrap())
        .collect()
}

fn find<'a>(record: &'a [Access], name: &str) -> &'a Access {
    record
        .iter()
        .find(|access| access.path.as_bytes() == name.as_bytes())
        .unwrap_or_else(|| panic!("{name} in {:?}", names(record)))
}

fn run(root: &Root, script: &str) -> Vec<Access> {
    let null = || {
        File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap()
            .into()
    };
    let stdio = Stdio {
        stdin: None,
        stdout: null(),
        stderr: null(),
    };
    let process = Process {
        args: vec!["/bin/sh".into(), "-c".into(), script.into()],
        env: vec!["PATH=/bin".into()],
        cwd: "/".into(),
        user: String::new(),
        terminal: false,
        stop_signal: None,
    };
    let isolation = Isolation {
        network: Network::Host,
        hostname: "box".to_owned(),
        binds: Vec::new(),
        read_only: false,
    };
    let mount = root.mount.try_clone().unwrap();
    let mut container = Container::create(mount, &process, &isolation, stdio).unwrap();
    let recorder = Recorder::start(root.mount.as_fd()).unwrap();
    container.start().unwrap();
    assert_eq!(container.wait().unwrap(), Exit::Code(0), "{script}");
    recorder.finish().unwrap()
}

fn kinds_of_access() {
    let root = Root::make(|lower| {
        fs::create_dir(lower.join("dir")).unwrap();
        for name in ["opened", "read", "dir/mapped", "statted", "listed"] {
            fs::write(lower.join(name), vec![b'x'; 8192]).unwrap();
        }
        symlink("read", lower.join("link")).unwrap();
    });
    let recorder = Recorder::start(root.mount.as_fd()).unwrap();
    root.open("opened");
    let mut buffer = Vec::new();
    root.open("link").read_to_end(&mut buffer).unwrap();
    let status = std::process::Command::new("dd")
        .args(["if=/dev/stdin", "of=/dev/null", "count=0"])
        .stdin(root.open("dir/mapped"))
        .stderr(std::process::Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());
    rustix::fs::statat(&root.mount, "statted", rustix::fs::AtFlags::empty()).unwrap();
    for entry in rustix::fs::Dir::new(root.open(".")).unwrap() {
        entry.unwrap();
    }
    // A second time changes nothing of the order.
    root.open("opened").read_to_end(&mut buffer).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while recorder.seen() < 3 {
        assert!(
            Instant::now() < deadline,
            "files are noted while they are accessed"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
    let record = recorder.finish().unwrap();
    assert_eq!(names(&record), ["opened", "read", "dir/mapped"]);
    assert!(record.is_sorted_by_key(|access| access.at));
    let flags: Vec<_> = record
        .iter()
        .map(|access| (access.read, access.executed))
        .collect();
    assert_eq!(flags, [(true, false), (true, false), (false, false)]);
}

fn a_container_is_seen_whole() {
    let root = Root::make(with_busybox);
    let record = run(
        &root,
        "/bin/cat /data/one; (/bin/cat /data/two; /bin/script) & wait; read x < /data/three; echo new > /tmp/new; \
         /bin/sleep 0",
    );
    let all: HashSet<String> = names(&record).into_iter().collect();
    for name in [
        "bin/sh",
        "bin/cat",
        "bin/script",
        "bin/sleep",
        "data/one",
        "data/two",
        "data/three",
        "data/script",
        // Made by the container: in the record, and not in the image's tree.
        "tmp/new",
    ] {
        assert!(all.contains(name), "{name} in {all:?}");
    }
    assert!(!all.contains("data/never") && !all.contains("data"), "{all:?}");
    assert_eq!(record[0].path.as_bytes(), b"bin/sh", "the program comes first");
    for (name, executed) in [
        ("bin/sh", true),
        ("bin/cat", true),
        ("bin/script", true),
        ("data/one", false),
    ] {
        let access = find(&record, name);
        assert_eq!((access.executed, access.read), (executed, true), "{name}");
    }
    assert!(!find(&record, "tmp/new").read);
    let place = |name: &str| names(&record).iter().position(|known| known == name);
    assert!(place("data/one") < place("data/two"));
    assert!(place("data/two") < place("data/three"));
}

fn other_mounts_of_the_same_root() {
    let root = Root::make(|lower| {
        fs::create_dir_all(lower.join("usr/lib")).unwrap();
        for name in ["usr/lib/a", "usr/lib/b", "usr/c", "c"] {
            fs::write(lower.join(name), name).unwrap();
        }
    });
    let place = tempfile::tempdir().unwrap();
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let empty = OpenTreeFlags::AT_EMPTY_PATH;
    let attached = open_tree(&root.mount, "", flags | empty).unwrap();
    let below = open_tree(&root.mount, "usr", flags).unwrap();
    move_mount(
        &attached,
        "",
        rustix::fs::CWD,
        place.path(),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .unwrap();
    let recorder = Recorder::start(root.mount.as_fd()).unwrap();
    // Under a directory of the host, and through a mount of a subdirectory, whose paths say nothing about the root.
    File::open(place.path().join("usr/lib/a")).unwrap();
    open(below.as_fd(), "lib/b");
    // There is a `c` in the root too; this is the other.
    open(below.as_fd(), "c");
    let record = recorder.finish();
    unmount(place.path(), UnmountFlags::DETACH).unwrap();
    assert_eq!(names(&record.unwrap()), ["usr/lib/a", "usr/lib/b", "usr/c"]);
}

fn removed_copied_and_odd_names() {
    let root = Root::make(|lower| {
        with_busybox(lower);
        fs::copy(BUSYBOX, lower.join("bin/rm")).unwrap();
        fs::write(lower.join("data/x (deleted)"), "odd").unwrap();
    });
    let record = run(
        &root,
        "cat /data/one; /bin/rm /data/one; cat '/data/x (deleted)'; cat /data/two; echo more >> /data/two; cat /data/two; \
         exec 3> /tmp/gone; rm /tmp/gone; echo x >&3",
    );
    let all = names(&record);
    for name in ["data/one", "data/x (deleted)", "data/two", "bin/rm"] {
        assert_eq!(
            all.iter().filter(|known| *known == name).count(),
            1,
            "{name} in {all:?}"
        );
    }
}

fn special_files_do_no_harm() {
    let root = Root::make(|lower| {
        with_busybox(lower);
        for name in ["mkfifo", "mknod"] {
            fs::copy(BUSYBOX, lower.join("bin").join(name)).unwrap();
        }
    });
    let record = run(
        &root,
        "mkfifo /tmp/f; cat /data/one > /tmp/f & cat /tmp/f; mknod /tmp/n c 1 3; cat /tmp/n; cat /data/two; true",
    );
    let all = names(&record);
    assert!(
        all.contains(&"data/one".to_owned()) && all.contains(&"data/two".to_owned()),
        "{all:?}"
    );
    assert!(
        !all.iter().any(|name| name == "tmp/f" || name == "tmp/n"),
        "{all:?}"
    );
}

fn many_reads_are_one_entry() {
    let root = Root::make(|lower| fs::write(lower.join("file"), vec![0; 1 << 20]).unwrap());
    let recorder = Recorder::start(root.mount.as_fd()).unwrap();
    let mut buffer = [0; 64];
    let mut file = root.open("file");
    while file.read(&mut buffer).unwrap() > 0 {}
    let record = recorder.finish().unwrap();
    assert_eq!(names(&record), ["file"]);
    assert!(record[0].read);
}

fn fifty_thousand_files() {
    let name = |number: usize| format!("d{}/f{number}", number % 100);
    let root = Root::make(|lower| {
        for directory in 0..100 {
            fs::create_dir(lower.join(format!("d{directory}"))).unwrap();
        }
        for number in 0..MANY {
            fs::write(lower.join(name(number)), b"x").unwrap();
        }
    });
    let recorder = Recorder::start(root.mount.as_fd()).unwrap();
    let begin = Instant::now();
    let mut buffer = [0; 8];
    for number in 0..MANY {
        assert_eq!(root.open(&name(number)).read(&mut buffer).unwrap(), 1);
    }
    let opened = begin.elapsed();
    let record = recorder.finish().unwrap();
    eprintln!(
        "{MANY} files: opened in {opened:?}, recorded in {:?}",
        begin.elapsed()
    );
    let expected: Vec<String> = (0..MANY).map(name).collect();
    assert_eq!(names(&record), expected);
    assert!(record.iter().all(|access| access.read && !access.executed));
}

fn no_descriptor_is_left() {
    let count = || fs::read_dir("/proc/self/fd").unwrap().count();
    let before = count();
    for _ in 0..3 {
        let root = Root::make(with_busybox);
        run(&root, "cat /data/one");
        assert!(root.directory.path().exists());
        drop(Recorder::start(root.mount.as_fd()).unwrap().finish().unwrap());
    }
    assert_eq!(count(), before);
}
