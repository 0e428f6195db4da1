//! Log lines: on standard error for commands, into a bounded file of the store for the server.
//!
//! What must hold: a line that cannot be written, because a disk is full or nobody reads any more, is lost and nothing else
//! comes of it. Lost lines are counted, and said once lines can be written again. The subscriber reports nothing on its own:
//! it would do so with `eprintln!`, which panics where standard error fails too.

use std::fs::File;
use std::io::{self, IsTerminal, Seek, Write};
use std::sync::{Mutex, PoisonError};

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::cli::LogFormat;

/// The server's log starts over when it grows beyond this many bytes: enough for days, too little to fill a disk.
const LOG_MAX: u64 = 8 << 20;

/// What is logged: `PEEL_LOG` (the syntax of tracing's `EnvFilter`) or else by `-v`.
fn filter(verbose: u8, default: &str) -> EnvFilter {
    // What it logs as an error is in peel's own, with what to do about it.
    let quiet = format!("{default},rustls_platform_verifier=off");
    let level = match verbose {
        0 => quiet.as_str(),
        1 => {
            "peel=info,peel_fs=info,peel_registry=info,peel_store=info,peel_sandbox=info,peel_analyzer=info,warn"
        }
        2 => {
            "peel=debug,peel_fs=debug,peel_registry=debug,peel_store=debug,peel_sandbox=debug,peel_analyzer=debug,info"
        }
        _ => "trace",
    };
    EnvFilter::try_from_env("PEEL_LOG").unwrap_or_else(|_| EnvFilter::new(level))
}

/// Logs to standard error. Warnings and errors, more with `-v`.
pub fn to_stderr(verbose: u8, format: LogFormat) {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(verbose, "warn"))
        .with_ansi(io::stderr().is_terminal())
        .log_internal_errors(false)
        .with_writer(Log::new(Stderr, format));
    // A second call in one process (tests) keeps the first subscriber.
    let _ = match format {
        LogFormat::Text => builder.without_time().with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// Logs to a file that was opened for appending. Returns it, for what has to be written without a subscriber.
pub fn to_file(file: File, verbose: u8, format: LogFormat) -> io::Result<File> {
    let writer = Log::new(Bounded(file.try_clone()?), format);
    let default = "info";
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(verbose, default))
        .with_ansi(false)
        .log_internal_errors(false)
        .with_writer(writer);
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    Ok(file)
}

/// Where lines go, one at a time.
trait Place: std::fmt::Debug + Send {
    /// Appends bytes; an error when some of them may not be there.
    fn append(&mut self, bytes: &[u8]) -> io::Result<()>;
}

/// Standard error.
#[derive(Debug)]
struct Stderr;

impl Place for Stderr {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::stderr().write_all(bytes)
    }
}

/// A file that starts over when it is full.
#[derive(Debug)]
struct Bounded(File);

impl Place for Bounded {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.0.stream_position()? > LOG_MAX {
            self.0.set_len(0)?;
        }
        self.0.write_all(bytes)
    }
}

/// A log whose writers never fail.
#[derive(Debug)]
struct Log<P> {
    state: Mutex<State<P>>,
    format: LogFormat,
}

#[derive(Debug)]
struct State<P> {
    place: P,
    /// Lines that could not be written since the last one that was.
    lost: u64,
}

impl<P: Place> Log<P> {
    const fn new(place: P, format: LogFormat) -> Self {
        let state = Mutex::new(State { place, lost: 0 });
        Self { state, format }
    }

    /// What is said of lost lines. Begins with the end of a line, because one of them may be there in part.
    fn loss(&self, lost: u64) -> String {
        let message = format!("{lost} log lines were lost: they could not be written");
        match self.format {
            LogFormat::Text => format!("\n WARN {message}\n"),
            LogFormat::Json => format!(
                "\n{}\n",
                serde_json::json!({"level": "WARN", "fields": {"message": message, "lost": lost}})
            ),
        }
    }
}

impl<'a, P: Place + 'a> MakeWriter<'a> for Log<P> {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl<P: Place> Write for &Log<P> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.lost > 0 {
            let loss = self.loss(state.lost);
            if state.place.append(loss.as_bytes()).is_ok() {
                state.lost = 0;
            }
        }
        if state.lost > 0 || state.place.append(line).is_err() {
            state.lost = state.lost.saturating_add(1);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use super::*;

    #[test]
    fn a_full_log_starts_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, vec![b'x'; usize::try_from(LOG_MAX).unwrap() + 1]).unwrap();
        let file = OpenOptions::new().append(true).open(&path).unwrap();
        let log = Log::new(Bounded(file), LogFormat::Text);
        (&log).write_all(b"first\n").unwrap();
        let length = std::fs::metadata(&path).unwrap().len();
        (&log).write_all(b"second\n").unwrap();
        assert_eq!(
            length,
            LOG_MAX + 7,
            "an append position is known only after a write"
        );
        assert_eq!(std::fs::read(&path).unwrap(), b"second\n");
    }

    /// A disk with so much room, of which some bytes of a line may be written.
    #[derive(Debug)]
    struct Disk {
        written: Vec<u8>,
        room: usize,
    }

    impl Place for Disk {
        fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
            let part = bytes.get(..self.room).unwrap_or(bytes);
            self.written.extend_from_slice(part);
            self.room -= part.len();
            if part.len() == bytes.len() {
                Ok(())
            } else {
                Err(io::ErrorKind::StorageFull.into())
            }
        }
    }

    #[test]
    fn lines_that_find_no_room_are_lost_and_counted() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let disk = Disk {
                written: Vec::new(),
                room: 8,
            };
            let log = Log::new(disk, format);
            for line in ["first\n", "second\n", "third\n"] {
                assert_eq!((&log).write(line.as_bytes()).unwrap(), line.len());
            }
            log.state.lock().unwrap().place.room = 1000;
            (&log).write_all(b"fourth\n").unwrap();
            (&log).write_all(b"fifth\n").unwrap();
            let written = log.state.into_inner().unwrap().place.written;
            let text = String::from_utf8(written).unwrap();
            let lines: Vec<&str> = text.lines().collect();
            assert_eq!(lines[..2], ["first", "se"], "{text}");
            assert!(lines[2].contains("2 log lines were lost"), "{text}");
            assert_eq!(lines[3..], ["fourth", "fifth"], "{text}");
        }
    }
}
