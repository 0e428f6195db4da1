//! The fetch engine: brings chunks from the registries, whoever asks, each one once.
//!
//! ```text
//! read (FUSE thread)          prefetch (network thread)
//!     | missing chunk              | the next streams of a profile
//!     v                            v
//!   claim ----- a run of streams, one request -----> transfer (network threads)
//!                                                        | whole streams
//!                                                        v
//!   reads that wait <---- verified bytes ----------- decode (decode threads) ----> store
//! ```
//!
//! A chunk that is claimed is fetched by one transfer; whoever else wants it waits for the same bytes. A claim that is
//! dropped without its bytes (a failed request, an unloaded image) gives the chunk free again, and reads that wait for
//! it are tried anew until their deadline. Demand and prefetch have request slots and memory of their own, each registry
//! its share of both, so none waits for another.
//!
//! Nothing is answered and nothing is written that was not verified against the chunk's digest. What the disk
//! has not confirmed is read by a decode thread, which hashes what it has read.

pub(crate) mod assemble;
pub(crate) mod claim;
mod complete;
mod deadlines;
mod decode;
mod deliver;
pub(crate) mod early;
mod fair;
pub(crate) mod layer;
pub(crate) mod prefetch;
mod recent;
mod refuse;
mod share;
mod shelf;
mod transfer;

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use peel_image::Digest;
use peel_image::layer::ChunkSource;
use peel_registry::Counters;
use peel_store::Store;
use rustix::io::Errno;
use tokio::runtime::{Handle, Runtime};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::Error;
use crate::load::pool::Pool;
use crate::object::{Answer, Backing, Object, Presence, Snapshot, Table, Waiter, chunks_under};
use crate::quiet::{LeftOut, Quiet};
use crate::{Options, Stats, lock};
use claim::Claimed;
use complete::Completer;
use deadlines::Deadlines;
use decode::{Decoders, Lane};
use layer::{Layer, LayerFile};
use recent::Recent;
use shelf::Shelf;

/// Threads of the network runtime: they only move bytes.
const NETWORK_THREADS: usize = 2;
/// How often reads are looked through for ones whose deadline has passed.
const DEADLINE_STEP: Duration = Duration::from_millis(100);
/// Pause before a failed fetch is tried again: doubles from the first to the last.
const RETRY_FIRST: Duration = Duration::from_millis(100);
const RETRY_LAST: Duration = Duration::from_secs(2);

/// Indexes of layers that are read at once, of all images: a TOC may have 150 MiB of JSON and its index some times that. Each is read
/// by several threads, so more would not be faster.
pub(crate) const READERS: usize = 4;
/// Longest wait for a turn to read an index. The largest takes some seconds.
const READING_WAIT: Duration = Duration::from_secs(300);

/// What the rest of the service wants to hear from the engine.
pub(crate) trait Events: Send + Sync {
    /// An object that overlays may have found in FUSE is complete now.
    fn completed(&self);
    /// What the kernel has cached of an object must go. Returns when it is gone, which may take as long as reads of the object
    /// wait for their bytes: never called from a thread that answers reads.
    fn invalidate(&self, object: u32);
    /// Whether layers are about to be registered that may bring an object which nobody brings now.
    fn registering(&self) -> bool;
    /// As [`Events::invalidate`], some time from now; returns at once.
    fn invalidate_later(&self, object: u32);
}

