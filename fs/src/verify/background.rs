//! The check of a lazy layer once all of it is here, in a thread of its own (`peel-verify`) at the lowest priority.
//!
//! A layer is looked at from time to time by a cursor over its objects, which stops at the first that is missing: a look costs
//! one system call. With the last object here:
//!
//! * A layer in Podman's dialect of zstd:chunked carries its tar-split: [`split`] makes the tar stream again from it and from
//!   the objects, and no file is fetched again.
//! * The blob of any other layer must be read once more. From a local layout or archive that is done; from a registry
//!   only where the load asks for it ([`crate::LoadRequest::check_by_download`]), because it doubles what a start costs on
//!   a metered link. Its bytes wait for every read that waits and for every prefetch.
//!
//! What is wrong is an error in the log that names image, layer and digests, and the layer is not loaded again. What could
//! not be checked (no network, an object that is gone) is left for the next load.

mod split;

use std::future::Future;
use std::io::{self, Read};
use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use oci_spec::image::Descriptor;
use peel_image::Digest;
use peel_image::layer::{EntryKind, LayerIndex};
use peel_registry::{Blob, ImageName, Source};
use peel_store::{LayerVerdict, Store};
use tokio::sync::mpsc;

use super::Subject;
use crate::error::Error;
use crate::fetch::Engine;
use crate::load::{PullFailure, diff_ids, inspect};
use crate::service::Image;
use crate::{LoadRequest, lock};

/// Images that may wait to be taken up; one that finds no room is checked after its next load.
const QUEUE: usize = 64;
/// How often layers are looked at. A start is not disturbed by a look, and nobody waits for a check.
const LOOK: Duration = Duration::from_secs(2);
/// Buffers of a blob between network and check.
const BUFFERS: usize = 8;
/// How long a check waits before it looks again whether reads or prefetches are under way.
const YIELD: Duration = Duration::from_millis(50);

/// Hands loaded images to the thread.
#[derive(Debug)]
pub(crate) struct Checker {
    images: Mutex<Option<Sender<Loaded>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// An image to look at as long as it lives. Never upgraded: the last handle of an image may be the last of the service, which
/// waits for this thread when it ends.
#[derive(Debug)]
struct Loaded {
    image: Weak<Image>,
    name: String,
    manifest: Digest,
    request: LoadRequest,
}

impl Loaded {
    fn is_alive(&self) -> bool {
        self.image.strong_count() > 0
    }
}

/// A lazy layer that waits for its last object.
struct Waiting {
    loaded: Arc<Loaded>,
    descriptor: Descriptor,
    subject: Subject,
    objects: Vec<Digest>,
    /// The first object that was missing at the last look.
    cursor: usize,
}

impl Checker {
    /// Starts the thread.
    pub(crate) fn start(engine: &Arc<Engine>) -> Result<Self, Error> {
        let (images, receiver) = bounded(QUEUE);
        let engine = Arc::clone(engine);
        let name = "peel-verify";
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&engine, &receiver))
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            images: Mutex::new(Some(images)),
            thread: Mutex::new(Some(thread)),
        })
    }

    /// An image was loaded.
    pub(crate) fn add(&self, image: &Arc<Image>, request: &LoadRequest) {
        let loaded = Loaded {
            image: Arc::downgrade(image),
            name: request.name.to_string(),
            manifest: image.manifest_digest(),
            request: request.clone(),
        };
        if let Some(images) = &*lock(&self.images) {
            // No room: the next load brings it again.
            let _ = images.try_send(loaded);
        }
    }

    /// Ends the thread. The engine must be stopping.
    pub(crate) fn stop(&self) {
        drop(lock(&self.images).take());
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the background check of layers ended with a panic");
        }
    }
}

