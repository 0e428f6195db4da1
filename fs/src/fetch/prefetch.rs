//! Prefetch: the prioritized bytes of an image's layers, in the order in which its start reads them, without anybody
//! asking for them.
//!
//! The first bytes of a layer may be requested before its index is known ([`Early`]); they are held until they can
//! be cut into streams and verified.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use peel_registry::Blob;
use tokio::sync::oneshot;

use super::Engine;
use super::assemble::Assembler;
use super::claim::Run;
use super::decode::Lane;
use super::layer::Layer;
use super::transfer::next;

/// Size of the first request: its bytes are wanted soonest.
const FIRST: u64 = 256 << 10;
/// Largest request. The requests that run at once lie side by side in the blob, so small ones keep the order; at
/// 500 Mbit/s shared by four, 2 MiB take 130 ms, several times the pause between two requests.
const LARGEST: u64 = 2 << 20;
/// Most bytes of a layer that are requested before its index is known.
pub(crate) const EARLY_MAX: u64 = 2 << 20;

/// The prioritized bytes of one layer, or the next part of them.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// The layer.
    pub(crate) layer: Arc<Layer>,
    /// Bytes of its blob.
    pub(crate) range: Range<u64>,
}

/// The beginning of a layer's prefetch, under way before the index is known. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Early {
    known: Option<oneshot::Sender<Arc<Layer>>>,
    end: u64,
}

impl Early {
    /// Requests the first bytes of `[0, end)` of a blob.
    pub(crate) fn start(engine: &Arc<Engine>, blob: Blob, end: u64) -> Self {
        let (known, layer) = oneshot::channel();
        let end = end.min(EARLY_MAX).min(blob.size());
        let engine_of_task = Arc::clone(engine);
        engine
            .handle
            .spawn(async move { engine_of_task.early(blob, end, layer).await });
        Self {
            known: Some(known),
            end,
        }
    }

    /// The index is known: what was received is used from now on. Returns the end of the requested bytes; streams that
    /// begin before it are taken care of.
    pub(crate) fn known(mut self, layer: &Arc<Layer>) -> u64 {
        match self.known.take().map(|known| known.send(Arc::clone(layer))) {
            Some(Ok(())) => self.end,
            // The request failed before: nothing was received.
            _ => 0,
        }
    }
}

impl Engine {
    /// Fetches the segments in order, until the layers are closed.
    pub(crate) async fn prefetch(self: &Arc<Self>, segments: Vec<Segment>) {
        let mut window = FIRST;
        for Segment { layer, range } in segments {
            let mut streams = layer.streams_in(&range);
            while !streams.is_empty() && !layer.is_closed() && !self.is_stopping() {
                let Some(slot) = self.slot(Lane::Prefetch).await else {
                    return;
                };
                let Some(run) = self.claim_run(&layer, streams.clone(), window, None) else {
                    break;
                };
                let next = layer.streams_in(&(run.range.start..run.range.end)).end;
                streams.start = next.max(streams.start + 1).min(streams.end);
                window = (window * 2).min(LARGEST);
                let engine = Arc::clone(self);
                self.handle.spawn(async move {
                    engine.transfer(run, Lane::Prefetch).await;
                    drop(slot);
                });
            }
        }
    }

    async fn early(self: Arc<Self>, blob: Blob, end: u64, mut known: oneshot::Receiver<Arc<Layer>>) {
        let Some(_slot) = self.slot(Lane::Prefetch).await else {
            return;
        };
        let Some(permit) = self.memory(Lane::Prefetch, end).await else {
            return;
        };
        let mut body = match blob.stream(0..end).await {
            Ok(body) => body,
            Err(error) => {
                tracing::warn!(layer = %blob.digest(), %error, "cannot begin the prefetch");
                return;
            }
        };
        let mut held: Vec<(u64, Bytes)> = Vec::new();
        let mut offset = 0;
        let mut open = true;
        let layer = loop {
            tokio::select! {
                biased;
                layer = &mut known => match layer {
                    Ok(layer) => break layer,
                    Err(_) => return,
                },
                bytes = next(&mut body), if open => match bytes {
                    Some(Ok(bytes)) => {
                        let length = bytes.len() as u64;
                        held.push((offset, bytes));
                        offset += length;
                    }
                    Some(Err(error)) => {
                        tracing::warn!(layer = %blob.digest(), %error, "the prefetch broke off");
                        open = false;
                    }
                    None => open = false,
                },
            }
        };
        let first = layer.streams_in(&(0..end));
        let Some(run) = self.claim_early(&layer, first) else {
            return;
        };
        let last = run.range.end;
        let mut assembler = Assembler::new(run.wanted);
        for (offset, bytes) in held {
            for ready in assembler.push(offset, &bytes) {
                self.hand_on(Lane::Prefetch, &layer, ready, &permit).await;
            }
        }
        // The stream that reaches beyond the requested bytes is fetched to its end.
        loop {
            while open && !layer.is_closed() {
                match next(&mut body).await {
                    Some(Ok(bytes)) => {
                        for ready in assembler.push(offset, &bytes) {
                            self.hand_on(Lane::Prefetch, &layer, ready, &permit).await;
                        }
                        offset += bytes.len() as u64;
                    }
                    Some(Err(error)) => {
                        tracing::warn!(layer = %layer.digest, %error, "the prefetch broke off");
                        return;
                    }
                    None => open = false,
                }
            }
            if assembler.is_done() || offset >= last || layer.is_closed() {
                return;
            }
            match layer.blob.stream(offset..last).await {
                Ok(rest) => (body, open) = (rest, true),
                Err(error) => {
                    tracing::warn!(layer = %layer.digest, %error, "the prefetch broke off");
                    return;
                }
            }
        }
    }

    /// Claims all of the first streams of a layer, whatever lies between them: their bytes are on their way.
    fn claim_early(self: &Arc<Self>, layer: &Arc<Layer>, streams: Range<usize>) -> Option<Run> {
        let mut whole: Option<Run> = None;
        let mut streams = streams;
        while let Some(run) = self.claim_run(layer, streams.clone(), u64::MAX, None) {
            streams.start = layer
                .streams_in(&run.range)
                .end
                .max(streams.start + 1)
                .min(streams.end);
            match &mut whole {
                None => whole = Some(run),
                Some(whole) => {
                    whole.range.end = whole.range.end.max(run.range.end);
                    whole.wanted.extend(run.wanted);
                }
            }
        }
        whole
    }
}
