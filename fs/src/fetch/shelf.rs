//! Chunks that the disk did not take, because it is full, read-only or fails: they stay in memory, so that what was fetched is served
//! and not fetched again.
//!
//! Used by [`super::deliver`]. What must hold: the memory is bounded, the oldest goes first. While the disk takes nothing, it is
//! asked only now and then; once it takes something, what is held here is written, and stays in memory like all that the disk has not
//! confirmed ([`super::recent`]).

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::Engine;
use super::complete::Completion;
use super::deliver::is_false;
use crate::lock;
use crate::object::{Backing, Flight, Object, Presence, Source};

/// Bytes that are held. One chunk may exceed it.
const BYTES_MAX: usize = 64 << 20;
/// Chunks that are held: each may keep a partial object, with two descriptors, open.
const CHUNKS_MAX: usize = 4096;
/// Pause before the disk is asked again: doubles from the first to the last.
const PAUSE_FIRST: Duration = Duration::from_secs(1);
const PAUSE_LAST: Duration = Duration::from_secs(8);

/// What is held, and when the disk is asked again.
#[derive(Debug, Default)]
pub(super) struct Shelf(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    held: VecDeque<Held>,
    bytes: usize,
    /// Attempts that failed since the last one that did not.
    failures: u32,
    /// No attempt before that.
    again: Option<Instant>,
}

/// A verified chunk that is in memory only.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) object: Arc<Object>,
    pub(super) chunk: u32,
    /// Generation of the object's chunk list that it belongs to.
    pub(super) generation: u32,
    pub(super) data: Arc<Vec<u8>>,
}

impl Shelf {
    /// Whether the disk may be asked to take something.
    pub(super) fn may_keep(&self, now: Instant) -> bool {
        lock(&self.0).again.is_none_or(|again| now >= again)
    }

    /// Whether so much is held that more would push out what nobody has read.
    pub(super) fn is_full(&self) -> bool {
        let state = lock(&self.0);
        state.bytes >= BYTES_MAX / 2 || state.held.len() >= CHUNKS_MAX / 2
    }

    /// The disk took something.
    pub(super) fn kept(&self) {
        let mut state = lock(&self.0);
        (state.failures, state.again) = (0, None);
    }

    /// The disk did not take something.
    pub(super) fn failed(&self, now: Instant) {
        let mut state = lock(&self.0);
        let pause = PAUSE_FIRST
            .saturating_mul(1 << state.failures.min(8))
            .min(PAUSE_LAST);
        state.failures = state.failures.saturating_add(1);
        state.again = Some(now + pause);
    }

    /// Whether something is held that the disk may be asked to take.
    pub(super) fn has_work(&self, now: Instant) -> bool {
        !lock(&self.0).held.is_empty() && self.may_keep(now)
    }

    /// How many chunks are held.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        lock(&self.0).held.len()
    }

    /// Holds a chunk; returns those that have to go for it.
    fn add(&self, held: Held) -> Vec<Held> {
        let mut state = lock(&self.0);
        let mut gone = Vec::new();
        state.bytes += held.data.len();
        state.held.push_back(held);
        while state.held.len() > 1 && (state.bytes > BYTES_MAX || state.held.len() > CHUNKS_MAX) {
            gone.extend(state.pop());
        }
        gone
    }

    /// Takes the oldest chunk, if the disk may be asked to take it.
    fn next(&self, now: Instant) -> Option<Held> {
        let mut state = lock(&self.0);
        if state.again.is_some_and(|again| now < again) {
            return None;
        }
        state.pop()
    }

    /// Gives one back that the disk still does not take. Others are tried before it.
    fn put_back(&self, held: Held) {
        let mut state = lock(&self.0);
        state.bytes += held.data.len();
        state.held.push_back(held);
    }
}

impl State {
    fn pop(&mut self) -> Option<Held> {
        let held = self.held.pop_front()?;
        self.bytes -= held.data.len();
        Some(held)
    }
}

impl Held {
    /// Whether reads are answered from it.
    fn is_used(&self) -> bool {
        let state = lock(&self.object.state);
        let here = match state.flights.get(&self.chunk) {
            Some(Flight::Writing(data)) => Arc::ptr_eq(data, &self.data),
            Some(Flight::Claimed) | None => false,
        };
        here && state.generation == self.generation
    }

    /// Whether nobody can ask for it: no image brings the object, and nobody has it open.
    fn is_orphan(&self) -> bool {
        let state = lock(&self.object.state);
        state.opens == 0 && state.source().is_none()
    }
}

impl Engine {
    /// Keeps a chunk in memory that the disk did not take; reads are answered from there.
    pub(super) fn hold(&self, held: Held) {
        for gone in self.shelf.add(held) {
            self.let_go(&gone);
        }
    }

    /// The chunk is not in memory any more.
    fn let_go(&self, held: &Held) {
        if held.is_used() {
            let mut state = lock(&held.object.state);
            state.flights.remove(&held.chunk);
            state.rest();
        }
    }

