//! What the container gets from the host stays as it is, whatever the program does to it; and what it is given beside.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;

use peel_sandbox::{Container, Exit, Isolation, Network, Stdio};
use rustix::fs::{Mode, OFlags};
use rustix::thread::CapabilitySet;

use crate::support::{self, Output, Root, isolation, run, shell, try_run};

/// Changes everything about each path that a system call can change, and tells of none of it.
const CHANGE: &str = r#"
    #define _GNU_SOURCE
    #include <fcntl.h>
    #include <sys/stat.h>
    #include <sys/xattr.h>
    #include <unistd.h>
    int main(int argc, char **argv) {
        struct timespec times[2] = {{1, 0}, {1, 0}};
        for (int i = 1; i < argc; i++) {
            (void)!chmod(argv[i], 0123);
            (void)!chown(argv[i], 7, 7);
            (void)!utimensat(AT_FDCWD, argv[i], times, 0);
            (void)!truncate(argv[i], 0);
            setxattr(argv[i], "user.x", "x", 1, 0);
            setxattr(argv[i], "security.x", "x", 1, 0);
        }
        for (int fd = 0; fd < 3; fd++) {
            (void)!fchmod(fd, 0123);
            (void)!fchown(fd, 7, 7);
            fsetxattr(fd, "user.x", "x", 1, 0);
        }
        return 0;
    }"#;
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// What lies behind these is the host's, or could be.
const PLACES: &str = "/dev/* /dev /etc/hosts /etc/hostname /etc/resolv.conf /proc/[!0-9]* /proc/sys/kernel/* /proc /sys \
    /sys/* /sys/kernel/* /sys/fs/cgroup /sys/fs/cgroup/*";

/// Mode, owner, group, device and attributes of what the host has.
fn state() -> Vec<(String, u32, u32, u32, u64, usize)> {
    let devices = DEVICES.iter().map(|name| format!("/dev/{name}"));
    let others = [
        "/dev",
        "/dev/pts",
        "/dev/ptmx",
        "/dev/shm",
        "/dev/mqueue",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/proc",
        "/sys",
        "/sys/kernel",
        "/sys/fs/cgroup",
        "/sys/fs/cgroup/cgroup.procs",
    ];
    devices
        .chain(others.map(str::to_owned))
        .filter_map(|path| {
            let found = fs::metadata(&path).ok()?;
            let mut names = [0_u8; 4096];
            let attributes = rustix::fs::listxattr(path.as_str(), &mut names).unwrap_or(0);
            Some((
                path,
                found.mode(),
                found.uid(),
                found.gid(),
                found.rdev(),
                attributes,
            ))
        })
        .collect()
}

/// The same of /proc as a new mount of it shows: an older one remembers modes.
fn proc_state(root: &Root) -> String {
    run(
        root,
        shell("busybox stat -c '%n %a %u %g' /proc/[!0-9]* /proc/sys/kernel/*"),
    )
    .stdout
}

fn changed(root: &Root, expected_mode: &str) -> Output {
    let script = format!(
        "change {PLACES}; stat() {{ busybox stat \"$@\"; }}; stat -c %a /dev/null /dev/zero; \
         echo x > /dev/null && head -c 4 /dev/zero | wc -c; echo x > /dev/full; head -c 3 /dev/urandom | wc -c"
    );
    let output = run(root, shell(&script));
    let expected = format!("{expected_mode}\n{expected_mode}\n4\n3\n");
    assert_eq!(output.stdout, expected, "{}", output.stderr);
    output
}

pub(crate) fn nodes_of_the_host_stay() {
    let root = Root::make();
    root.build("change", CHANGE);
    let before = (state(), proc_state(&root));
    changed(&root, "123");
    assert_eq!((state(), proc_state(&root)), before);
    // Where nodes cannot be made, the host's are there and cannot be changed.
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // Only this thread and what it starts go without.
            rustix::thread::remove_capability_from_bounding_set(CapabilitySet::MKNOD).unwrap();
            changed(&root, "666");
        });
        thread.join().unwrap();
    });
    assert_eq!((state(), proc_state(&root)), before);
}

