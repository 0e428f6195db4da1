//! What happens to a chunk when its bytes are here: reads are answered from memory, then the bytes are written behind
//! their back, and an object whose last chunk came is completed. It is pending then, until the disk has
//! confirmed it ([`crate::settle`]); reads are answered from memory or from bytes that were hashed after they
//! were read.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use peel_image::Digest;
use peel_store::Checked;

use super::claim::Claim;
use super::shelf::Held;
use super::{Engine, fail};
use crate::lock;
use crate::object::{Backing, Flight, ListId, Object, Snapshot, Waiter};

impl Claim {
    /// The chunk's bytes are here and verified.
    pub(super) fn deliver(self, data: Vec<u8>) {
        let data = Arc::new(data);
        let chunk = self.chunk();
        let file = self.layer.chunk(self.position).map(|(file, _)| file);
        let is_whole = file.is_some_and(|file| matches!(file.list, ListId::Single(_)));
        if !is_whole && let Err(error) = self.engine.look(&self.object, file) {
            tracing::error!(object = %self.object.digest, %error, "cannot open the object in the store");
        }
        let backing = {
            let mut state = lock(&self.object.state);
            if state.generation != self.generation {
                drop(state);
                return self.settle();
            }
            // The last close may have let go of the partial object. What is kept without one is kept as the whole object.
            if !is_whole && !matches!(state.backing, Backing::Partial(_) | Backing::Unkept) {
                drop(state);
                return;
            }
            state.failures = 0;
            state.progress = Some(Instant::now());
            state.wrong.remove(&chunk);
            state.flights.insert(chunk, Flight::Writing(Arc::clone(&data)));
            state.backing.clone()
        };
        self.engine.arrived(&self.object, chunk);
        let kept = match &backing {
            Backing::Unkept => None,
            _ if !self.engine.shelf.may_keep(Instant::now()) => None,
            Backing::Partial(partial) => Some(partial.write(chunk as usize, &data)),
            _ => {
                let added = self.engine.store.add_verified(&self.object.digest, &data);
                Some(added.map(|()| true))
            }
        };
        match kept {
            Some(Ok(last)) => {
                self.engine.shelf.kept();
                return self.landed(last, &backing);
            }
            Some(Err(error)) if is_false(&error) => {
                let (object, engine, generation) = (
                    Arc::clone(&self.object),
                    Arc::clone(&self.engine),
                    self.generation,
                );
                self.settle();
                return engine.falsified(&object, generation);
            }
            Some(Err(error)) => self.engine.unkept(&self.layer.digest, &self.object, &error),
            None => {}
        }
        let engine = Arc::clone(&self.engine);
        let held = Held {
            object: Arc::clone(&self.object),
            chunk,
            generation: self.generation,
            data,
        };
        self.settle();
        engine.hold(held);
    }

    /// The chunk is all of the object, and the store has it.
    pub(super) fn kept(self) {
        {
            let mut state = lock(&self.object.state);
            if state.generation != self.generation {
                drop(state);
                return self.settle();
            }
            state.failures = 0;
            state.progress = Some(Instant::now());
        }
        self.landed(true, &Backing::Nothing);
    }

    /// The chunk is on disk, as far as is known: reads and hashes it. If it is not right, dropping the claim
    /// lets the reads that wait fetch it.
    pub(super) fn verify(self) {
        let backing = lock(&self.object.state).backing.clone();
        let Some((_, chunk)) = self.layer.chunk(self.position) else {
            return;
        };
        // Chunks that were counted as here before have had their completion.
        let was_absent = matches!(&backing, Backing::Partial(partial) if partial.absent() > 0);
        let checked = match &backing {
            Backing::Partial(partial) => match partial.verify(self.chunk() as usize) {
                Ok(Some(bytes)) => Ok(Checked::Right(bytes)),
                Ok(None) => return,
                Err(error) => Err(error),
            },
            Backing::Pending => self.engine.store.read_pending(&self.object.digest, chunk),
            Backing::Unknown | Backing::Nothing | Backing::Unkept | Backing::Complete(_) => return,
        };
        match checked {
            Ok(Checked::Right(bytes)) => self.found(bytes, &backing, was_absent),
            Ok(Checked::Wrong) => {
                let (object, engine, generation) = (
                    Arc::clone(&self.object),
                    Arc::clone(&self.engine),
                    self.generation,
                );
                tracing::error!(
                    file = %object.describe(), layer = %self.layer.digest, object = %object.digest,
                    "the table of contents gives this file a chunk that it does not have"
                );
                self.settle();
                engine.falsified(&object, generation);
            }
            Ok(Checked::Lost) => {
                let (object, engine) = (Arc::clone(&self.object), Arc::clone(&self.engine));
                self.settle();
                engine.lost(&object);
            }
            Err(error) => {
                tracing::error!(object = %self.object.digest, %error, "cannot verify what is here of an object");
            }
        }
    }

