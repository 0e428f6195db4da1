//! The service: one per store. Owns the object file system, the fetch engine and the loaded images.

use std::collections::{BTreeSet, HashMap};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use crossbeam_channel::Sender;
use fuser::Notifier;
use peel_image::Digest;
use peel_store::Store;

use crate::error::Error;
use crate::fetch::layer::Layer;
use crate::fetch::{Engine, Events};
use crate::load::flight::Flights;
use crate::load::{self, Loaded, Outcome};
use crate::mount::{self, FuseMount};
use crate::native::Native;
use crate::object_fs::{self, Lookups, Served};
use crate::settle::Settler;
use crate::verify::background::Checker;
use crate::{LayerReport, LoadRequest, Options, Progress, Stats, lock};

/// How far the kernel reads ahead in the object file system, in KiB: the largest FUSE request on a kernel with its
/// default limit of 256 pages. A chunk is 4 MiB as a rule, so larger requests only save calls.
const READ_AHEAD_KIB: u32 = 1024;

/// The one per store: object file system, fetcher, loaded images. Cheap to clone; stops when it, all images and all
/// mounts are dropped.
#[derive(Clone, Debug)]
pub struct Service {
    shared: Arc<Shared>,
}

/// What the service, its images and its mounts share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) engine: Arc<Engine>,
    pub(crate) lookups: Arc<Lookups>,
    native: Native,
    checker: Checker,
    settler: Settler,
    fuse: FuseMount,
    objects: OwnedFd,
    served: Mutex<Served>,
    images: Mutex<HashMap<String, Weak<Image>>>,
    flights: Arc<Flights>,
    next_image: AtomicU64,
    stopped: AtomicBool,
}

/// An image whose tree is known. Dropping the last handle ends its prefetch and forgets its sources.
#[derive(Debug)]
pub struct Image {
    shared: Arc<Shared>,
    loaded: Loaded,
    sources: Arc<Sources>,
}

/// The layers that an image can be fetched from. They may become known after the image itself.
#[derive(Debug, Default)]
pub(crate) struct Sources(Mutex<SourcesState>);

#[derive(Debug, Default)]
struct SourcesState {
    layers: Vec<Arc<Layer>>,
    closed: bool,
}

impl Sources {
    /// Makes a layer's chunks available. False when the image is gone already.
    pub(crate) fn add(&self, engine: &Arc<Engine>, layer: &Arc<Layer>) -> bool {
        {
            let mut state = lock(&self.0);
            if state.closed {
                return false;
            }
            state.layers.push(Arc::clone(layer));
        }
        engine.register(layer);
        true
    }

    /// Whether the image is gone.
    pub(crate) fn is_closed(&self) -> bool {
        lock(&self.0).closed
    }

    /// The image is gone, or did not come to be: its layers bring nothing any more.
    pub(crate) fn close(&self, engine: &Arc<Engine>) {
        let layers = {
            let mut state = lock(&self.0);
            state.closed = true;
            std::mem::take(&mut state.layers)
        };
        for layer in &layers {
            layer.close();
        }
        for layer in &layers {
            for file in &layer.files {
                if let Some(object) = engine.table.get(file.object) {
                    engine.start_over(&object, object.remove_image(layer.image));
                }
            }
        }
    }
}

/// A mounted root file system. While it lives, files that complete go back to the kernel for its later opens.
#[derive(Debug)]
pub struct MountedImage {
    overlay: Arc<OwnedFd>,
    image: Arc<Image>,
}

struct Hooks {
    notifier: Notifier,
    completions: Sender<()>,
    /// Objects whose cached pages wait to be dropped: at most all that there are. There are some only where a TOC lies.
    stale: Arc<Mutex<BTreeSet<u32>>>,
    wake: Sender<()>,
    lookups: Arc<Lookups>,
}

