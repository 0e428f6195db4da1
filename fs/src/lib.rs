//! How files are served (skeleton of the contract).
#![allow(clippy::todo, missing_debug_implementations)]

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use peel_image::Digest;
use peel_registry::{ClientOptions, ImageName};
use peel_store::Store;

/// Why an image could not be loaded or mounted.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Replaced by the real variants.
    #[error("placeholder")]
    Placeholder,
}

/// How the service behaves.
#[derive(Debug, Clone)]
pub struct Options {
    /// How long a read waits for its bytes before it fails with EIO. Default 60 s.
    pub read_deadline: Duration,
}

/// When an image's name is looked up in its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum PullPolicy {
    /// Always.
    Always,
    /// Only when the store does not know the name (the default, as `docker run` does).
    Missing,
    /// Never: an unknown name is an error.
    Never,
}

/// What to load and how.
#[derive(Debug, Clone)]
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

/// An image whose tree is known. Dropping the last handle ends its prefetch and forgets its sources.
#[derive(Debug)]
pub struct Image;

/// What was fetched since the service began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Stats {
    /// Requests to registries, failed ones too.
    pub requests: u64,
    /// Body bytes received.
    pub bytes: u64,
}

/// The one per store: object file system, fetcher, loaded images. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Service;

/// A mounted root file system. While it lives, files that complete go back to the kernel for its later opens.
#[derive(Debug)]
pub struct MountedImage;

impl Service {
    /// Locks the store, mounts the object file system (detached: it appears nowhere), starts the threads.
    pub fn start(_store: Store, _options: Options) -> Result<Self, Error> {
        todo!()
    }

    /// Finds the image, fetches its metadata, builds its tree. Blocks; call it from a thread of your own.
    pub fn load(
        &self,
        _request: &LoadRequest,
        _progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Arc<Image>, Error> {
        todo!()
    }

    /// Mounts the image's root file system, detached. `scratch` is an empty directory for the writable layer (made
    /// by the caller, on the store's file system); `None` mounts read-only.
    pub fn mount(&self, _image: &Arc<Image>, _scratch: Option<&Path>) -> Result<MountedImage, Error> {
        todo!()
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        todo!()
    }

    /// Ends the threads and unmounts. Reads that wait get EIO.
    pub fn stop(self) {
        todo!()
    }
}

impl Image {
    /// Digest of the platform's manifest.
    pub fn manifest_digest(&self) -> Digest {
        todo!()
    }

    /// The manifest, byte for byte.
    pub fn manifest(&self) -> &[u8] {
        todo!()
    }

    /// The configuration, byte for byte.
    pub fn config(&self) -> &[u8] {
        todo!()
    }

    /// The layers, lowest first.
    pub fn layers(&self) -> &[LayerReport] {
        todo!()
    }
}

impl MountedImage {
    /// The detached overlay mount; `move_mount` it to where it should appear, in any mount namespace. Once.
    pub fn mount_fd(&self) -> BorrowedFd<'_> {
        todo!()
    }

    /// A duplicate of the mount descriptor to send to another process.
    pub fn try_clone_fd(&self) -> std::io::Result<OwnedFd> {
        todo!()
    }
}
