//! Claims: the right and the duty to bring a chunk. Whoever holds one delivers the bytes or drops it; a dropped claim
//! gives the chunk free and wakes up a new try if reads wait for it.

use std::ops::Range;
use std::sync::Arc;

use super::Engine;
use super::decode::{Job, Lane};
use super::layer::{Layer, Position, Stream};
use crate::lock;
use crate::object::{Flight, Object, Presence, Waiter};

/// Bytes between two streams that are cheaper to read through than to skip with a request of their own.
const GAP_MAX: u64 = 64 << 10;
/// Most streams in one request.
const RUN_MAX: usize = 4096;

/// The duty to bring one chunk.
#[derive(Debug)]
pub(crate) struct Claim {
    pub(super) engine: Arc<Engine>,
    pub(super) object: Arc<Object>,
    pub(super) layer: Arc<Layer>,
    pub(super) position: Position,
    /// Generation of the object's chunk list when the claim was made.
    pub(super) generation: u32,
    settled: bool,
}

/// What became of an attempt to claim a chunk.
#[derive(Debug)]
pub(crate) enum Claimed {
    /// It must be fetched.
    Fetch(Claim),
    /// It is on disk and must be hashed before it is answered.
    Verify(Claim),
    /// It is here, on its way, or not to be had from this layer.
    No,
}

/// A stream to fetch and the chunks that are wanted from it.
#[derive(Debug)]
pub(crate) struct Wanted {
    /// The stream.
    pub(crate) stream: Stream,
    /// The chunks.
    pub(crate) claims: Vec<Claim>,
}

/// Neighbouring streams that one request brings.
#[derive(Debug)]
pub(crate) struct Run {
    /// The layer.
    pub(crate) layer: Arc<Layer>,
    /// Bytes of its blob.
    pub(crate) range: Range<u64>,
    /// The streams, ascending.
    pub(crate) wanted: Vec<Wanted>,
}

impl Claim {
    /// Index of the chunk in its file.
    pub(super) fn chunk(&self) -> u32 {
        self.position.chunk
    }

    /// Ends the duty: the chunk was delivered or will not be.
    pub(super) fn settle(mut self) {
        self.settled = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.settled {
            return;
        }
        let chunk = self.chunk();
        let next = {
            let mut state = lock(&self.object.state);
            if state.generation != self.generation {
                return;
            }
            state.flights.remove(&chunk);
            state.failures = state.failures.saturating_add(1);
            let waited_for = state.waiters.iter().any(|waiter| waiter.missing.contains(&chunk));
            if !waited_for {
                state.rest();
                Next::Nothing
            } else if state.is_stuck() && state.turn() {
                Next::StartOver(std::mem::take(&mut state.waiters))
            } else {
                Next::Retry(state.failures)
            }
        };
        match next {
            Next::Nothing => {}
            Next::Retry(failures) => self.engine.retry(&self.object, chunk, failures),
            Next::StartOver(waiters) => self.engine.start_over_later(&self.object, waiters),
        }
    }
}

/// What becomes of a chunk whose claim was dropped.
enum Next {
    /// Nobody waits for it.
    Nothing,
    /// It is tried again after a pause that depends on the failures so far.
    Retry(u32),
    /// Another chunk list has its turn.
    StartOver(Vec<Waiter>),
}

impl Engine {
    /// Tries to claim a chunk of a layer.
    pub(crate) fn claim(self: &Arc<Self>, layer: &Arc<Layer>, position: Position) -> Claimed {
        let Some((file, _)) = layer.chunk(position) else {
            return Claimed::No;
        };
        let Some(object) = self.table.get(file.object) else {
            return Claimed::No;
        };
        if !lock(&object.state).may_use(file) {
            return Claimed::No;
        }
        if let Err(error) = self.look(&object, Some(file)) {
            tracing::error!(object = %object.digest, %error, "cannot open the object in the store");
            return Claimed::No;
        }
        let mut state = lock(&object.state);
        if layer.is_closed() || self.is_stopping() || !state.may_use(file) {
            return Claimed::No;
        }
        let presence = state.has(position.chunk);
        let claimable = match presence {
            Presence::Missing | Presence::Unverified => true,
            // It is only hashed again for a read.
            Presence::Unconfirmed => state
                .waiters
                .iter()
                .any(|waiter| waiter.missing.contains(&position.chunk)),
            Presence::Here | Presence::Coming => false,
        };
        if !claimable {
            return Claimed::No;
        }
        state.use_list(file.list);
        state.flights.insert(position.chunk, Flight::Claimed);
        let generation = state.generation;
        drop(state);
        let claim = Claim {
            engine: Arc::clone(self),
            object,
            layer: Arc::clone(layer),
            position,
            generation,
            settled: false,
        };
        if presence == Presence::Missing {
            Claimed::Fetch(claim)
        } else {
            Claimed::Verify(claim)
        }
    }

    /// Claims what is missing of a stream. Chunks that only have to be hashed are sent to the decoders.
    fn claim_stream(self: &Arc<Self>, layer: &Arc<Layer>, stream: &Stream, lane: Lane) -> Option<Wanted> {
        let mut claims = Vec::new();
        for position in layer.positions(stream) {
            match self.claim(layer, *position) {
                Claimed::Fetch(claim) => claims.push(claim),
                Claimed::Verify(claim) => self.decoders.submit(lane, Job::Verify(claim)),
                Claimed::No => {}
            }
        }
        (!claims.is_empty()).then(|| Wanted {
            stream: stream.clone(),
            claims,
        })
    }

    /// Claims missing neighbours among `streams`, ascending, until they make up `window` bytes of the blob or the next
    /// missing one is too far away. With `first`, nothing is claimed unless that stream is missing.
    pub(crate) fn claim_run(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        mut streams: Range<usize>,
        window: u64,
        first: Option<usize>,
    ) -> Option<Run> {
        let lane = if first.is_some() {
            Lane::Demand
        } else {
            Lane::Prefetch
        };
        let mut run: Option<Run> = None;
        for index in &mut streams {
            let Some(stream) = layer.streams.get(index) else {
                break;
            };
            if let Some(run) = &run {
                let full = stream.range.end > run.range.start.saturating_add(window);
                let far = stream.range.start > run.range.end.saturating_add(GAP_MAX);
                if full || far || run.wanted.len() >= RUN_MAX {
                    break;
                }
            }
            let wanted = self.claim_stream(layer, stream, lane);
            match (&mut run, wanted) {
                (Some(run), Some(wanted)) => {
                    run.range.end = run.range.end.max(wanted.stream.range.end);
                    run.wanted.push(wanted);
                }
                (None, Some(wanted)) => {
                    run = Some(Run {
                        layer: Arc::clone(layer),
                        range: wanted.stream.range.clone(),
                        wanted: vec![wanted],
                    });
                }
                (None, None) if first == Some(index) => break,
                (_, None) => {}
            }
        }
        run
    }
}