impl Hooks {
    /// Starts the thread that drops cached pages: the kernel waits for pages that are being read, so no thread that answers
    /// reads may do it.
    fn start(
        engine: &Arc<Engine>,
        notifier: Notifier,
        completions: Sender<()>,
        lookups: &Arc<Lookups>,
    ) -> Result<Self, Error> {
        // One message says it all: there are some.
        let (wake, woken) = crossbeam_channel::bounded::<()>(1);
        let stale = Arc::<Mutex<BTreeSet<u32>>>::default();
        let name = "peel-stale";
        let (notifier_of_thread, stale_of_thread) = (notifier.clone(), Arc::clone(&stale));
        let engine = Arc::downgrade(engine);
        std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                for () in woken {
                    // A statement of its own: the lock must be free while the kernel works.
                    while let Some(object) = { lock(&stale_of_thread).pop_first() } {
                        let mark = engine.upgrade().map_or(0, |engine| engine.taint(object));
                        object_fs::invalidate(&notifier_of_thread, object);
                        if let Some(engine) = engine.upgrade() {
                            engine.cleaned(object, mark);
                        }
                    }
                }
            })
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            notifier,
            completions,
            stale,
            wake,
            lookups: Arc::clone(lookups),
        })
    }
}

impl Events for Hooks {
    fn completed(&self) {
        // Full means that the thread has a message to come to.
        let _ = self.completions.try_send(());
    }

    fn invalidate(&self, object: u32) {
        object_fs::invalidate(&self.notifier, object);
    }

    fn registering(&self) -> bool {
        self.lookups.hurry()
    }

    fn invalidate_later(&self, object: u32) {
        lock(&self.stale).insert(object);
        // Full means that the thread has a message to come to.
        let _ = self.wake.try_send(());
    }
}

impl Service {
    /// Locks the store, mounts the object file system (detached: it appears nowhere), starts the threads.
    pub fn start(store: Store, options: Options) -> Result<Self, Error> {
        store.lock()?;
        raise_open_files();
        let objects = mount::open_directory(&store.objects_dir())?;
        let fuse = mount::fuse()?;
        let engine = Engine::start(store, &options)?;
        let lookups = Arc::<Lookups>::default();
        let native = Native::start()?;
        let checker = Checker::start(&engine)?;
        let settler = Settler::start(&engine)?;
        let served = object_fs::serve(&engine, &lookups, object_fs::duplicate(&fuse.device)?)?;
        engine.listen(Box::new(Hooks::start(
            &engine,
            served.notifier(),
            native.completions(),
            &lookups,
        )?));
        if let Err(error) = mount::set_read_ahead(fuse.mount.as_fd(), READ_AHEAD_KIB) {
            tracing::debug!(%error, "the kernel keeps its default readahead for incomplete files");
        }
        Ok(Self {
            shared: Arc::new(Shared {
                engine,
                lookups,
                native,
                checker,
                settler,
                fuse,
                objects,
                served: Mutex::new(served),
                images: Mutex::default(),
                flights: Arc::default(),
                next_image: AtomicU64::new(0),
                stopped: AtomicBool::new(false),
            }),
        })
    }

    /// Finds the image, fetches its metadata, builds its tree. Calls with the same request share one load. Blocks; call it from a
    /// thread of your own, not from an asynchronous task.
    pub fn load(
        &self,
        request: &LoadRequest,
        progress: &(dyn Fn(Progress) + Send + Sync),
    ) -> Result<Arc<Image>, Error> {
        if self.shared.stopped.load(Ordering::Acquire) {
            return Err(Error::Stopping);
        }
        let shared = Arc::clone(&self.shared);
        self.shared
            .flights
            .load(request, progress, move |request, progress| {
                load_alone(&shared, request, progress)
            })
    }

    /// How many calls of [`Service::load`] wait for an image.
    pub fn loads_waiting(&self) -> usize {
        self.shared.flights.waiting()
    }

    /// Mounts the image's root file system, detached. `scratch` is an empty directory for the writable layer (made
    /// by the caller, on the store's file system); `None` mounts read-only.
    pub fn mount(&self, image: &Arc<Image>, scratch: Option<&Path>) -> Result<MountedImage, Error> {
        let shared = &self.shared;
        let tree = shared.tree(&image.loaded)?;
        let overlay = mount::overlay(
            &image.loaded.manifest_digest.to_string(),
            tree.as_fd(),
            &[shared.objects.as_fd(), shared.fuse.mount.as_fd()],
            scratch,
        )?;
        let overlay = Arc::new(overlay);
        shared.native.add(&overlay);
        Ok(MountedImage {
            overlay,
            image: Arc::clone(image),
        })
    }

