//! A range of an object that may be exposed: taken under the object's lock, copied without one, by the threads that answer
//! reads.
//!
//! What must hold: whoever makes one has seen that every chunk under the range is verified and here.

use std::fs::File;
use std::io;
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
    /// All of the object is zeros, by its own hash.
    zeros: bool,
}

impl Snapshot {
    /// Of an object whose range is here: on disk, but for the chunks in `memory`, given as place in the file and bytes, ascending.
    pub(super) fn new(backing: &Backing, memory: Vec<(u64, Arc<Vec<u8>>)>) -> Self {
        Self {
            backing: backing.clone(),
            memory,
            zeros: false,
        }
    }

    /// Of an object that is complete.
    pub(crate) fn complete(backing: &Backing) -> Self {
        Self {
            backing: backing.clone(),
            memory: Vec::new(),
            zeros: false,
        }
    }

    /// Of an object that is nothing but zeros, by its own hash: there is nothing to read.
    pub(super) fn zeros() -> Self {
        Self {
            backing: Backing::Pending,
            memory: Vec::new(),
            zeros: true,
        }
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
            let next = self
                .memory
                .iter()
                .map(|(start, _)| *start)
                .find(|start| *start > at);
            let run = next.map_or(left, |next| {
                usize::try_from(next - at).map_or(left, |run| run.min(left))
            });
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
            Backing::Pending if self.zeros => {
                bytes.resize(length + run, 0);
                Ok(())
            }
            // What is not confirmed is answered from memory only.
            Backing::Unknown | Backing::Nothing | Backing::Unkept | Backing::Pending => {
                Err(io::ErrorKind::NotFound.into())
            }
        }
    }
}
