//! The output, counted and hashed. As long as many pieces come, a thread of its own writes them.

use std::io::Write;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crossbeam_channel::{Sender, bounded};

use super::WriteError;
use super::hashing::Work;
use peel_hash::{Digest, Hasher};

/// zstd's skippable frame (RFC 8878, section 3.1.2), of the sixteen kinds the one that zstd:chunked uses.
const SKIPPABLE: [u8; 4] = [0x50, 0x2a, 0x4d, 0x18];

/// A blob in the making.
pub(super) struct Blob<W> {
    output: W,
    hasher: Hasher,
    size: u64,
}

impl<W: Write> Blob<W> {
    pub(super) fn new(output: W) -> Self {
        Self {
            output,
            hasher: Hasher::new(),
            size: 0,
        }
    }

    /// Bytes so far.
    pub(super) fn size(&self) -> u64 {
        self.size
    }

    pub(super) fn write(&mut self, data: &[u8]) -> Result<(), WriteError> {
        self.write_only(data)?;
        self.hasher.update(data);
        Ok(())
    }

    fn write_only(&mut self, data: &[u8]) -> Result<(), WriteError> {
        self.output.write_all(data).map_err(WriteError::Output)?;
        self.size += data.len() as u64;
        Ok(())
    }

    /// Takes the hash of what was written so far, where it was made elsewhere.
    pub(super) fn set_hash(&mut self, hasher: Hasher) {
        self.hasher = hasher;
    }

    /// Writes `data` as a frame that zstd skips; returns where `data` is.
    pub(super) fn write_skippable(&mut self, data: &[u8]) -> Result<u64, WriteError> {
        let length = u32::try_from(data.len()).map_err(|_| WriteError::TocTooLarge)?;
        self.write(&SKIPPABLE)?;
        self.write(&length.to_le_bytes())?;
        let start = self.size;
        self.write(data)?;
        Ok(start)
    }

    /// Digest and length.
    pub(super) fn finish(mut self) -> Result<(Digest, u64), WriteError> {
        self.output.flush().map_err(WriteError::Output)?;
        Ok((self.hasher.finish(), self.size))
    }
}

/// The thread.
pub(super) struct Thread<'scope, W> {
    /// What is to be written. The thread ends, with the blob, when nobody has this any more.
    pub(super) unwritten: Sender<Vec<u8>>,
    pub(super) thread: ScopedJoinHandle<'scope, Result<Blob<W>, WriteError>>,
}

/// Starts a thread that writes what it is sent, and passes it on to be hashed. At most `waiting` buffers wait.
pub(super) fn start<'scope, W: Write + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    output: W,
    hashing: Sender<Work>,
    waiting: usize,
) -> Result<Thread<'scope, W>, WriteError> {
    let (unwritten, buffers) = bounded::<Vec<u8>>(waiting);
    let thread = Builder::new()
        .name("layer-blob".to_owned())
        .spawn_scoped(scope, move || {
            let mut blob = Blob::new(output);
            for buffer in buffers {
                blob.write_only(&buffer)?;
                hashing
                    .send(Work::Blob(buffer))
                    .map_err(|_| WriteError::ThreadLost)?;
            }
            Ok(blob)
        })
        .map_err(WriteError::Thread)?;
    Ok(Thread { unwritten, thread })
}