    /// The chunk was on disk, and these bytes of it are right. `was_absent` says that chunks of the object
    /// were missing or unverified before.
    fn found(self, bytes: Vec<u8>, backing: &Backing, was_absent: bool) {
        let chunk = self.chunk();
        {
            let mut state = lock(&self.object.state);
            if state.generation != self.generation {
                drop(state);
                return self.settle();
            }
            state.flights.insert(chunk, Flight::Writing(Arc::new(bytes)));
        }
        self.engine.arrived(&self.object, chunk);
        let last = was_absent && matches!(backing, Backing::Partial(partial) if partial.absent() == 0);
        self.landed(last, backing);
    }

    /// The bytes were written; with `last`, all of the object was.
    fn landed(self, last: bool, backing: &Backing) {
        let (object, engine) = (Arc::clone(&self.object), Arc::clone(&self.engine));
        let (chunk, generation) = (self.chunk(), self.generation);
        self.settle();
        engine.landed(&object, chunk, generation, last, backing);
    }

    /// The bytes that came are not the chunk's. They may have been damaged on the way once, and another source may have good ones;
    /// twice is an error for the reads that wait, unless images disagree and another chunk list is left to try.
    pub(super) fn wrong(self, reason: &str) {
        let chunk = self.chunk();
        let (file, digest) = match self.layer.chunk(self.position) {
            Some((file, chunk)) => (file.path.to_string(), chunk.digest.to_string()),
            None => (String::new(), String::new()),
        };
        let (mut failed, mut over, mut again) = (Vec::new(), Vec::new(), false);
        {
            let mut state = lock(&self.object.state);
            if state.generation == self.generation {
                state.flights.remove(&chunk);
                state.failures = state.failures.saturating_add(1);
                let waits = |waiter: &Waiter| waiter.missing.contains(&chunk);
                if !state.waiters.iter().any(waits) {
                    state.wrong.remove(&chunk);
                } else if state.wrong.insert(chunk) {
                    again = true;
                } else if state.wrong_turns + 1 < state.choices() && state.turn() {
                    state.wrong_turns += 1;
                    over = std::mem::take(&mut state.waiters);
                } else {
                    state.wrong_turns = 0;
                    state.wrong.remove(&chunk);
                    (failed, state.waiters) = std::mem::take(&mut state.waiters).into_iter().partition(waits);
                }
                if !again {
                    state.rest();
                }
            }
        }
        if again {
            tracing::warn!(%file, layer = %self.layer.digest, chunk = %digest, reason, "a chunk is damaged; fetching it again");
        } else {
            tracing::error!(%file, layer = %self.layer.digest, chunk = %digest, reason, "a chunk does not match its digest");
        }
        let (object, engine) = (Arc::clone(&self.object), Arc::clone(&self.engine));
        self.settle();
        fail(failed);
        engine.start_over(&object, over);
        if again {
            engine.demand(&object, chunk);
        }
    }
}

impl Claim {
    /// The file is not the run of zeros that its chunk list calls it. One look at so many bytes is enough: that list is not used again,
    /// whoever has it; another one may tell the truth.
    pub(super) fn false_zeros(self) {
        let (object, engine, generation) = (
            Arc::clone(&self.object),
            Arc::clone(&self.engine),
            self.generation,
        );
        tracing::error!(
            file = %object.describe(), layer = %self.layer.digest, object = %object.digest,
            "the table of contents calls this file a run of zeros, but those have another digest"
        );
        self.settle();
        engine.falsified(&object, generation);
    }

    /// The bytes are right, but the store could not take them. The reads that wait fail; later ones try again.
    pub(super) fn not_kept(self, error: &peel_store::Error) {
        let chunk = self.chunk();
        tracing::error!(
            file = %self.object.describe(), object = %self.object.digest, %error,
            "cannot keep a file of zeros in the store; see that its disk has room and no errors"
        );
        let failed = {
            let mut state = lock(&self.object.state);
            if state.generation != self.generation {
                // The reads wait for another list's chunks.
                drop(state);
                return self.settle();
            }
            state.flights.remove(&chunk);
            let (failed, waiting) = std::mem::take(&mut state.waiters)
                .into_iter()
                .partition(|waiter: &Waiter| waiter.missing.contains(&chunk));
            state.waiters = waiting;
            state.rest();
            failed
        };
        self.settle();
        fail(failed);
    }
}

impl Engine {
    /// The store did not take fetched bytes of an object: they stay in memory for now.
    pub(super) fn unkept(&self, layer: &Digest, object: &Object, error: &peel_store::Error) {
        let now = Instant::now();
        if error.is_io() {
            self.shelf.failed(now);
        }
        if let Some(left_out) = self.quiet.may_say("keep", layer, now) {
            tracing::error!(
                object = %object.digest, %layer, %error, left_out,
                "cannot keep fetched bytes in the store; they are served from memory"
            );
        }
    }

