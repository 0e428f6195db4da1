//! A store and directories of a test's own, the built program, and a clean end.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use peel_testkit::registry::Registry;
pub use peel_testkit::vectors::{TAGS, expected_listing, image as vector, listing};
use rustix::process::{Pid, Signal};

/// How long any command may take before it counts as hanging. Debug builds on a busy machine are slow.
pub const DEADLINE: Duration = Duration::from_secs(240);

/// Compares a tree with the vectors' listing, line by line so that the first difference shows.
pub fn assert_expected(dir: &Path, what: &str) {
    assert_listing(&listing(dir), what);
}

/// The same for a tree that a tool made which takes eStargz for ordinary tar: the format's own entries are files there.
pub fn assert_expected_beside_own(dir: &Path, what: &str) {
    let own = |line: &&str| {
        [".prefetch.landmark", ".no.prefetch.landmark", "stargz.index.json"]
            .iter()
            .any(|name| line.contains(&format!("\"path\": \"{name}\"")))
    };
    let all = listing(dir);
    let lines: Vec<&str> = all.lines().filter(|line| !own(line)).collect();
    assert_listing(&lines.join("\n"), what);
}

fn assert_listing(got: &str, what: &str) {
    let expected = expected_listing();
    for (line, wanted) in got.lines().zip(expected.lines()) {
        assert_eq!(line, wanted, "{what}");
    }
    assert_eq!(
        got.lines().count(),
        expected.lines().count(),
        "{what}: number of entries"
    );
}

/// The program under test.
pub fn program() -> PathBuf {
    // The test is in `target/PROFILE/deps`, the program in `target/PROFILE`.
    let this = std::env::current_exe().unwrap();
    let program = this.parent().and_then(Path::parent).unwrap().join("peel");
    assert!(
        program.exists(),
        "{} is not there: build it with `cargo build -p peel` in the same profile",
        program.display()
    );
    program
}

/// Standard error as text.
pub fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Standard output as text.
pub fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until something holds.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Everything that one test uses; unmounted, ended and removed at its end.
#[derive(Debug)]
pub struct World {
    root: tempfile::TempDir,
    store: PathBuf,
    env: Vec<(String, String)>,
}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// An empty store in a directory of its own.
    pub fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount file systems: run them as root"
        );
        let root = tempfile::Builder::new()
            .prefix("peel-test-")
            .tempdir_in("/var/tmp")
            .unwrap();
        // The machine's own credentials are no part of a test.
        fs::write(root.path().join("auth.json"), "{}").unwrap();
        Self {
            store: root.path().join("store"),
            root,
            env: Vec::new(),
        }
    }

    /// The same with the store below a directory of this name.
    #[must_use]
    pub fn with_store_below(mut self, name: &str) -> Self {
        self.store = self.dir(name).join("store");
        self
    }

    /// The same with a shorter wait for bytes that do not come, in seconds.
    #[must_use]
    pub fn with_read_deadline(mut self, seconds: u32) -> Self {
        self.env.push(("PEEL_READ_DEADLINE".into(), seconds.to_string()));
        self
    }

    /// A path in the world's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A new directory in the world's directory.
    pub fn dir(&self, name: &str) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        dir
    }

    /// The store.
    pub fn store(&self) -> &Path {
        &self.store
    }

    /// An embedded registry with its content in this world.
    pub fn registry(&self) -> Registry {
        Registry::start(&self.dir("registry")).unwrap()
    }

    /// The program with arguments.
    pub fn command<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=5", &DEADLINE.as_secs().to_string()])
            .arg(program())
            .args(arguments)
            .env("PEEL_STORE", &self.store)
            .env("TMPDIR", self.root.path())
            .env("REGISTRY_AUTH_FILE", self.path("auth.json"))
            .envs(self.env.iter().cloned())
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub fn run<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs it, expects success and returns what it printed.
    pub fn ok<S: AsRef<std::ffi::OsStr> + std::fmt::Debug>(&self, arguments: &[S]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "peel {arguments:?}: {}\n{}\n{}",
            output.status,
            errors(&output),
            self.log()
        );
        text(&output)
    }

    /// Runs it with `--json`, expects success and returns what it printed.
    pub fn json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ok(&[&["--json"], arguments].concat())).unwrap()
    }

    /// Converts an image, with the flags that choose the format of its layers.
    pub fn convert(&self, flags: &[&str], source: &str, target: &str) {
        let arguments: Vec<&str> = [&["convert"], flags, &[source, target]].concat();
        self.ok(&arguments);
    }

    /// Starts it with pipes to and from it.
    pub fn start<S: AsRef<std::ffi::OsStr>>(&self, arguments: &[S]) -> Running {
        let mut child = Command::new(program())
            .args(arguments)
            .env("PEEL_STORE", &self.store)
            .env("TMPDIR", self.root.path())
            .envs(self.env.iter().cloned())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let stdin = child.stdin.take();
        Running { child, stdin, stdout }
    }

    /// Mounts an image on a new directory.
    pub fn mount(&self, image: &str, name: &str) -> PathBuf {
        let dir = self.dir(name);
        self.ok(&["mount", image, dir.to_str().unwrap()]);
        dir
    }

    /// Unmounts it.
    pub fn umount(&self, dir: &Path) {
        self.ok(&["umount", dir.to_str().unwrap()]);
    }

    /// What the store's server has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.store.join("run/daemon.log")).unwrap_or_default()
    }

    /// The server has neither panicked nor gone away in silence.
    pub fn assert_sound(&self) {
        let log = self.log();
        assert!(!log.contains("panicked"), "the server panicked:\n{log}");
    }

    /// Process id of the store's server, if there is one.
    pub fn server(&self) -> Option<Pid> {
        let client = peel::client::Client::connect_if_running(&self.store).ok()??;
        Pid::from_raw(i32::try_from(client.server_pid()).ok()?)
    }

    /// Ends the store's server with a signal and waits until it is gone.
    pub fn end_server(&self, signal: Signal) {
        if let Some(pid) = self.server() {
            end_process(pid, signal);
        }
    }

    /// Mounts below the world's directory.
    pub fn mounts(&self) -> Vec<PathBuf> {
        let root = self.root.path();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dirs = mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .map(PathBuf::from);
        dirs.filter(|dir| dir.starts_with(root)).collect()
    }

    /// Size and number of files below `objects` that hold data.
    pub fn objects(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut pending = vec![self.store.join("objects")];
        while let Some(dir) = pending.pop() {
            for entry in fs::read_dir(dir).into_iter().flatten() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() {
                    pending.push(entry.path());
                } else {
                    found.push(entry.path());
                }
            }
        }
        found
    }

    /// Flags of `run` that put the host's programs into a container whose image has none.
    pub fn host_programs(&self) -> Vec<String> {
        let mut flags = ["-e", "PATH=/usr/bin", "-v", "/usr:/usr:ro"]
            .map(str::to_owned)
            .to_vec();
        for dir in ["/bin", "/lib", "/lib64"] {
            if Path::new(dir).exists() {
                flags.extend(["-v".to_owned(), format!("{dir}:{dir}:ro")]);
            }
        }
        flags
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A test that failed in the middle must not leave mounts: the directory could not be removed.
        for dir in self.mounts() {
            let _ = rustix::mount::unmount(&dir, rustix::mount::UnmountFlags::DETACH);
        }
        if let Some(pid) = self.server() {
            let _ = rustix::process::kill_process(pid, Signal::TERM);
            let deadline = Instant::now() + Duration::from_secs(20);
            while rustix::process::test_kill_process(pid).is_ok() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        if std::thread::panicking() {
            let log = self.log();
            let last: Vec<&str> = log.lines().rev().take(40).collect();
            for line in last.iter().rev() {
                println!("server: {line}");
            }
        }
    }
}

