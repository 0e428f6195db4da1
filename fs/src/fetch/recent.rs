//! Verified chunks that stay in memory for a while, because the disk has not confirmed them: whoever reads on
//! in a chunk need not wait until all of it is hashed again.
//!
//! Called by [`Engine::landed`](super::Engine::landed), which puts a chunk into its object's state first, and by
//! [`crate::settle`] after a sync. [`super::shelf`] is another memory: what the disk did not take is there, holds
//! its partial object open and is written later, so it must not be pushed out by what was written. What must hold: the bytes of all objects together stay within a limit; no lock is held
//! inside another.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use crate::lock;
use crate::object::Object;

/// Bytes of chunks that are kept, of all objects; one chunk may be larger. Two seconds of a fast link.
const LIMIT: usize = 64 << 20;
/// Bytes that a chunk counts for besides its own: its place in the lists, and what its allocations take. A bound too on the number of
/// chunks, which may have one byte each.
const OVERHEAD: usize = 512;

/// The chunks that are kept, the oldest first.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<Kept>);

#[derive(Debug, Default)]
struct Kept {
    chunks: VecDeque<Chunk>,
    bytes: usize,
}

#[derive(Debug)]
struct Chunk {
    object: Arc<Object>,
    index: u32,
    bytes: usize,
}

impl Recent {
    /// A chunk was put into its object's state. Older ones go if there are too many bytes.
    pub(super) fn keep(&self, object: &Arc<Object>, index: u32, bytes: usize) {
        let mut gone = Vec::new();
        let bytes = bytes.saturating_add(OVERHEAD);
        {
            let mut kept = lock(&self.0);
            kept.bytes += bytes;
            kept.chunks.push_back(Chunk {
                object: Arc::clone(object),
                index,
                bytes,
            });
            while kept.bytes > LIMIT && kept.chunks.len() > 1 {
                let Some(chunk) = kept.chunks.pop_front() else {
                    break;
                };
                kept.bytes -= chunk.bytes;
                gone.push(chunk);
            }
        }
        for chunk in gone {
            let mut state = lock(&chunk.object.state);
            state.recent.remove(&chunk.index);
            state.rest();
        }
    }

    /// Lets go of what the disk has confirmed.
    pub(super) fn tidy(&self) {
        let kept = std::mem::take(&mut *lock(&self.0));
        for chunk in kept.chunks {
            let is_needed = {
                let mut state = lock(&chunk.object.state);
                if state.is_confirmed(chunk.index) {
                    state.recent.remove(&chunk.index);
                }
                state.recent.contains_key(&chunk.index)
            };
            if is_needed {
                let mut kept = lock(&self.0);
                kept.bytes += chunk.bytes;
                kept.chunks.push_back(chunk);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::object::Table;

    #[test]
    fn small_chunks_are_bounded_in_number() {
        let table = Table::default();
        let number = table.add_all([(&peel_image::Digest::EMPTY, 1)].into_iter())[0];
        let object = table.get(number).unwrap();
        let recent = Recent::default();
        let most = LIMIT / OVERHEAD;
        for (index, _) in (0..).zip(0..most + 10) {
            lock(&object.state).recent.insert(index, Arc::default());
            recent.keep(&object, index, 0);
        }
        assert_eq!(lock(&recent.0).chunks.len(), most);
        let state = lock(&object.state);
        assert_eq!(state.recent.len(), most);
        assert_eq!(state.recent.keys().next(), Some(&10), "the oldest go");
    }
}
