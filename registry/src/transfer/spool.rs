//! Blobs of registries that send all of a blob when they are asked for a part of it: fetched once into a temporary file without a name,
//! from which all parts come, those at its beginning while the rest is on its way. [`super::http`] turns to it.
//!
//! A spool is let go of when nobody has read from it for some minutes, and its fetch ends when nobody waits for it; then the registry
//! is asked again. The file is as large as the blob, which the manifest tells.

use std::collections::HashMap;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::future::BoxFuture;
use peel_image::Digest;
use reqwest::Response;
use tokio::sync::watch;

use super::http::{HttpStream, RemoteBlob};
use crate::client::session::Session;
use crate::error::Error;
use crate::nameless::{Nameless, temporary_directory};
use crate::source::blocking;

/// How long a fetch goes on that nobody waits for. Reads that fail are often tried again.
const UNWANTED: Duration = Duration::from_secs(60);
/// How long a whole spool is kept after its last reader.
const IDLE: Duration = Duration::from_secs(300);
/// How often that is looked at.
const LOOK: Duration = Duration::from_secs(30);
/// Bytes read from the file at once.
const PIECE: u64 = 256 << 10;
/// Answers with whole blobs that are kept for whoever reads them: all three together fit into the window of one HTTP/2 connection, so
/// that they cannot hold up the requests beside them.
const MAX_KEPT: usize = 3;
/// How long such an answer is worth keeping.
const KEPT_FOR: Duration = Duration::from_secs(60);

/// What a repository's blobs have come to that the registry sends whole.
#[derive(Debug, Default)]
pub(crate) struct Spools {
    spools: Mutex<HashMap<Digest, Arc<Spool>>>,
    kept: Mutex<HashMap<Digest, (Response, Instant)>>,
    /// There is no room for temporary files.
    unusable: AtomicBool,
}

/// A blob in a file, or on its way there.
#[derive(Debug)]
pub(crate) struct Spool {
    place: String,
    file: Arc<File>,
    state: watch::Receiver<State>,
    /// When it was last read. Its readers have clones.
    used: Arc<Mutex<Instant>>,
}

/// How far a fetch is.
#[derive(Debug, Clone)]
struct State {
    /// Bytes in the file.
    here: u64,
    /// Why no more will come.
    failed: Option<Error>,
}

/// A range of a spooled blob on its way to a reader.
#[derive(Debug)]
pub(crate) struct SpoolStream {
    spool: Arc<Spool>,
    used: Arc<Mutex<Instant>>,
    state: watch::Receiver<State>,
    next: u64,
    end: u64,
}

impl Spools {
    /// The blob's spool, if there is one.
    pub(crate) fn get(&self, digest: &Digest) -> Option<Arc<Spool>> {
        lock(&self.spools).get(digest).map(Arc::clone)
    }

    /// Keeps the beginning of a whole blob for whoever asks for all of it.
    pub(crate) fn keep(&self, digest: Digest, response: Response) {
        let mut kept = lock(&self.kept);
        kept.retain(|_, (_, since)| since.elapsed() < KEPT_FOR);
        if kept.len() < MAX_KEPT {
            kept.entry(digest).or_insert((response, Instant::now()));
        }
    }

    /// Takes what [`Spools::keep`] has kept.
    pub(crate) fn take(&self, digest: &Digest) -> Option<Response> {
        let (response, since) = lock(&self.kept).remove(digest)?;
        (since.elapsed() < KEPT_FOR).then_some(response)
    }