fn work(engine: &Arc<Engine>, images: &Receiver<Loaded>) {
    // Linux has priorities of threads; none given is the calling one.
    if let Err(error) = rustix::process::setpriority_process(None, 19) {
        tracing::debug!(%error, "background checks run at normal priority");
    }
    let mut waiting: Vec<Waiting> = Vec::new();
    // Images whose records are not in the store yet.
    let mut unread: Vec<Arc<Loaded>> = Vec::new();
    while !engine.is_stopping() {
        match images.recv_timeout(LOOK) {
            Ok(loaded) => unread.push(Arc::new(loaded)),
            Err(RecvTimeoutError::Disconnected) => return,
            Err(RecvTimeoutError::Timeout) => {
                unread.retain(|loaded| loaded.is_alive() && !take_up(&engine.store, loaded, &mut waiting));
                waiting.retain(|layer| layer.loaded.is_alive());
                look(engine, &mut waiting);
            }
        }
    }
}

/// Notes the lazy layers of an image that no verdict is known of. False while the store does not have its record.
fn take_up(store: &Store, loaded: &Arc<Loaded>, waiting: &mut Vec<Waiting>) -> bool {
    let Ok(Some(record)) = store.image(&loaded.manifest) else {
        return false;
    };
    let Ok(manifest) = peel_registry::document::manifest(&record.manifest) else {
        return true;
    };
    let local = !matches!(loaded.request.name, ImageName::Registry(_));
    let diff_ids = diff_ids(&record.config).unwrap_or_default();
    for ((descriptor, index), diff_id) in manifest.layers().iter().zip(&record.layers).zip(diff_ids) {
        let Ok(blob) = descriptor.digest().to_string().parse::<Digest>() else {
            continue;
        };
        let subject = Subject {
            blob,
            index: *index,
            diff_id,
        };
        // A layer that was pulled whole was checked then.
        let known = *index == blob || subject.verdict(store).is_some();
        if known || waiting.iter().any(|other| other.subject == subject) {
            continue;
        }
        if !local && !loaded.request.check_by_download && !split::is_there(descriptor) {
            continue;
        }
        let Ok(Some(listed)) = store.layer(index) else {
            continue;
        };
        waiting.push(Waiting {
            loaded: Arc::clone(loaded),
            descriptor: descriptor.clone(),
            subject,
            objects: objects(&listed),
            cursor: 0,
        });
    }
    true
}

fn objects(index: &LayerIndex) -> Vec<Digest> {
    let objects = index.entries.iter().filter_map(|entry| match &entry.kind {
        EntryKind::Regular(content) if content.size > 0 => content.digest,
        _ => None,
    });
    let mut objects: Vec<Digest> = objects.collect();
    objects.sort_unstable();
    objects.dedup();
    objects
}

/// Checks the layers all of whose objects are here, one after the other.
fn look(engine: &Arc<Engine>, waiting: &mut Vec<Waiting>) {
    let mut later = Vec::new();
    for mut layer in std::mem::take(waiting) {
        let here = |object: &Digest| engine.store.has_object(object);
        while layer.objects.get(layer.cursor).is_some_and(here) {
            layer.cursor += 1;
        }
        if layer.cursor < layer.objects.len() {
            later.push(layer);
        } else if !engine.is_stopping() {
            check(engine, &layer);
        }
    }
    *waiting = later;
}

fn check(engine: &Arc<Engine>, layer: &Waiting) {
    let image = layer.loaded.name.as_str();
    let Subject { blob, diff_id, .. } = layer.subject;
    tracing::debug!(image, layer = %blob, "checking a layer that is here in full");
    match find(engine, layer) {
        Ok(verdict) => {
            match &verdict.fault {
                None => {
                    tracing::info!(image, layer = %blob, %diff_id, "a layer that is here in full is right");
                }
                Some(fault) => tracing::error!(
                    image,
                    layer = %blob,
                    %diff_id,
                    "a layer in use is not what the image says it is, and will not be loaded again: {fault}"
                ),
            }
            layer.subject.keep(&engine.store, &verdict);
        }
        Err(reason) if engine.is_stopping() => {
            tracing::debug!(image, layer = %blob, reason, "the check of a layer was broken off");
        }
        Err(reason) => {
            tracing::warn!(image, layer = %blob, reason, "a layer could not be checked; the next load tries again");
        }
    }
}