/// The engine. One per service.
pub(crate) struct Engine {
    pub(crate) store: Store,
    pub(crate) table: Table,
    handle: Handle,
    runtime: Mutex<Option<Runtime>>,
    decoders: Decoders,
    completer: Completer,
    demand: share::Limits,
    prefetch: share::Limits,
    deadlines: Deadlines,
    recent: Recent,
    shelf: Shelf,
    /// [`Engine::keep_held`] is under way.
    keeping: AtomicBool,
    quiet: Quiet,
    read_deadline: Duration,
    indexes_max: u64,
    readers: Arc<Semaphore>,
    pool: Arc<Pool>,
    counters: Mutex<Counted>,
    stopping: AtomicBool,
    events: OnceLock<Box<dyn Events>>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("store", &self.store)
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the network and decode threads.
    pub(crate) fn start(store: Store, options: &Options) -> Result<Arc<Self>, Error> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(NETWORK_THREADS)
            .thread_name("peel-net")
            .enable_all()
            .build()
            .map_err(|source| Error::Thread {
                name: "peel-net".to_owned(),
                source,
            })?;
        let engine = Arc::new(Self {
            store,
            table: Table::default(),
            handle: runtime.handle().clone(),
            runtime: Mutex::new(Some(runtime)),
            decoders: Decoders::start()?,
            completer: Completer::start()?,
            demand: transfer::demand(),
            prefetch: transfer::prefetch(),
            deadlines: Deadlines::default(),
            recent: Recent::default(),
            shelf: Shelf::default(),
            keeping: AtomicBool::new(false),
            quiet: Quiet::default(),
            read_deadline: options.read_deadline,
            indexes_max: options.indexes_max,
            readers: Arc::new(Semaphore::new(READERS)),
            pool: Pool::new(options.loads_max),
            counters: Mutex::default(),
            stopping: AtomicBool::new(false),
            events: OnceLock::new(),
        });
        let watched = Arc::downgrade(&engine);
        engine.handle.spawn(async move {
            let mut ticks = tokio::time::interval(DEADLINE_STEP);
            loop {
                ticks.tick().await;
                let Some(engine) = watched.upgrade() else { break };
                let now = Instant::now();
                engine.expire(now);
                engine.look_after_shelf(now);
                for LeftOut { kind, layer, lines } in engine.quiet.forget(now) {
                    tracing::warn!(kind, %layer, lines, "lines like an earlier one were left out");
                }
            }
        });
        Ok(engine)
    }

    /// Sets who hears of completions. Once, before the first image.
    pub(crate) fn listen(&self, events: Box<dyn Events>) {
        if self.events.set(events).is_err() {
            tracing::error!("the fetch engine has a listener already");
        }
    }

    pub(crate) fn events(&self) -> Option<&dyn Events> {
        self.events.get().map(Box::as_ref)
    }

    /// The network runtime.
    pub(crate) fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Counters since the start.
    pub(crate) fn stats(&self) -> Stats {
        lock(&self.counters).sum()
    }

    /// Counts what goes through this source from now on.
    pub(crate) fn count(&self, counters: Arc<Counters>) {
        let mut counted = lock(&self.counters);
        counted.fold();
        counted.live.push(counters);
    }

    /// Bytes of memory that the indexes of one image may take.
    pub(crate) fn indexes_max(&self) -> u64 {
        self.indexes_max
    }

    /// Memory for the metadata of all images that are being loaded.
    pub(crate) fn pool(&self) -> &Arc<Pool> {
        &self.pool
    }

    /// A turn to read the index of a layer. An error when there is none for long.
    pub(crate) async fn reading_turn(
        &self,
        image: &str,
        layer: &Digest,
    ) -> Result<OwnedSemaphorePermit, Error> {
        let turn = Arc::clone(&self.readers).acquire_owned();
        match tokio::time::timeout(READING_WAIT, turn).await {
            Ok(turn) => turn.map_err(|_| Error::Stopping),
            Err(_) => Err(Error::Layer {
                image: image.to_owned(),
                layer: *layer,
                reason: format!(
                    "its list of files could not be read, because those of other layers took more than {} s; load fewer images \
                     at once",
                    READING_WAIT.as_secs()
                ),
            }),
        }
    }

    /// Whether [`Engine::stop`] was called.
    pub(crate) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    /// Whether requests of reads or prefetches are under way: what nobody waits for should wait.
    pub(crate) fn is_busy(&self) -> bool {
        self.demand.in_use() || self.prefetch.in_use()
    }

    /// Ends all work. Reads that wait get EIO.
    pub(crate) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        for object in self.table.all() {
            fail(std::mem::take(&mut lock(&object.state).waiters));
        }
        if let Some(runtime) = lock(&self.runtime).take() {
            runtime.shutdown_background();
        }
        self.decoders.stop();
        self.completer.stop();
    }

    /// Bytes of an object that can be had without waiting and without a system call under a lock.
    pub(crate) fn ready(&self, object: &Object, offset: u64, length: usize) -> Option<Snapshot> {
        lock(&object.state).snapshot(offset, length)
    }

    /// Reads a range of an object, fetching what is missing. `answer` is called from this thread when everything is
    /// here, else later from another one, at the latest after the read deadline.
    pub(crate) fn read(self: &Arc<Self>, object: &Arc<Object>, offset: u64, length: usize, answer: Answer) {
        if object.gave_up(offset, length) && self.ready(object, offset, length).is_none() {
            return answer(Err(Errno::IO));
        }
        let deadline = Instant::now() + self.read_deadline;
        self.read_until(object, offset, length, deadline, answer);
    }

    /// As [`Engine::read`], with the deadline given.
    fn read_until(
        self: &Arc<Self>,
        object: &Arc<Object>,
        offset: u64,
        length: usize,
        deadline: Instant,
        answer: Answer,
    ) {
        if self.is_stopping() {
            return answer(Err(Errno::IO));
        }
        let source = lock(&object.state).source();
        let file = source.as_ref().and_then(|source| source.file());
        match self.look(object, file) {
            // What is left of another image's attempt at this object is about to be let go.
            Err(peel_store::Error::ChunkListConflict(_)) if Instant::now() < deadline => {
                self.completer.let_go(object.number);
                self.hurry(object);
                return self.read_later(object, offset, length, deadline, answer);
            }
            Err(error) => {
                let layer = source
                    .as_ref()
                    .map_or(Digest::EMPTY, |source| source.layer.digest);
                if let Some(left_out) = self.quiet.may_say("open", &layer, Instant::now()) {
                    tracing::error!(object = %object.digest, %layer, %error, left_out, "cannot open the object in the store");
                }
                return answer(Err(Errno::IO));
            }
            Ok(()) => {}
        }
        let mut answer = Some(answer);
        let outcome = {
            let mut state = lock(&object.state);
            match (state.snapshot(offset, length), state.source()) {
                (Some(snapshot), _) => Outcome::Ready(snapshot),
                (None, Some(source)) => {
                    let waiter = answer.take().map(|answer| Waiter {
                        offset,
                        length,
                        deadline,
                        missing: BTreeSet::new(),
                        whole: state.is_withheld(),
                        answer,
                    });
                    Outcome::Wait(enqueue(&mut state, &source, waiter))
                }
                (None, None) => Outcome::Unreachable,
            }
        };
        match (outcome, answer) {
            (Outcome::Wait(chunks), _) => {
                self.deadlines.push(deadline, object.number);
                if chunks.is_empty() {
                    self.hurry(object);
                }
                for chunk in chunks {
                    self.demand(object, chunk);
                }
            }
            (Outcome::Ready(snapshot), Some(answer)) => {
                self.answer(object, &snapshot, offset, length, answer);
            }
            (_, Some(answer))
                if Instant::now() < deadline && self.events().is_some_and(Events::registering) =>
            {
                self.read_later(object, offset, length, deadline, answer);
            }
            (_, Some(answer)) => {
                tracing::error!(
                    file = %object.describe(),
                    object = %object.digest,
                    "no loaded image can bring the missing bytes of this file"
                );
                answer(Err(Errno::IO));
            }
            (_, None) => {}
        }
    }

    fn read_later(
        self: &Arc<Self>,
        object: &Arc<Object>,
        offset: u64,
        length: usize,
        deadline: Instant,
        answer: Answer,
    ) {
        let (engine, object) = (Arc::downgrade(self), Arc::clone(object));
        self.handle.spawn(async move {
            tokio::time::sleep(RETRY_FIRST).await;
            match engine.upgrade() {
                Some(engine) => {
                    let handle = engine.handle.clone();
                    handle.spawn_blocking(move || {
                        engine.read_until(&object, offset, length, deadline, answer);
                    });
                }
                None => answer(Err(Errno::IO)),
            }
        });
    }

    fn answer(&self, object: &Object, snapshot: &Snapshot, offset: u64, length: usize, answer: Answer) {
        // Only now the length is known if images disagreed about it.
        let left = usize::try_from(object.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = length.min(left);
        let mut bytes = Vec::with_capacity(length);
        match snapshot.read_into(&self.store, &object.digest, offset, length, &mut bytes) {
            Ok(()) => answer(Ok(&bytes)),
            Err(error) => {
                tracing::error!(object = %object.digest, %error, "cannot read the object from the store");
                answer(Err(Errno::IO));
            }
        }
    }

    /// Finds out how much of an object the store has, unless that is known. `file` describes it in some image.
    pub(crate) fn look(&self, object: &Object, file: Option<&LayerFile>) -> Result<(), peel_store::Error> {
        let generation = {
            let state = lock(&object.state);
            match state.backing {
                Backing::Unknown => {}
                // The store may have room again.
                Backing::Unkept if self.shelf.may_keep(Instant::now()) => {}
                _ => return Ok(()),
            }
            state.generation
        };
        // In this order: what is no longer pending is an object.
        let pending = self.store.pending_size(&object.digest).is_some();
        let complete = self.store.object_size(&object.digest);
        let backing = if complete.is_some() {
            Backing::Complete(None)
        } else {
            match file {
                Some(_) if pending => Backing::Pending,
                Some(file) if file.chunks.len() > 1 => {
                    match self.store.partial(&object.digest, file.size(), &file.chunks) {
                        Ok(partial) => Backing::Partial(partial),
                        // Runs of zeros are here only by the word of a partial object.
                        Err(error) if error.is_io() && !file.has_zeros() => {
                            let source = lock(&object.state).source();
                            let layer = source.map_or(Digest::EMPTY, |source| source.layer.digest);
                            self.unkept(&layer, object, &error);
                            Backing::Unkept
                        }
                        Err(error) => return Err(error),
                    }
                }
                Some(_) => Backing::Nothing,
                None => return Ok(()),
            }
        };
        let mut corrected = false;
        {
            let mut state = lock(&object.state);
            let is_open = matches!(state.backing, Backing::Unknown | Backing::Unkept);
            if is_open && state.generation == generation {
                match (complete, file) {
                    (Some(size), _) => corrected = object.settle_size(&mut state, size),
                    (None, Some(file)) => state.use_list(file.list),
                    (None, None) => {}
                }
                state.backing = backing;
            }
        }
        if let (true, Some(events)) = (corrected, self.events()) {
            events.invalidate_later(object.number);
        }
        Ok(())
    }

    /// Lets reads find their chunks in a layer. Where images disagree about an object, what was shown of it goes first, which
    /// may take as long as a read.
    pub(crate) fn register(self: &Arc<Self>, layer: &Arc<Layer>) {
        let mut stale = Vec::new();
        for (file, number) in layer.files.iter().zip(0_u32..) {
            let Some(object) = self.table.get(file.object) else {
                continue;
            };
            let source = crate::object::Source {
                layer: Arc::clone(layer),
                file: number,
            };
            let Some(waiters) = object.add_source(source) else {
                continue;
            };
            tracing::debug!(
                file = %file.path,
                object = %object.digest,
                "images cut this file into different chunks; it is served once it is complete and its hash is right"
            );
            // These first: the kernel holds the pages that they read, and lets go of none before each is answered or has
            // come to its deadline, which only those that wait in the state ever do.
            self.start_over(&object, waiters);
            stale.push(object.number);
        }
        // All of them start over before the first is waited for, so that together they take no longer than one.
        if let Some(events) = self.events() {
            for object in stale {
                events.invalidate(object);
            }
        }
    }

    /// A mark for [`Engine::cleaned`].
    pub(crate) fn taint(&self, object: u32) -> u32 {
        self.table
            .get(object)
            .map_or(0, |object| lock(&object.state).tainted)
    }

    /// What the kernel had cached of an object since before the mark was taken is gone.
    pub(crate) fn cleaned(&self, object: u32, mark: u32) {
        if let Some(object) = self.table.get(object) {
            let mut state = lock(&object.state);
            if state.tainted == mark {
                state.tainted = 0;
            }
        }
    }

    /// Lets the reads that waited wait anew, for what the object's state says now.
    pub(crate) fn start_over(self: &Arc<Self>, object: &Arc<Object>, waiters: Vec<Waiter>) {
        for waiter in waiters {
            self.read_until(
                object,
                waiter.offset,
                waiter.length,
                waiter.deadline,
                waiter.answer,
            );
        }
    }

    /// As [`Engine::start_over`], from another thread: reads that start over may call back to where this is called.
    pub(crate) fn start_over_later(self: &Arc<Self>, object: &Arc<Object>, waiters: Vec<Waiter>) {
        if waiters.is_empty() || self.is_stopping() {
            return fail(waiters);
        }
        let (engine, object) = (Arc::clone(self), Arc::clone(object));
        self.handle
            .spawn_blocking(move || engine.start_over(&object, waiters));
    }

    /// Finds out how long an object is. `answer` is called at once, unless images disagree: then it is called when the object is
    /// complete, which this sees to, with EIO at the latest after the read deadline.
    pub(crate) fn size(
        self: &Arc<Self>,
        object: &Arc<Object>,
        answer: impl FnOnce(Result<u64, Errno>) + Send + 'static,
    ) {
        if let Some(size) = object.known_size() {
            return answer(Ok(size));
        }
        let of = Arc::clone(object);
        self.read(
            object,
            0,
            0,
            Box::new(move |read| answer(read.map(|_| of.size()))),
        );
    }

    /// An overlay may have found the object in FUSE just now. If it is complete, nobody else will say so.
    pub(crate) fn looked_up(&self, object: &Object) {
        let complete = matches!(lock(&object.state).backing, Backing::Complete(_));
        if let (true, Some(events)) = (complete, self.events()) {
            events.completed();
        }
    }

    /// An open through FUSE: keeps the object's file at hand until the [`Engine::closed`] that belongs to it.
    pub(crate) fn opened(&self, object: &Object) {
        let file = {
            let mut state = lock(&object.state);
            state.opens = state.opens.saturating_add(1);
            state
                .source()
                .filter(|_| matches!(state.backing, Backing::Unknown))
        };
        // A failure shows again, and is reported, when the bytes are read.
        let _ = self.look(object, file.as_ref().and_then(crate::object::Source::file));
        let complete = matches!(lock(&object.state).backing, Backing::Complete(None));
        if !complete {
            return;
        }
        match self.store.open_object(&object.digest) {
            Ok(Some(file)) => {
                let mut state = lock(&object.state);
                if let Backing::Complete(None) = state.backing {
                    state.backing = Backing::Complete(Some(Arc::new(file)));
                }
            }
            Ok(None) => {
                tracing::warn!(object = %object.digest, "a complete object has gone; it will be fetched again");
                lock(&object.state).change_list();
            }
            Err(error) => tracing::error!(object = %object.digest, %error, "cannot open a complete object"),
        }
    }

    /// The end of an open through FUSE.
    pub(crate) fn closed(&self, object: &Object) {
        let (last, complete) = {
            let mut state = lock(&object.state);
            state.opens = state.opens.saturating_sub(1);
            let last = state.opens == 0;
            if last {
                state.rest();
            }
            (last, matches!(state.backing, Backing::Complete(_)))
        };
        // While it was open, no overlay could be made to forget where it had found it.
        if let (true, true, Some(events)) = (last, complete, self.events()) {
            events.completed();
        }
    }

    /// Starts to fetch a chunk that a read waits for.
    fn demand(self: &Arc<Self>, object: &Arc<Object>, chunk: u32) {
        let Some(source) = lock(&object.state).source() else {
            return;
        };
        let Some(entry) = source.file().and_then(|file| file.chunks.get(chunk as usize)) else {
            return;
        };
        match entry.source {
            ChunkSource::Blob { .. } => self.demand_stream(&source.layer, entry),
            // Only a file that is nothing but zeros is hashed as such. Runs of zeros in others are here once the object is open.
            ChunkSource::Zeros if source.file().is_some_and(|file| file.chunks.len() > 1) => {
                let opened = self.look(object, source.file());
                let (presence, failures) = {
                    let state = lock(&object.state);
                    (state.has(chunk), state.failures)
                };
                if opened.is_ok() && presence == Presence::Here {
                    self.arrived(object, chunk);
                } else {
                    self.retry(object, chunk, failures);
                }
            }
            ChunkSource::Zeros => {
                let position = layer::Position {
                    file: source.file,
                    chunk,
                };
                if let Claimed::Fetch(claim) | Claimed::Verify(claim) = self.claim(&source.layer, position) {
                    self.completer.submit_zeros(claim);
                }
            }
        }
    }

    fn demand_stream(self: &Arc<Self>, layer: &Arc<Layer>, chunk: &peel_image::layer::Chunk) {
        let Some(first) = layer.stream_of(chunk) else {
            return;
        };
        let Some(offset) = layer.streams.get(first).map(|stream| stream.range.start) else {
            return;
        };
        let window = layer.window(offset);
        if let Some(run) = self.claim_run(layer, first..layer.streams.len(), window, Some(first)) {
            self.spawn_transfer(run, Lane::Demand);
        }
    }

    /// Tries again later for a chunk that reads wait for.
    pub(crate) fn retry(self: &Arc<Self>, object: &Arc<Object>, chunk: u32, failures: u32) {
        if self.is_stopping() {
            return;
        }
        let pause = RETRY_FIRST.saturating_mul(1 << failures.min(8)).min(RETRY_LAST);
        let (engine, object) = (Arc::downgrade(self), Arc::clone(object));
        self.handle.spawn(async move {
            tokio::time::sleep(pause).await;
            let Some(engine) = engine.upgrade() else { return };
            let waited_for = lock(&object.state)
                .waiters
                .iter()
                .any(|waiter| waiter.missing.contains(&chunk));
            if waited_for && !engine.is_stopping() {
                // Claims look at the disk.
                let handle = engine.handle.clone();
                handle.spawn_blocking(move || engine.demand(&object, chunk));
            }
        });
    }

    /// Has written what is held in memory only, if the disk may take it.
    fn look_after_shelf(self: &Arc<Self>, now: Instant) {
        if !self.shelf.has_work(now) || self.keeping.swap(true, Ordering::AcqRel) {
            return;
        }
        let engine = Arc::clone(self);
        self.handle.spawn_blocking(move || {
            engine.keep_held();
            engine.keeping.store(false, Ordering::Release);
        });
    }

    /// Fails the reads whose deadline has passed.
    fn expire(&self, now: Instant) {
        while let Some(number) = self.deadlines.due(now) {
            let Some(object) = self.table.get(number) else {
                continue;
            };
            let expired = object.expired(now);
            if expired.is_empty() {
                continue;
            }
            let source = lock(&object.state).source();
            let layer = source.map_or(Digest::EMPTY, |source| source.layer.digest);
            if let Some(left_out) = self.quiet.may_say("deadline", &layer, now) {
                tracing::error!(
                    file = %object.describe(),
                    seconds = self.read_deadline.as_secs(),
                    reads = expired.len(),
                    left_out,
                    "the bytes of this file did not arrive in time; its reads fail with EIO"
                );
            }
            fail(expired);
        }
    }
}

