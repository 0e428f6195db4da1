//! Objects that are not complete yet: a sparse file and a map of its chunks, filled in any order by several threads while
//! others read.
//!
//! Called by the fetcher and the object file system. What must hold:
//!
//! * A chunk is Present only when this process has verified it (the writer hashed it before [`PartialObject::write`]) and
//!   a sync has confirmed it since ([`crate::durable`]). Before that it is Unconfirmed, and what an earlier process left is
//!   Unverified: both are hashed after they are read, before a byte is exposed ([`PartialObject::verify`]). So neither a
//!   crash nor a power loss nor a disk that refuses pages can expose a wrong byte, and nobody waits for a sync.
//! * A partial object belongs to one exact chunk list. Chunk digests are vouched for only by the TOC that they came from;
//!   if two images name the same object with different lists, one of them may lie, and its bytes must not reach
//!   the other. The second is refused with [`Error::ChunkListConflict`] while the first is in use; on disk, a map of another
//!   list is thrown away.
//! * A file is pending, and later an object, only after all of it has been hashed. Its descriptor stays valid for those
//!   who read.
//! * State changes are single atomic operations. No lock is held across I/O except the one that lets a second opener of
//!   the same object wait until the first has made its two files.

mod map;
mod open;
mod registry;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use peel_image::{Digest, Hasher};
use rustix::buffer::spare_capacity;
use rustix::fs::{CWD, Mode, RenameFlags};
use rustix::io::Errno;

pub(crate) use open::remove_leftovers;
pub(crate) use registry::Registry;

use crate::durable::Stamp;
use crate::error::{Context, Error};
use crate::{Store, remove_quietly};

/// Bytes read at a time when a chunk or a file is hashed.
const HASH_BUFFER: usize = 256 << 10;

/// What the chunk map says of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum ChunkState {
    /// Not here.
    Missing = 0,
    /// Written by an earlier process; must be hashed before a byte of it is exposed, and may be wrong.
    Unverified = 1,
    /// Here, verified by this process, and confirmed by the disk.
    Present = 2,
    /// Verified by this process, but not confirmed by the disk; must be hashed before a byte of it is
    /// exposed.
    Unconfirmed = 3,
}

/// How the states of chunks are kept: here, whether the disk has confirmed it or not.
const HERE: u8 = ChunkState::Present as u8;

/// Being filled.
const OPEN: u8 = 0;
/// One thread hashes the whole file.
const COMPLETING: u8 = 1;
/// The file is pending, or an object.
const COMPLETE: u8 = 2;
/// The whole had another digest; nothing of it may be used.
const DISCARDED: u8 = 3;

/// An object some of whose chunks are missing: a sparse file and a chunk map. Shared by all who read it.
#[derive(Debug)]
pub struct PartialObject {
    store: Store,
    digest: Digest,
    size: u64,
    chunks: Box<[Extent]>,
    /// Identity of the chunk list ([`list_identity`]).
    list: Digest,
    /// Missing, Unverified or [`HERE`] for each chunk.
    states: Box<[AtomicU8]>,
    /// For each chunk, the [`Stamp`] of its last write.
    stamps: Box<[AtomicU64]>,
    /// How many chunks are not [`HERE`].
    absent: AtomicUsize,
    /// `OPEN`, `COMPLETING`, `COMPLETE` or `DISCARDED`.
    phase: AtomicU8,
    data: File,
    /// `None` when the file was complete from the start.
    map: Option<File>,
    /// The file was an object from the start: the disk has it.
    is_object: bool,
}

/// One chunk as far as the store needs it.
#[derive(Debug, Clone, Copy)]
struct Extent {
    offset: u64,
    size: u64,
    digest: Digest,
    zeros: bool,
}

impl PartialObject {
    /// The object that it becomes.
    pub const fn digest(&self) -> &Digest {
        &self.digest
    }

    /// Length of the whole file in bytes.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Number of chunks.
    pub const fn chunk_count(&self) -> usize {
        self.chunks.len()
    }

    /// How many chunks are not here: Missing or Unverified.
    pub fn absent(&self) -> usize {
        self.absent.load(Ordering::Acquire)
    }

    /// Whether the file is pending or an object.
    pub fn is_complete(&self) -> bool {
        self.phase.load(Ordering::Acquire) == COMPLETE
    }

    /// State of chunk `index` (position in the chunk list). Missing for an index beyond the list, and for every chunk of
    /// an object that was discarded.
    pub fn state(&self, index: usize) -> ChunkState {
        if self.phase.load(Ordering::Acquire) == DISCARDED {
            return ChunkState::Missing;
        }
        match self.states.get(index).map(|state| state.load(Ordering::Acquire)) {
            Some(HERE) if self.is_confirmed(index) => ChunkState::Present,
            Some(HERE) => ChunkState::Unconfirmed,
            Some(state) if state == ChunkState::Unverified as u8 => ChunkState::Unverified,
            _ => ChunkState::Missing,
        }
    }

