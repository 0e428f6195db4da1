//! The last step of a large file: hashing all of it, on threads of its own, so that the decode threads go on bringing chunks that
//! reads wait for. Called by [`super::deliver`] when the last chunk is on disk, and by the engine when a read needs the whole.
//!
//! What must hold: a read that waits for the whole of an object never waits for other files that nobody reads. Its file is hashed
//! where the last chunk came, or, if it was in the queue of `peel-complete` already, taken out of it by a thread `peel-whole-N`. No
//! file is hashed twice at a time; [`PartialObject::complete`] sees to that. A file that the disk keeps from becoming an object is tried
//! again a few times, by `peel-complete`.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, select};
use peel_store::PartialObject;

use super::claim::Claim;
use super::fair::{Bounds, Lane, Queues, Refused};
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
/// Files of one image that reads wait for and that wait for a thread. Beyond these, they wait with those that nobody reads; those of
/// zeros are tried again later.
const URGENT_QUEUE: usize = 256;
/// Files of so many bytes never have all threads for such files, nor any decode thread.
const HUGE: u64 = 64 << 20;

/// Pauses before a file is tried again that the disk kept from becoming an object: it may be full for a moment, or until somebody has
/// seen to it. After the last one, the next read of the whole or the next open tries.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(16),
    Duration::from_secs(64),
    Duration::from_secs(256),
];
/// Such files that are kept open for that. Each has two descriptors; where the disk is full, there may be any number.
const PUT_OFF: usize = 64;

/// A file all of whose chunks are on disk.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) engine: Arc<Engine>,
    pub(super) object: Arc<Object>,
    pub(super) partial: Arc<PartialObject>,
    /// Generation of the object's chunk list when its last chunk was claimed.
    pub(super) generation: u32,
    /// How often the disk kept it from becoming an object.
    attempts: usize,
}

/// The threads and their queues.
#[derive(Debug)]
pub(super) struct Completer {
    waiting: Arc<Mutex<Waiting>>,
    /// One message says it all: there are some.
    wake: Sender<()>,
    stop: Sender<()>,
    urgent: Arc<Queues<Urgent>>,
}

/// What a read waits for.
#[derive(Debug)]
enum Urgent {
    /// All chunks are on disk.
    File(Completion),
    /// The file is nothing but zeros, if its chunk list is right.
    Zeros(Claim),
}

#[derive(Debug, Default)]
struct Waiting {
    /// Files that nobody reads, at most [`QUEUE`] and those that found no room among the urgent ones.
    files: VecDeque<Completion>,
    /// Numbers of the objects in the other queue: each is there once, however many reads wait for it.
    urgent: BTreeSet<u32>,
    /// Files that are tried again, at most [`PUT_OFF`].
    put_off: Vec<PutOff>,
}

/// A file that is tried again.
#[derive(Debug)]
struct PutOff {
    completion: Completion,
    /// When the last attempt failed.
    since: Instant,
    /// When the next one is due.
    due: Instant,
}

/// What is known of an object.
#[derive(Debug)]
enum Taken {
    /// It was in the queue.
    Queued(Completion),
    /// It is tried again soon.
    PutOff,
    /// It is not here.
    Unknown,
}

impl Waiting {
    /// The next file, or how long until there may be one.
    fn next(&mut self, now: Instant) -> Result<Completion, Option<Duration>> {
        if let Some(place) = self.put_off.iter().position(|file| file.due <= now) {
            return Ok(self.put_off.swap_remove(place).completion);
        }
        let due = self.put_off.iter().map(|file| file.due).min();
        self.files
            .pop_front()
            .ok_or(due.map(|due| due.saturating_duration_since(now)))
    }

    /// Has a file tried again that has just failed. Gives it back if that was its last attempt, if there is no room, or
    /// if it is here already.
    fn put_off(&mut self, mut completion: Completion, now: Instant) -> Result<(), Completion> {
        let object = completion.object.number;
        let is_here = || {
            self.put_off
                .iter()
                .any(|file| file.completion.object.number == object)
        };
        let pause = PAUSES.get(completion.attempts);
        let Some(pause) = pause.filter(|_| self.put_off.len() < PUT_OFF && !is_here()) else {
            return Err(completion);
        };
        completion.attempts += 1;
        self.put_off.push(PutOff {
            completion,
            since: now,
            due: now + *pause,
        });
        Ok(())
    }

