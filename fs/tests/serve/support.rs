//! What the tests share: vectors, services on temporary stores, and mounts that are cleaned up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use peel_fs::{Image, LoadRequest, MountedImage, Options, PullPolicy, Service};
use peel_image::estargz;
use peel_image::layer::{ChunkSource, EntryKind, LayerIndex};
use peel_registry::ClientOptions;
use peel_store::Store;
use peel_testkit::vectors;
use rustix::mount::{MoveMountFlags, UnmountFlags};

/// A service on a store of its own.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) service: Service,
    pub(crate) store: PathBuf,
    scratch: tempfile::TempDir,
}

impl Host {
    pub(crate) fn new() -> Self {
        Self::with(Options::default())
    }

    pub(crate) fn with(options: Options) -> Self {
        let scratch = tempfile::tempdir().unwrap();
        let store = scratch.path().join("store");
        Self::in_directory(store, scratch, &options)
    }

    /// With a store in a directory of the test's own.
    pub(crate) fn at(store: PathBuf, options: &Options) -> Self {
        Self::in_directory(store, tempfile::tempdir().unwrap(), options)
    }

    fn in_directory(store: PathBuf, scratch: tempfile::TempDir, options: &Options) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "these tests mount file systems: run them as root"
        );
        // Shown with the output of a test that fails; another test may have been first.
        let _ = tracing_subscriber::fmt()
            .with_test_writer()
            .with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG)
            .try_init();
        Self {
            service: start(&store, options),
            store,
            scratch,
        }
    }

    /// Ends the service and starts another one on the same store.
    pub(crate) fn restart(self, options: Options) -> Self {
        let Self {
            service,
            store,
            scratch,
        } = self;
        service.stop();
        Self {
            service: start(&store, &options),
            store,
            scratch,
        }
    }

    pub(crate) fn request(&self, name: &str) -> LoadRequest {
        LoadRequest {
            name: name.parse().unwrap(),
            platform: None,
            pull: PullPolicy::Missing,
            client: ClientOptions {
                plain_http: true,
                attempt_timeout: Duration::from_secs(2),
                retry_for: Duration::from_millis(200),
                ..ClientOptions::default()
            },
            prefetch: false,
            eager: false,
            check_by_download: false,
        }
    }

    pub(crate) fn load(&self, name: &str) -> Arc<Image> {
        self.service.load(&self.request(name), &|_| {}).unwrap()
    }

    pub(crate) fn mount(&self, image: &Arc<Image>) -> Mount {
        let directory = tempfile::tempdir_in(self.scratch.path()).unwrap();
        let mounted = self.service.mount(image, None).unwrap();
        attach(mounted, directory)
    }

    pub(crate) fn mount_writable(&self, image: &Arc<Image>) -> Mount {
        let directory = tempfile::tempdir_in(self.scratch.path()).unwrap();
        let scratch = tempfile::tempdir_in(self.scratch.path()).unwrap().keep();
        let mounted = self.service.mount(image, Some(&scratch)).unwrap();
        attach(mounted, directory)
    }

    /// Loads and mounts.
    pub(crate) fn open(&self, name: &str) -> Mount {
        self.mount(&self.load(name))
    }

    pub(crate) fn object(&self, digest: &peel_image::Digest) -> PathBuf {
        self.store.join("objects").join(Store::object_name(digest))
    }
}

/// Threads that a service has left to end by themselves may hold the store's lock a little longer.
fn start(store: &Path, options: &Options) -> Service {
    let mut service = None;
    eventually("the store to be free", || {
        match Service::start(Store::open(store).unwrap(), options.clone()) {
            Err(peel_fs::Error::Store(peel_store::Error::Locked { .. })) => false,
            started => {
                service = Some(started.unwrap());
                true
            }
        }
    });
    service.unwrap()
}

fn attach(mounted: MountedImage, directory: tempfile::TempDir) -> Mount {
    rustix::mount::move_mount(
        mounted.mount_fd(),
        "",
        rustix::fs::CWD,
        directory.path(),
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .unwrap();
    Mount {
        mounted: Some(mounted),
        directory,
    }
}

/// A mount in the file system; goes away when dropped.
#[derive(Debug)]
pub(crate) struct Mount {
    mounted: Option<MountedImage>,
    directory: tempfile::TempDir,
}

impl Mount {
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        self.directory.path().join(inside)
    }

    /// Lets go of the service's side; the mount stays.
    pub(crate) fn forget(&mut self) {
        self.mounted = None;
    }

    /// What `listing.py` of the vectors says of it.
    pub(crate) fn listing(&self) -> Vec<String> {
        lines(&vectors::listing(self.directory.path()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        rustix::mount::unmount(self.directory.path(), UnmountFlags::DETACH).unwrap();
    }
}

/// The listing that every image of the vectors must have.
pub(crate) fn expected() -> Vec<String> {
    lines(&vectors::expected_listing())
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// A lazy layer of an image of the vectors: blob digest as hexadecimal digits, and index.
pub(crate) fn layer(tag: &str, position: usize) -> (String, LayerIndex) {
    let layer = &vectors::layers(tag)[position];
    let bytes = layer.blob();
    let location = estargz::locate(&bytes, bytes.len() as u64).unwrap();
    let from = usize::try_from(location.payload_end).unwrap();
    let length = usize::try_from(location.toc_size).unwrap();
    let toc = estargz::extract_toc(&bytes[from..from + length]).unwrap();
    (
        layer.digest.trim_start_matches("sha256:").to_owned(),
        estargz::read_index(&toc.json, location.payload_end).unwrap(),
    )
}

/// Where a file lies in a layer.
#[derive(Debug)]
pub(crate) struct Place {
    pub(crate) digest: peel_image::Digest,
    pub(crate) size: u64,
    /// Compressed ranges of its chunks.
    pub(crate) chunks: Vec<std::ops::Range<usize>>,
}

pub(crate) fn place(index: &LayerIndex, path: &str) -> Place {
    let entry = index
        .entries
        .iter()
        .find(|entry| entry.path.as_bytes() == path.as_bytes())
        .unwrap_or_else(|| panic!("{path} is not in the layer"));
    let EntryKind::Regular(content) = &entry.kind else {
        panic!("{path} is no regular file");
    };
    let chunks = content.chunks.iter().map(|chunk| match chunk.source {
        ChunkSource::Blob {
            offset,
            compressed_size,
            ..
        } => {
            let offset = usize::try_from(offset).unwrap();
            offset..offset + usize::try_from(compressed_size).unwrap()
        }
        ChunkSource::Zeros => panic!("{path} has a run of zeros"),
    });
    Place {
        digest: content.digest.unwrap(),
        size: content.size,
        chunks: chunks.collect(),
    }
}

/// Waits until something holds, at most some seconds.
pub(crate) fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    for _ in 0..500 {
        if holds() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    panic!("it never came true: {what}");
}