pub(crate) fn null_streams_are_the_containers_own() {
    let root = Root::make();
    root.build("change", CHANGE);
    let before = state();
    let null =
        |flags| -> OwnedFd { rustix::fs::open("/dev/null", flags | OFlags::CLOEXEC, Mode::empty()).unwrap() };
    let stdio = Stdio {
        stdin: Some(null(OFlags::RDONLY)),
        stdout: null(OFlags::WRONLY),
        stderr: null(OFlags::RDWR),
    };
    let script = "change /dev/stdin /dev/stdout /proc/self/fd/2; echo x; echo x >&2; cat";
    let mut container = Container::create(root.mount(), &shell(script), &isolation(), stdio).unwrap();
    container.start().unwrap();
    assert_eq!(container.wait().unwrap(), Exit::Code(0));
    assert_eq!(state(), before);
    // The default for standard input, in a root that has no /dev and cannot be given one.
    fs::remove_dir(root.path().join("dev")).unwrap();
    let empty = tempfile::tempdir().unwrap();
    let (stdio, reader) = support::stdio(None);
    let mount = root.read_only_mount(empty.path());
    let mut container =
        Container::create(mount, &shell("change /proc/self/fd/0"), &isolation(), stdio).unwrap();
    container.start().unwrap();
    assert_eq!(container.wait().unwrap(), Exit::Code(0), "{:?}", reader.finish());
    assert_eq!(state(), before);
}

pub(crate) fn places_in_a_read_only_root() {
    let root = Root::make();
    for name in ["dev", "proc", "sys"] {
        fs::remove_dir(root.path().join(name)).unwrap();
    }
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "bound").unwrap();
    let closed = Isolation {
        network: Network::None,
        read_only: true,
        binds: vec![
            (outside.path().into(), "/made/volume".into(), false),
            (outside.path().join("file"), "/made/one/file".into(), true),
        ],
        ..isolation()
    };
    let mut process = shell(
        "pwd; cat /made/one/file /etc/hostname; ls -d /dev/null /proc/self/status /sys/kernel; echo x > /made/volume/new; \
         for f in /x /tmp/x /made/x /made/one/file; do (echo x > $f) 2>&1; done | grep -c 'Read-only file system'; \
         chmod 700 /etc 2>&1 | grep -c Read-only; echo x > /dev/shm/x && echo writable",
    );
    process.cwd = "/made/work".into();
    let output = try_run(&root, process, &closed).unwrap();
    assert_eq!(
        output.stdout, "/made/work\nboundbox\n/dev/null\n/proc/self/status\n/sys/kernel\n4\n1\nwritable\n",
        "{}",
        output.stderr
    );
    assert_eq!(fs::read(outside.path().join("new")).unwrap(), b"x\n");
    // The mount that was handed over is read-only, not the file system.
    fs::write(root.path().join("still"), "writable").unwrap();
}

pub(crate) fn groups_and_home() {
    let root = Root::make();
    for (user, groups) in [
        ("", "0 10"),
        ("web", "34 44 55"),
        ("web:staff", "50"),
        ("1234:5678", "5678"),
        ("65534", "0"),
    ] {
        let mut process = shell("sed -n 's/^Groups://p' /proc/self/status");
        process.user = user.to_owned();
        let output = run(&root, process).stdout;
        assert_eq!(
            output.split_whitespace().collect::<Vec<_>>().join(" "),
            groups,
            "{user}"
        );
    }
    for (env, expected) in [
        (&[][..], "/srv"),
        (&["HOME="], "/srv"),
        (&["HOME=/x"], "/x"),
        (&["HOME= "], " "),
        // An empty variable of another name stays, and is not taken for HOME.
        (&["HOSTNAME=", "HOMES=", "EMPTY="], "/srv"),
    ] {
        let mut process = shell("echo \"$HOME\"; env | grep -c =$ ");
        process.user = "web".to_owned();
        process.env.extend(env.iter().map(Into::into));
        let output = run(&root, process).stdout;
        let empty = env
            .iter()
            .filter(|entry| entry.ends_with('=') && **entry != "HOME=")
            .count();
        assert_eq!(output, format!("{expected}\n{empty}\n"), "{env:?}");
    }
}

