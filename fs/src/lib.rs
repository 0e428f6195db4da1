//! How files are served: object file system, fetch engine, image mounts, prefetch.
//!
//! The kernel serves everything that is here; this crate serves only the bytes that have not arrived yet.
//!
//! * [`Service`]: one per store. Loads images and mounts them.
//! * `load`: name to tree: manifest, configuration and TOCs, or whole layers where there is no other way.
//! * `fetch`: brings chunks, each once, verified, in lanes; `object`: what is here of which object.
//! * `object_fs`: the FUSE file system that is the last data layer of every overlay.
//! * [`mount`]: detached EROFS, FUSE and overlay mounts, and probing for them.
//! * `native`: gives completed files back to the kernel.
//!
//! Called by the server process of the command. Threads: `peel-fuse` and its workers answer the kernel and never wait
//! for the network; `peel-net` moves bytes; `peel-decode-N` inflates, verifies and writes; `peel-complete` hashes large files and `peel-whole-N` those
//! that reads wait for; `peel-native` reconfigures overlays; `peel-load`, `peel-register` and `peel-pull-N` live as long as their work.

mod error;
mod fetch;
mod load;
pub mod mount;
mod native;
mod object;
mod object_fs;
mod quiet;
mod service;
mod settle;
mod verify;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use peel_image::Digest;
use peel_registry::{ClientOptions, ImageName};

pub use error::Error;
pub use service::{Image, MountedImage, Service};
pub use verify::{LayerCheck, image_faults, layer_check};

/// How the service behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a read waits for its bytes before it fails with EIO. Default 60 s.
    pub read_deadline: Duration,
    /// Bytes of memory that the indexes of one image's layers may take. Default [`INDEXES_MAX`].
    pub indexes_max: u64,
    /// Bytes of memory that the metadata of all images may take which are being loaded. Default [`LOADS_MAX`].
    pub loads_max: u64,
}

/// Bytes of memory that the indexes of one image's layers may take: they are all here at once while the image is loaded, and an
/// image may have 1000 layers with a TOC of 150 MiB each. Some 3 million files; the largest images have a third of that.
pub const INDEXES_MAX: u64 = 1 << 30;

/// Bytes of memory that the tables of contents and indexes of all images may take together which are being loaded; one image may exceed
/// it. Room for twenty of the largest real images at once, or for two that ask for all that one may have.
pub const LOADS_MAX: u64 = 2 << 30;

impl Default for Options {
    fn default() -> Self {
        Self {
            read_deadline: Duration::from_secs(60),
            indexes_max: INDEXES_MAX,
            loads_max: LOADS_MAX,
        }
    }
}

/// When an image's name is looked up in its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PullPolicy {
    /// Always.
    Always,
    /// Only when the store does not know the name (the default, as `docker run` does). Local layouts and archives cost
    /// nothing to look at, so they always are.
    Missing,
    /// Never: an unknown name is an error.
    Never,
}

/// What to load and how. Loads whose requests are equal share their work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LoadRequest {
    /// The image.
    pub name: ImageName,
    /// `os/architecture[/variant]`; `None` is this machine.
    pub platform: Option<String>,
    /// When to ask the registry.
    pub pull: PullPolicy,
    /// How to reach it.
    pub client: ClientOptions,
    /// Fetch the prioritized files in the background as soon as the image is known.
    pub prefetch: bool,
    /// Download and check every layer whole before the image counts as loaded.
    pub eager: bool,
    /// Whether the check of a lazy layer, once all of its files are here, may download its blob for that. Layers that
    /// bring their tar-split, and those of local layouts and archives, are checked in any case.
    pub check_by_download: bool,
}

/// What happens while an image is loaded, for people who watch.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Progress {
    /// The manifest is known.
    Resolved {
        /// Digest of the platform's manifest.
        manifest: Digest,
        /// Number of layers.
        layers: usize,
        /// Compressed bytes of all layers.
        bytes: u64,
    },
    /// A layer that cannot be served lazily is pulled whole.
    Pulling {
        /// Its position, lowest first.
        layer: usize,
        /// Why it is not lazy, one sentence.
        reason: String,
        /// Bytes here.
        done: u64,
        /// Bytes in all.
        total: u64,
    },
    /// All metadata is here and the tree is built.
    Indexed,
}

/// How one layer of a loaded image is served.
#[derive(Debug, Clone, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct LayerReport {
    /// Blob digest.
    pub digest: Digest,
    /// Compressed size in bytes.
    pub size: u64,
    /// `None` when it is served lazily, else the reason in one sentence.
    pub not_lazy: Option<String>,
}

/// What was fetched since the service began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    /// Requests to registries, failed ones too.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
}

/// Locks. A thread that panicked with the lock held left nothing half-done: every critical section is a few assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