    /// Answers the reads for which this chunk was the last one.
    pub(super) fn arrived(self: &Arc<Self>, object: &Arc<Object>, chunk: u32) {
        let ready: Vec<(Waiter, Option<Snapshot>)> = {
            let mut state = lock(&object.state);
            for waiter in &mut state.waiters {
                waiter.missing.remove(&chunk);
            }
            let (ready, waiting) = std::mem::take(&mut state.waiters)
                .into_iter()
                .partition(|waiter: &Waiter| waiter.missing.is_empty() && !waiter.whole);
            state.waiters = waiting;
            ready
                .into_iter()
                .map(|waiter| {
                    let snapshot = state.snapshot(waiter.offset, waiter.length);
                    (waiter, snapshot)
                })
                .collect()
        };
        self.answer_all(object, ready);
    }

    fn answer_all(self: &Arc<Self>, object: &Arc<Object>, ready: Vec<(Waiter, Option<Snapshot>)>) {
        for (waiter, snapshot) in ready {
            match snapshot {
                Some(snapshot) => self.answer(object, &snapshot, waiter.offset, waiter.length, waiter.answer),
                // A chunk that was here has gone again (a full disk): the read starts over.
                None => self.read_until(
                    object,
                    waiter.offset,
                    waiter.length,
                    waiter.deadline,
                    waiter.answer,
                ),
            }
        }
    }

    /// The object's bytes are not what the chunk list of that generation promised: another list may tell the truth.
    pub(super) fn falsified(self: &Arc<Self>, object: &Arc<Object>, generation: u32) {
        let waiters = {
            let mut state = lock(&object.state);
            if state.generation == generation {
                state.falsify();
            }
            std::mem::take(&mut state.waiters)
        };
        if let Some(events) = self.events() {
            events.invalidate_later(object.number);
        }
        self.start_over(object, waiters);
    }

    /// All of the object is verified and written, by the list of that generation: it is pending, or an object
    /// already.
    pub(super) fn pended(self: &Arc<Self>, object: &Arc<Object>, generation: u32) {
        if self.store.has_object(&object.digest) {
            return self.completed(object);
        }
        let size = self.store.pending_size(&object.digest);
        let (waiters, corrected) = {
            let mut state = lock(&object.state);
            if state.generation != generation || matches!(state.backing, Backing::Complete(_)) {
                return;
            }
            state.backing = Backing::Pending;
            state.proven = state.list;
            state.wrong.clear();
            state.unkept = false;
            let corrected = size.is_some_and(|size| object.settle_size(&mut state, size));
            // Those that waited for the whole need not wait for the disk.
            (std::mem::take(&mut state.waiters), corrected)
        };
        if let (true, Some(events)) = (corrected, self.events()) {
            events.invalidate_later(object.number);
        }
        self.start_over_later(object, waiters);
    }

    /// The disk has lost what was pending of the object, or chunks of it: the reads that wait start over.
    pub(crate) fn lost(self: &Arc<Self>, object: &Arc<Object>) {
        let waiters = {
            let mut state = lock(&object.state);
            if matches!(state.backing, Backing::Complete(_)) {
                return;
            }
            state.change_list();
            std::mem::take(&mut state.waiters)
        };
        self.start_over_later(object, waiters);
    }

    /// The disk has confirmed more of what was written.
    pub(crate) fn confirmed(&self) {
        self.recent.tidy();
    }

    /// The object stands in the store.
    pub(crate) fn completed(self: &Arc<Self>, object: &Arc<Object>) {
        let open = lock(&object.state).opens > 0;
        let file = if open {
            self.store.open_object(&object.digest).ok().flatten()
        } else {
            None
        };
        let size = self.store.object_size(&object.digest);
        let (ready, corrected) = {
            let mut state = lock(&object.state);
            let corrected = size.is_some_and(|size| object.settle_size(&mut state, size));
            state.backing = Backing::Complete(file.map(Arc::new));
            state.flights.clear();
            state.recent.clear();
            state.wrong.clear();
            state.wrong_turns = 0;
            state.unkept = false;
            let waiters = std::mem::take(&mut state.waiters);
            let ready = waiters
                .into_iter()
                .map(|waiter| (waiter, Some(Snapshot::complete(&state.backing))))
                .collect();
            (ready, corrected)
        };
        if let (true, Some(events)) = (corrected, self.events()) {
            events.invalidate_later(object.number);
        }
        self.answer_all(object, ready);
        if object.seen.load(Ordering::Acquire)
            && let Some(events) = self.events()
        {
            events.completed();
        }
    }
}

/// Whether the store has found that the chunks do not make up the object.
pub(super) fn is_false(error: &peel_store::Error) -> bool {
    use peel_store::Error::{DigestMismatch, Discarded};
    matches!(error, DigestMismatch { .. } | Discarded(_))
}