/// The counters of all sources. Those that nobody else holds any more are added up and let go.
#[derive(Debug, Default)]
struct Counted {
    live: Vec<Arc<Counters>>,
    ended: Stats,
}

impl Counted {
    fn fold(&mut self) {
        let (ended, live) = std::mem::take(&mut self.live)
            .into_iter()
            .partition(|counters| Arc::strong_count(counters) == 1);
        self.live = live;
        self.ended = Self {
            live: ended,
            ended: self.ended,
        }
        .sum();
    }

    fn sum(&self) -> Stats {
        self.live.iter().fold(self.ended, |sum, counters| Stats {
            requests: sum.requests + counters.requests(),
            bytes: sum.bytes + counters.bytes(),
        })
    }
}

enum Outcome {
    Ready(Snapshot),
    Wait(Vec<u32>),
    Unreachable,
}

/// Lets a read wait; returns the chunks that nobody brings yet.
fn enqueue(
    state: &mut crate::object::State,
    source: &crate::object::Source,
    waiter: Option<Waiter>,
) -> Vec<u32> {
    let (Some(mut waiter), Some(file)) = (waiter, source.file()) else {
        return Vec::new();
    };
    let wanted = if waiter.whole {
        0..u32::try_from(file.chunks.len()).unwrap_or(u32::MAX)
    } else {
        chunks_under(&file.chunks, waiter.offset, waiter.length)
    };
    let mut fetch = Vec::new();
    for chunk in wanted {
        match state.has(chunk) {
            Presence::Here => continue,
            Presence::Coming => {}
            Presence::Unconfirmed | Presence::Unverified | Presence::Missing => fetch.push(chunk),
        }
        waiter.missing.insert(chunk);
    }
    state.waiters.push(waiter);
    fetch
}

/// Answers reads with EIO.
pub(crate) fn fail(waiters: Vec<Waiter>) {
    for waiter in waiters {
        (waiter.answer)(Err(Errno::IO));
    }
}
