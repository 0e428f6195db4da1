//! Return to native: an overlay that has found a file's data in FUSE keeps going there. When such objects have completed,
//! the overlays are made to forget what is not in use, so that the next open finds the object in the store and no
//! daemon on its path any more.
//!
//! An overlay does not forget what is open, so the last close of a completed file counts like a completion.
//!
//! Forgetting costs an overlay its cached names, which the EROFS image gives back cheaply. The first messages after a time of
//! calm are heeded almost at once, because until then the file fails if this process is killed; behind them, the overlays
//! wait for a pause in the messages, and while there is none it is done rarely.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::error::Error;
use crate::{lock, mount};

/// How long after the overlays were made to forget a message is the first of another burst.
const CALM: Duration = Duration::from_secs(1);
/// Delays after the first messages of a burst. A file that completes under its reader takes two: it completes, and is closed; the
/// kernel tells of that just before it lets go of the name.
const FIRST: [Duration; 2] = [Duration::from_millis(5), Duration::from_millis(20)];
/// A pause in the completions that means that a burst is over.
const QUIET: Duration = Duration::from_millis(200);
/// Longest delay while completions go on.
const LONGEST: Duration = Duration::from_secs(2);

/// Hears of completions and keeps the overlays.
#[derive(Debug)]
pub(crate) struct Native {
    completions: Sender<()>,
    overlays: Arc<Mutex<Vec<Weak<OwnedFd>>>>,
}

impl Native {
    /// Starts the thread, which ends with the last sender.
    pub(crate) fn start() -> Result<Self, Error> {
        // One message says it all: something has completed.
        let (completions, completed) = bounded(1);
        let overlays = Arc::<Mutex<Vec<Weak<OwnedFd>>>>::default();
        let overlays_of_thread = Arc::clone(&overlays);
        let name = "peel-native";
        thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || work(&completed, &overlays_of_thread))
            .map_err(|source| Error::Thread {
                name: name.to_owned(),
                source,
            })?;
        Ok(Self {
            completions,
            overlays,
        })
    }

    /// Where completions are told.
    pub(crate) fn completions(&self) -> Sender<()> {
        self.completions.clone()
    }

    /// An overlay is there until its descriptor is dropped.
    pub(crate) fn add(&self, overlay: &Arc<OwnedFd>) {
        let mut overlays = lock(&self.overlays);
        overlays.retain(|overlay| overlay.strong_count() > 0);
        overlays.push(Arc::downgrade(overlay));
    }
}

fn work(completed: &Receiver<()>, overlays: &Mutex<Vec<Weak<OwnedFd>>>) {
    let mut last: Option<Instant> = None;
    let mut first = FIRST.iter();
    while completed.recv().is_ok() {
        if last.is_none_or(|last| last.elapsed() >= CALM) {
            first = FIRST.iter();
        }
        if let Some(delay) = first.next() {
            thread::sleep(*delay);
        } else {
            let latest = Instant::now() + LONGEST;
            loop {
                match completed.recv_timeout(QUIET) {
                    Ok(()) if Instant::now() < latest => {}
                    Ok(()) | Err(RecvTimeoutError::Timeout) => break,
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        }
        let live: Vec<Arc<OwnedFd>> = lock(overlays).iter().filter_map(Weak::upgrade).collect();
        for overlay in live {
            if let Err(error) = mount::forget_unused(overlay.as_fd()) {
                tracing::warn!(%error, "an overlay keeps reading completed files through FUSE");
            }
        }
        last = Some(Instant::now());
    }
}
