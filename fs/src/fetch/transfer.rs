//! Moves runs of streams from a registry to the decoders: one request each, several at once, each stream handed on
//! as soon as its last byte is here.
//!
//! Memory is bounded: a transfer takes a permit for all its bytes before its request and needs nothing more to end, so
//! transfers cannot block each other half-way. The permit is given back when the last stream is decoded.
//!
//! Slots and memory are shared out by registry: requests to one that is gone or slow keep both for as long as they are
//! tried again, which is as long as a read waits at most.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use peel_registry::Blob;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::Engine;
use super::assemble::{Assembler, Ready};
use super::claim::Run;
use super::decode::{Job, Lane};
use super::layer::Layer;
use crate::lock;

/// Requests of reads that wait at once, for each registry. Each is one round trip of at most a few MiB; a page fault storm of many threads
/// should not open hundreds of connections.
const DEMAND_SLOTS: usize = 16;
/// Requests of a prefetch at once, for each registry. A few connections fill a link that one of them, still in slow start or limited by
/// the far end, does not; more would spread the bandwidth over bytes that are needed later.
pub(super) const PREFETCH_SLOTS: usize = 4;
/// Compressed bytes in flight for each lane and registry, in KiB.
const SHARE_KIB: u32 = 64 << 10;
/// Registries that are told apart at a time, in each lane; more than these share what the others leave.
const SHARES: usize = 4;
/// Bytes of one request; a longer run (a single huge chunk) is split.
const PART: u64 = 8 << 20;
/// Parts of one run that are fetched at once.
const PARTS: usize = 4;
/// Longest silence of a body before its transfer is given up. The registry client gives up by itself; this only
/// guards against one that does not.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// What one lane may use.
#[derive(Debug)]
pub(crate) struct Limits {
    slots: usize,
    /// At most [`SHARES`].
    shares: Mutex<Vec<Share>>,
}

/// What the requests to one registry may use.
#[derive(Debug, Clone)]
struct Share {
    /// Host and port; `None` for local layouts and archives.
    registry: Option<String>,
    slots: Arc<Semaphore>,
    memory: Arc<Semaphore>,
}

impl Limits {
    pub(super) fn demand() -> Self {
        Self::new(DEMAND_SLOTS)
    }

    pub(super) fn prefetch() -> Self {
        Self::new(PREFETCH_SLOTS)
    }

    fn new(slots: usize) -> Self {
        Self {
            slots,
            shares: Mutex::default(),
        }
    }

    /// Whether any bytes are in flight.
    pub(super) fn in_use(&self) -> bool {
        lock(&self.shares)
            .iter()
            .any(|share| share.memory.available_permits() < SHARE_KIB as usize)
    }

    /// The share of a registry.
    fn share(&self, registry: Option<&str>) -> Share {
        let mut shares = lock(&self.shares);
        if let Some(share) = shares.iter().find(|share| share.registry.as_deref() == registry) {
            return share.clone();
        }
        let new = || Share {
            registry: registry.map(str::to_owned),
            slots: Arc::new(Semaphore::new(self.slots)),
            memory: Arc::new(Semaphore::new(SHARE_KIB as usize)),
        };
        if shares.len() < SHARES {
            let share = new();
            shares.push(share.clone());
            return share;
        }
        if let Some(idle) = shares.iter_mut().find(|share| share.is_idle()) {
            idle.registry = registry.map(str::to_owned);
            return idle.clone();
        }
        let left = |share: &&Share| (share.slots.available_permits(), share.memory.available_permits());
        shares.iter().max_by_key(left).cloned().unwrap_or_else(new)
    }
}

impl Share {
    /// Whether nobody has or waits for anything of it: permits and waiters keep the semaphores.
    fn is_idle(&self) -> bool {
        Arc::strong_count(&self.slots) == 1 && Arc::strong_count(&self.memory) == 1
    }
}

/// The right to have bytes in flight; shared by the streams of a transfer.
pub(crate) type Permit = Arc<OwnedSemaphorePermit>;

