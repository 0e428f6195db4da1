//! A store and directories of a test's own, the built program, and checks that nothing is left behind.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails where it is"
)]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use peel_testkit::vectors;
use serde_json::Value;

/// How long anything may take before it counts as hanging.
const DEADLINE: Duration = Duration::from_secs(60);

/// Everything that one test uses; unmounted and removed at its end.
pub(crate) struct World {
    root: tempfile::TempDir,
    store: PathBuf,
}

/// A path of ours as an argument.
pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("paths of tests are UTF-8")
}

/// Waits until something holds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Sends a signal by name.
pub(crate) fn kill(pid: u32, signal: &str) {
    let status = Command::new("kill")
        .args(["-s", signal, &pid.to_string()])
        .status()
        .unwrap();
    assert!(status.success(), "kill {pid}");
}

impl World {
    pub(crate) fn new() -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount file systems: run them as root"
        );
        let root = tempfile::tempdir().unwrap();
        Self {
            store: root.path().join("store"),
            root,
        }
    }

    pub(crate) fn set_store(&mut self, store: &Path) {
        self.store = store.to_owned();
    }

    pub(crate) fn store(&self) -> &Path {
        &self.store
    }

    /// A path that nothing is at yet.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// A directory to mount on.
    pub(crate) fn dir(&self, name: &str) -> PathBuf {
        let dir = self.path(&format!("dir-{name}"));
        // Not create_dir_all: it would look into what is mounted there.
        if let Err(error) = std::fs::create_dir(&dir) {
            assert_eq!(
                error.kind(),
                std::io::ErrorKind::AlreadyExists,
                "{}",
                dir.display()
            );
        }
        dir
    }

    /// Name of an image of the vectors.
    pub(crate) fn vector(&self, tag: &str) -> String {
        vectors::image(tag)
    }

    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("timeout");
        command
            .args(["--foreground", "--kill-after=5", &DEADLINE.as_secs().to_string()])
            .arg(env!("CARGO_BIN_EXE_peel"))
            .args(arguments)
            .env("PEEL_STORE", &self.store)
            .env("TMPDIR", self.root.path())
            .stdin(Stdio::null());
        command
    }

    /// Runs the program to its end.
    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    /// Runs it, expects success and returns what it printed.
    pub(crate) fn ok(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        assert!(
            output.status.success(),
            "peel {arguments:?}: {}\n{}\n{}",
            output.status,
            String::from_utf8_lossy(&output.stderr),
            std::fs::read_to_string(self.store.join("run/daemon.log")).unwrap_or_default()
        );
        String::from_utf8(output.stdout).unwrap()
    }

    /// Starts it.
    pub(crate) fn start(&self, arguments: &[&str]) -> Running {
        let mut command = Command::new(env!("CARGO_BIN_EXE_peel"));
        let mut child = command
            .args(arguments)
            .env("PEEL_STORE", &self.store)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Running { child, stdout }
    }

    /// Flags of `run` that put the host's programs into the container: the vectors have none but one that prints a line.
    pub(crate) fn host_programs(&self) -> Vec<String> {
        let mut flags = ["-e", "PATH=/usr/bin", "-v", "/usr:/usr:ro"]
            .map(str::to_owned)
            .to_vec();
        for dir in ["/lib", "/lib64"] {
            if Path::new(dir).exists() {
                flags.extend(["-v".to_owned(), format!("{dir}:{dir}:ro")]);
            }
        }
        flags
    }

    /// Compares a mounted tree with what containerd unpacks.
    pub(crate) fn assert_listing(&self, dir: &Path, what: &str) {
        let listing = vectors::listing(dir);
        let expected = self.expected();
        for (line, wanted) in listing.lines().zip(expected.lines()) {
            assert_eq!(line, wanted, "{what}");
        }
        assert_eq!(listing.lines().count(), expected.lines().count(), "{what}");
    }

    fn expected(&self) -> String {
        vectors::expected_listing()
    }

    /// Number of entries of the vectors' tree.
    pub(crate) fn expected_entries(&self) -> usize {
        self.expected().lines().count()
    }

    /// sha256 of a file of the vectors' tree, hexadecimal.
    pub(crate) fn expected_digest(&self, path: &str) -> String {
        let expected = self.expected();
        let mut entries = expected
            .lines()
            .map(|line| serde_json::from_str::<Value>(line).unwrap());
        let entry = entries.find(|entry| entry["path"] == path).unwrap();
        entry["sha256"].as_str().unwrap().to_owned()
    }

    /// Process ids of this store's servers.
    pub(crate) fn servers(&self) -> Vec<u32> {
        self.processes()
            .into_iter()
            .filter(|(_, command)| command.split('\0').any(|word| word == "daemon"))
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Processes whose command line names this store; a zombie has none.
    fn processes(&self) -> Vec<(u32, String)> {
        let store = text(&self.store).to_owned();
        let entries = std::fs::read_dir("/proc").unwrap();
        entries
            .filter_map(|entry| {
                let pid = entry.ok()?.file_name().to_str()?.parse().ok()?;
                let command = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let command = String::from_utf8_lossy(&command).into_owned();
                command
                    .split('\0')
                    .any(|word| word == store)
                    .then_some((pid, command))
            })
            .collect()
    }

    /// Names of what is kept of mounts.
    pub(crate) fn scratch(&self) -> Vec<String> {
        std::fs::read_dir(self.store.join("mounts"))
            .into_iter()
            .flatten()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    fn mounts(&self) -> Vec<String> {
        let root = text(self.root.path()).to_owned();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts
            .lines()
            .filter(|line| line.split(' ').nth(4).is_some_and(|dir| dir.starts_with(&root)))
            .map(str::to_owned)
            .collect()
    }

    /// The server ends by itself, and then there is no process, no mount and no writable layer.
    pub(crate) fn assert_nothing_left(&self) {
        assert_eq!(self.mounts(), Vec::<String>::new());
        eventually("the server to end", || self.processes().is_empty());
        assert_eq!(self.scratch(), Vec::<String>::new());
        assert!(!self.store.join("run/peel.sock").exists() || self.servers().is_empty());
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A test that failed in the middle must not leave mounts: the directory could not be removed.
        for line in self.mounts() {
            if let Some(dir) = line.split(' ').nth(4) {
                let _ = rustix::mount::unmount(dir, rustix::mount::UnmountFlags::DETACH);
            }
        }
        for pid in self.servers() {
            kill(pid, "TERM");
        }
    }
}

/// The program while it runs.
pub(crate) struct Running {
    child: Child,
    stdout: BufReader<ChildStdout>,
}

impl Running {
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The next line that it prints.
    pub(crate) fn line(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    /// Waits for its end.
    pub(crate) fn wait(&mut self) -> ExitStatus {
        let mut status = None;
        eventually("a command to end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// What it printed on standard error; call it after its end.
    pub(crate) fn errors(&mut self) -> String {
        let mut text = String::new();
        if let Some(mut stderr) = self.child.stderr.take() {
            let _ = stderr.read_to_string(&mut text);
        }
        text
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
