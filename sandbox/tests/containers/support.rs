//! A root to run and the ways to run it, for the tests of containers.

use std::ffi::OsString;
use std::fs;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use peel_sandbox::{Container, Error, Exit, Isolation, Network, Process, Stdio};
use rustix::mount::{OpenTreeFlags, open_tree};

/// Where Debian's busybox-static puts its program.
const BUSYBOX: &str = "/bin/busybox";
const APPLETS: [&str; 34] = [
    "cat", "echo", "env", "false", "grep", "head", "hostname", "id", "ifconfig", "kill", "ls", "mknod",
    "mount", "ping", "ps", "pwd", "readlink", "sed", "seq", "sh", "sleep", "stty", "test", "touch", "true",
    "tty", "umount", "unshare", "wc", "dd", "rm", "cp", "mkdir", "chmod",
];
/// Longest wait for anything that a test waits for.
const DEADLINE: Duration = Duration::from_secs(20);

/// A root directory with busybox and a few users.
pub(crate) struct Root(tempfile::TempDir);

impl Root {
    pub(crate) fn make() -> Self {
        assert!(
            Path::new(BUSYBOX).exists(),
            "these tests need {BUSYBOX}: apt-get install busybox-static"
        );
        let root = Self(tempfile::tempdir().unwrap());
        for name in ["bin", "dev", "etc", "proc", "sys", "tmp", "srv"] {
            fs::create_dir(root.path().join(name)).unwrap();
        }
        fs::copy(BUSYBOX, root.path().join("bin/busybox")).unwrap();
        for applet in APPLETS {
            symlink("busybox", root.path().join("bin").join(applet)).unwrap();
        }
        let passwd = "root:x:0:0:root:/root:/bin/sh\nweb:x:33:34:web:/srv:/bin/sh\n";
        fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        let group = "root:x:0:\nwheel:x:10:root\nweb:x:34:\na:x:44:web\nb:x:55:x,web\nstaff:x:50:\n";
        fs::write(root.path().join("etc/group"), group).unwrap();
        // The temporary directory is for its owner only; users of the container must get in.
        fs::set_permissions(root.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        root
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// A detached mount of it, as an image mount is handed over.
    pub(crate) fn mount(&self) -> OwnedFd {
        detached(self.path())
    }

    /// The same, read-only: an overlay without an upper directory, which needs a second, empty lower one.
    pub(crate) fn read_only_mount(&self, empty: &Path) -> OwnedFd {
        let lower = self.path();
        let context = rustix::mount::fsopen("overlay", rustix::mount::FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        let dirs = format!("{}:{}", lower.display(), empty.display());
        rustix::mount::fsconfig_set_string(context.as_fd(), "lowerdir", dirs).unwrap();
        rustix::mount::fsconfig_create(context.as_fd()).unwrap();
        rustix::mount::fsmount(
            context.as_fd(),
            rustix::mount::FsMountFlags::FSMOUNT_CLOEXEC,
            rustix::mount::MountAttrFlags::empty(),
        )
        .unwrap()
    }

    /// Compiles a static program into the root's /bin.
    pub(crate) fn build(&self, name: &str, source: &str) {
        let file = self.path().join(format!("{name}.c"));
        fs::write(&file, source).unwrap();
        let status = Command::new("cc")
            .arg("-static")
            .arg("-o")
            .arg(self.path().join("bin").join(name))
            .arg(&file)
            .status()
            .expect("these tests need a C compiler: apt-get install gcc libc6-dev");
        assert!(status.success());
    }
}

pub(crate) fn detached(path: &Path) -> OwnedFd {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(rustix::fs::CWD, path, flags).expect("these tests need root")
}

/// What a container left.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) exit: Exit,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

pub(crate) fn isolation() -> Isolation {
    Isolation {
        network: Network::Host,
        hostname: "box".to_owned(),
        binds: Vec::new(),
        read_only: false,
    }
}

pub(crate) fn process(args: &[&str]) -> Process {
    Process {
        args: args.iter().map(OsString::from).collect(),
        env: vec!["PATH=/bin".into()],
        cwd: PathBuf::from("/"),
        user: String::new(),
        terminal: false,
        stop_signal: None,
    }
}

pub(crate) fn shell(script: &str) -> Process {
    process(&["sh", "-c", script])
}

/// Standard output and error as text, as they come.
pub(crate) struct Reader {
    stdout: JoinHandle<String>,
    stderr: JoinHandle<String>,
    seen: Receiver<String>,
}

impl Reader {
    pub(crate) fn finish(self) -> (String, String) {
        (self.stdout.join().unwrap(), self.stderr.join().unwrap())
    }

    /// Waits until the text on standard output ends with this.
    pub(crate) fn wait_for(&self, end: &str) {
        loop {
            let seen = self.seen.recv_timeout(DEADLINE).expect("the expected output");
            if seen.ends_with(end) {
                return;
            }
        }
    }
}

pub(crate) fn stdio(stdin: Option<OwnedFd>) -> (Stdio, Reader) {
    let pipe = || rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let ((out, stdout), (err, stderr)) = (pipe(), pipe());
    let (sender, seen) = channel();
    let stdout_reader = std::thread::spawn(move || {
        let mut file = fs::File::from(out);
        let mut text = String::new();
        let mut buffer = [0; 4096];
        loop {
            let count = file.read(&mut buffer).unwrap();
            if count == 0 {
                return text;
            }
            text.push_str(&String::from_utf8_lossy(&buffer[..count]));
            let _gone = sender.send(text.clone());
        }
    });
    let stderr_reader = std::thread::spawn(move || {
        let mut text = String::new();
        fs::File::from(err).read_to_string(&mut text).unwrap();
        text
    });
    let reader = Reader {
        stdout: stdout_reader,
        stderr: stderr_reader,
        seen,
    };
    (
        Stdio {
            stdin,
            stdout,
            stderr,
        },
        reader,
    )
}

pub(crate) fn run(root: &Root, process: Process) -> Output {
    try_run(root, process, &isolation()).unwrap()
}

pub(crate) fn try_run(root: &Root, process: Process, isolation: &Isolation) -> Result<Output, Error> {
    let (stdio, reader) = stdio(None);
    let mut container = Container::create(root.mount(), &process, isolation, stdio)?;
    container.start()?;
    let exit = container.wait()?;
    let (stdout, stderr) = reader.finish();
    Ok(Output { exit, stdout, stderr })
}

/// Pids of the host's processes whose command line starts with this.
pub(crate) fn processes(command: &str) -> Vec<u32> {
    fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse().ok()?;
            let line = fs::read(entry.path().join("cmdline")).ok()?;
            line.starts_with(command.as_bytes()).then_some(pid)
        })
        .collect()
}

/// Parent of a process.
pub(crate) fn parent_of(pid: u32) -> u32 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("PPid:"))
        .unwrap();
    line.trim().parse().unwrap()
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Cgroups of containers that exist, as far as they are where these tests can see them.
pub(crate) fn cgroups() -> Vec<PathBuf> {
    ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"]
        .iter()
        .filter_map(|place| fs::read_dir(place).ok())
        .flatten()
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with("peel-"))
        .map(|entry| entry.path())
        .collect()
}
