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
