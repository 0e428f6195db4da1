//! Copies a container's output to this process' and notes when the first byte came.

use std::io::{Read, Write};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context;

/// Bytes that are moved at once.
const PIECE: usize = 64 << 10;

/// When the first byte of output came.
#[derive(Debug, Clone)]
pub(super) struct FirstByte {
    begin: Instant,
    at: Arc<OnceLock<Duration>>,
}

impl FirstByte {
    /// Counts from `begin`.
    pub(super) fn new(begin: Instant) -> Self {
        Self {
            begin,
            at: Arc::default(),
        }
    }

    /// A byte is here.
    pub(super) fn note(&self) {
        self.at.get_or_init(|| self.begin.elapsed());
    }

    /// The time, once there was one.
    pub(super) fn get(&self) -> Option<Duration> {
        self.at.get().copied()
    }
}

/// A thread that copies.
#[derive(Debug)]
pub(super) struct Relay(JoinHandle<()>);

impl Relay {
    /// Waits until everything is copied.
    pub(super) fn join(self) {
        // A relay has no result; one that panicked has lost output and said so on standard error.
        let _ = self.0.join();
    }
}

/// Starts to copy. Ends with the input, or when nobody takes the output any more.
pub(super) fn spawn(
    name: &str,
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
    first_byte: &FirstByte,
) -> anyhow::Result<Relay> {
    let first_byte = first_byte.clone();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let mut buffer = vec![0; PIECE];
            loop {
                let length = match from.read(&mut buffer) {
                    Ok(0) => break,
                    Ok(length) => length,
                    Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                    // A terminal whose other side is gone says EIO.
                    Err(_) => break,
                };
                first_byte.note();
                let piece = buffer.get(..length).unwrap_or_default();
                if to.write_all(piece).and_then(|()| to.flush()).is_err() {
                    break;
                }
            }
        })
        .map(Relay)
        .context("thread")
}
