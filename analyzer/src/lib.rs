//! What a run touched (skeleton of the contract).
#![allow(clippy::todo, missing_debug_implementations)]

use std::os::fd::BorrowedFd;
use std::time::Duration;

/// Why a run could not be recorded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Replaced by the real variants.
    #[error("placeholder")]
    Placeholder,
}

/// One file that was touched, at its first access.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Path inside the root, clean and relative.
    pub path: peel_image::path::EntryPath,
    /// Time of the first access since the recorder was started.
    pub at: Duration,
    /// Whether it was executed.
    pub executed: bool,
    /// Whether bytes were read through a descriptor (mapped files show only as opened).
    pub read: bool,
}

/// Records every open, access and exec below one mounted root, whichever process does it.
#[derive(Debug)]
pub struct Recorder;

impl Recorder {
    /// Marks the file system of `root` (the container's overlay). Call it before the first instruction runs.
    pub fn start(_root: BorrowedFd<'_>) -> Result<Self, Error> {
        todo!()
    }

    /// Ends the recording and returns regular files in the order of their first access. A queue overflow is an error.
    pub fn finish(self) -> Result<Vec<Access>, Error> {
        todo!()
    }
}
