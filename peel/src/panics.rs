//! A panic ends the whole process at once, whichever thread it is in.
//!
//! Called by the server when it starts. Half a server is worse than none: reads would wait for threads that are gone, and
//! `catch_unwind`, which the runtime has around every task, would hide why.

use std::fmt::{self, Write};
use std::fs::File;
use std::io;
use std::panic::PanicHookInfo;

/// Longest message in bytes; the rest of a longer one is left out.
const LINE_MAX: usize = 2048;

/// From now on a panic in any thread of this process is written to standard error and to the end of `log`, and then the process
/// ends with SIGABRT. Neither needs memory, and that they cannot be written is no reason to go on.
pub fn abort_process(log: Option<File>) {
    std::panic::set_hook(Box::new(move |panic| {
        let line = describe(panic);
        let _ = rustix::io::write(io::stderr(), line.as_bytes());
        if let Some(log) = &log {
            let _ = rustix::io::write(log, line.as_bytes());
        }
        std::process::abort();
    }));
}

fn describe(panic: &PanicHookInfo<'_>) -> Line {
    let mut line = Line {
        bytes: [0; LINE_MAX],
        length: 0,
    };
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("without a name");
    let message = panic.payload_as_str().unwrap_or("no message");
    // Full is no failure: the beginning says most.
    let _ = match panic.location() {
        Some(place) => write!(line, "ERROR thread {name} panicked at {place}: {message}"),
        None => write!(line, "ERROR thread {name} panicked: {message}"),
    };
    line.end();
    line
}

/// Text of a bounded length that needs no memory but its own.
struct Line {
    bytes: [u8; LINE_MAX],
    length: usize,
}

impl Line {
    fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    /// Ends the line; its last byte always has room.
    fn end(&mut self) {
        if let Some(byte) = self.bytes.get_mut(self.length) {
            *byte = b'\n';
            self.length += 1;
        }
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for byte in text.bytes() {
            if self.length + 1 >= LINE_MAX {
                return Err(fmt::Error);
            }
            if let Some(place) = self.bytes.get_mut(self.length) {
                *place = byte;
                self.length += 1;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    use super::*;

    /// Where this test, run as a process of its own, panics.
    const PANIC_IN: &str = "PEEL_TEST_PANIC_IN";

    /// Panics where no other thread looks.
    fn panic_in(place: &str) {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        match place {
            "thread" => drop(
                std::thread::Builder::new()
                    .name("peel-some".to_owned())
                    .spawn(|| panic!("broken {}", 1))
                    .unwrap(),
            ),
            "task" => drop(runtime.spawn(async { panic!("broken {}", 1) })),
            "blocking" => drop(runtime.spawn_blocking(|| panic!("broken {}", 1))),
            "caught" => drop(std::panic::catch_unwind(|| panic!("broken {}", 1))),
            "long" => drop(std::thread::spawn(|| panic!("broken 1{}", "x".repeat(100_000)))),
            other => unreachable!("{other}"),
        }
        // Only the panic ends this.
        loop {
            std::thread::park();
        }
    }

    #[test]
    fn a_panic_in_any_thread_ends_the_process_and_is_in_the_log() {
        if let Ok(place) = std::env::var(PANIC_IN) {
            let (place, log) = place.split_once(' ').unwrap();
            abort_process(Some(File::options().append(true).create(true).open(log).unwrap()));
            panic_in(place);
        }
        let dir = tempfile::tempdir().unwrap();
        for place in ["thread", "task", "blocking", "caught", "long"] {
            let log = dir.path().join(place);
            let output = Command::new(std::env::current_exe().unwrap())
                .args([
                    "--exact",
                    "panics::tests::a_panic_in_any_thread_ends_the_process_and_is_in_the_log",
                ])
                .env(PANIC_IN, format!("{place} {}", log.display()))
                .output()
                .unwrap();
            assert_eq!(output.status.signal(), Some(6), "{place}: {output:?}");
            let text = std::fs::read_to_string(log).unwrap();
            assert!(
                text.contains(" panicked at ") && text.contains("broken 1"),
                "{place}: {text}"
            );
            assert!(text.ends_with('\n') && text.len() <= LINE_MAX, "{place}: {text}");
        }
    }

    #[test]
    fn a_panic_whose_log_cannot_be_written_ends_the_process_too() {
        if std::env::var_os(PANIC_IN).is_some() {
            abort_process(Some(File::options().write(true).open("/dev/full").unwrap()));
            panic_in("task");
        }
        let full = File::options().write(true).open("/dev/full").unwrap();
        let status = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "panics::tests::a_panic_whose_log_cannot_be_written_ends_the_process_too",
            ])
            .env(PANIC_IN, "task")
            .stderr(full)
            .status()
            .unwrap();
        assert_eq!(status.signal(), Some(6), "{status}");
    }
}