    /// A read needs the whole of the object: takes it out of the queue. If it is to be tried again, that is soon, but not at once: reads
    /// may come many times a second.
    fn take(&mut self, object: u32) -> Taken {
        let is_it = |completion: &Completion| completion.object.number == object;
        if let Some(file) = self.put_off.iter_mut().find(|file| is_it(&file.completion)) {
            let [first, ..] = PAUSES;
            file.completion.attempts = 0;
            file.due = file.due.min(file.since + first);
            return Taken::PutOff;
        }
        let place = self.files.iter().position(is_it);
        place
            .and_then(|place| self.files.remove(place))
            .map_or(Taken::Unknown, Taken::Queued)
    }
}

impl Completer {
    /// Starts the threads.
    pub(super) fn start() -> Result<Self, Error> {
        let waiting = Arc::<Mutex<Waiting>>::default();
        let (wake, woken) = bounded(1);
        let (stop, stopped) = bounded(1);
        let files = Arc::clone(&waiting);
        spawn("peel-complete".to_owned(), move || work(&files, &woken, &stopped))?;
        let urgent = Arc::new(Queues::new(Bounds {
            queue: URGENT_QUEUE,
            large: HUGE,
            large_threads: URGENT_THREADS - 1,
            large_bytes: u64::MAX,
        }));
        for number in 0..URGENT_THREADS {
            let (files, waiting) = (Arc::clone(&urgent), Arc::clone(&waiting));
            spawn(format!("peel-whole-{number}"), move || {
                work_urgently(&files, &waiting);
            })?;
        }
        Ok(Self {
            waiting,
            wake,
            stop,
            urgent,
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

    /// Has a file tried again that the disk has just kept from becoming an object, a few times.
    fn put_off(&self, completion: Completion) {
        let engine = Arc::clone(&completion.engine);
        // Bound to a name, because what is dropped may be the last of more than itself: not under the lock.
        let given_up = lock(&self.waiting).put_off(completion, Instant::now());
        self.wake(&engine);
        drop(given_up);
    }

    /// Tries the file of an object no more that was put off: it stands in the way of another chunk list.
    pub(super) fn let_go(&self, object: u32) {
        let mut waiting = lock(&self.waiting);
        let mut files = waiting.put_off.iter();
        let place = files.position(|file| file.completion.object.number == object);
        let file = place.map(|place| waiting.put_off.swap_remove(place));
        drop(waiting);
        drop(file);
    }

    /// Takes a file on that a read waits for, unless that is done already; gives it back when there is no room.
    fn submit_urgent(&self, completion: Completion) -> Result<(), Completion> {
        let (image, bytes) = (completion.image(), completion.partial.size());
        let object = completion.object.number;
        if !lock(&self.waiting).urgent.insert(object) {
            return Ok(());
        }
        match self
            .urgent
            .push(Lane::Demand, image, bytes, Urgent::File(completion))
        {
            Err(Refused::Full(Urgent::File(completion))) => {
                lock(&self.waiting).urgent.remove(&object);
                Err(completion)
            }
            // What is refused at the end is dropped.
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// As [`Completer::submit_urgent`]; where there is no room, the file waits with those that nobody reads.
    fn submit_soon(&self, completion: Completion) {
        let engine = Arc::clone(&completion.engine);
        if let Err(completion) = self.submit_urgent(completion) {
            lock(&self.waiting).files.push_front(completion);
        }
        self.wake(&engine);
    }

    /// Takes on a file of nothing but zeros that a read waits for. There is nothing to fetch, but there may be as much to hash as in the
    /// largest files.
    pub(super) fn submit_zeros(&self, claim: Claim) {
        let (image, bytes) = (claim.layer.image, claim.layer.chunk(claim.position));
        let bytes = bytes.map_or(0, |(_, chunk)| chunk.size);
        // A claim that finds no room is dropped, and tried again while reads wait.
        drop(self.urgent.push(Lane::Demand, image, bytes, Urgent::Zeros(claim)));
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
        // Full means that it has its order already.
        let _ = self.stop.try_send(());
        self.urgent.stop();
        self.discard();
    }

    /// Drops what waits: it holds the engine, which holds this. The chunks stay on disk for the next process.
    fn discard(&self) {
        // A statement of its own: what is dropped may be the last of more than itself.
        let waiting = std::mem::take(&mut *lock(&self.waiting));
        drop(waiting);
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
        let next = lock(waiting).next(Instant::now());
        let pause = match next {
            Ok(completion) => {
                completion.run();
                continue;
            }
            Err(Some(pause)) => crossbeam_channel::after(pause),
            Err(None) => crossbeam_channel::never(),
        };
        select! {
            recv(woken) -> message => if message.is_err() { return },
            recv(pause) -> _ => {}
            recv(stopped) -> _ => return,
        }
    }
}

fn work_urgently(files: &Queues<Urgent>, waiting: &Mutex<Waiting>) {
    while let Some((urgent, turn)) = files.next() {
        match urgent {
            Urgent::Zeros(claim) => zeros(claim),
            Urgent::File(completion) => {
                lock(waiting).urgent.remove(&completion.object.number);
                completion.run();
            }
        }
        drop(turn);
    }
}

/// Delivers a file that is nothing but zeros: only then a run of zeros is asked for, because the store has runs of zeros in partial
/// objects from the start. The claim is for all of the object, which nobody hashes after this; the index lets no more zeros through
/// than can be hashed while a read waits.
fn zeros(claim: Claim) {
    let size = claim.layer.chunk(claim.position).map(|(_, chunk)| chunk.size);
    match claim
        .engine
        .store
        .add_zeros(&claim.object.digest, size.unwrap_or(0))
    {
        Ok(true) => claim.kept(),
        Ok(false) => claim.false_zeros(),
        Err(error) => claim.not_kept(&error),
    }
}

impl Engine {
    /// A read waits for the whole of an object, and for no chunk that it could ask for: sees to it that the file is hashed now, if all
    /// of it is on disk. If its last chunk is on its way there, whoever brings it sees the read.
    pub(super) fn hurry(self: &Arc<Self>, object: &Arc<Object>) {
        let taken = lock(&self.completer.waiting).take(object.number);
        let completion = match taken {
            Taken::Queued(completion) => completion,
            Taken::PutOff => return self.completer.wake(self),
            Taken::Unknown => {
                let state = lock(&object.state);
                match &state.backing {
                    Backing::Partial(partial) if partial.absent() == 0 => {
                        Completion::new(self, object, partial, state.generation)
                    }
                    _ => return,
                }
            }
        };
        self.completer.submit_soon(completion);
    }

    /// An object of which all chunks are on disk is made one: here and now if it is small, or if a read waits for that and it is not huge,
    /// else by and by.
    pub(super) fn finish(self: &Arc<Self>, completion: Completion) {
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
        let left = match left {
            Err(completion) if completion.partial.size() >= HUGE => self.completer.submit_urgent(completion),
            left => left,
        };
        match left {
            Err(completion) => completion.run(),
            Ok(()) => {
                // A read that came just before that found nothing in the queue.
                if waited_for() {
                    self.hurry(&object);
                }
            }
        }
    }
}

impl Completion {
    /// All chunks of the object are on disk, the last one by the chunk list of that generation.
    pub(super) fn new(
        engine: &Arc<Engine>,
        object: &Arc<Object>,
        partial: &Arc<PartialObject>,
        generation: u32,
    ) -> Self {
        Self {
            engine: Arc::clone(engine),
            object: Arc::clone(object),
            partial: Arc::clone(partial),
            generation,
            attempts: 0,
        }
    }

    /// An image that it is made for.
    fn image(&self) -> u64 {
        lock(&self.object.state)
            .source()
            .map_or(u64::MAX, |source| source.layer.image)
    }

    /// Hashes the file and makes it pending.
    fn run(self) {
        let (engine, object) = (Arc::clone(&self.engine), Arc::clone(&self.object));
        match self.partial.complete() {
            Ok(()) if self.partial.is_complete() => {
                engine.pended(&object, self.generation);
            }
            // Another thread is at it.
            Ok(()) => {}
            Err(error @ peel_store::Error::Lost(_)) => {
                tracing::warn!(file = %object.describe(), %error, "missing bytes are fetched again when they are needed");
                engine.lost(&object);
            }
            Err(error) if deliver::is_false(&error) => {
                let file = object.describe();
                tracing::error!(%file, object = %object.digest, %error, "the chunks of this file are right, but it is not");
                engine.falsified(&object, self.generation);
            }
            Err(error) => {
                let known = std::mem::replace(&mut lock(&object.state).unkept, true);
                if known {
                    tracing::debug!(object = %object.digest, %error, "an object can still not be completed");
                } else {
                    let file = object.describe();
                    tracing::error!(
                        %file, object = %object.digest, %error,
                        "all of this file is here, but the disk keeps it from becoming an object; this is tried again for some minutes, and \
                         when the file is opened later. See that the disk of the store has room and no errors"
                    );
                }
                engine.completer.put_off(self);
            }
        }
    }
}

#[cfg(test)]
mod tests;
