//! What a run touched: which files of a container's root were opened, read and executed, in the order of the first time.
//!
//! Called by `peel optimize` between making a container and starting it, so that nothing of the container is
//! missed. The kernel reports through fanotify: every process, every mount and every mount namespace, because the mark is
//! on the file system itself. What must hold: no event is lost silently; a run that lost one fails.

pub mod event;
mod recorder;
mod sys;

use std::io;
use std::time::Duration;

pub use recorder::Recorder;

/// Why a run could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// fanotify cannot be used.
    #[error("cannot record file accesses: {step}: {source} (CAP_SYS_ADMIN is needed)")]
    Start {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// Events could not be read.
    #[error("recording file accesses failed: {step}: {source}; run it again")]
    Read {
        /// What was tried.
        step: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The kernel's queue was full and events were dropped.
    #[error("the kernel dropped file access events, so the record would be incomplete; run it again")]
    Overflow,
    /// More different files than a record may have.
    #[error("the run touched more than {0} files, which is more than a record can hold")]
    TooMany(usize),
    /// The kernel's answer is not understood.
    #[error("the kernel's file access events are not understood: {0}")]
    Malformed(#[from] event::Malformed),
    /// The thread that records ended by itself.
    #[error("the recorder stopped unexpectedly; this is a defect of peel")]
    Stopped,
}

/// One file that was touched, at its first access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Path inside the root, clean and relative. A file that was made during the run is here too; it is not in the image's
    /// tree.
    pub path: peel_image::path::EntryPath,
    /// Time of the first access since the recorder was started, to the microsecond; taken when the event is read, which is
    /// at once unless the machine is overloaded.
    pub at: Duration,
    /// Whether it was executed: as a program, as the interpreter of one, or as the dynamic loader.
    pub executed: bool,
    /// Whether bytes were read through a descriptor (mapped files show only as opened). The kernel's own look at the first
    /// page of a program counts.
    pub read: bool,
}
