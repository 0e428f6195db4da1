//! The last step of a large file: hashing all of it, on threads of its own, so that the decode threads go on bringing chunks that
//! reads wait for. Called by [`super::deliver`] when the last chunk is on disk, and by the engine when a read needs the whole.
//!
//! What must hold: a read that waits for the whole of an object never waits for other files that nobody reads. Its file is hashed
//! where the last chunk came, or, if it was in the queue of `peel-complete` already, taken out of it by a thread `peel-whole-N`. No
//! file is hashed twice at a time; [`PartialObject::complete`] sees to that.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::thread;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded, select};
use peel_store::PartialObject;

use super::{Engine, deliver};
use crate::error::Error;
use crate::lock;
use crate::object::{Backing, Object, Waiter};

/// Smallest file that is hashed here, in bytes: twice the usual chunk. Less than that takes no longer than decoding a chunk.
const LARGE: u64 = 8 << 20;
/// Files that may wait while nobody reads them. Each has two descriptors open; one that finds no room is hashed where it is.
const QUEUE: usize = 64;
/// Priority of the thread for them (`nice`): nobody waits for it, and somebody may for what the decode threads do.
const NICE: i32 = 10;
/// Threads for files that reads wait for: with a second one, a large file does not hold up all others.
const URGENT_THREADS: usize = 2;
/// Files that reads wait for and that wait for a thread. Beyond these, they wait with those that nobody reads.
const URGENT_QUEUE: usize = 256;

/// A file all of whose chunks are on disk.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) engine: Arc<Engine>,
    pub(super) object: Arc<Object>,
    pub(super) partial: Arc<PartialObject>,
    /// Generation of the object's chunk list when its last chunk was claimed.
    pub(super) generation: u32,
}

/// The threads and their queues.
#[derive(Debug)]
pub(super) struct Completer {
    waiting: Arc<Mutex<Waiting>>,
    /// One message says it all: there are some.
    wake: Sender<()>,
    stop: Sender<()>,
    urgent: Sender<Completion>,
    /// The other end, to empty it at the end.
    urgent_queue: Receiver<Completion>,
    stop_urgent: Sender<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    /// Files that nobody reads, at most [`QUEUE`] and those that found no room among the urgent ones.
    files: VecDeque<Completion>,
    /// Numbers of the objects in the other queue: each is there once, however many reads wait for it.
    urgent: BTreeSet<u32>,
}

impl Completer {
    /// Starts the threads.
    pub(super) fn start() -> Result<Self, Error> {
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (wake, woken) = bounded(1);
        let (stop, stopped) = bounded(1);
        let files = Arc::clone(&waiting);
        spawn("peel-complete".to_owned(), move || work(&files, &woken, &stopped))?;
        let (urgent, urgent_queue) = bounded(URGENT_QUEUE);
        let (stop_urgent, stopped) = bounded(URGENT_THREADS);
        for number in 0..URGENT_THREADS {
            let (files, stopped, waiting) = (urgent_queue.clone(), stopped.clone(), Arc::clone(&waiting));
            spawn(format!("peel-whole-{number}"), move || {
                work_urgently(&files, &waiting, &stopped);
            })?;
        }
        Ok(Self {
            waiting,
            wake,
            stop,
            urgent,
            urgent_queue,
            stop_urgent,
        })
    }

    /// Takes a large file on that nobody reads; gives it back if it is none or there is no room.
    pub(super) fn submit(&self, completion: Completion) -> Result<(), Completion> {
        if completion.partial.size() < LARGE || completion.engine.is_stopping() {
            return Err(completion);
        }
        let engine = Arc::clone(&completion.engine);
        {
            let mut waiting = lock(&self.waiting);
            if waiting.files.len() >= QUEUE {
                return Err(completion);
            }
            waiting.files.push_back(completion);
        }
        self.wake(&engine);
        Ok(())
    }

    /// Takes the file of an object out of the queue, if it is there.
    fn take(&self, object: u32) -> Option<Completion> {
        let mut waiting = lock(&self.waiting);
        let mut files = waiting.files.iter();
        let place = files.position(|completion| completion.object.number == object)?;
        waiting.files.remove(place)
    }