impl Engine {
    fn limits(&self, lane: Lane) -> &Limits {
        match lane {
            Lane::Demand => &self.demand,
            Lane::Prefetch => &self.prefetch,
        }
    }

    /// A slot of the lane for a request of this blob.
    pub(super) async fn slot(&self, lane: Lane, blob: &Blob) -> Option<OwnedSemaphorePermit> {
        let slots = self.limits(lane).share(blob.registry()).slots;
        slots.acquire_owned().await.ok()
    }

    /// Memory of the lane for so many bytes of this blob, or all there is.
    pub(super) async fn memory(&self, lane: Lane, blob: &Blob, bytes: u64) -> Option<Permit> {
        let kib = u32::try_from(bytes.div_ceil(1024))
            .unwrap_or(SHARE_KIB)
            .clamp(1, SHARE_KIB);
        let memory = self.limits(lane).share(blob.registry()).memory;
        memory.acquire_many_owned(kib).await.ok().map(Arc::new)
    }

    /// Fetches a run in the background.
    pub(super) fn spawn_transfer(self: &Arc<Self>, run: Run, lane: Lane) {
        let engine = Arc::clone(self);
        self.handle.spawn(async move {
            let Some(slot) = engine.slot(lane, &run.layer.blob).await else {
                return;
            };
            engine.transfer(run, lane).await;
            drop(slot);
        });
    }

    /// Fetches a run. A failure is reported and drops the claims that are left, which frees their chunks.
    pub(super) async fn transfer(self: &Arc<Self>, run: Run, lane: Lane) {
        let Run { layer, range, wanted } = run;
        tracing::trace!(?lane, layer = %layer.digest, from = range.start, to = range.end, streams = wanted.len(), "transfer");
        let Some(permit) = self.memory(lane, &layer.blob, range.end - range.start).await else {
            return;
        };
        let (nothing, wanted): (Vec<_>, Vec<_>) = wanted
            .into_iter()
            .partition(|wanted| wanted.stream.range.is_empty());
        for wanted in nothing {
            // Decoding no bytes is what tells that the index lies about this stream.
            self.hand_on(
                lane,
                &layer,
                Ready {
                    wanted,
                    bytes: Bytes::new(),
                },
                &permit,
            )
            .await;
        }
        let mut assembler = Assembler::new(wanted);
        let result = if range.end - range.start > PART {
            self.pump_parts(&layer, range.clone(), &mut assembler, lane, &permit)
                .await
        } else {
            self.pump(&layer, range.clone(), &mut assembler, lane, &permit)
                .await
        };
        if let Err(error) = result {
            tracing::warn!(layer = %layer.digest, from = range.start, to = range.end, %error, "cannot fetch a range");
            // What is transient without a time is tried again as soon as the claims are dropped.
            if !error.is_transient() || error.retry_at().is_some() {
                for claim in assembler.into_claims() {
                    claim.refused(error.retry_at());
                }
            }
        }
    }

    /// One request, its bytes in order.
    async fn pump(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        range: Range<u64>,
        assembler: &mut Assembler,
        lane: Lane,
        permit: &Permit,
    ) -> Result<(), peel_registry::Error> {
        let mut offset = range.start;
        let mut stream = layer.blob.stream(range).await?;
        while let Some(bytes) = next(&mut stream).await {
            let bytes = bytes?;
            for ready in assembler.push(offset, &bytes) {
                self.hand_on(lane, layer, ready, permit).await;
            }
            offset += bytes.len() as u64;
            if assembler.is_done() || layer.is_closed() {
                break;
            }
        }
        Ok(())
    }

