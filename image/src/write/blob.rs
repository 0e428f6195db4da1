//! The output, counted and hashed, by a thread of its own as long as many pieces come.

use std::io::Write;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::WriteError;
use super::pack::ROOM_MAX;
use crate::digest::{Digest, Hasher};

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
        self.output.write_all(data).map_err(WriteError::Output)?;
        self.hasher.update(data);
        self.size += data.len() as u64;
        Ok(())
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

/// The thread; it ends with the blob when the sender is gone.
pub(super) type Thread<'scope, W> = ScopedJoinHandle<'scope, Result<Blob<W>, WriteError>>;

/// Starts a thread that writes what it is sent and gives the buffers back, emptied: fresh memory costs more than what is copied
/// into it. At most `waiting` of them wait on either way.
pub(super) fn start<'scope, W: Write + Send + 'scope>(
    scope: &'scope Scope<'scope, '_>,
    output: W,
    waiting: usize,
) -> Result<(Sender<Vec<u8>>, Receiver<Vec<u8>>, Thread<'scope, W>), WriteError> {
    let (unwritten, buffers) = bounded::<Vec<u8>>(waiting);
    let (done, rooms) = bounded(waiting);
    let thread = Builder::new()
        .name("layer-blob".to_owned())
        .spawn_scoped(scope, move || {
            let mut blob = Blob::new(output);
            for mut buffer in buffers {
                blob.write(&buffer)?;
                buffer.clear();
                if buffer.capacity() <= ROOM_MAX {
                    // Enough of them are waiting already, or nobody wants them any more.
                    let _unwanted = done.try_send(buffer);
                }
            }
            Ok(blob)
        })
        .map_err(WriteError::Thread)?;
    Ok((unwritten, rooms, thread))
}