    /// Takes a file on that a read waits for.
    fn submit_urgent(&self, completion: Completion) {
        let (engine, object) = (Arc::clone(&completion.engine), completion.object.number);
        if !lock(&self.waiting).urgent.insert(object) {
            return;
        }
        if let Err(TrySendError::Full(completion)) = self.urgent.try_send(completion) {
            let mut waiting = lock(&self.waiting);
            waiting.urgent.remove(&object);
            waiting.files.push_front(completion);
        }
        self.wake(&engine);
    }

    /// Tells the thread that there is something to do, unless all is over.
    fn wake(&self, engine: &Engine) {
        // Full means that it has a message to come to.
        let _ = self.wake.try_send(());
        if engine.is_stopping() {
            self.discard();
        }
    }

    /// Ends the threads after the files that they are at. The engine must be stopping.
    pub(super) fn stop(&self) {
        // Full means that they have their order already.
        let _ = self.stop.try_send(());
        for _ in 0..URGENT_THREADS {
            let _ = self.stop_urgent.try_send(());
        }
        self.discard();
    }

    /// Drops what waits: it holds the engine, which holds this. The chunks stay on disk for the next process.
    fn discard(&self) {
        // A statement of its own: what is dropped may be the last of more than itself.
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        drop(waiting);
        while self.urgent_queue.try_recv().is_ok() {}
    }
}

fn spawn(name: String, work: impl FnOnce() + Send + 'static) -> Result<(), Error> {
    thread::Builder::new()
        .name(name.clone())
        .spawn(work)
        .map(drop)
        .map_err(|source| Error::Thread { name, source })
}

fn work(waiting: &Mutex<Waiting>, woken: &Receiver<()>, stopped: &Receiver<()>) {
    // Linux has priorities of threads; none given is the calling one.
    if let Err(error) = rustix::process::setpriority_process(None, NICE) {
        tracing::debug!(%error, "large files are completed at normal priority");
    }
    loop {
        if stopped.try_recv().is_ok() {
            return;
        }
        // A statement of its own: the lock must be free while the file is hashed.
        let next = lock(waiting).files.pop_front();
        if let Some(completion) = next {
            completion.run();
            continue;
        }
        select! {
            recv(woken) -> message => if message.is_err() { return },
            recv(stopped) -> _ => return,
        }
    }
}

fn work_urgently(files: &Receiver<Completion>, waiting: &Mutex<Waiting>, stopped: &Receiver<()>) {
    loop {
        if stopped.try_recv().is_ok() {
            return;
        }
        select! {
            recv(files) -> completion => match completion {
                Ok(completion) => {
                    lock(waiting).urgent.remove(&completion.object.number);
                    completion.run();
                }
                Err(_) => return,
            },
            recv(stopped) -> _ => return,
        }
    }
}

impl Engine {
    /// A read waits for the whole of an object, and for no chunk that it could ask for: sees to it that the file is hashed now, if all
    /// of it is on disk. If its last chunk is on its way there, whoever brings it sees the read.
    pub(super) fn hurry(self: &Arc<Self>, object: &Arc<Object>) {
        let completion = self.completer.take(object.number).or_else(|| {
            let state = lock(&object.state);
            match &state.backing {
                Backing::Partial(partial) if partial.absent() == 0 => Some(Completion {
                    engine: Arc::clone(self),
                    object: Arc::clone(object),
                    partial: Arc::clone(partial),
                    generation: state.generation,
                }),
                _ => None,
            }
        });
        if let Some(completion) = completion {
            self.completer.submit_urgent(completion);
        }
    }

    /// An object of which all chunks are on disk is made one: here and now if a read waits for that or if it is small, else by and by.
    /// True when it is one already.
    pub(super) fn finish(self: &Arc<Self>, completion: Completion) -> bool {
        let object = Arc::clone(&completion.object);
        let waited_for = || {
            lock(&object.state)
                .waiters
                .iter()
                .any(|waiter: &Waiter| waiter.whole)
        };
        let left = if waited_for() {
            Err(completion)
        } else {
            self.completer.submit(completion)
        };
        match left {
            Err(completion) => completion.run(),
            Ok(()) => {
                // A read that came just before that found nothing in the queue.
                if waited_for() {
                    self.hurry(&object);
                }
                false
            }
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

#[cfg(test)]
mod tests;
