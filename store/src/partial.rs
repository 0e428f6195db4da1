//! Objects that are not complete yet: a sparse file and a map of its chunks, filled in any order by several threads while
//! others read.
//!
//! Called by the fetcher and the object file system. What must hold:
//!
//! * A chunk is Present only when this process has verified it: the writer hashed it before [`PartialObject::write`], or
//!   [`PartialObject::verify`] hashed what an earlier process left. Bits loaded from disk are only Unverified, so neither
//!   a crash nor a power loss can expose a wrong byte, and nothing here is ever synced.
//! * A partial object belongs to one exact chunk list. Chunk digests are vouched for only by the TOC that they came from;
//!   if two images name the same object with different lists, one of them may lie, and its bytes must not reach
//!   the other. The second is refused with [`Error::ChunkListConflict`] while the first is in use; on disk, a map of another
//!   list is thrown away.
//! * An object gets its name only after the whole file has been hashed. Its descriptor stays valid for those who read.
//! * State changes are single atomic operations. No lock is held across I/O except the one that lets a second opener of
//!   the same object wait until the first has made its two files.

mod map;
mod open;
mod registry;

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};

use peel_image::{Digest, Hasher};
use rustix::buffer::spare_capacity;
use rustix::fs::{Mode, RenameFlags};
use rustix::io::Errno;

pub(crate) use open::remove_leftovers;
pub(crate) use registry::Registry;

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
    /// Written by an earlier process; must be hashed before a byte of it is exposed.
    Unverified = 1,
    /// Here and verified by this process.
    Present = 2,
}

/// Being filled.
const OPEN: u8 = 0;
/// One thread hashes the whole file.
const COMPLETING: u8 = 1;
/// The file is an object.
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
    /// A [`ChunkState`] for each chunk.
    states: Box<[AtomicU8]>,
    /// How many chunks are not Present. Reaches 0 once.
    absent: AtomicUsize,
    /// `OPEN`, `COMPLETING`, `COMPLETE` or `DISCARDED`.
    phase: AtomicU8,
    data: File,
    /// `None` when the file was an object from the start.
    map: Option<File>,
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

    /// How many chunks are not Present.
    pub fn absent(&self) -> usize {
        self.absent.load(Ordering::Acquire)
    }

    /// Whether the file has become an object.
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
            Some(state) if state == ChunkState::Present as u8 => ChunkState::Present,
            Some(state) if state == ChunkState::Unverified as u8 => ChunkState::Unverified,
            _ => ChunkState::Missing,
        }
    }

    /// Reads the chunk from disk, hashes it and moves it from Unverified to Present (true) or Missing (false). Of a chunk
    /// in another state it only says whether it is Present. When [`PartialObject::absent`] is 0 afterwards, the object can
    /// be completed.
    pub fn verify(&self, index: usize) -> Result<bool, Error> {
        let (extent, state) = self.chunk(index)?;
        match self.state(index) {
            ChunkState::Present => return Ok(true),
            ChunkState::Missing => return Ok(false),
            ChunkState::Unverified => {}
        }
        let good = self.hash(extent.offset, extent.size)? == extent.digest;
        let verdict = if good {
            ChunkState::Present
        } else {
            ChunkState::Missing
        };
        let unverified = ChunkState::Unverified as u8;
        match state.compare_exchange(unverified, verdict as u8, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) if good => {
                self.absent.fetch_sub(1, Ordering::AcqRel);
                Ok(true)
            }
            Ok(_) => Ok(false),
            // Somebody wrote or verified it meanwhile; a failed hash may have seen half of that.
            Err(now) => Ok(now == ChunkState::Present as u8),
        }
    }

    /// Writes a chunk that the caller has verified against its digest. Returns true when this was the last one that was
    /// not Present. Writing a chunk twice is harmless.
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
        if state.load(Ordering::Acquire) == ChunkState::Present as u8 {
            return Ok(false);
        }
        let (data_path, map_path) = self.store.partial_paths(&self.digest);
        self.data
            .write_all_at(bytes, extent.offset)
            .context("write chunk to", &data_path)?;
        if let Some(map) = &self.map {
            map::set(map, index).context("write", &map_path)?;
        }
        let present = ChunkState::Present as u8;
        let was = state.swap(present, Ordering::AcqRel);
        Ok(was != present && self.absent.fetch_sub(1, Ordering::AcqRel) == 1)
    }

    /// Reads bytes of the file; the caller has made sure that all chunks under the range are Present.
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

    /// All chunks are Present: hashes the whole file, renames it to its object name. A digest that differs discards
    /// the data and is an error. When another thread is at it already, returns at once ([`PartialObject::is_complete`]
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
        if found != self.digest {
            // The files go before the phase changes: afterwards a new object of the same name may make its own.
            remove_quietly(&map_path);
            remove_quietly(&data_path);
            return Err(Error::DigestMismatch {
                expected: self.digest,
                found,
            });
        }
        let _writing = self.store.begin_write()?;
        let object_path = self.store.object_path(&self.digest);
        rustix::fs::fchmod(&self.data, Mode::from_raw_mode(0o444)).context("set the mode of", &data_path)?;
        match rustix::fs::renameat_with(
            rustix::fs::CWD,
            &data_path,
            &self.store.inner.objects_fd,
            Store::object_name(&self.digest),
            RenameFlags::NOREPLACE,
        ) {
            Ok(()) => {}
            Err(Errno::EXIST) => remove_quietly(&data_path),
            Err(error) => return Err(error).context("name object", &object_path),
        }
        remove_quietly(&map_path);
        Ok(())
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
