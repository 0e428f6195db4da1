//! Real containers from a small root. Needs root, and Debian's busybox-static for the programs.
//!
//! Containers execute this binary again, so it has a `main` of its own that calls `become_init_if_asked` first, as every
//! binary that uses the crate must; the tests are a list of functions. An argument runs those with it in their name.

#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test without the harness is not known as one"
)]

#[path = "containers/host.rs"]
mod host;
#[path = "containers/support.rs"]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use peel_sandbox::{Container, Error, Exit, Isolation, Network, Stdio, become_init_if_asked};
use support::{Root, isolation, processes, run, shell, try_run};

/// Role of this binary as the parent that is killed; the argument after it is the root's directory.
const VICTIM: &str = "victim";

fn main() -> ExitCode {
    become_init_if_asked();
    let mut args = std::env::args().skip(1);
    let wanted = args.next();
    if wanted.as_deref() == Some(VICTIM) {
        victim(&args.next().expect("the root's directory"));
        return ExitCode::SUCCESS;
    }
    let tests: &[(&str, fn())] = &[
        ("exit_codes_and_signals", exit_codes_and_signals),
        ("programs_that_cannot_run", programs_that_cannot_run),
        ("standard_streams", standard_streams),
        ("environment_and_directory", environment_and_directory),
        ("users", users),
        ("namespaces", namespaces),
        ("proc_sys_dev", proc_sys_dev),
        ("masked_and_read_only_paths", masked_and_read_only_paths),
        ("devices_cannot_be_made", devices_cannot_be_made),
        ("capabilities_and_privileges", capabilities_and_privileges),
        ("seccomp_refuses", seccomp_refuses),
        ("network", network),
        ("host_files", host_files),
        ("binds", binds),
        ("links_do_not_lead_out", links_do_not_lead_out),
        ("read_only_root", read_only_root),
        ("nodes_of_the_host_stay", host::nodes_of_the_host_stay),
        (
            "null_streams_are_the_containers_own",
            host::null_streams_are_the_containers_own,
        ),
        ("places_in_a_read_only_root", host::places_in_a_read_only_root),
        ("groups_and_home", host::groups_and_home),
        ("calls_of_i386", host::calls_of_i386),
        ("mounts_are_restricted", host::mounts_are_restricted),
        ("terminal", terminal),
        (
            "the_binary_cannot_be_overwritten",
            the_binary_cannot_be_overwritten,
        ),
        ("two_phases", two_phases),
        ("signals_reach_the_program", signals_reach_the_program),
        ("many_threads_at_once", many_threads_at_once),
        ("killed_supervisor", killed_supervisor),
        ("killed_parent", killed_parent),
        ("nothing_is_left", nothing_is_left),
    ];
    let mut failed = Vec::new();
    for (name, test) in tests {
        if wanted
            .as_deref()
            .is_some_and(|wanted| !wanted.starts_with('-') && !name.contains(wanted))
        {
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

fn exit_codes_and_signals() {
    let root = Root::make();
    for (script, expected) in [
        ("true", Exit::Code(0)),
        ("exit 7", Exit::Code(7)),
        ("exit 255", Exit::Code(255)),
        // A signal with no handler does nothing to a pid 1, so a child is killed and its code passed on.
        ("sh -c 'kill -TERM $$'; exit $?", Exit::Code(143)),
        // What a pid 1 leaves running ends with it.
        ("sleep 1000 & exit 3", Exit::Code(3)),
    ] {
        assert_eq!(run(&root, shell(script)).exit, expected, "{script}");
    }
}

fn programs_that_cannot_run() {
    let root = Root::make();
    let bin = root.path().join("bin");
    fs::write(bin.join("plain"), "#!/bin/sh\n").unwrap();
    fs::write(bin.join("script"), "#!/no/such/interpreter\n").unwrap();
    fs::set_permissions(bin.join("script"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(bin.join("garbage"), "\x7fELF garbage").unwrap();
    fs::set_permissions(bin.join("garbage"), fs::Permissions::from_mode(0o755)).unwrap();
    for (program, code) in [
        ("nosuch", 127),
        ("/bin/nosuch", 127),
        ("/bin/true/x", 127),
        ("script", 127),
        ("/bin/plain", 126),
        ("plain", 126),
        ("/bin", 126),
        ("garbage", 126),
    ] {
        let error = try_run(&root, support::process(&[program]), &isolation()).unwrap_err();
        assert_eq!(error.exit_code(), code, "{program}: {error}");
        assert!(error.to_string().contains(program), "{error}");
    }
    let mut process = shell("true");
    process.user = "nobodyhere".to_owned();
    let error = try_run(&root, process, &isolation()).unwrap_err();
    assert!(
        matches!(&error, Error::User { user, .. } if user == "nobodyhere"),
        "{error}"
    );
    assert_eq!(error.exit_code(), 125);
    let mut process = shell("true");
    process.cwd = "/bin/true/x".into();
    let error = try_run(&root, process, &isolation()).unwrap_err();
    assert!(matches!(error, Error::Directory { .. }), "{error}");
    let mut process = shell("true");
    process.args.push("a\0b".into());
    assert!(matches!(
        try_run(&root, process, &isolation()),
        Err(Error::Nul(_))
    ));
}

fn standard_streams() {
    let root = Root::make();
    let output = run(
        &root,
        shell("echo out; echo err >&2; readlink /proc/self/fd/0; ls /proc/self/fd"),
    );
    assert_eq!(output.stderr, "err\n");
    // 3 is ls's own.
    assert_eq!(output.stdout, "out\n/dev/null\n0\n1\n2\n3\n");
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (stdio, reader) = support::stdio(Some(read));
    let mut container = Container::create(root.mount(), &shell("cat"), &isolation(), stdio).unwrap();
    container.start().unwrap();
    fs::File::from(write).write_all(b"through").unwrap();
    assert_eq!(container.wait().unwrap(), Exit::Code(0));
    assert_eq!(reader.finish().0, "through");
}

fn environment_and_directory() {
    let root = Root::make();
    let mut process = shell("env; pwd; umask");
    process.env = vec!["A=1".into(), "PATH=/bin".into()];
    process.cwd = "/made/for/this".into();
    let output = run(&root, process);
    let mut lines: Vec<&str> = output.stdout.lines().collect();
    assert_eq!(lines.split_off(lines.len() - 2), ["/made/for/this", "0022"]);
    for line in ["A=1", "PATH=/bin", "HOME=/root", "HOSTNAME=box"] {
        assert!(lines.contains(&line), "{line} in {lines:?}");
    }
    // The shell adds PWD and its like; nothing of the host comes in.
    assert!(!output.stdout.contains("CARGO"), "{}", output.stdout);
}

fn users() {
    let root = Root::make();
    for (user, expected) in [
        ("", "0 0 0 10 /root"),
        ("web", "33 34 34 44 55 /srv"),
        ("33", "33 34 34 44 55 /srv"),
        ("web:staff", "33 50 50 /srv"),
        ("1234:5678", "1234 5678 5678 /"),
        ("1234", "1234 0 0 /"),
    ] {
        let mut process = shell("echo $(id -u) $(id -g) $(id -G) $HOME");
        process.user = user.to_owned();
        assert_eq!(run(&root, process).stdout.trim(), expected, "{user}");
    }
    // Standard output is a pipe, which its user can open again.
    let mut process = shell("echo again > /dev/stdout");
    process.user = "web".to_owned();
    assert_eq!(run(&root, process).stdout, "again\n");
}

fn namespaces() {
    let root = Root::make();
    let output = run(
        &root,
        shell(
            "echo $$; hostname; for n in mnt pid ipc uts cgroup net user; do readlink /proc/self/ns/$n; done; ps -o pid | wc -l",
        ),
    );
    let mut lines = output.stdout.lines();
    assert_eq!(lines.next(), Some("1"));
    assert_eq!(lines.next(), Some("box"));
    for (name, shared) in [
        ("mnt", false),
        ("pid", false),
        ("ipc", false),
        ("uts", false),
        ("cgroup", false),
        ("net", true),
        ("user", true),
    ] {
        let ours = fs::read_link(format!("/proc/self/ns/{name}")).unwrap();
        assert_eq!(lines.next() == ours.to_str(), shared, "{name}: {}", output.stdout);
    }
    // The shell, ps, wc and the headline: the container sees only itself.
    assert_eq!(lines.next().map(str::trim), Some("4"));
}

fn proc_sys_dev() {
    let root = Root::make();
    let output = run(
        &root,
        shell(
            "cat /proc/mounts; echo --; ls /dev; echo --; ls -l /dev/ptmx /dev/fd | sed 's/.* //'; echo --; \
             echo x > /dev/null && head -c 4 /dev/zero | wc -c; echo x > /dev/full; head -c 3 /dev/urandom | wc -c; \
             echo shm > /dev/shm/a && cat /dev/shm/a; ls /sys/class | head -1",
        ),
    );
    let parts: Vec<&str> = output.stdout.split("--\n").collect();
    for (place, kind, options) in [
        ("/proc", "proc", "rw,nosuid,nodev,noexec"),
        ("/dev", "tmpfs", "rw,nosuid,nodev"),
        ("/dev/pts", "devpts", "rw,nosuid,noexec"),
        ("/dev/shm", "tmpfs", "rw,nosuid,nodev,noexec"),
        ("/dev/mqueue", "mqueue", "rw,nosuid,nodev,noexec"),
        ("/sys", "sysfs", "ro,nosuid,nodev,noexec"),
        ("/sys/fs/cgroup", "cgroup2", "ro,nosuid,nodev,noexec"),
    ] {
        let found = parts[0].lines().any(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            fields[1] == place && fields[2] == kind && fields[3].starts_with(options)
        });
        assert!(found, "{place} {kind} {options} in\n{}", parts[0]);
    }
    // No mount of the host is left.
    assert!(
        parts[0].lines().all(|line| !line.contains("/dev/vda")
            || line.split(' ').nth(1) == Some("/")
            || line.contains(" ext4 ") && line.starts_with("/dev/vda / ")),
        "{}",
        parts[0]
    );
    assert_eq!(
        parts[1].split_whitespace().collect::<Vec<_>>(),
        [
            "core", "fd", "full", "mqueue", "null", "ptmx", "pts", "random", "shm", "stderr", "stdin",
            "stdout", "tty", "urandom", "zero"
        ]
    );
    assert_eq!(parts[2], "/proc/self/fd\npts/ptmx\n");
    assert!(parts[3].starts_with("4\n3\nshm\n"), "{}", parts[3]);
    assert!(output.stderr.contains("No space left"), "{}", output.stderr);
}

fn masked_and_read_only_paths() {
    let root = Root::make();
    let output = run(
        &root,
        shell(
            "for f in kcore keys timer_list interrupts; do test -e /proc/$f && wc -c < /proc/$f; done; \
             for d in /proc/acpi /proc/scsi /sys/firmware; do test -d $d && ls -A $d; done; echo --; \
             for f in /proc/sys/kernel/hostname /proc/sysrq-trigger /proc/irq/x /sys/x /sys/firmware/x /sys/fs/cgroup/x; \
             do sh -c \"echo 1 > $f\"; done; umount /proc/sys; mount -t tmpfs none /tmp; echo done",
        ),
    );
    let (masked, rest) = output.stdout.split_once("--\n").unwrap();
    assert!(!masked.is_empty(), "there is something to mask");
    assert!(masked.lines().all(|line| line.trim() == "0"), "{masked}");
    assert_eq!(rest, "done\n");
    let refused =
        |line: &str| line.contains("Read-only") || line.contains("ermi") || line.contains("nonexistent");
    assert!(output.stderr.lines().all(refused), "{}", output.stderr);
    assert!(output.stderr.lines().count() >= 7, "{}", output.stderr);
}

fn devices_cannot_be_made() {
    let root = Root::make();
    let host = fs::metadata("/dev/null").unwrap().rdev();
    assert_eq!(host, rustix::fs::makedev(1, 3));
    let output = run(
        &root,
        shell("for d in / /dev /dev/shm /tmp; do mknod $d/n c 1 3 && cat $d/n; done; echo $?"),
    );
    assert_eq!(output.stdout, "1\n", "{}", output.stderr);
    assert_eq!(
        output.stderr.matches("Permission denied").count(),
        4,
        "{}",
        output.stderr
    );
}

fn capabilities_and_privileges() {
    let root = Root::make();
    let status = |user: &str| {
        let pattern = "^(Cap|NoNewPrivs|Seccomp:|SigBlk|SigIgn)";
        let mut process = support::process(&["grep", "-E", pattern, "/proc/self/status"]);
        process.user = user.to_owned();
        run(&root, process).stdout.replace('\t', "")
    };
    // Docker's default set, as `docker run` shows it.
    let docker = "00000000a80425fb";
    let empty = "0000000000000000";
    let expected = |held: &str| {
        format!(
            "SigBlk:{empty}\nSigIgn:{empty}\nCapInh:{empty}\nCapPrm:{held}\nCapEff:{held}\nCapBnd:{docker}\n\
             CapAmb:{empty}\nNoNewPrivs:1\nSeccomp:2\n"
        )
    };
    assert_eq!(status(""), expected(docker));
    assert_eq!(status("web"), expected(empty));
    // A set-user-id program gives nothing.
    let suid = root.path().join("srv/busybox");
    fs::copy(root.path().join("bin/busybox"), &suid).unwrap();
    fs::set_permissions(&suid, fs::Permissions::from_mode(0o4755)).unwrap();
    let mut process = support::process(&["/srv/busybox", "id", "-u"]);
    process.user = "web".to_owned();
    assert_eq!(run(&root, process).stdout, "33\n");
}

fn seccomp_refuses() {
    let root = Root::make();
    // As root, so that it is the filter that refuses and not a missing capability alone.
    let output = run(&root, shell("unshare -U true; echo $?; unshare -m true; echo $?"));
    assert_eq!(output.stdout, "1\n1\n", "{}", output.stderr);
    root.build(
        "probe",
        r#"
        #define _GNU_SOURCE
        #include <errno.h>
        #include <stdio.h>
        #include <sys/syscall.h>
        #include <unistd.h>
        #define SHOW(...) do { long r = syscall(__VA_ARGS__); printf("%d\n", r < 0 ? errno : 0); } while (0)
        int main(void) {
            SHOW(SYS_unshare, 0);
            SHOW(SYS_keyctl, 0, 0);
            SHOW(SYS_bpf, 0, 0, 0);
            SHOW(SYS_clone3, 0, 0);
            SHOW(467, 0, 0);
            SHOW(5000, 0, 0);
            SHOW(SYS_clone, 0x10000000 | 17, 0, 0, 0, 0);
            SHOW(SYS_socket, 40, 1, 0);
            SHOW(SYS_socket, 1, 1, 0);
            SHOW(SYS_personality, 0xffffffff);
            SHOW(SYS_personality, 0x40000);
            SHOW(SYS_getpid);
            return 0;
        }"#,
    );
    let output = run(&root, support::process(&["/bin/probe"]));
    let (eperm, enosys) = (libc::EPERM, libc::ENOSYS);
    let expected = [
        eperm, eperm, eperm, enosys, enosys, enosys, eperm, eperm, 0, 0, eperm, 0,
    ];
    let got: Vec<i32> = output.stdout.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(got, expected);
}

fn network() {
    let root = Root::make();
    let alone = Isolation {
        network: Network::None,
        ..isolation()
    };
    let script = "ls /sys/class/net; cat /etc/hosts; ifconfig lo | grep -c UP; ping -c 1 -w 2 127.0.0.1 > /dev/null && echo pong";
    let output = try_run(&root, shell(script), &alone).unwrap();
    assert_eq!(
        output.stdout, "lo\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n1\npong\n",
        "{}",
        output.stderr
    );
    let host = run(&root, shell("ls /sys/class/net")).stdout;
    let names = fs::read_dir("/sys/class/net").unwrap().count();
    assert_eq!(host.lines().count(), names);
}

fn host_files() {
    let root = Root::make();
    let before = fs::read("/etc/hosts").unwrap();
    let script = "cat /etc/hostname /etc/hosts; echo changed > /etc/hosts; cat /etc/hosts";
    let output = run(&root, shell(script));
    let expected = format!("box\n{}changed\n", String::from_utf8(before.clone()).unwrap());
    assert_eq!(output.stdout, expected, "{}", output.stderr);
    // Neither the host's file nor the image's has changed.
    assert_eq!(fs::read("/etc/hosts").unwrap(), before);
    assert_eq!(fs::read(root.path().join("etc/hosts")).unwrap(), b"");
    // A link inside the root leads to its target inside the root.
    let etc = root.path().join("etc");
    fs::remove_file(etc.join("hosts")).unwrap();
    fs::create_dir_all(root.path().join("run")).unwrap();
    fs::write(root.path().join("run/hosts"), "the image's").unwrap();
    symlink("/run/hosts", etc.join("hosts")).unwrap();
    let output = run(&root, shell("cat /run/hosts"));
    assert_eq!(output.stdout.into_bytes(), before);
    // One that leads nowhere, too: images of virtual machines have such a resolv.conf.
    fs::remove_file(root.path().join("run/hosts")).unwrap();
    fs::remove_file(etc.join("hosts")).unwrap();
    symlink("../run/deep/hosts", etc.join("hosts")).unwrap();
    let output = run(&root, shell("cat /etc/hosts"));
    assert_eq!(output.stdout.into_bytes(), before, "{}", output.stderr);
    assert!(
        !std::path::Path::new("/run/deep").exists(),
        "made outside the root"
    );
}

fn binds() {
    let root = Root::make();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("file"), "bound").unwrap();
    let bound = Isolation {
        binds: vec![
            (outside.path().into(), "/a/new/place".into(), true),
            (outside.path().into(), "/writable".into(), false),
            (outside.path().join("file"), "/etc/one/file".into(), true),
        ],
        ..isolation()
    };
    let script = "cat /a/new/place/file /etc/one/file; echo x > /a/new/place/y; echo z > /writable/z; echo x > /etc/one/file";
    let output = try_run(&root, shell(script), &bound).unwrap();
    assert_eq!(output.stdout, "boundbound");
    assert_eq!(output.stderr.matches("Read-only").count(), 2, "{}", output.stderr);
    assert_eq!(fs::read(outside.path().join("z")).unwrap(), b"z\n");
    let missing = Isolation {
        binds: vec![("/no/such/dir".into(), "/x".into(), true)],
        ..isolation()
    };
    let error = try_run(&root, shell("true"), &missing).unwrap_err();
    assert!(error.to_string().contains("/no/such/dir"), "{error}");
}

fn links_do_not_lead_out() {
    let root = Root::make();
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().to_str().unwrap();
    fs::create_dir_all(root.path().join("etc2")).unwrap();
    // Every lookup of the set-up meets a link that would leave the root if it were followed on the host.
    symlink(format!("{target}/cwd"), root.path().join("cwd")).unwrap();
    symlink("../../../../../../..", root.path().join("up")).unwrap();
    let bound = Isolation {
        binds: vec![("/etc".into(), format!("/up{target}/bind").into(), true)],
        ..isolation()
    };
    let mut process = shell("pwd");
    process.cwd = format!("/up{target}/made").into();
    let output = try_run(&root, process, &bound).unwrap();
    assert_eq!(output.stdout, format!("{target}/made\n"));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 0);
    // A descriptor of the host cannot be entered.
    for number in 0..12 {
        let mut process = shell("pwd");
        process.cwd = format!("/proc/self/fd/{number}").into();
        let error = try_run(&root, process, &isolation()).unwrap_err();
        assert!(matches!(error, Error::Directory { .. }), "{error}");
    }
    // /proc must be a directory of the root, not a link to another.
    let linked = Root::make();
    fs::create_dir(linked.path().join("elsewhere")).unwrap();
    fs::remove_dir(linked.path().join("proc")).unwrap();
    symlink("elsewhere", linked.path().join("proc")).unwrap();
    let error = try_run(&linked, shell("true"), &isolation()).unwrap_err();
    assert!(error.to_string().contains("/proc"), "{error}");
}

fn read_only_root() {
    let root = Root::make();
    fs::remove_dir(root.path().join("sys")).unwrap();
    // /etc/hosts is not there and cannot be made; the container goes without.
    fs::write(root.path().join("etc/hostname"), "the image's").unwrap();
    let empty = tempfile::tempdir().unwrap();
    let mount = root.read_only_mount(empty.path());
    let (stdio, reader) = support::stdio(None);
    let script = "echo x > /tmp/y; cat /etc/hostname; ls -d /sys";
    let mut container = Container::create(mount, &shell(script), &isolation(), stdio).unwrap();
    assert!(
        container
            .warnings()
            .iter()
            .any(|warning| warning.contains("/sys")),
        "{:?}",
        container.warnings()
    );
    container.start().unwrap();
    container.wait().unwrap();
    let (stdout, stderr) = reader.finish();
    assert_eq!(stdout, "box\n");
    assert!(
        stderr.contains("Read-only") && stderr.contains("/sys: No such"),
        "{stderr}"
    );
}

fn terminal() {
    let root = Root::make();
    let (stdio, reader) = support::stdio(None);
    let mut process = shell(
        "tty; stty size; test -c /dev/console && echo console; read line; echo got $line; echo x > /dev/tty",
    );
    process.terminal = true;
    process.user = "web".to_owned();
    let mut container = Container::create(root.mount(), &process, &isolation(), stdio).unwrap();
    container.resize(43, 121).unwrap();
    let mut console = fs::File::from(container.console().unwrap().try_clone_to_owned().unwrap());
    container.start().unwrap();
    console.write_all(b"typed\n").unwrap();
    let mut seen = Vec::new();
    // Ends with EIO when the other side is closed for good.
    let _end = console.read_to_end(&mut seen);
    assert_eq!(container.wait().unwrap(), Exit::Code(0));
    let seen = String::from_utf8(seen).unwrap();
    for part in [
        "/dev/pts/0\r\n",
        "43 121\r\n",
        "console\r\n",
        "got typed\r\n",
        "x\r\n",
    ] {
        assert!(seen.contains(part), "{part:?} in {seen:?}");
    }
    assert_eq!(reader.finish(), (String::new(), String::new()));
    // Ctrl-C reaches the foreground process of the terminal, which has a handler here.
    let mut process = shell("trap 'echo interrupted; exit 5' INT; echo ready; while :; do sleep 0.05; done");
    process.terminal = true;
    let (stdio, _reader) = support::stdio(None);
    let mut container = Container::create(root.mount(), &process, &isolation(), stdio).unwrap();
    let mut console = fs::File::from(container.console().unwrap().try_clone_to_owned().unwrap());
    container.start().unwrap();
    let mut ready = [0; 7];
    console.read_exact(&mut ready).unwrap();
    console.write_all(&[3]).unwrap();
    assert_eq!(container.wait().unwrap(), Exit::Code(5));
}

fn the_binary_cannot_be_overwritten() {
    let root = Root::make();
    // An image whose program is the binary that started it. It runs again here, finds no socket and fails.
    symlink("/proc/self/exe", root.path().join("bin/self")).unwrap();
    root.build(
        "writer",
        r#"
        #include <fcntl.h>
        #include <stdio.h>
        #include <errno.h>
        #include <unistd.h>
        int main(void) {
            int fd = open("/proc/1/exe", O_RDONLY);
            char path[64];
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            printf("%d\n", open(path, O_WRONLY) < 0 ? errno : 0);
            return 0;
        }"#,
    );
    let exe = std::env::current_exe().unwrap();
    let before = fs::metadata(&exe).unwrap();
    // Its loader is not in the root, so depending on how it was linked it is not found or it ends at once.
    match try_run(&root, support::process(&["/bin/self"]), &isolation()) {
        Ok(output) => assert_ne!(output.exit, Exit::Code(0)),
        Err(error) => assert!(error.exit_code() >= 126, "{error}"),
    }
    let (stdio, reader) = support::stdio(None);
    let container = Container::create(root.mount(), &shell("true"), &isolation(), stdio).unwrap();
    let path = format!("/proc/{}/exe", container.pid());
    let writable = fs::OpenOptions::new().write(true).open(path);
    let errno = writable.unwrap_err().raw_os_error();
    assert!(
        errno == Some(libc::EROFS) || errno == Some(libc::ETXTBSY),
        "{errno:?}"
    );
    let flags = rustix::fs::statvfs(format!("/proc/{}/exe", container.pid()))
        .unwrap()
        .f_flag;
    assert!(flags.contains(rustix::fs::StatVfsMountFlags::RDONLY));
    drop(container);
    reader.finish();
    let after = fs::metadata(&exe).unwrap();
    assert_eq!(
        (before.len(), before.mtime_nsec()),
        (after.len(), after.mtime_nsec())
    );
}

fn two_phases() {
    let root = Root::make();
    let (stdio, reader) = support::stdio(None);
    let mut container = Container::create(root.mount(), &shell("echo ran"), &isolation(), stdio).unwrap();
    // The process exists, with the root in place, and has not become the program.
    let pid = container.pid();
    let inside = format!("/proc/{pid}/root/etc/passwd");
    assert!(fs::read_to_string(inside).unwrap().contains("web"));
    assert!(
        fs::read_to_string(format!("/proc/{pid}/cmdline"))
            .unwrap()
            .contains("peel-container-init")
    );
    assert_eq!(container.wait_for(Duration::from_millis(50)).unwrap(), None);
    container.start().unwrap();
    assert!(matches!(container.start(), Err(Error::Started)));
    assert_eq!(container.wait().unwrap(), Exit::Code(0));
    assert_eq!(container.wait().unwrap(), Exit::Code(0));
    container.signal(libc::SIGTERM).unwrap();
    container.kill().unwrap();
    assert_eq!(reader.finish().0, "ran\n");
}

fn signals_reach_the_program() {
    let root = Root::make();
    let script = "trap 'exit 42' TERM; trap 'echo usr' USR1; echo ready; while :; do sleep 0.05; done";
    let (stdio, reader) = support::stdio(None);
    let mut container = Container::create(root.mount(), &shell(script), &isolation(), stdio).unwrap();
    container.start().unwrap();
    reader.wait_for("ready\n");
    container.signal(libc::SIGUSR1).unwrap();
    reader.wait_for("usr\n");
    let signaller = container.signaller();
    let waiter = std::thread::spawn(move || container.wait().unwrap());
    signaller.signal(libc::SIGTERM).unwrap();
    assert_eq!(waiter.join().unwrap(), Exit::Code(42));
    let (stdio, _reader) = support::stdio(None);
    let mut container =
        Container::create(root.mount(), &shell("sleep 1000; true"), &isolation(), stdio).unwrap();
    container.start().unwrap();
    container.kill().unwrap();
    assert_eq!(container.wait().unwrap(), Exit::Signal(libc::SIGKILL));
}

fn many_threads_at_once() {
    let root = Root::make();
    std::thread::scope(|scope| {
        for number in 0..8 {
            let root = &root;
            scope.spawn(move || {
                for _ in 0..3 {
                    let output = run(root, shell(&format!("echo {number}; exit {number}")));
                    assert_eq!(output.exit, Exit::Code(number));
                    assert_eq!(output.stdout, format!("{number}\n"));
                }
            });
        }
    });
}

fn killed_supervisor() {
    let root = Root::make();
    let (stdio, reader) = support::stdio(None);
    // It changes its user, which would clear a parent-death signal.
    let mut process = shell("sleep 1001 & echo ready; sleep 1001");
    process.user = "web".to_owned();
    let mut container = Container::create(root.mount(), &process, &isolation(), stdio).unwrap();
    container.start().unwrap();
    reader.wait_for("ready\n");
    let supervisor = support::parent_of(container.pid());
    assert_eq!(support::parent_of(supervisor), std::process::id());
    support::kill(supervisor);
    assert_eq!(container.wait().unwrap(), Exit::Signal(libc::SIGKILL));
    assert_eq!(processes("sleep\x001001"), Vec::<u32>::new());
}

/// Starts a container and waits for it; killed meanwhile.
fn victim(root: &str) {
    let mount = support::detached(Path::new(root));
    let stdio = Stdio {
        stdin: None,
        stdout: std::io::stdout().as_fd().try_clone_to_owned().unwrap(),
        stderr: std::io::stderr().as_fd().try_clone_to_owned().unwrap(),
    };
    let mut process = shell("sleep 1002 & echo ready; sleep 1002");
    process.user = "web".to_owned();
    // Made on a thread that ends: nothing may depend on that thread's life.
    let mut container = std::thread::spawn(move || {
        let mut container = Container::create(mount, &process, &isolation(), stdio).unwrap();
        container.start().unwrap();
        container
    })
    .join()
    .unwrap();
    container.wait().unwrap();
}

fn killed_parent() {
    let root = Root::make();
    let groups = support::cgroups();
    let mut parent = Command::new(std::env::current_exe().unwrap())
        .arg(VICTIM)
        .arg(root.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    parent.stdout.take().unwrap().read_exact(&mut ready).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(
        processes("sleep\x001002").len(),
        2,
        "it outlives the thread that made it"
    );
    parent.kill().unwrap();
    parent.wait().unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !processes("sleep\x001002").is_empty()
        || !processes("peel-container-init").is_empty()
        || support::cgroups() != groups
    {
        assert!(Instant::now() < deadline, "something is left after kill -9");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn nothing_is_left() {
    let root = Root::make();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").unwrap();
    let fds = || fs::read_dir("/proc/self/fd").unwrap().count();
    let state = || {
        (
            mounts(),
            fds(),
            support::cgroups(),
            processes("peel-container-init"),
        )
    };
    let before = state();
    for number in 0..5 {
        run(&root, shell("sleep 1000 & true"));
        let (stdio, reader) = support::stdio(None);
        let mut container =
            Container::create(root.mount(), &shell("sleep 1000"), &isolation(), stdio).unwrap();
        // Dropped before and after its start, and failed in the middle.
        if number % 2 == 0 {
            container.start().unwrap();
        }
        drop(container);
        reader.finish();
        let mut process = shell("true");
        process.user = "nobodyhere".to_owned();
        try_run(&root, process, &isolation()).unwrap_err();
    }
    // What the kernel takes apart by itself may need a moment on a busy machine.
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut after = state();
    while after != before && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
        after = state();
    }
    assert_eq!(before, after);
    // No zombies either.
    let children = fs::read_to_string(format!("/proc/self/task/{}/children", std::process::id()));
    assert_eq!(children.unwrap_or_default(), "");
}
