//! Mount namespaces for other people's container programs, so that whatever they mount or write beside their directories
//! goes away with the value: with the host's own programs, or with a tree of Debian 13 programs (Podman 5, containerd
//! 1.7, ctr-remote) that `.ci/trixie.sh` makes and keeps in `/var/cache/peel/trixie`.
//!
//! The directory of a [`World`] has the same path inside and outside. `/run`, `/var/lib` and `/dev/shm` are empty, and
//! the tree cannot be written to.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use crate::world::{World, errors, text};

/// Sets the namespace up and keeps it until standard input ends, so also when the test is killed.
/// `$1` is the tree or empty, `$2` the directory of the world.
const SETUP: &str = r#"
tree=$1
if [ -n "$tree" ]; then
	exec 9<"${tree%/root}.lock"
	flock --shared 9
	# Podman and runc want their root to be a mount point.
	mount --bind "$tree" "$tree"
	mount -o remount,bind,ro "$tree"
	mount -t proc proc "$tree/proc"
	mount --rbind /sys "$tree/sys"
	mount --rbind /dev "$tree/dev"
	mount -t tmpfs tmpfs "$tree/tmp"
	mount -t tmpfs tmpfs "$tree/var/tmp"
	mkdir "$tree$2"
	mount --bind "$2" "$tree$2"
fi
for dir in /run /var/lib /dev/shm; do
	mount -t tmpfs tmpfs "$tree$dir"
done
echo ready
exec cat
"#;

/// A mount namespace that ends with this value.
#[derive(Debug)]
pub struct Namespace {
    /// Keeps it.
    anchor: Child,
    /// The root of its programs, unless it is the host's.
    tree: Option<PathBuf>,
}

impl Namespace {
    /// One with the host's programs.
    pub fn host(world: &World) -> Self {
        Self::new(world, None)
    }

    /// One with Debian 13's programs.
    pub fn trixie(world: &World) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.ci/trixie.sh");
        let output = Command::new(&script)
            .output()
            .unwrap_or_else(|error| panic!("cannot run {}: {error}", script.display()));
        assert!(
            output.status.success(),
            "{}: {}; test.sh installs what it needs",
            script.display(),
            errors(&output)
        );
        let tree = Path::new(text(&output).trim()).join("root");
        assert!(
            tree.join("usr/bin/podman").exists(),
            "no podman in {}",
            tree.display()
        );
        Self::new(world, Some(tree))
    }

    fn new(world: &World, tree: Option<PathBuf>) -> Self {
        let mut anchor = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-euc", SETUP, "sh"])
            .arg(tree.as_deref().unwrap_or_else(|| Path::new("")))
            .arg(world.path("").components().as_path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut output = BufReader::new(anchor.stdout.take().unwrap());
        output.read_line(&mut line).unwrap();
        let namespace = Self { anchor, tree };
        assert_eq!(line.trim(), "ready", "a mount namespace cannot be set up");
        namespace
    }

    /// A program in the namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--mount=/proc/{}/ns/mnt", self.anchor.id()));
        // The containers tools read more of the environment than their flags can overrule.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        if let Some(tree) = &self.tree {
            command.arg("chroot").arg(tree);
        }
        command.arg(program).stdin(Stdio::null());
        command
    }

    /// Runs a program to its end, expects success and returns its standard output.
    pub fn ok<S: AsRef<std::ffi::OsStr>>(&self, program: &str, arguments: &[S]) -> String {
        let mut command = self.command(program);
        let output = command.args(arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{command:?}: {}\n{}",
            text(&output),
            errors(&output)
        );
        text(&output)
    }

    /// The path from outside of what has this path inside.
    pub fn path(&self, inside: &Path) -> PathBuf {
        let mut path = PathBuf::from(format!("/proc/{}/root", self.anchor.id()));
        for part in self.tree.iter().map(PathBuf::as_path).chain([inside]) {
            path.push(part.strip_prefix("/").unwrap_or(part));
        }
        path
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // The anchor has no children; the namespace goes when the programs in it have gone too.
        let _ = self.anchor.kill();
        let _ = self.anchor.wait();
    }
}
