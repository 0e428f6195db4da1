//! Return to native: an overlay that has found a file's data in FUSE keeps going there. When such objects have completed,
//! the overlays are made to forget what is not in use, so that the next open finds the object in the store and no
//! daemon on its path any more.
//!
//! Forgetting costs an overlay its cached names, which the EROFS image gives back cheaply; so it waits for a pause in
//! the completions, and while there is none it is done rarely.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, Weak};
use std::thread;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};

use crate::error::Error;
use crate::{lock, mount};

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
    while completed.recv().is_ok() {
        let latest = Instant::now() + LONGEST;
        loop {
            match completed.recv_timeout(QUIET) {
                Ok(()) if Instant::now() < latest => {}
                Ok(()) | Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
        let live: Vec<Arc<OwnedFd>> = lock(overlays).iter().filter_map(Weak::upgrade).collect();
        for overlay in live {
            if let Err(error) = mount::forget_unused(overlay.as_fd()) {
                tracing::warn!(%error, "an overlay keeps reading completed files through FUSE");
            }
        }
    }
}