    fn is_confirmed(&self, index: usize) -> bool {
        let stamp = self.stamps.get(index).map(|stamp| stamp.load(Ordering::Acquire));
        // Nothing was written where a chunk is zeros.
        let zeros = self.chunks.get(index).is_some_and(|chunk| chunk.zeros);
        self.is_object
            || zeros
            || stamp.is_some_and(|stamp| self.store.inner.syncs.confirm(Stamp::unpack(stamp)))
    }

    /// Reads the chunk and hashes what was read: the bytes, if they are right. A chunk that is wrong or
    /// cannot be read is Missing afterwards; one that was Unverified and is right counts as here. When
    /// [`PartialObject::absent`] is 0 afterwards, the object can be completed.
    pub fn verify(&self, index: usize) -> Result<Option<Vec<u8>>, Error> {
        let (extent, state) = self.chunk(index)?;
        let was = state.load(Ordering::Acquire);
        if was == ChunkState::Missing as u8 {
            return Ok(None);
        }
        let length = usize::try_from(extent.size).map_err(io::Error::other);
        let bytes = length
            .context("read", &self.store.partial_paths(&self.digest).0)
            .and_then(|length| self.read(extent.offset, length));
        let bytes = match bytes {
            Ok(bytes) => Some(bytes).filter(|bytes| Digest::of(bytes) == extent.digest),
            Err(Error::Discarded(digest)) => return Err(Error::Discarded(digest)),
            Err(error) => {
                tracing::warn!(object = %self.digest, index, %error, "a chunk cannot be read; it is fetched again");
                None
            }
        };
        match (was == HERE, bytes.is_some()) {
            (false, true) => {
                if state
                    .compare_exchange(was, HERE, Ordering::AcqRel, Ordering::Acquire)
                    .is_ok()
                {
                    self.absent.fetch_sub(1, Ordering::AcqRel);
                }
            }
            (was_here, false) => {
                let missing = ChunkState::Missing as u8;
                let changed = state.compare_exchange(was, missing, Ordering::AcqRel, Ordering::Acquire);
                if was_here && changed.is_ok() {
                    tracing::warn!(object = %self.digest, index, "the disk has lost a chunk; it is fetched again");
                    self.absent.fetch_add(1, Ordering::AcqRel);
                }
            }
            (true, true) => {}
        }
        Ok(bytes)
    }

    /// Writes a chunk that the caller has verified against its digest. Returns true when this was the last one that was
    /// not here. Writing a chunk twice is harmless.
    pub fn write(&self, index: usize, bytes: &[u8]) -> Result<bool, Error> {
        let (extent, state) = self.chunk(index)?;
        if u64::try_from(bytes.len()) != Ok(extent.size) {
            return Err(Error::ChunkSize {
                digest: self.digest,
                index,
                expected: extent.size,
                found: bytes.len(),
            });
        }
        if state.load(Ordering::Acquire) == HERE {
            return Ok(false);
        }
        let begun = self.store.inner.syncs.begin_write();
        let (data_path, map_path) = self.store.partial_paths(&self.digest);
        self.data
            .write_all_at(bytes, extent.offset)
            .context("write chunk to", &data_path)?;
        if let Some(map) = &self.map {
            map::set(map, index).context("write", &map_path)?;
        }
        if let Some(stamp) = self.stamps.get(index) {
            let written = self.store.inner.syncs.end_write(&begun);
            stamp.store(written.pack(), Ordering::Release);
        }
        let was = state.swap(HERE, Ordering::AcqRel);
        if let Some(watcher) = self.store.watcher() {
            watcher.written();
        }
        Ok(was != HERE && self.absent.fetch_sub(1, Ordering::AcqRel) == 1)
    }

    /// Reads bytes of the file. They may be exposed if all chunks under the range are Present; else the
    /// caller hashes them first.
    pub fn read(&self, offset: u64, length: usize) -> Result<Vec<u8>, Error> {
        self.check_phase()?;
        let end = u64::try_from(length)
            .ok()
            .and_then(|length| offset.checked_add(length));
        if end.is_none_or(|end| end > self.size) {
            return Err(Error::Range {
                digest: self.digest,
                offset,
                length,
                size: self.size,
            });
        }
        let mut bytes = Vec::with_capacity(length);
        while bytes.len() < length {
            let position = offset + bytes.len() as u64;
            match rustix::io::pread(&self.data, spare_capacity(&mut bytes), position) {
                // The allocation may be larger than what was asked for.
                Ok(count) if count > 0 => bytes.truncate(length),
                Err(Errno::INTR) => {}
                Ok(_) => return self.read_failed(io::ErrorKind::UnexpectedEof.into()),
                Err(error) => return self.read_failed(error.into()),
            }
        }
        Ok(bytes)
    }

    fn read_failed<T>(&self, error: io::Error) -> Result<T, Error> {
        let (path, _) = self.store.partial_paths(&self.digest);
        Err(error).context("read", &path)
    }

