//! The last step of a large file: hashing all of it, on a thread of its own (`peel-complete`), so that the decode threads go on
//! bringing chunks that reads wait for. Called by [`super::deliver`] when the last chunk is on disk.
//!
//! What must hold: a read that waits for the whole object never comes here behind other files; its decode thread hashes at once.

use std::sync::Arc;
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use peel_store::PartialObject;

use super::{Engine, deliver};
use crate::error::Error;
use crate::object::Object;

/// Smallest file that is hashed here, in bytes: twice the usual chunk. Less than that takes no longer than decoding a chunk.
const LARGE: u64 = 8 << 20;
/// Files that may wait. Each has two descriptors open; one that finds no room is hashed where it is.
const QUEUE: usize = 64;
/// Priority of the thread (`nice`): nobody waits for it, and somebody may for what the decode threads do.
const NICE: i32 = 10;

/// A file all of whose chunks are on disk.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) engine: Arc<Engine>,
    pub(super) object: Arc<Object>,
    pub(super) partial: Arc<PartialObject>,
    /// Generation of the object's chunk list when its last chunk was claimed.
    pub(super) generation: u32,
}

/// The thread and its queue.
#[derive(Debug)]
pub(super) struct Completer {
    files: Sender<Completion>,
    /// The other end, to empty it at the end.
    queue: Receiver<Completion>,
    stop: Sender<()>,
}

impl Completer {
    /// Starts the thread.
    pub(super) fn start() -> Result<Self, Error> {
        let (files, queue) = bounded(QUEUE);
        let (stop, stopped) = bounded(1);
        let waiting: Receiver<Completion> = queue.clone();
        let name = "peel-complete";
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&waiting, &stopped))
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self { files, queue, stop })
    }

    /// Takes a large file on; gives it back if it is none or there is no room.
    pub(super) fn submit(&self, completion: Completion) -> Result<(), Completion> {
        if completion.partial.size() < LARGE || completion.engine.is_stopping() {
            return Err(completion);
        }
        let engine = Arc::clone(&completion.engine);
        let sent = self.files.try_send(completion).map_err(|error| match error {
            TrySendError::Full(completion) | TrySendError::Disconnected(completion) => completion,
        });
        if engine.is_stopping() {
            self.discard();
        }
        sent
    }

    /// Ends the thread after the file that it is at. The engine must be stopping.
    pub(super) fn stop(&self) {
        // Full means that it has its order already.
        let _ = self.stop.try_send(());
        self.discard();
    }

    /// Drops what waits: it holds the engine, which holds this. The chunks stay on disk for the next process.
    fn discard(&self) {
        while self.queue.try_recv().is_ok() {}
    }
}

fn work(files: &Receiver<Completion>, stopped: &Receiver<()>) {
    // Linux has priorities of threads; none given is the calling one.
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "large files are completed at normal priority");
    }
    loop {
        if stopped.try_recv().is_ok() {
            return;
        }
        crossbeam_channel::select! {
            recv(files) -> completion => match completion {
                Ok(completion) => {
                    completion.run();
                }
                Err(_) => return,
            },
            recv(stopped) -> _ => return,
        }
    }
}

impl Completion {
    /// Hashes the file and makes it an object. False when it did not become one.
    pub(super) fn run(self) -> bool {
        let Self {
            engine,
            object,
            partial,
            generation,
        } = self;
        match partial.complete() {
            Ok(()) if partial.is_complete() => {
                engine.completed(&object);
                return true;
            }
            // Another thread is at it.
            Ok(()) => {}
            Err(error) if deliver::is_false(&error) => {
                let file = object.describe();
                tracing::error!(%file, object = %object.digest, %error, "the chunks of this file are right, but it is not");
                engine.falsified(&object, generation);
            }
            Err(error) => {
                tracing::error!(object = %object.digest, %error, "cannot complete an object");
            }
        }
        false
    }
}