/// The program while it runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    /// Its standard input; taking it closes it.
    pub stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    /// The next line that it prints, empty at the end.
    pub fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Sends a line to its standard input.
    pub fn say(&mut self, line: &str) {
        use std::io::Write;
        let stdin = self.stdin.as_mut().expect("standard input is closed");
        writeln!(stdin, "{line}").unwrap();
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> ExitStatus {
        self.stdin = None;
        let mut status = None;
        eventually("a command to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap_or_else(|| ExitStatus::from_raw(-1))
    }

    /// Waits for its end as well; returns also the most memory that was resident, in bytes, but for what it took in its last
    /// 20 ms.
    pub fn wait_and_weigh(&mut self) -> (ExitStatus, u64) {
        let path = format!("/proc/{}/status", self.child.id());
        let (mut status, mut peak) = (None, 0);
        eventually("a command to end", || {
            // A process that has ended has no memory to speak of.
            let lines = fs::read_to_string(&path).unwrap_or_default();
            let mark = lines.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let kib = mark.and_then(|mark| mark.trim().trim_end_matches(" kB").parse::<u64>().ok());
            peak = peak.max(kib.unwrap_or(0) << 10);
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        (status.unwrap_or_else(|| ExitStatus::from_raw(-1)), peak)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends a process with a signal and waits until it is gone.
pub fn end_process(pid: Pid, signal: Signal) {
    let fd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
    rustix::process::pidfd_send_signal(&fd, signal).unwrap();
    let limit = rustix::event::Timespec {
        tv_sec: 60,
        tv_nsec: 0,
    };
    let mut ended = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
    assert_eq!(
        rustix::event::poll(&mut ended, Some(&limit)).unwrap(),
        1,
        "the server does not end"
    );
}

/// Reads a file whole; the error number when that fails.
pub fn read(path: &Path) -> Result<Vec<u8>, i32> {
    fs::read(path).map_err(|error| error.raw_os_error().unwrap_or_default())
}
