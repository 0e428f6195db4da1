//! Chunks that a registry will not give: it says so (401, 404, an answer to another range), or wants a pause that is longer than reads
//! wait. [`super::transfer`] tells; reads that wait fail at once then, and the next read asks again.
//!
//! What must hold: no read fails while another layer may have the bytes. A source that refused is left out until all have refused.

use std::time::Instant;

use super::claim::Claim;
use super::{Events, fail};
use crate::lock;
use crate::object::{State, Waiter};

impl Claim {
    /// The chunk will not come from this layer before `until`, or not at all. Reads that wait for it and have no other source fail; those
    /// with more time than that go on waiting.
    pub(super) fn refused(self, until: Option<Instant>) {
        let chunk = self.chunk();
        // Those that are known but have not been read yet may have it.
        let more = self.engine.events().is_some_and(Events::registering);
        let failed = {
            let mut state = lock(&self.object.state);
            let refused = state.generation == self.generation && state.refuse(&self.layer);
            // Where images disagree about the chunks, the others' chunks have their turn.
            if refused && !more && state.choices() < 2 {
                hopeless(&mut state, chunk, until)
            } else {
                Vec::new()
            }
        };
        if !failed.is_empty() {
            tracing::debug!(object = %self.object.digest, chunk, reads = failed.len(), "reads fail: the chunk was refused");
        }
        // The claim goes first, so that a read that comes at once makes one of its own.
        drop(self);
        fail(failed);
    }
}

/// Takes the reads that wait for the chunk and cannot wait until then.
fn hopeless(state: &mut State, chunk: u32, until: Option<Instant>) -> Vec<Waiter> {
    let (failed, waiting) = std::mem::take(&mut state.waiters)
        .into_iter()
        .partition(|waiter| {
            waiter.missing.contains(&chunk) && until.is_none_or(|until| waiter.deadline <= until)
        });
    state.waiters = waiting;
    failed
}
