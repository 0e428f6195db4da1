//! The one process per store: it loads images, serves their missing bytes and keeps mounts.
//!
//! `peel daemon` runs it; the first command that needs it starts that ([`crate::client`]). It ends some seconds after the
//! last mount and the last connection are gone.
//!
//! Threads: the main thread waits for signals and does what is due periodically; `accept` takes connections;
//! every connection has a thread of its own that blocks on its socket ([`connection`]), and a `load` thread while an
//! image is loaded. Locks: only the table of mounts ([`mounts`]) and the counters here, none held across I/O.

mod connection;
mod memory;
mod mounts;
mod socket;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context;
use peel_fs::Service;
use peel_store::Store;

pub use socket::{LOCK, RunDir, SOCKET, START_LOCK};

use crate::cli::{DaemonArgs, Global};
use crate::describe::describe;
use crate::protocol::{MountStatus, Status};
use crate::{logging, panics};
use memory::{Activity, Memory};
use mounts::Mounts;
use socket::Listener;

/// How often the server looks for mounts that are gone.
const SCAN_EVERY: Duration = Duration::from_secs(2);
/// How often it looks whether it is idle.
const TICK: Duration = Duration::from_millis(250);
/// How long a new server waits for one that is ending to let go of the store: that one writes everything out first, which
/// takes long on a slow disk. Shorter than the client's patience with a server that starts.
const PREDECESSOR: Duration = Duration::from_secs(240);
/// The same for a server in the foreground: somebody is looking, and wants to hear that another one runs.
const PREDECESSOR_FOREGROUND: Duration = Duration::from_secs(10);
/// How often it looks.
const PREDECESSOR_POLL: Duration = Duration::from_millis(5);
/// How often what was fetched is made durable: after a power loss, only objects younger than this are hashed again.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(60);
/// Connections at a time; each has a thread.
const CONNECTIONS_MAX: usize = 512;

/// What a starting server prints on standard output when it accepts connections; the command that started it waits for
/// this line, and takes anything else for the reason why there is no server.
pub const READY: &str = "ready";

/// What the threads of a server share.
#[derive(Debug)]
struct Server {
    service: Service,
    mounts: Mounts,
    started: Instant,
    connections: Mutex<Connections>,
    /// Set once: no new connection is served any more.
    ending: AtomicBool,
}

#[derive(Debug)]
struct Connections {
    open: usize,
    /// When the last one went.
    idle_since: Instant,
}

impl Server {
    fn status(&self) -> Status {
        Status {
            pid: std::process::id(),
            uptime: self.started.elapsed(),
            connections: self
                .connections
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .open,
            mounts: self
                .mounts
                .records()
                .into_iter()
                .map(|record| MountStatus {
                    id: record.id,
                    image: record.image,
                    manifest_digest: record.manifest_digest,
                    dir: record.dir,
                })
                .collect(),
            stats: self.service.stats(),
        }
    }

    /// Counts a new connection; `None` when there are too many or the server is ending.
    fn enter(self: &Arc<Self>) -> Option<ConnectionGuard> {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if self.ending.load(Ordering::Relaxed) || connections.open >= CONNECTIONS_MAX {
            return None;
        }
        connections.open += 1;
        Some(ConnectionGuard(Arc::clone(self)))
    }

    /// Decides whether to end, and if so, serves nobody any more.
    fn end_if_idle(&self, limit: Duration) -> bool {
        if self.mounts.any() {
            return false;
        }
        let connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        let idle = connections.open == 0 && connections.idle_since.elapsed() >= limit;
        if idle {
            self.ending.store(true, Ordering::Relaxed);
        }
        idle
    }
}

/// Counts one connection as open.
#[derive(Debug)]
struct ConnectionGuard(Arc<Server>);

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        let mut connections = self.0.connections.lock().unwrap_or_else(PoisonError::into_inner);
        connections.open = connections.open.saturating_sub(1);
        connections.idle_since = Instant::now();
    }
}

/// Runs `peel daemon` until it is idle or told to stop.
pub fn run(global: &Global, args: &DaemonArgs) -> anyhow::Result<()> {
    let root = std::path::absolute(&global.store).context("store directory")?;
    let run_dir = RunDir::make(&root)?;
    // Started through /proc/self/exe, it would show as "exe" in process lists. A name is a courtesy.
    let _ = rustix::thread::set_name(c"peel-server");
    if args.detached {
        let log = logging::to_file(run_dir.open_log()?, global.verbose, global.log_format)
            .context("run/daemon.log")?;
        panics::abort_process(Some(log));
        // Until here it is the log as well. Whatever writes to it from now on must not fail where the disk of the log is full.
        let null = File::options()
            .write(true)
            .open("/dev/null")
            .context("/dev/null")?;
        rustix::stdio::dup2_stderr(null).context("standard error")?;
        // The starter gives a new process that leads no group, so this cannot fail for the one documented reason.
        rustix::process::setsid().context("setsid")?;
        std::env::set_current_dir("/").context("/")?;
    } else {
        logging::to_stderr(global.verbose.max(1), global.log_format);
        panics::abort_process(None);
    }
    let result = serve(&root, run_dir, args);
    if let Err(error) = &result {
        tracing::error!("{}", describe(error));
    }
    result
}