    /// Writes what is held, for as long as the disk takes it. Called now and then, from a thread that may wait for the disk.
    pub(super) fn keep_held(self: &Arc<Self>) {
        while let Some(held) = self.shelf.next(Instant::now()) {
            if self.is_stopping() {
                return;
            }
            if !held.is_used() {
                continue;
            }
            match self.keep(&held) {
                Ok(Some((last, backing))) => {
                    self.shelf.kept();
                    self.landed(&held.object, held.chunk, held.generation, last, &backing);
                }
                // The images that could use it are gone.
                Ok(None) if held.is_orphan() => self.let_go(&held),
                Ok(None) => return self.shelf.put_back(held),
                Err(error) if is_false(&error) => self.falsified(&held.object, held.generation),
                Err(error) => {
                    tracing::debug!(object = %held.object.digest, %error, "the disk still does not take fetched bytes");
                    if error.is_io() {
                        self.shelf.failed(Instant::now());
                    }
                    return self.shelf.put_back(held);
                }
            }
        }
    }

    /// Writes a chunk to the store. Returns whether the object is here in full then, and as what; `None` when the store has no place
    /// for it.
    fn keep(&self, held: &Held) -> Result<Option<(bool, Backing)>, peel_store::Error> {
        let source = lock(&held.object.state).source();
        self.look(&held.object, source.as_ref().and_then(Source::file))?;
        let backing = {
            let state = lock(&held.object.state);
            // Of another chunk list it may be a chunk with other bytes.
            if state.generation != held.generation {
                return Ok(None);
            }
            state.backing.clone()
        };
        let last = match &backing {
            Backing::Partial(partial) => partial.write(held.chunk as usize, &held.data)?,
            Backing::Nothing => {
                self.store.add_verified(&held.object.digest, &held.data)?;
                true
            }
            Backing::Unknown | Backing::Unkept => return Ok(None),
            Backing::Pending | Backing::Complete(_) => false,
        };
        Ok(Some((last, backing)))
    }

    /// A chunk was written; with `last`, all of the object was. It stays in memory for a while, until the disk has confirmed it.
    pub(super) fn landed(
        self: &Arc<Self>,
        object: &Arc<Object>,
        chunk: u32,
        generation: u32,
        last: bool,
        backing: &Backing,
    ) {
        match backing {
            Backing::Partial(partial) if last && !partial.is_complete() => {
                self.finish(Completion::new(self, object, partial, generation));
            }
            Backing::Partial(_) => {}
            _ if last => self.pended(object, generation),
            _ => {}
        }
        let kept = {
            let mut state = lock(&object.state);
            if state.generation != generation {
                return;
            }
            let kept = match state.flights.remove(&chunk) {
                // A read of the whole waits for what is on disk.
                Some(Flight::Writing(bytes))
                    if !state.is_confirmed(chunk)
                        && (!state.strict || state.has(chunk) != Presence::Missing) =>
                {
                    let length = bytes.len();
                    state.recent.insert(chunk, bytes);
                    Some(length)
                }
                _ => None,
            };
            state.rest();
            kept
        };
        if let Some(length) = kept {
            self.recent.keep(object, chunk, length);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::Table;

    #[test]
    fn what_is_held_is_bounded_and_the_oldest_goes_first() {
        let table = Table::default();
        let number = table.add_all([(&peel_image::Digest::EMPTY, 1)].into_iter())[0];
        let object = table.get(number).unwrap();
        let held = |chunk, bytes: usize| Held {
            object: Arc::clone(&object),
            chunk,
            generation: 0,
            data: Arc::new(vec![0; bytes]),
        };
        let shelf = Shelf::default();
        let gone = |held| shelf.add(held).iter().map(|held| held.chunk).collect::<Vec<_>>();
        assert_eq!(gone(held(0, BYTES_MAX / 2)), [0; 0]);
        assert!(
            shelf.is_full(),
            "what comes unasked for would push out what is read"
        );
        assert_eq!(gone(held(1, BYTES_MAX / 2)), [0; 0]);
        assert_eq!(gone(held(2, 1)), [0]);
        assert_eq!(gone(held(3, 2 * BYTES_MAX)), [1, 2], "one may be larger");
        assert_eq!(gone(held(4, 0)), [3]);
        for chunk in 5..5 + u32::try_from(CHUNKS_MAX).unwrap() {
            shelf.add(held(chunk, 0));
        }
        assert_eq!(lock(&shelf.0).held.len(), CHUNKS_MAX);
    }

    #[test]
    fn a_full_disk_is_asked_ever_more_rarely() {
        let (shelf, start) = (Shelf::default(), Instant::now());
        assert!(shelf.may_keep(start));
        shelf.failed(start);
        assert!(!shelf.may_keep(start) && shelf.may_keep(start + PAUSE_FIRST));
        for _ in 0..40 {
            shelf.failed(start);
        }
        assert!(!shelf.may_keep(start + PAUSE_LAST / 2) && shelf.may_keep(start + PAUSE_LAST));
        shelf.kept();
        assert!(shelf.may_keep(start));
    }
}
