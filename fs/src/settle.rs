//! The thread `peel-sync`: has the disk confirm what was fetched, so that complete files become objects,
//! which the kernel serves.
//!
//! Started by the service. No read waits for it: bytes that the disk has not confirmed are
//! answered from memory, or hashed again. A sync is one of the whole file system, whose other users feel it,
//! so there is a pause after each that grows with its length. After one that failed, what it may have lost is
//! hashed and written once more, with growing pauses.

use std::sync::{Arc, Mutex, Weak};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded, never, select};
use peel_image::Digest;
use peel_store::{Store, Watch};

use crate::error::Error;
use crate::fetch::Engine;
use crate::lock;

/// How long after a write a sync begins: more writes come together.
const BATCH: Duration = Duration::from_millis(20);
/// Pause after a sync, as a multiple of its length: at most a fifth of the time goes into them.
const REST: u32 = 4;
/// Shortest and longest pause after a sync.
const REST_MIN: Duration = Duration::from_millis(50);
const REST_MAX: Duration = Duration::from_secs(10);
/// A sync that takes longer is worth a line in the log.
const SLOW: Duration = Duration::from_secs(5);
/// Pauses before what a sync may have lost is tried again; the last one is repeated.
const PAUSES: [Duration; 5] = [
    Duration::from_secs(1),
    Duration::from_secs(4),
    Duration::from_secs(16),
    Duration::from_secs(64),
    Duration::from_secs(256),
];

/// The thread.
#[derive(Debug)]
pub(crate) struct Settler {
    stop: Sender<()>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// Tells the engine what becomes of what it wrote.
struct Hears {
    engine: Weak<Engine>,
    wake: Sender<()>,
}

impl Watch for Hears {
    fn written(&self) {
        // Full means that the thread has a message to come to.
        let _ = self.wake.try_send(());
    }

    fn confirmed(&self) {
        if let Some(engine) = self.engine.upgrade() {
            engine.confirmed();
        }
    }

    fn named(&self, objects: &[Digest]) {
        if let Some(engine) = self.engine.upgrade() {
            for object in objects.iter().filter_map(|object| engine.table.find(object)) {
                engine.completed(&object);
            }
        }
    }

    fn lost(&self, objects: &[Digest]) {
        if let Some(engine) = self.engine.upgrade() {
            for object in objects.iter().filter_map(|object| engine.table.find(object)) {
                engine.lost(&object);
            }
        }
    }
}

impl Settler {
    /// Starts the thread.
    pub(crate) fn start(engine: &Arc<Engine>) -> Result<Self, Error> {
        // One message says it all: something was written.
        let (wake, woken) = bounded(1);
        let (stop, stopped) = bounded(1);
        let store = engine.store.clone();
        store.watch(Box::new(Hears {
            engine: Arc::downgrade(engine),
            wake,
        }));
        let name = "peel-sync";
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&store, &woken, &stopped))
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            stop,
            thread: Mutex::new(Some(thread)),
        })
    }

    /// Ends the thread after the sync that it is at.
    pub(crate) fn stop(&self) {
        // Full means that it has its order already.
        let _ = self.stop.try_send(());
        let thread = lock(&self.thread).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that syncs the store ended with a panic");
        }
    }
}

/// When what a sync may have lost is tried again.
#[derive(Debug, Default)]
struct Retry {
    attempts: usize,
    due: Option<Instant>,
    /// That the disk fails was said.
    said: bool,
}

impl Retry {
    fn put_off(&mut self, now: Instant) {
        let [.., last] = PAUSES;
        self.due = Some(now + PAUSES.get(self.attempts).copied().unwrap_or(last));
        self.attempts += 1;
    }

    /// Whether a failure has yet to be said; it counts as said then. Attempts may be under way before the first failure: for what an
    /// earlier process left.
    fn is_news(&mut self) -> bool {
        !std::mem::replace(&mut self.said, true)
    }
}

fn work(store: &Store, woken: &Receiver<()>, stopped: &Receiver<()>) {
    let mut retry = Retry::default();
    if store.suspect_count() > 0 {
        // What an earlier process left is in no hurry.
        retry.put_off(Instant::now());
    }
    loop {
        let pause = retry.due.map_or_else(never, |due| {
            crossbeam_channel::after(due.saturating_duration_since(Instant::now()))
        });
        select! {
            recv(woken) -> message => if message.is_err() { return },
            recv(pause) -> _ => {}
            recv(stopped) -> _ => return,
        }
        if stopped.recv_timeout(BATCH).is_ok() {
            return;
        }
        let begin = Instant::now();
        let healed = match retry.due {
            Some(due) if due <= begin => store.heal().map(drop),
            _ => Ok(()),
        };
        let settled = store.settle();
        let took = begin.elapsed();
        if took >= SLOW {
            tracing::info!(
                seconds = took.as_secs(),
                "the disk was slow to take what was fetched; until then the server serves it"
            );
        }
        let failed = healed.and(settled);
        if let Err(error) = &failed {
            if retry.is_news() {
                tracing::error!(
                    %error,
                    "the disk does not take what was fetched; it is tried again, and nothing of it is read without another check. See that \
                     the disk of the store has room and no errors"
                );
            } else {
                tracing::debug!(%error, "the disk does still not take what was fetched");
            }
            retry.put_off(Instant::now());
        } else if store.suspect_count() > 0 {
            if retry.due.is_none_or(|due| due <= begin) {
                retry.put_off(Instant::now());
            }
        } else {
            retry = Retry::default();
        }
        let rest = took.saturating_mul(REST).clamp(REST_MIN, REST_MAX);
        if stopped.recv_timeout(rest).is_ok() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_failure_is_said_also_while_earlier_files_are_tried() {
        let mut retry = Retry::default();
        retry.put_off(Instant::now());
        assert!(retry.is_news() && !retry.is_news());
        retry.put_off(Instant::now());
        assert!(!retry.is_news());
        assert!(
            Retry::default().is_news(),
            "once all is well, the next one is news"
        );
    }
}
