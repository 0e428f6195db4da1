//! An embedded OCI registry for loopback: the pull and push halves of the OCI distribution specification 1.1 over
//! plain HTTP, with counters and with faults on demand.
//!
//! Called by `peel demo`, by the end-to-end tests and by the benchmarks. Blobs are files in a directory of the caller,
//! manifests are blobs with a name. It runs on one thread of its own with its own runtime, so that it can be paused,
//! stopped and dropped from any thread.
//!
//! Split: this file starts and stops it and has what callers use; [`content`] keeps blobs and manifests, `pull` and
//! `push` answer requests, [`faults`] is the plan of what goes wrong.
//!
//! Not there on purpose: authentication, TLS (the tests put a real web server in front), deletion, referrers. One
//! namespace for all blobs: a blob pushed to one repository can be read from every repository, a mount always succeeds
//! when the blob is here.

pub mod content;
pub mod faults;
mod pull;
mod push;
mod serve;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;

use tokio::sync::watch;

pub use content::Content;
pub use faults::{Action, Faults, Rule};

/// What was asked and answered.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Requests of every kind, those that were refused by a fault too.
    pub requests: u64,
    /// Requests that read a blob or a part of one.
    pub blob_requests: u64,
    /// Body bytes handed to connections in answers. A client that goes away in the middle may have received less.
    pub body_bytes: u64,
}

/// One request, as it came.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RequestRecord {
    /// HTTP method.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// The `Range` header, if there was one.
    pub range: Option<String>,
    /// Status of the answer, 0 when the connection was cut instead.
    pub status: u16,
}

/// Most requests that are kept for [`Registry::log`]; enough for a test, bounded for a long demo.
const LOG_LIMIT: usize = 100_000;

/// What the server's thread and its owner share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) content: Content,
    pub(crate) faults: Faults,
    requests: AtomicU64,
    blob_requests: AtomicU64,
    pub(crate) body_bytes: AtomicU64,
    log: std::sync::Mutex<Vec<RequestRecord>>,
}

impl Shared {
    fn note(&self, record: RequestRecord) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        if matches!(record.method.as_str(), "GET" | "HEAD")
            && record.target.contains("/blobs/")
            && !record.target.contains("/uploads/")
        {
            self.blob_requests.fetch_add(1, Ordering::Relaxed);
        }
        let mut log = self.log.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if log.len() < LOG_LIMIT {
            log.push(record);
        }
    }
}

/// A running registry. Dropping it closes every connection; the content directory stays.
#[derive(Debug)]
pub struct Registry {
    addr: SocketAddr,
    shared: Arc<Shared>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Registry {
    /// Serves the blobs in `dir` (made if it is not there) on a free loopback port.
    pub fn start(dir: &Path) -> io::Result<Self> {
        let content = Content::open(dir)?;
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        listener.set_nonblocking(true)?;
        let addr = listener.local_addr()?;
        let shared = Arc::new(Shared {
            content,
            faults: Faults::default(),
            requests: AtomicU64::new(0),
            blob_requests: AtomicU64::new(0),
            body_bytes: AtomicU64::new(0),
            log: std::sync::Mutex::default(),
        });
        let (stop, stopped) = watch::channel(false);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let server = serve::Server::new(listener, Arc::clone(&shared), stopped);
        let thread = std::thread::Builder::new()
            .name("testkit-registry".into())
            .spawn(move || runtime.block_on(server.run()))?;
        Ok(Self {
            addr,
            shared,
            stop,
            thread: Some(thread),
        })
    }

    /// Where it listens.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// What it holds.
    pub fn content(&self) -> &Content {
        &self.shared.content
    }

    /// What goes wrong.
    pub fn faults(&self) -> &Faults {
        &self.shared.faults
    }

    /// What was asked since the start or the last reset.
    pub fn counters(&self) -> Counters {
        Counters {
            requests: self.shared.requests.load(Ordering::Relaxed),
            blob_requests: self.shared.blob_requests.load(Ordering::Relaxed),
            body_bytes: self.shared.body_bytes.load(Ordering::Relaxed),
        }
    }

    /// The requests since the start or the last reset, oldest first, at most 100,000.
    pub fn log(&self) -> Vec<RequestRecord> {
        self.shared
            .log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone()
    }

    /// Sets all counters to zero and empties the log.
    pub fn reset_counters(&self) {
        for counter in [
            &self.shared.requests,
            &self.shared.blob_requests,
            &self.shared.body_bytes,
        ] {
            counter.store(0, Ordering::Relaxed);
        }
        self.shared
            .log
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clear();
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.shared.faults.clear();
        let _ = self.stop.send(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the registry's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests;