    /// Several requests side by side.
    async fn pump_parts(
        self: &Arc<Self>,
        layer: &Arc<Layer>,
        range: Range<u64>,
        assembler: &mut Assembler,
        lane: Lane,
        permit: &Permit,
    ) -> Result<(), peel_registry::Error> {
        // As many buffers as parts may wait here; the socket holds the rest back.
        let (sender, mut receiver) = mpsc::channel::<(u64, Bytes)>(PARTS);
        let layer_of_parts = Arc::clone(layer);
        let parts = async move {
            let mut running = JoinSet::new();
            let mut from = range.start;
            loop {
                while from < range.end && running.len() < PARTS {
                    let part = from..range.end.min(from + PART);
                    from = part.end;
                    let (layer, sender) = (Arc::clone(&layer_of_parts), sender.clone());
                    running.spawn(async move { Self::pump_part(&layer, part, &sender).await });
                }
                match running.join_next().await {
                    Some(Ok(Ok(()))) => {}
                    Some(Ok(Err(error))) => return Err(error),
                    // A part that was cancelled leaves its streams unfinished: their claims are dropped below.
                    Some(Err(_)) | None => return Ok(()),
                }
            }
        };
        let collect = async {
            while let Some((offset, bytes)) = receiver.recv().await {
                for ready in assembler.push(offset, &bytes) {
                    self.hand_on(lane, layer, ready, permit).await;
                }
            }
        };
        let (result, ()) = tokio::join!(parts, collect);
        result
    }

    async fn pump_part(
        layer: &Layer,
        part: Range<u64>,
        sender: &mpsc::Sender<(u64, Bytes)>,
    ) -> Result<(), peel_registry::Error> {
        let mut offset = part.start;
        let mut stream = layer.blob.stream(part).await?;
        while let Some(bytes) = next(&mut stream).await {
            let bytes = bytes?;
            let length = bytes.len() as u64;
            if layer.is_closed() || sender.send((offset, bytes)).await.is_err() {
                break;
            }
            offset += length;
        }
        Ok(())
    }

    /// Gives a whole stream to the decoders, waiting while they are busy.
    pub(super) async fn hand_on(&self, lane: Lane, layer: &Arc<Layer>, ready: Ready, permit: &Permit) {
        let Ready { wanted, bytes } = ready;
        let mut job = Job::Stream {
            layer: Arc::clone(layer),
            stream: wanted.stream,
            bytes,
            claims: wanted.claims,
            permit: Arc::clone(permit),
        };
        while let Err(refused) = self.decoders.try_submit(lane, job) {
            let Some(refused) = refused else { return };
            job = refused;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// The next bytes of a body; its end, too, when it stays silent for far too long.
pub(super) async fn next(
    stream: &mut peel_registry::ByteStream,
) -> Option<Result<Bytes, peel_registry::Error>> {
    match tokio::time::timeout(SILENCE_MAX, stream.next()).await {
        Ok(next) => next,
        Err(_) => {
            tracing::error!("a body was silent for {} s", SILENCE_MAX.as_secs());
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_registry_without_slots_leaves_the_others_theirs() {
        let limits = Limits::demand();
        let take = |registry: &str| {
            let share = limits.share(Some(registry));
            let memory = share.memory.try_acquire_many_owned(1024).ok()?;
            Some((share.slots.try_acquire_owned().ok()?, memory))
        };
        let stuck: Vec<_> = std::iter::from_fn(|| take("dead")).collect();
        assert_eq!(stuck.len(), DEMAND_SLOTS);
        assert!(limits.in_use() && take("healthy").is_some());
        drop(stuck);
        assert!(!limits.in_use());
    }

    #[test]
    fn shares_are_few_and_go_to_those_that_use_them() {
        let limits = Limits::prefetch();
        let all = u32::try_from(PREFETCH_SLOTS).unwrap();
        let mut used: Vec<_> = (0..SHARES)
            .map(|number| {
                let share = limits.share(Some(&number.to_string()));
                let slots = if number == 2 { 1 } else { all };
                share.slots.try_acquire_many_owned(slots).unwrap()
            })
            .collect();
        let guest = limits.share(Some("guest"));
        assert_eq!(guest.registry.as_deref(), Some("2"), "the one with most left");
        drop(guest);
        drop(used.remove(1));
        let heir = limits.share(Some("heir"));
        assert_eq!(heir.slots.available_permits(), PREFETCH_SLOTS);
        assert_eq!(heir.registry.as_deref(), Some("heir"));
        assert!(
            limits.share(None).registry.is_some(),
            "a share that is used was given away"
        );
        assert_eq!(lock(&limits.shares).len(), SHARES);
    }
}
