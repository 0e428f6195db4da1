//! What the benchmarks share. Each of them measures one hot path beside a baseline in the same run, since only their ratio
//! means something on another machine:
//!
//! | benchmark | what | baseline |
//! |---|---|---|
//! | `warm` | reading, stat and readdir of an image whose objects are complete | plain overlayfs over the same files |
//! | `first_touch` | reading a file whose only chunk is missing | `curl` of the same range |
//! | `mount` | name to mounted root file system | `tar tf` of the same layer |
//! | `convert` | tar stream to eStargz; to zstd:chunked | `pigz -6`; `zstd -3 -T2` of the same stream |
//! | `hash` | sha256 of two messages at once; the rolling checksum | `sha2` one after the other; one sha256 |
//! | `toc` | TOC of 100,000 entries to the tree, each dialect | `tar tf` of the same layer |
//!
//! * [`files`]: trees of files that are the same in every run, as tar stream and as directory. * [`usr`]: real files.
//! * [`image`]: such a tree as an image in an embedded registry.
//! * [`host`]: a store, its service, and detached mounts; nothing appears in the mount table or outlives the process.
//! * [`pair`]: both sides measured, and their ratio. * [`usage`]: processor time and memory of each.
//!
//! `cargo bench -p peel-bench` runs all of them, as root. Without `--bench` (`cargo test -p peel-bench --benches`) each
//! runs once on a small tree.

pub mod files;
pub mod host;
pub mod image;
pub mod pair;
pub mod usage;
pub mod usr;

use std::path::Path;

use anyhow::{Context, bail};
use tempfile::TempDir;

/// Whether this is a measurement (`cargo bench`) or only a try (`cargo test`).
pub fn measuring() -> bool {
    let mut given = std::env::args();
    given.any(|argument| argument == "--bench") && !std::env::args().any(|argument| argument == "--test")
}

/// A directory on the disk that holds cargo's target directory, removed at the end. Fails unless root asks: everything
/// here mounts or is compared with something that does.
pub fn scratch(target: &Path) -> anyhow::Result<TempDir> {
    if !rustix::process::geteuid().is_root() {
        bail!("the benchmarks mount file systems: run them as root");
    }
    std::fs::create_dir_all(target).with_context(|| target.display().to_string())?;
    tempfile::Builder::new()
        .prefix("bench-")
        .tempdir_in(target)
        .with_context(|| format!("{}: cannot make a temporary directory", target.display()))
}
