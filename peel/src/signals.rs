//! Signals to this process passed on to a container.
//!
//! The handlers are tokio's: they only write to a pipe, and a thread of ours reads it. From the first call on, the signals
//! named here do not end this process any more.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use anyhow::Context;
use peel_sandbox::Signaller;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// After so many requests to end (SIGINT, SIGTERM, SIGHUP) a container that ignores them is killed: a program that runs as pid 1
/// and has no handler cannot be ended in any other way.
const REQUESTS_UNTIL_KILL: u32 = 3;

/// Passes SIGINT, SIGTERM, SIGHUP, SIGQUIT, SIGUSR1 and SIGUSR2 on; SIGTERM, which asks for the container's end, as its
/// `stop_signal`.
pub fn forward(container: Signaller, stop_signal: i32) -> anyhow::Result<()> {
    let container = Arc::new(container);
    let requests = Arc::new(AtomicU32::new(0));
    let kinds = [
        SignalKind::interrupt(),
        SignalKind::terminate(),
        SignalKind::hangup(),
        SignalKind::quit(),
        SignalKind::user_defined1(),
        SignalKind::user_defined2(),
    ];
    listen(&kinds, move |kind| {
        let asks = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
        ]
        .contains(&kind);
        let number = if kind == SignalKind::terminate() {
            stop_signal
        } else {
            kind.as_raw_value()
        };
        let result = if asks && requests.fetch_add(1, Ordering::Relaxed) + 1 >= REQUESTS_UNTIL_KILL {
            container.kill()
        } else {
            container.signal(number)
        };
        if let Err(error) = result {
            tracing::warn!("signal {number} not passed on: {error}");
        }
    })
}

/// Notices SIGINT and SIGTERM as long as it lives; afterwards they end the process again.
#[derive(Debug)]
pub struct Interrupts(Arc<InterruptState>);

#[derive(Debug, Default)]
struct InterruptState {
    arrived: AtomicBool,
    over: AtomicBool,
}

impl Interrupts {
    /// Whether one has come.
    pub fn arrived(&self) -> bool {
        self.0.arrived.load(Ordering::Relaxed)
    }
}

impl Drop for Interrupts {
    fn drop(&mut self) {
        self.0.over.store(true, Ordering::Relaxed);
    }
}

/// Begins to notice SIGINT and SIGTERM.
pub fn interrupts() -> anyhow::Result<Interrupts> {
    let state = Arc::new(InterruptState::default());
    let seen = Arc::clone(&state);
    listen(&[SignalKind::interrupt(), SignalKind::terminate()], move |kind| {
        if seen.over.load(Ordering::Relaxed) {
            // tokio keeps its handler for good, so what the signal would have done is done here.
            std::process::exit(128 + kind.as_raw_value());
        }
        seen.arrived.store(true, Ordering::Relaxed);
    })?;
    Ok(Interrupts(state))
}

/// A flag that is set whenever the size of the terminal changes (SIGWINCH).
pub fn window_changes() -> anyhow::Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    listen(&[SignalKind::window_change()], move |_| {
        set.store(true, Ordering::Relaxed);
    })?;
    Ok(flag)
}

/// Calls `act` in a thread of its own for every such signal. The handlers are in place when this returns.
fn listen(kinds: &[SignalKind], act: impl Fn(SignalKind) + Send + Sync + 'static) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()
        .context("runtime")?;
    let act = Arc::new(act);
    {
        let _inside = runtime.enter();
        for kind in kinds.iter().copied() {
            let mut arrivals: Signal = signal(kind).context("signal handler")?;
            let act = Arc::clone(&act);
            runtime.spawn(async move {
                while arrivals.recv().await.is_some() {
                    act(kind);
                }
            });
        }
    }
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || runtime.block_on(std::future::pending::<()>()))
        .context("thread")?;
    Ok(())
}
