//! Prefetch before the indexes are known: the manifest says how far the prioritized bytes of its layers reach, so they can
//! be on their way together with the TOCs. Nothing of them is used before it was cut into streams and verified by
//! the index.
//!
//! One controller requests parts of the layers in the order of the prefetch, as many at once as the prefetch lane
//! allows. What arrives is held, within the lane's memory, until [`Early::known`] hands in the layer; from then on the layer's
//! parts are cut as they come, and no new ones are requested: the ordinary prefetch goes on behind them.

use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use bytes::Bytes;
use peel_registry::Blob;
use tokio::sync::Semaphore;

use super::Engine;
use super::assemble::{Assembler, Ready};
use super::claim::Run;
use super::decode::Lane;
use super::layer::Layer;
use super::prefetch::{FIRST, LARGEST};
use super::share::Permit;
use super::transfer::{PREFETCH_SLOTS_OF_IMAGE, next};
use crate::lock;

/// The beginning of an image's prefetch. Dropping it ends what has no layer by then.
#[derive(Debug)]
pub(crate) struct Early {
    layers: Vec<Arc<EarlyLayer>>,
    throttle: Arc<Semaphore>,
}

/// While somebody holds one, early parts are requested one at a time, so that TOCs, which everything waits for, have most of
/// the link.
#[derive(Debug, Clone)]
pub(crate) struct Brake(#[expect(dead_code, reason = "its drop is what counts")] Option<Arc<Release>>);

#[derive(Debug)]
struct Release(Arc<Semaphore>);

impl Drop for Release {
    fn drop(&mut self) {
        self.0.add_permits(PREFETCH_SLOTS_OF_IMAGE as usize - 1);
    }
}

#[derive(Debug)]
struct EarlyLayer {
    /// Number of the image.
    image: u64,
    blob: Blob,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// End of the requested bytes, which begin at 0.
    issued: u64,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The index is not known.
    Holding(Vec<(u64, Bytes, Permit)>),
    /// The index is known; the streams are about to be claimed.
    Claiming(Vec<(u64, Bytes, Permit)>),
    /// Bytes are cut as they come.
    Cutting(Arc<Layer>, Assembler),
    /// Nothing is wanted any more.
    Over,
}

impl Early {
    /// Begins to request the segments of an image: index into `blobs`, and bytes of that blob, which follow each other from 0.
    pub(crate) fn start(
        engine: &Arc<Engine>,
        image: u64,
        blobs: Vec<Blob>,
        segments: Vec<(usize, Range<u64>)>,
    ) -> Self {
        let layers: Vec<Arc<EarlyLayer>> = blobs
            .into_iter()
            .map(|blob| {
                Arc::new(EarlyLayer {
                    image,
                    blob,
                    state: Mutex::new(State {
                        issued: 0,
                        stage: Stage::Holding(Vec::new()),
                    }),
                })
            })
            .collect();
        let work: Vec<(Arc<EarlyLayer>, Range<u64>)> = segments
            .into_iter()
            .filter_map(|(layer, range)| Some((Arc::clone(layers.get(layer)?), range)))
            .collect();
        let throttle = Arc::new(Semaphore::new(1));
        let (engine_of_task, throttle_of_task) = (Arc::clone(engine), Arc::clone(&throttle));
        engine
            .handle
            .spawn(async move { engine_of_task.early(work, throttle_of_task).await });
        Self { layers, throttle }
    }

    /// Slows the requests down until all clones are dropped. Called once.
    pub(crate) fn brake(early: Option<&Self>) -> Brake {
        Brake(early.map(|early| Arc::new(Release(Arc::clone(&early.throttle)))))
    }

    /// The index of a layer is known: what was received of it is used from now on. Returns the end of the requested bytes;
    /// streams that begin before it are taken care of. Blocks for as long as claims take.
    pub(crate) fn known(&self, engine: &Arc<Engine>, position: usize, layer: &Arc<Layer>) -> u64 {
        let Some(early) = self.layers.get(position) else {
            return 0;
        };
        let issued = {
            let mut state = lock(&early.state);
            state.stage = match std::mem::replace(&mut state.stage, Stage::Over) {
                Stage::Holding(held) => Stage::Claiming(held),
                other => other,
            };
            state.issued
        };
        let run = engine.claim_all(layer, layer.streams_in(&(0..issued)));
        let Some(run) = run else {
            lock(&early.state).stage = Stage::Over;
            return issued;
        };
        let end = run.range.end;
        let (mut ready, open) = {
            let mut state = lock(&early.state);
            let mut assembler = Assembler::new(run.wanted);
            let mut ready = Vec::new();
            if let Stage::Claiming(held) = std::mem::replace(&mut state.stage, Stage::Over) {
                for (offset, bytes, permit) in held {
                    ready.extend(
                        assembler
                            .push(offset, &bytes)
                            .into_iter()
                            .map(|ready| (ready, Arc::clone(&permit))),
                    );
                }
            }
            let open = !assembler.is_done();
            if open {
                state.stage = Stage::Cutting(Arc::clone(layer), assembler);
            }
            (ready, open)
        };
        let (engine, layer, early) = (Arc::clone(engine), Arc::clone(layer), Arc::clone(early));
        engine.handle.clone().spawn(async move {
            for (ready, permit) in ready.drain(..) {
                engine.hand_on(Lane::Prefetch, &layer, ready, &permit).await;
            }
            // The stream that reaches beyond the requested bytes is fetched to its end.
            if open && end > issued {
                engine.early_part(&early, issued..end).await;
            }
        });
        issued
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        for layer in &self.layers {
            let mut state = lock(&layer.state);
            if let Stage::Holding(_) = state.stage {
                state.stage = Stage::Over;
            }
        }
    }
}

impl EarlyLayer {
    /// Whether more bytes may be requested; if so, they count as requested.
    fn issue(&self, part: &Range<u64>) -> bool {
        let mut state = lock(&self.state);
        let wanted = matches!(state.stage, Stage::Holding(_)) && state.issued == part.start;
        if wanted {
            state.issued = part.end;
        }
        wanted
    }

    /// Takes bytes; `None` when none are wanted any more.
    fn take(&self, offset: u64, bytes: Bytes, permit: &Permit) -> Option<(Option<Arc<Layer>>, Vec<Ready>)> {
        let mut state = lock(&self.state);
        match &mut state.stage {
            Stage::Holding(held) | Stage::Claiming(held) => {
                held.push((offset, bytes, Arc::clone(permit)));
                Some((None, Vec::new()))
            }
            Stage::Cutting(layer, assembler) => {
                let ready = assembler.push(offset, &bytes);
                let layer = Arc::clone(layer);
                if assembler.is_done() || layer.is_closed() {
                    state.stage = Stage::Over;
                }
                Some((Some(layer), ready))
            }
            Stage::Over => None,
        }
    }

    /// A part will not come: its streams cannot be completed, and their claims are given back.
    fn fail(&self) {
        lock(&self.state).stage = Stage::Over;
    }
}

impl Engine {
    async fn early(self: Arc<Self>, work: Vec<(Arc<EarlyLayer>, Range<u64>)>, throttle: Arc<Semaphore>) {
        let mut window = FIRST;
        for (layer, range) in work {
            let mut from = range.start;
            while from < range.end && !self.is_stopping() {
                let Ok(turn) = Arc::clone(&throttle).acquire_owned().await else {
                    return;
                };
                let Some(slot) = self.slot(Lane::Prefetch, layer.image, &layer.blob).await else {
                    return;
                };
                let part = from..range.end.min(from + window);
                if !layer.issue(&part) {
                    break;
                }
                from = part.end;
                window = (window * 2).min(LARGEST);
                let (engine, layer) = (Arc::clone(&self), Arc::clone(&layer));
                self.handle.spawn(async move {
                    engine.early_part(&layer, part).await;
                    drop((slot, turn));
                });
            }
        }
    }

    async fn early_part(self: &Arc<Self>, early: &Arc<EarlyLayer>, part: Range<u64>) {
        let bytes = part.end - part.start;
        let memory = self.memory(Lane::Prefetch, early.image, &early.blob, bytes);
        let Some(permit) = memory.await else {
            return;
        };
        tracing::trace!(layer = %early.blob.digest(), from = part.start, to = part.end, "early transfer");
        let mut offset = part.start;
        let mut body = match early.blob.stream(part).await {
            Ok(body) => body,
            // Then the layer is pulled whole.
            Err(error @ peel_registry::Error::NoRanges { .. }) => {
                tracing::debug!(layer = %early.blob.digest(), %error, "no prefetch");
                return early.fail();
            }
            Err(error) => {
                self.say_broken(&early.blob, &error);
                return early.fail();
            }
        };
        while let Some(bytes) = next(&mut body).await {
            let bytes = match bytes {
                Ok(bytes) => bytes,
                Err(error) => {
                    self.say_broken(&early.blob, &error);
                    return early.fail();
                }
            };
            let length = bytes.len() as u64;
            let Some((layer, ready)) = early.take(offset, bytes, &permit) else {
                return;
            };
            if let Some(layer) = layer {
                for ready in ready {
                    self.hand_on(Lane::Prefetch, &layer, ready, &permit).await;
                }
            }
            offset += length;
        }
    }

    fn say_broken(&self, blob: &Blob, error: &peel_registry::Error) {
        let layer = blob.digest();
        if let Some(left_out) = self.quiet.may_say("prefetch", &layer, Instant::now()) {
            tracing::warn!(%layer, %error, left_out, "the prefetch broke off");
        }
    }

    /// Claims all that is missing of some streams, whatever lies between them: their bytes are on their way.
    fn claim_all(self: &Arc<Self>, layer: &Arc<Layer>, mut streams: Range<usize>) -> Option<Run> {
        let mut whole: Option<Run> = None;
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
