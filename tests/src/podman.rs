//! Podman with storage of its own, on the host's files or in the tree of Debian 13.

use std::fs;
use std::path::{Path, PathBuf};

use crate::namespace::Namespace;
use crate::world::{errors, text};

/// One Podman's storage and configuration; nothing of it runs between commands.
#[derive(Debug)]
pub struct Podman<'a> {
    namespace: &'a Namespace,
    dir: PathBuf,
}

/// What a pull says of one layer that it took in part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Partial {
    /// Bytes of files that were in no local layer.
    pub missing: u64,
    /// Bytes of all files of the layer.
    pub total: u64,
}

/// What a pull did, by its debug log.
#[derive(Debug)]
pub struct Pull {
    /// Layers that were applied from their table of contents instead of their whole blob.
    pub partial_layers: usize,
    /// What was missing, for the layers that have file contents; in order of size.
    pub partial: Vec<Partial>,
    /// The log, for messages.
    pub log: String,
}

impl<'a> Podman<'a> {
    /// One with empty storage in `dir`, which takes every layer whole.
    pub fn whole(namespace: &'a Namespace, dir: &Path) -> Self {
        Self::new(namespace, dir, false)
    }

    /// One with empty storage in `dir`, which takes layers in part where it can.
    pub fn partial(namespace: &'a Namespace, dir: &Path) -> Self {
        Self::new(namespace, dir, true)
    }

    fn new(namespace: &'a Namespace, dir: &Path, partial: bool) -> Self {
        let root = dir.display();
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{root}/graph\"\nrunroot = \"{root}/run\"\n\
             [storage.options]\n\
             pull_options = {{enable_partial_images = \"{partial}\", use_hard_links = \"false\", ostree_repos = \"\"}}\n"
        );
        fs::create_dir_all(dir).unwrap();
        fs::write(dir.join("storage.conf"), storage).unwrap();
        fs::write(dir.join("auth.json"), "{}").unwrap();
        Self {
            namespace,
            dir: dir.to_owned(),
        }
    }

    fn run(&self, arguments: &[&str]) -> (String, String) {
        let mut command = self.namespace.command("podman");
        command
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"))
            .env("REGISTRY_AUTH_FILE", self.dir.join("auth.json"))
            .env("HOME", &self.dir)
            .env("TMPDIR", &self.dir)
            .args(["--cgroup-manager", "cgroupfs"])
            .args(arguments);
        let output = command.output().unwrap();
        let log = errors(&output);
        assert!(output.status.success(), "podman {arguments:?}:\n{log}");
        (text(&output), log)
    }

    /// Runs it, expects success and returns what it printed.
    pub fn ok(&self, arguments: &[&str]) -> String {
        self.run(arguments).0
    }

    /// Pulls an image from a registry without TLS.
    pub fn pull(&self, image: &str) -> Pull {
        let (_, log) = self.run(&["--log-level", "debug", "pull", "--tls-verify=false", image]);
        let mut partial: Vec<Partial> = log.lines().filter_map(missing).collect();
        partial.sort_unstable_by_key(|layer| layer.total);
        Pull {
            partial_layers: log.matches("Retrieved partial blob").count(),
            partial,
            log,
        }
    }

    /// Mounts an image and returns the path from outside the namespace.
    pub fn mount(&self, image: &str) -> PathBuf {
        let dir = self.ok(&["image", "mount", image]);
        self.namespace.path(Path::new(dir.trim()))
    }
}

/// Reads `Missing 5252090 bytes out of 5559868 (94.46 %)`.
fn missing(line: &str) -> Option<Partial> {
    let (missing, rest) = line.split_once("Missing ")?.1.split_once(" bytes out of ")?;
    Some(Partial {
        missing: missing.parse().ok()?,
        total: rest.split_once(' ')?.0.parse().ok()?,
    })
}
