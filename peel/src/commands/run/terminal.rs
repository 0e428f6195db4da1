//! `peel run -t`: the container's terminal on this one.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use peel_sandbox::{Container, Exit};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use super::relay::{self, FirstByte, Relay};
use crate::signals;

/// How often a change of size is looked for while waiting for the container.
const RESIZE_EVERY: Duration = Duration::from_millis(100);

/// The connection between the two terminals.
#[derive(Debug)]
pub(super) struct Screen {
    output: Relay,
    resized: Arc<AtomicBool>,
    _raw: Option<RawMode>,
}

/// Starts to copy between the container's terminal and this one; input only with `interactive`.
pub(super) fn attach(console: OwnedFd, interactive: bool, first_byte: &FirstByte) -> anyhow::Result<Screen> {
    let console = File::from(console);
    let raw = interactive.then(RawMode::enter).transpose()?.flatten();
    if interactive {
        let to = console.try_clone().context("terminal")?;
        let unused = FirstByte::new(std::time::Instant::now());
        // Not joined: it ends with this process, or earlier with its input.
        relay::spawn("stdin", io::stdin(), to, &unused)?;
    }
    let output = relay::spawn("stdout", console, io::stdout(), first_byte)?;
    Ok(Screen {
        output,
        resized: signals::window_changes()?,
        _raw: raw,
    })
}

impl Screen {
    /// Gives the container's terminal the size of this one.
    pub(super) fn follow_size(&self, container: &Container) -> anyhow::Result<()> {
        if let Ok(size) = tcgetwinsize(io::stdout()) {
            container.resize(size.ws_row, size.ws_col)?;
        }
        Ok(())
    }

    /// Waits for the container's end and passes changes of size on meanwhile.
    pub(super) fn wait(&self, container: &mut Container) -> anyhow::Result<Exit> {
        loop {
            if let Some(exit) = container.wait_for(RESIZE_EVERY)? {
                return Ok(exit);
            }
            if self.resized.swap(false, Ordering::Relaxed) {
                self.follow_size(container)?;
            }
        }
    }

    /// Copies what is left and gives the terminal back.
    pub(super) fn detach(self) {
        self.output.join();
    }
}

/// This terminal in raw mode; as it was when dropped.
#[derive(Debug)]
struct RawMode(Termios);

impl RawMode {
    /// `None` when standard input is no terminal.
    fn enter() -> anyhow::Result<Option<Self>> {
        let Ok(before) = tcgetattr(io::stdin()) else {
            return Ok(None);
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw).context("terminal")?;
        Ok(Some(Self(before)))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Drain, so that what the container wrote last is shown in the mode that it was written for.
        let _ = tcsetattr(io::stdin(), OptionalActions::Drain, &self.0);
    }
}
