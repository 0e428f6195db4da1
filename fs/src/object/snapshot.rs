//! A range of an object that may be exposed: taken under the object's lock, copied without one, by the threads that answer
//! reads.
//!
//! What must hold: whoever makes one has seen that every chunk under the range is verified and here.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use peel_image::Digest;
use peel_store::Store;

use super::Backing;

/// Bytes that may be exposed, ready to be copied without a lock.
#[derive(Debug)]
pub(crate) struct Snapshot {
    backing: Backing,
    /// Chunks that are not on disk yet: place in the file and bytes, ascending.
    memory: Vec<(u64, Arc<Vec<u8>>)>,
    /// Ranges of a pending object that are zeros, ascending.
    holes: Vec<Range<u64>>,
    /// They are so only by the word of a list that did not bring the object.
    doubted: bool,
}

impl Snapshot {
    /// Of an object whose range is here: on disk, but for the chunks in `memory`, given as place in the file and bytes, and for `holes`,
    /// which are zeros. Both ascending.
    pub(super) fn new(backing: &Backing, memory: Vec<(u64, Arc<Vec<u8>>)>, holes: Vec<Range<u64>>) -> Self {
        Self {
            backing: backing.clone(),
            memory,
            holes,
            doubted: false,
        }
    }

    /// With `doubted`, a hole is answered only if the file has zeros there.
    pub(super) fn doubt_holes(mut self, doubted: bool) -> Self {
        self.doubted = doubted;
        self
    }

    /// Of an object that is complete.
    pub(crate) fn complete(backing: &Backing) -> Self {
        Self::new(backing, Vec::new(), Vec::new())
    }

    /// Of an object that is nothing but zeros, by its own hash: there is nothing to read.
    pub(super) fn zeros() -> Self {
        let all = 0..u64::MAX;
        Self::new(&Backing::Pending, Vec::new(), vec![all])
    }

    /// Copies a range that lies inside what the snapshot was taken for; replaces what `bytes` held.
    pub(crate) fn read_into(
        &self,
        store: &Store,
        digest: &Digest,
        offset: u64,
        length: usize,
        bytes: &mut Vec<u8>,
    ) -> io::Result<()> {
        bytes.clear();
        while bytes.len() < length {
            let at = offset + bytes.len() as u64;
            let left = length - bytes.len();
            if let Some(piece) = self.in_memory(at) {
                bytes.extend_from_slice(piece.get(..left).unwrap_or(piece));
                continue;
            }
            let until = |end: u64| usize::try_from(end - at).map_or(left, |run| run.min(left));
            if let Some(hole) = self.holes.iter().find(|hole| hole.contains(&at)) {
                let run = until(hole.end);
                if self.doubted {
                    check_hole(store, digest, at, run)?;
                }
                bytes.resize(bytes.len() + run, 0);
                continue;
            }
            let memory = self.memory.iter().map(|(start, _)| *start);
            let starts = memory.chain(self.holes.iter().map(|hole| hole.start));
            let run = starts.filter(|start| *start > at).min().map_or(left, until);
            self.on_disk(store, digest, at, run, bytes)?;
        }
        Ok(())
    }

    fn in_memory(&self, at: u64) -> Option<&[u8]> {
        self.memory.iter().find_map(|(start, bytes)| {
            let skip = usize::try_from(at.checked_sub(*start)?).ok()?;
            bytes.get(skip..).filter(|rest| !rest.is_empty())
        })
    }

    fn on_disk(
        &self,
        store: &Store,
        digest: &Digest,
        at: u64,
        run: usize,
        bytes: &mut Vec<u8>,
    ) -> io::Result<()> {
        let length = bytes.len();
        let read = |file: &File, bytes: &mut Vec<u8>| {
            bytes.resize(length + run, 0);
            file.read_exact_at(bytes.get_mut(length..).unwrap_or_default(), at)
        };
        match &self.backing {
            Backing::Complete(Some(file)) => read(file, bytes),
            Backing::Complete(None) => {
                let file = store.open_object(digest).map_err(io::Error::other)?;
                read(&file.ok_or(io::ErrorKind::NotFound)?, bytes)
            }
            Backing::Partial(partial) => {
                let part = partial.read(at, run).map_err(io::Error::other)?;
                if part.len() != run {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                bytes.extend_from_slice(&part);
                Ok(())
            }
            // What is not confirmed is answered from memory only, but for zeros.
            Backing::Unknown | Backing::Nothing | Backing::Unkept | Backing::Pending => {
                Err(io::ErrorKind::NotFound.into())
            }
        }
    }
}

/// An error if a pending file has something else than zeros in that range.
fn check_hole(store: &Store, digest: &Digest, at: u64, run: usize) -> io::Result<()> {
    let file = store.open_pending(digest).map_err(io::Error::other)?;
    let mut found = vec![0; run];
    file.ok_or(io::ErrorKind::NotFound)?
        .read_exact_at(&mut found, at)?;
    if found.iter().any(|byte| *byte != 0) {
        return Err(io::Error::other(
            "the table of contents calls a part of this file a run of zeros, which it is not",
        ));
    }
    Ok(())
}