    /// Spools `blob`, whose beginning `response` is; gives the response back if there is no room for a file.
    pub(crate) async fn begin(blob: &RemoteBlob, response: Response) -> Result<Arc<Spool>, Response> {
        let spools = &blob.session.spools;
        if let Some(spool) = spools.get(&blob.digest) {
            return Ok(spool);
        }
        if spools.unusable.load(Ordering::Relaxed) {
            return Err(response);
        }
        let made = blocking(|| {
            let dir = temporary_directory();
            Nameless::new_in(&dir)
                .and_then(|file| file.open())
                .map_err(Error::file(dir, "temporary file for a blob cannot be made"))
        })
        .await;
        let file = match made {
            Ok(file) => Arc::new(file),
            Err(error) => {
                tracing::warn!(%error, "ranges are read from the beginnings of their blobs");
                spools.unusable.store(true, Ordering::Relaxed);
                return Err(response);
            }
        };
        let (sender, state) = watch::channel(State {
            here: 0,
            failed: None,
        });
        let used = Arc::new(Mutex::new(Instant::now()));
        let spool = Arc::new(Spool {
            place: blob.session.place.to_string(),
            file: Arc::clone(&file),
            state,
            used: Arc::clone(&used),
        });
        {
            let mut all = lock(&spools.spools);
            if let Some(other) = all.get(&blob.digest) {
                return Ok(Arc::clone(other));
            }
            all.insert(blob.digest, Arc::clone(&spool));
        }
        tracing::info!(
            blob = %blob.digest,
            "the registry sends the whole blob when it is asked for a part of it: it is fetched once and read from a file"
        );
        let (blob, session, digest) = (blob.clone(), Arc::downgrade(&blob.session), blob.digest);
        tokio::spawn(async move {
            let fetched = fetch(&blob, response, &file, &sender, &used).await;
            // What is left to do here keeps nothing alive.
            drop(blob);
            if let Err(error) = fetched {
                if let (Error::File { .. }, Some(session)) = (&error, session.upgrade()) {
                    session.spools.unusable.store(true, Ordering::Relaxed);
                }
                // Gone before anybody hears of it: whoever tries again begins anew.
                forget(&session, &digest);
                sender.send_modify(|state| state.failed = Some(error));
                return;
            }
            loop {
                tokio::time::sleep(LOOK).await;
                if session.strong_count() == 0 || is_idle(&used, IDLE) {
                    return forget(&session, &digest);
                }
            }
        });
        Ok(spool)
    }
}

fn forget(session: &Weak<Session>, digest: &Digest) {
    if let Some(session) = session.upgrade() {
        lock(&session.spools.spools).remove(digest);
    }
}

/// Whether nobody reads or has read for so long. The spool and its task have one clone each.
fn is_idle(used: &Arc<Mutex<Instant>>, limit: Duration) -> bool {
    Arc::strong_count(used) <= 2 && lock(used).elapsed() >= limit
}

/// Moves the rest of a blob into the file. Boxed, because a stream may turn to a spool and a spool has a stream.
fn fetch<'a>(
    blob: &'a RemoteBlob,
    response: Response,
    file: &'a Arc<File>,
    sender: &'a watch::Sender<State>,
    used: &'a Arc<Mutex<Instant>>,
) -> BoxFuture<'a, Result<(), Error>> {
    Box::pin(async move {
        let mut stream = HttpStream::whole(blob, response)?;
        let mut here = 0;
        while let Some(part) = stream.next().await? {
            let (file, offset, length) = (Arc::clone(file), here, part.len() as u64);
            let written = blocking(move || {
                let failed = Error::file(
                    temporary_directory(),
                    "temporary file for a blob cannot be written",
                );
                file.write_all_at(&part, offset).map_err(failed)
            });
            written.await?;
            here += length;
            sender.send_modify(|state| state.here = here);
            if is_idle(used, UNWANTED) {
                return Err(blob
                    .session
                    .protocol(&format!("blob {}", blob.digest), "nobody waits for it any more"));
            }
        }
        Ok(())
    })
}

impl Spool {
    /// The bytes of `range`, which must lie in the blob.
    pub(crate) fn stream(self: &Arc<Self>, range: Range<u64>) -> SpoolStream {
        *lock(&self.used) = Instant::now();
        SpoolStream {
            spool: Arc::clone(self),
            used: Arc::clone(&self.used),
            state: self.state.clone(),
            next: range.start,
            end: range.end,
        }
    }
}

impl SpoolStream {
    /// Waits for bytes behind the first `offset`; gives how many there are then.
    async fn here_beyond(&mut self, offset: u64) -> Result<u64, Error> {
        let arrived = |state: &State| state.here > offset || state.failed.is_some();
        match self.state.wait_for(arrived).await.as_deref() {
            Ok(State { here, .. }) if *here > offset => Ok(*here),
            Ok(State {
                failed: Some(error), ..
            }) => Err(error.clone()),
            Ok(State { failed: None, .. }) | Err(_) => Err(Error::Setup(format!(
                "{}: the fetch of a blob was broken off",
                self.spool.place
            ))),
        }
    }

    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        if self.next >= self.end {
            return Ok(None);
        }
        let next = self.next;
        let here = self.here_beyond(next).await?;
        let length = (here.min(self.end) - next).min(PIECE);
        let file = Arc::clone(&self.spool.file);
        let piece = blocking(move || {
            let mut piece = vec![0; usize::try_from(length).unwrap_or(0)];
            file.read_exact_at(&mut piece, next).map_err(Error::file(
                temporary_directory(),
                "temporary file of a blob cannot be read",
            ))?;
            Ok(Bytes::from(piece))
        });
        let piece = piece.await?;
        self.next += length;
        *lock(&self.used) = Instant::now();
        Ok(Some(piece))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
