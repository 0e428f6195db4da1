//! Stores, services and mounts. Every mount is detached and reached through its descriptor: nothing appears in the mount
//! table, and nothing is left when the process ends, however it ends.

use std::ffi::CString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use peel_fs::{Image, LoadRequest, MountedImage, Options, PullPolicy, Service};
use peel_registry::{ClientOptions, ImageName};
use peel_store::Store;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};

/// How long a store may still be in use. Reading the index of a large layer takes some hundred milliseconds.
const PATIENCE: Duration = Duration::from_secs(30);

/// A service on a store of its own, and one image.
#[derive(Debug)]
pub struct Host {
    service: Service,
    store: PathBuf,
}

impl Host {
    /// Starts one on the store in `dir`, made if it is not there. Waits for what an earlier service has left to do in the
    /// background: it holds the store until then.
    pub fn start(dir: &Path) -> anyhow::Result<Self> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Service::start(Store::open(dir)?, Options::default()) {
                Ok(service) => {
                    let store = dir.to_owned();
                    return Ok(Self { service, store });
                }
                Err(peel_fs::Error::Store(peel_store::Error::Locked { .. })) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Loads an image; `eager` pulls every layer whole, so that all objects are complete.
    pub fn load(&self, name: &ImageName, eager: bool) -> anyhow::Result<Arc<Image>> {
        let request = LoadRequest {
            name: name.clone(),
            platform: None,
            pull: PullPolicy::Missing,
            client: ClientOptions {
                plain_http: true,
                ..ClientOptions::default()
            },
            prefetch: false,
            eager,
            check_by_download: false,
        };
        Ok(self.service.load(&request, &|_| {})?)
    }

    /// Mounts it with a writable layer, as `peel run` does.
    pub fn mount(&self, image: &Arc<Image>) -> anyhow::Result<Mounted> {
        let scratch = tempfile::Builder::new()
            .tempdir_in(self.store.join("mounts"))?
            .keep();
        let image = self.service.mount(image, Some(&scratch))?;
        let root = Root::of_mount(image.mount_fd())?;
        Ok(Mounted { root, _image: image })
    }

    /// Requests made so far, and body bytes received.
    pub fn fetched(&self) -> (u64, u64) {
        let stats = self.service.stats();
        (stats.requests, stats.bytes)
    }

    /// Ends the threads; the store stays.
    pub fn stop(self) {
        self.service.stop();
    }
}

/// A mounted image.
#[derive(Debug)]
pub struct Mounted {
    /// Its root directory.
    pub root: Root,
    _image: MountedImage,
}

/// An open root directory below which things are measured.
#[derive(Debug)]
pub struct Root(OwnedFd);

/// Plain overlayfs over a directory, with a writable layer in `scratch`, which is made. Detached.
pub fn plain_overlay(lower: &Path, scratch: &Path) -> anyhow::Result<Root> {
    let (upper, work) = (scratch.join("upper"), scratch.join("work"));
    std::fs::create_dir_all(&upper)?;
    std::fs::create_dir_all(&work)?;
    let context = rustix::mount::fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).context("overlayfs")?;
    for (key, directory) in [("lowerdir+", lower), ("upperdir", &upper), ("workdir", &work)] {
        rustix::mount::fsconfig_set_string(context.as_fd(), key, directory)
            .with_context(|| format!("overlayfs: {key}={}", directory.display()))?;
    }
    rustix::mount::fsconfig_create(context.as_fd()).context("overlayfs")?;
    let mount = rustix::mount::fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::empty(),
    )
    .context("overlayfs")?;
    Root::of_mount(mount)
}

impl Root {
    /// The root directory of a detached mount, which stays as long as this.
    fn of_mount(mount: impl AsFd) -> anyhow::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self(rustix::fs::openat(mount, c".", flags, Mode::empty())?))
    }

    /// Opens a file for reading.
    pub fn open(&self, path: &CString) -> anyhow::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        rustix::fs::openat(&self.0, path.as_c_str(), flags, Mode::empty())
            .with_context(|| format!("{}: cannot be opened", path.to_string_lossy()))
    }

    /// Opens each file and reads it to its end; returns the bytes.
    pub fn read_all(&self, paths: &[CString]) -> anyhow::Result<u64> {
        let mut buffer = vec![0; 128 << 10];
        let mut bytes = 0;
        for path in paths {
            let file = self.open(path)?;
            loop {
                match rustix::io::read(&file, &mut buffer)? {
                    0 => break,
                    count => bytes += u64::try_from(count)?,
                }
            }
        }
        Ok(bytes)
    }

    /// Looks at each file; returns the bytes that they say they have.
    pub fn stat_all(&self, paths: &[CString]) -> anyhow::Result<u64> {
        let mut bytes = 0;
        for path in paths {
            let stat = rustix::fs::statat(&self.0, path.as_c_str(), AtFlags::SYMLINK_NOFOLLOW)?;
            bytes += u64::try_from(stat.st_size)?;
        }
        Ok(bytes)
    }

    /// Lists the root directory and every directory in it; returns the number of names, `.` and `..` left out.
    pub fn list_all(&self) -> anyhow::Result<usize> {
        let mut names = 0;
        for entry in Dir::read_from(&self.0)? {
            let entry = entry?;
            let name = entry.file_name();
            if is_dot(name.to_bytes()) {
                continue;
            }
            names += 1;
            if entry.file_type() == FileType::Directory {
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let directory = rustix::fs::openat(&self.0, name, flags, Mode::empty())?;
                for entry in Dir::read_from(&directory)? {
                    names += usize::from(!is_dot(entry?.file_name().to_bytes()));
                }
            }
        }
        Ok(names)
    }
}

fn is_dot(name: &[u8]) -> bool {
    matches!(name, b"." | b"..")
}