    /// Counters.
    pub fn stats(&self) -> Stats {
        self.shared.engine.stats()
    }

    /// The `/dev/fuse` descriptor. Whoever holds a duplicate keeps the connection, and the reads that wait on it, alive
    /// beyond this process.
    pub fn fuse_device(&self) -> BorrowedFd<'_> {
        self.shared.fuse.device.as_fd()
    }

    /// Ends the threads and unmounts. Reads that wait get EIO.
    pub fn stop(self) {
        self.shared.stop();
    }
}

/// Loads an image that nobody else is loading.
fn load_alone(
    shared: &Arc<Shared>,
    request: &LoadRequest,
    progress: &(dyn Fn(Progress) + Send + Sync),
) -> Result<Arc<Image>, Error> {
    let number = shared.next_image.fetch_add(1, Ordering::Relaxed);
    match load::load(shared, number, request, progress)? {
        Outcome::Live(image) => Ok(image),
        Outcome::New {
            loaded,
            sources,
            keys,
        } => {
            let image = Arc::new(Image {
                shared: Arc::clone(shared),
                loaded,
                sources,
            });
            let mut images = lock(&shared.images);
            images.retain(|_, image| image.strong_count() > 0);
            images.extend(keys.map(|key| (key, Arc::downgrade(&image))));
            drop(images);
            shared.checker.add(&image, request);
            Ok(image)
        }
    }
}

impl Shared {
    /// The image that was loaded under this key, while somebody has it.
    pub(crate) fn live(&self, key: &str) -> Option<Arc<Image>> {
        lock(&self.images).get(key).and_then(Weak::upgrade)
    }

    /// Mounts the EROFS image of a known tree. One that the kernel finds damaged is made anew, if the store can.
    fn tree(&self, loaded: &Loaded) -> Result<OwnedFd, Error> {
        match mount::erofs(&loaded.erofs) {
            Err(error) if error.is_damaged_file_system() => {
                tracing::warn!(%error, "a damaged EROFS image");
                let rebuilt = load::rebuild(&self.engine.store, &loaded.manifest_digest)?;
                mount::erofs(&rebuilt.ok_or(error)?)
            }
            tree => tree,
        }
    }

    fn stop(&self) {
        if self.stopped.swap(true, Ordering::AcqRel) {
            return;
        }
        self.engine.stop();
        // Registrations that wait hold the store.
        self.lookups.hurry();
        self.checker.stop();
        match mount::abort_fuse(self.fuse.mount.as_fd()) {
            Ok(()) => lock(&self.served).join(),
            Err(error) => {
                tracing::error!(%error, "the object file system stays until its last mount is gone");
            }
        }
        self.settler.stop();
        if let Err(error) = self.engine.store.checkpoint() {
            tracing::error!(%error, "the store was not closed cleanly");
        }
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Image {
    /// Digest of the platform's manifest.
    pub fn manifest_digest(&self) -> Digest {
        self.loaded.manifest_digest
    }

    /// The manifest, byte for byte.
    pub fn manifest(&self) -> &[u8] {
        &self.loaded.manifest
    }

    /// The configuration, byte for byte.
    pub fn config(&self) -> &[u8] {
        &self.loaded.config
    }

    /// The layers, lowest first.
    pub fn layers(&self) -> &[LayerReport] {
        &self.loaded.reports
    }

    /// The EROFS image of its tree.
    pub fn erofs(&self) -> &PathBuf {
        &self.loaded.erofs
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        self.sources.close(&self.shared.engine);
    }
}

impl MountedImage {
    /// The detached overlay mount; `move_mount` it to where it should appear, in any mount namespace. Once.
    pub fn mount_fd(&self) -> BorrowedFd<'_> {
        self.overlay.as_ref().as_fd()
    }

    /// A duplicate of the mount descriptor to send to another process.
    pub fn try_clone_fd(&self) -> std::io::Result<OwnedFd> {
        self.overlay.try_clone()
    }

    /// The image that it shows.
    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }
}

/// Every object that is open through FUSE, and every partial object, needs a descriptor.
fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
