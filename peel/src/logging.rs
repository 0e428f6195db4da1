//! Log lines: on standard error for commands, into a bounded file of the store for the server.

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
        .with_writer(io::stderr);
    // A second call in one process (tests) keeps the first subscriber.
    let _ = match format {
        LogFormat::Text => builder.without_time().with_target(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// Logs to a file that was opened for appending.
pub fn to_file(file: File, verbose: u8, format: LogFormat) {
    let writer = BoundedLog(Mutex::new(file));
    let default = "info";
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(verbose, default))
        .with_ansi(false)
        .with_writer(writer);
    let _ = match format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// A log file that starts over when it is full.
#[derive(Debug)]
struct BoundedLog(Mutex<File>);

impl<'a> MakeWriter<'a> for BoundedLog {
    type Writer = &'a Self;

    fn make_writer(&'a self) -> Self::Writer {
        self
    }
}

impl Write for &BoundedLog {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if file.stream_position()? > LOG_MAX {
            file.set_len(0)?;
        }
        file.write_all(line)?;
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
        let log = BoundedLog(Mutex::new(file));
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
}