/// Calls of i386 from a program of x86-64: the kernel and the filter see the same as from a 32-bit one.
#[cfg(target_arch = "x86_64")]
pub(crate) fn calls_of_i386() {
    const PROBE: &str = r#"
        #include <stdio.h>
        #include <sys/mman.h>
        static long call(long number, long first, long second) {
            long result;
            __asm__ volatile("int $0x80" : "=a"(result) : "a"(number), "b"(first), "c"(second), "d"(0L), "S"(0L), "D"(0L)
                             : "memory", "r8", "r9", "r10", "r11");
            return (int)result;
        }
        #define SHOW(...) do { long r = call(__VA_ARGS__); printf("%ld\n", r < 0 ? -r : 0); } while (0)
        int main(void) {
            unsigned *arguments = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_32BIT, -1, 0);
            arguments[0] = 40; arguments[1] = 1;
            SHOW(20, 0, 0);                  /* getpid */
            SHOW(310, 0, 0);                 /* unshare */
            SHOW(21, 0, 0);                  /* mount */
            SHOW(22, 0, 0);                  /* umount */
            SHOW(25, 0, 0);                  /* stime */
            SHOW(404, 0, 0);                 /* clock_settime64 */
            SHOW(288, 0, 0);                 /* keyctl */
            SHOW(120, 0x10000000 | 17, 0);   /* clone */
            SHOW(435, 0, 0);                 /* clone3 */
            SHOW(467, 0, 0);
            SHOW(359, 40, 1);                /* socket */
            SHOW(359, 1, 1);
            SHOW(102, 1, (long)arguments);   /* socketcall */
            arguments[0] = 1;
            SHOW(102, 1, (long)arguments);
            return 0;
        }"#;
    let root = Root::make();
    root.build("probe", PROBE);
    let on_the_host = std::process::Command::new(root.path().join("bin/probe"))
        .output()
        .unwrap();
    if !on_the_host.status.success() {
        eprintln!(
            "calls_of_i386: this kernel runs no 32-bit programs; the filter is tested in sandbox/src/seccomp/tests.rs"
        );
        return;
    }
    let (eperm, enosys) = (libc::EPERM, libc::ENOSYS);
    let output = try_run(&root, support::process(&["/bin/probe"]), &isolation()).unwrap();
    let got: Vec<i32> = output.stdout.lines().map(|line| line.parse().unwrap()).collect();
    let expected = [
        0, eperm, eperm, eperm, eperm, eperm, eperm, eperm, enosys, enosys, eperm, 0,
    ];
    assert_eq!(got[..12], expected, "{:?}", output.exit);
    // What the host's kernel says of AF_VSOCK is not ours to know.
    assert_ne!(got[12], enosys);
    assert_eq!(got[13], 0);
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn calls_of_i386() {}

pub(crate) fn mounts_are_restricted() {
    let directory = tempfile::tempdir().unwrap();
    let flags = |nosuid, nodev| {
        let mount = support::detached(directory.path());
        peel_sandbox::restrict_mount(mount.as_fd(), nosuid, nodev).unwrap();
        let found = rustix::fs::fstatvfs(&mount).unwrap().f_flag;
        (
            found.contains(rustix::fs::StatVfsMountFlags::NOSUID),
            found.contains(rustix::fs::StatVfsMountFlags::NODEV),
        )
    };
    let plain = flags(false, false);
    for (nosuid, nodev) in [(true, false), (false, true), (true, true)] {
        assert_eq!(flags(nosuid, nodev), (nosuid || plain.0, nodev || plain.1));
    }
}