fn serve(root: &Path, run_dir: RunDir, args: &DaemonArgs) -> anyhow::Result<()> {
    let patience = if args.detached {
        PREDECESSOR
    } else {
        PREDECESSOR_FOREGROUND
    };
    let lock = run_dir
        .lock(LOCK, patience)
        .context("the store has a server already; stop that first, or use another --store")?;
    let store = Store::open(root)?;
    lock_store(&store, patience)?;
    let options = peel_fs::Options {
        read_deadline: read_deadline()?,
        ..peel_fs::Options::default()
    };
    let service = Service::start(store.clone(), options)?;
    let server = Arc::new(Server {
        mounts: Mounts::new(root, service.clone())?,
        service,
        started: Instant::now(),
        connections: Mutex::new(Connections {
            open: 0,
            idle_since: Instant::now(),
        }),
        ending: AtomicBool::new(false),
    });
    server.mounts.clean_up();
    let listener = Arc::new(run_dir.listen()?);
    spawn_accept(&server, &listener)?;
    announce();
    tracing::info!(store = %root.display(), pid = std::process::id(), "serving");

    let idle_exit = (args.idle_exit > 0).then(|| Duration::from_secs(args.idle_exit));
    let why = wait_for_end(&server, &store, idle_exit)?;
    tracing::info!("ending: {why}");
    server.ending.store(true, Ordering::Relaxed);
    listener.close();
    server.mounts.drop_all();
    server.service.clone().stop();
    if let Err(error) = store.checkpoint() {
        tracing::warn!("store not closed cleanly: {error}");
    }
    // Threads that are still ending keep the store locked until the process is gone; so does its successor's turn wait.
    std::mem::forget(lock);
    Ok(())
}

/// Takes the store, waiting for a predecessor whose last threads are still ending.
fn lock_store(store: &Store, patience: Duration) -> Result<(), peel_store::Error> {
    let deadline = Instant::now() + patience;
    loop {
        match store.lock() {
            Err(peel_store::Error::Locked { .. }) if Instant::now() < deadline => {
                std::thread::sleep(PREDECESSOR_POLL);
            }
            result => return result,
        }
    }
}

/// How long a read waits for bytes; `PEEL_READ_DEADLINE` (seconds) is for tests and slow links.
fn read_deadline() -> anyhow::Result<Duration> {
    match std::env::var("PEEL_READ_DEADLINE") {
        Ok(text) => text
            .parse::<f64>()
            .ok()
            .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
            .filter(|deadline| !deadline.is_zero())
            .with_context(|| format!("PEEL_READ_DEADLINE={text}: not a number of seconds")),
        Err(_) => Ok(peel_fs::Options::default().read_deadline),
    }
}

/// Tells whoever started this process that it accepts connections. Nobody may be listening.
fn announce() {
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{READY}").and_then(|()| out.flush());
    // The starter waits for the end of the pipe, not only for the line: give it up.
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(null);
    }
}

fn spawn_accept(server: &Arc<Server>, listener: &Arc<Listener>) -> anyhow::Result<()> {
    let (server, listener) = (Arc::clone(server), Arc::clone(listener));
    std::thread::Builder::new()
        .name("accept".to_owned())
        .spawn(move || {
            while let Some(stream) = listener.accept() {
                // A refused client sees the end of the stream and tries again, or a new server, until its deadline.
                let Some(guard) = server.enter() else { continue };
                let spawned = std::thread::Builder::new()
                    .name("connection".to_owned())
                    .spawn(move || connection::serve(&guard.0, stream));
                if let Err(error) = spawned {
                    tracing::warn!("no thread for a connection: {error}");
                }
            }
        })
        .context("thread")?;
    Ok(())
}

/// Blocks until the server should end; returns why.
fn wait_for_end(
    server: &Arc<Server>,
    store: &Store,
    idle_exit: Option<Duration>,
) -> anyhow::Result<&'static str> {
    use tokio::signal::unix::{SignalKind, signal};

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("runtime")?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        // A server that dies with the terminal of the first command would surprise the second.
        let mut _hangup = signal(SignalKind::hangup())?;
        let mut tick = tokio::time::interval(TICK);
        let mut scanned = Instant::now();
        let mut memory = Memory::new();
        let mut checkpoint = tokio::task::spawn_blocking(|| {});
        let mut checkpointed = Instant::now();
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok("SIGTERM"),
                _ = interrupt.recv() => return Ok("SIGINT"),
                _ = tick.tick() => {}
            }
            memory.look(Activity::of(&server.status()));
            if scanned.elapsed() >= SCAN_EVERY {
                server.mounts.clean_up();
                scanned = Instant::now();
            }
            if checkpointed.elapsed() >= CHECKPOINT_EVERY && checkpoint.is_finished() {
                checkpointed = Instant::now();
                let store = store.clone();
                // Writing everything out can take seconds, during which signals must still be heard.
                checkpoint = tokio::task::spawn_blocking(move || {
                    if let Err(error) = store.checkpoint() {
                        tracing::warn!("cannot make the store durable: {error}");
                    }
                });
            }
            if idle_exit.is_some_and(|limit| server.end_if_idle(limit)) {
                return Ok("nothing is mounted");
            }
        }
    })
}