    /// All chunks are here: hashes the whole file and makes it pending; it is an object after a
    /// [`Store::settle`]. A digest that differs discards the data and is an error, unless the disk has lost
    /// chunks: those are Missing then ([`Error::Lost`]). When another thread is at it already, returns at
    /// once ([`PartialObject::is_complete`]
    /// tells when it is done).
    pub fn complete(&self) -> Result<(), Error> {
        match self
            .phase
            .compare_exchange(OPEN, COMPLETING, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => {}
            Err(DISCARDED) => return Err(Error::Discarded(self.digest)),
            Err(_) => return Ok(()),
        }
        let result = self.complete_now();
        let phase = match &result {
            Ok(()) => COMPLETE,
            Err(Error::DigestMismatch { .. }) => DISCARDED,
            Err(_) => OPEN,
        };
        self.phase.store(phase, Ordering::Release);
        result
    }

    fn complete_now(&self) -> Result<(), Error> {
        let missing = self.absent();
        if missing > 0 {
            return Err(Error::Incomplete {
                digest: self.digest,
                missing,
            });
        }
        let (data_path, map_path) = self.store.partial_paths(&self.digest);
        let found = self.hash(0, self.size)?;
        if found != self.digest && !self.is_whole_after_all()? {
            // The files go before the phase changes: afterwards a new object of the same name may make its own.
            remove_quietly(&map_path);
            remove_quietly(&data_path);
            return Err(Error::DigestMismatch {
                expected: self.digest,
                found,
            });
        }
        if self.store.has_object(&self.digest) {
            remove_quietly(&data_path);
            remove_quietly(&map_path);
            return Ok(());
        }
        self.store.check_locked()?;
        rustix::fs::fchmod(&self.data, Mode::from_raw_mode(0o444)).context("set the mode of", &data_path)?;
        let pending = self.store.pending_path(&self.digest);
        let taken = self.store.pend(&self.digest, self.size, self.stamp(), || {
            rustix::fs::renameat_with(CWD, &data_path, CWD, &pending, RenameFlags::NOREPLACE)
        })?;
        if !taken {
            remove_quietly(&data_path);
        }
        remove_quietly(&map_path);
        Ok(())
    }

    /// The whole had another digest: looks for lost chunks ([`Error::Lost`]). If there are none, hashes the whole again: one that was lost
    /// when it was hashed may have been brought anew since. True if it is right now.
    fn is_whole_after_all(&self) -> Result<bool, Error> {
        if self.find_lost()? {
            return Err(Error::Lost(self.digest));
        }
        Ok(self.hash(0, self.size)? == self.digest)
    }

    /// Whether chunks that were verified are wrong now: those are Missing afterwards. Takes as long as
    /// hashing the file.
    fn find_lost(&self) -> Result<bool, Error> {
        for (index, chunk) in self.chunks.iter().enumerate() {
            if !chunk.zeros {
                self.verify(index)?;
            }
        }
        Ok(self.absent() > 0)
    }

    /// That of all writes together.
    fn stamp(&self) -> Stamp {
        let written = self
            .chunks
            .iter()
            .zip(&self.stamps)
            .filter(|(chunk, _)| !chunk.zeros);
        let stamps = written.map(|(_, stamp)| Stamp::unpack(stamp.load(Ordering::Acquire)));
        // A file of zeros is as old as its name.
        stamps.reduce(Stamp::join).unwrap_or_else(|| {
            self.store
                .inner
                .syncs
                .end_write(&self.store.inner.syncs.begin_write())
        })
    }

    /// The file that holds the bytes. Readers must look at [`PartialObject::state`] first: what is not Present may be
    /// zeros or worse.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.data.as_fd()
    }

    fn check_phase(&self) -> Result<(), Error> {
        if self.phase.load(Ordering::Acquire) == DISCARDED {
            return Err(Error::Discarded(self.digest));
        }
        Ok(())
    }

    fn chunk(&self, index: usize) -> Result<(&Extent, &AtomicU8), Error> {
        self.check_phase()?;
        self.chunks
            .get(index)
            .zip(self.states.get(index))
            .ok_or(Error::NoSuchChunk {
                digest: self.digest,
                index,
            })
    }

    /// Hashes a range of the file as it is on disk.
    fn hash(&self, offset: u64, size: u64) -> Result<Digest, Error> {
        let mut hasher = Hasher::new();
        let mut buffer = vec![0; HASH_BUFFER];
        let mut done = 0;
        while done < size {
            let length = usize::try_from(size - done).map_or(HASH_BUFFER, |left| left.min(HASH_BUFFER));
            let part = buffer.get_mut(..length).unwrap_or_default();
            match self.data.read_exact_at(part, offset + done) {
                Ok(()) => hasher.update(part),
                Err(error) => return self.read_failed(error),
            }
            done += length as u64;
        }
        Ok(hasher.finish())
    }
}

impl Drop for PartialObject {
    fn drop(&mut self) {
        self.store.inner.partials.forget(&self.digest);
    }
}

#[cfg(test)]
mod tests;
