//! Moves runs of streams from a registry to the decoders: one request each, several at once, each stream handed on
//! as soon as its last byte is here.
//!
//! Memory is bounded: a transfer takes a permit for all its bytes before its request and needs nothing more to end, so
//! transfers cannot block each other half-way. The permit is given back when the last stream is decoded.
//!
//! Slots and memory are shared out by registry and by image ([`super::share`]).

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use peel_registry::Blob;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::Engine;
use super::assemble::{Assembler, Ready};
use super::claim::Run;
use super::decode::{Job, Lane};
use super::layer::Layer;
use super::share::{Grant, Limits, Permit};

/// Requests of reads that wait at once, for each registry, and of one image. Each is one round trip of at most a few MiB; a page fault storm of many threads
/// should not open hundreds of connections.
const DEMAND_SLOTS: u32 = 24;
const DEMAND_SLOTS_OF_IMAGE: u32 = 16;
/// Requests of prefetches at once, for each registry, and of one image. A few connections fill a link that one of them, still in slow start or limited by
/// the far end, does not; more would spread the bandwidth over bytes that are needed later.
const PREFETCH_SLOTS: u32 = 5;
pub(super) const PREFETCH_SLOTS_OF_IMAGE: u32 = 4;
/// Bytes of one request; a longer run (a single huge chunk) is split.
const PART: u64 = 8 << 20;
/// Parts of one run that are fetched at once.
const PARTS: usize = 4;
/// Longest silence of a body before its transfer is given up. The registry client gives up by itself; this only
/// guards against one that does not.
const SILENCE_MAX: Duration = Duration::from_secs(300);

/// What requests of reads may use.
pub(super) fn demand() -> Limits {
    Limits::new(DEMAND_SLOTS, DEMAND_SLOTS_OF_IMAGE)
}

/// What requests of prefetches may use.
pub(super) fn prefetch() -> Limits {
    Limits::new(PREFETCH_SLOTS, PREFETCH_SLOTS_OF_IMAGE)
}

impl Engine {
    fn limits(&self, lane: Lane) -> &Limits {
        match lane {
            Lane::Demand => &self.demand,
            Lane::Prefetch => &self.prefetch,
        }
    }

    /// A slot of the lane for a request of this blob, which is one of the image.
    pub(super) async fn slot(&self, lane: Lane, image: u64, blob: &Blob) -> Option<Grant> {
        self.limits(lane).slot(blob.registry(), image).await
    }

    /// Memory of the lane for so many bytes of this blob, or all that the image may have.
    pub(super) async fn memory(&self, lane: Lane, image: u64, blob: &Blob, bytes: u64) -> Option<Permit> {
        let memory = self.limits(lane).memory(blob.registry(), image, bytes);
        memory.await.map(Arc::new)
    }

    /// Fetches a run in the background.
    pub(super) fn spawn_transfer(self: &Arc<Self>, run: Run, lane: Lane) {
        let engine = Arc::clone(self);
        self.handle.spawn(async move {
            let Some(slot) = engine.slot(lane, run.layer.image, &run.layer.blob).await else {
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
        let memory = self.memory(lane, layer.image, &layer.blob, range.end - range.start);
        let Some(permit) = memory.await else {
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
            if let Some(left_out) = self.quiet.may_say("fetch", &layer.digest, Instant::now()) {
                tracing::warn!(
                    layer = %layer.digest, from = range.start, to = range.end, %error, left_out, "cannot fetch a range"
                );
            }
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