/// The verdict on a layer, or why there is none.
fn find(engine: &Arc<Engine>, layer: &Waiting) -> Result<LayerVerdict, String> {
    let Subject { index, diff_id, .. } = layer.subject;
    let listed = engine.store.layer(&index).map_err(|error| error.to_string())?;
    let listed = listed.ok_or("its index is not in the store any more")?;
    let blob = open(engine, layer)?;
    let judge = |toc: &Digest, found: Digest, unpacked: &LayerIndex| {
        if found == diff_id {
            super::disagreement(toc, &listed, &found, unpacked)
        } else {
            Some(super::wrong_diff_id(&found, &diff_id))
        }
    };
    if let Some(place) = split::place(&layer.descriptor)? {
        let fault = match split::rebuild(engine, &blob, &place, &listed)? {
            split::Rebuilt::Stream(unpacked, found) => judge(&place.toc_digest(), found, &unpacked),
            split::Rebuilt::Wrong(fault) => Some(fault),
        };
        return Ok(LayerVerdict { blob: false, fault });
    }
    let toc = super::vouched(&layer.descriptor);
    let fault = match stream(engine, blob, diff_id)? {
        Ok(unpacked) => judge(&toc.unwrap_or(index), diff_id, &unpacked),
        Err(found) => Some(super::wrong_diff_id(&found, &diff_id)),
    };
    Ok(LayerVerdict { blob: true, fault })
}

fn open(engine: &Arc<Engine>, layer: &Waiting) -> Result<Blob, String> {
    let request = layer.loaded.request.clone();
    let opened = wait(engine, async move {
        Source::open(&request.name, &request.client).await
    })?;
    let source = opened.map_err(|error| error.to_string())?;
    engine.count(source.counters());
    source.blob(&layer.descriptor).map_err(|error| error.to_string())
}

/// Runs a future on the network threads and waits for it; an error when the service is stopping. The future has deadlines of its
/// own.
fn wait<T: Send + 'static>(
    engine: &Engine,
    future: impl Future<Output = T> + Send + 'static,
) -> Result<T, String> {
    let (done, result) = bounded(1);
    engine.handle().spawn(async move {
        // Closed means that the service is stopping.
        let _ = done.send(future.await);
    });
    result.recv().map_err(|_| "the service is stopping".to_owned())
}

/// Reads the whole blob once more. `Err` inside holds the digest of its uncompressed bytes where that is not the DiffID.
fn stream(engine: &Arc<Engine>, blob: Blob, diff_id: Digest) -> Result<Result<LayerIndex, Digest>, String> {
    let (sender, receiver) = mpsc::channel(BUFFERS);
    let (done, received) = bounded(1);
    let patient = Arc::clone(engine);
    engine.handle().spawn(async move {
        let move_all = async {
            let mut stream = blob.stream_verified().await?;
            while let Some(bytes) = stream.next().await {
                let bytes = bytes?;
                while patient.is_busy() && !patient.is_stopping() {
                    tokio::time::sleep(YIELD).await;
                }
                // Closed means that the check is done, well or not; only the end tells whether the blob is right.
                let _ = sender.send(bytes).await;
            }
            Ok::<(), peel_registry::Error>(())
        };
        let result = move_all.await.map_err(|error| error.to_string());
        drop(sender);
        let _ = done.send(result);
    });
    let found = inspect(receiver, diff_id);
    // What is wrong with the blob as a whole explains whatever its unpacking ran into.
    received
        .recv()
        .map_err(|_| "the service is stopping".to_owned())??;
    match found {
        Ok(index) => Ok(Ok(index)),
        Err(PullFailure::DiffId(found)) => Ok(Err(found)),
        Err(PullFailure::Broken(reason)) => Err(reason),
        Err(PullFailure::Registry(error)) => Err(error.to_string()),
        Err(PullFailure::Store(error)) => Err(error.to_string()),
        Err(PullFailure::Thread(error)) => Err(error.to_string()),
    }
}

/// Ends a long computation when the service stops.
struct Stoppable<'a, R> {
    engine: &'a Engine,
    stream: R,
}

impl<R: Read> Read for Stoppable<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.engine.is_stopping() {
            return Err(io::Error::other("the service is stopping"));
        }
        self.stream.read(buffer)
    }
}
