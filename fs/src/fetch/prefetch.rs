//! Prefetch: the prioritized bytes of an image's layers, in the order in which its start reads them, without anybody
//! asking for them.
//!
//! What can be requested before the indexes are known is the matter of [`super::early`].

use std::ops::Range;
use std::sync::Arc;

use super::Engine;
use super::decode::Lane;
use super::layer::Layer;

/// Size of the first request: its bytes are wanted soonest.
pub(super) const FIRST: u64 = 256 << 10;
/// Largest request. The requests that run at once lie side by side in the blob, so small ones keep the order; at
/// 500 Mbit/s shared by four, 2 MiB take 130 ms, several times the pause between two requests.
pub(super) const LARGEST: u64 = 2 << 20;
/// The prioritized bytes of one layer, or the next part of them.
#[derive(Debug, Clone)]
pub(crate) struct Segment {
    /// The layer.
    pub(crate) layer: Arc<Layer>,
    /// Bytes of its blob.
    pub(crate) range: Range<u64>,
}

impl Engine {
    /// Fetches the segments in order, until the layers are closed.
    pub(crate) async fn prefetch(self: &Arc<Self>, segments: Vec<Segment>) {
        let mut window = FIRST;
        for Segment { layer, range } in segments {
            let mut streams = layer.streams_in(&range);
            while !streams.is_empty() && !layer.is_closed() && !self.is_stopping() {
                // Reads bring what they need; more would push out what waits for them.
                if self.shelf.is_full() {
                    tracing::debug!(layer = %layer.digest, "no prefetch: the store takes nothing, and memory is used up");
                    return;
                }
                let Some(slot) = self.slot(Lane::Prefetch, layer.image, &layer.blob).await else {
                    return;
                };
                // Claims look at the disk, and the threads of the network have reads to serve.
                let (engine, of, among) = (Arc::clone(self), Arc::clone(&layer), streams.clone());
                let claiming = self
                    .handle
                    .spawn_blocking(move || engine.claim_run(&of, among, window, None));
                let Ok(Some(run)) = claiming.await else {
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
        tracing::debug!("all of the prefetch is requested");
    }
}
