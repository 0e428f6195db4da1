//! Opening a partial object: the chunk list is checked, the one that is live is shared, what an earlier process left is
//! loaded or thrown away.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering};

use peel_image::layer::{Chunk, ChunkSource};
use peel_image::{Digest, Hasher};
use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use super::{COMPLETE, ChunkState, DISCARDED, Extent, HASH_BUFFER, HERE, OPEN, PartialObject, map};
use crate::durable::Stamp;
use crate::error::{Context, Error};
use crate::{Store, make_directory, remove_quietly};

impl Store {
    /// Opens or makes the partial object of a file of `size` bytes with these chunks. Chunks found on disk from an
    /// earlier process count as present but unverified until they have been hashed again. A map on disk with another
    /// chunk list is thrown away. Runs of zeros are Present from the start. The same list gives the same object as long as
    /// somebody holds it; another list for an object that is being filled is [`Error::ChunkListConflict`]. For an object
    /// that is complete already the answer has all chunks Present, for a pending one Unconfirmed.
    pub fn partial(&self, digest: &Digest, size: u64, chunks: &[Chunk]) -> Result<Arc<PartialObject>, Error> {
        check_list(digest, size, chunks)?;
        self.check_locked()?;
        let list = list_identity(size, chunks);
        let slot = self.inner.partials.slot(digest);
        let mut live = slot.lock();
        if let Some(partial) = live.upgrade() {
            match partial.phase.load(Ordering::Acquire) {
                DISCARDED => {}
                _ if partial.list == list => return Ok(partial),
                COMPLETE => {}
                _ => return Err(Error::ChunkListConflict(*digest)),
            }
        }
        let extents = chunks
            .iter()
            .map(|chunk| Extent {
                offset: chunk.file_offset,
                size: chunk.size,
                digest: chunk.digest,
                zeros: matches!(chunk.source, ChunkSource::Zeros),
            })
            .collect();
        let pending = match self.pending_size(digest) {
            Some(_) => File::open(self.pending_path(digest)).ok(),
            None => None,
        };
        let partial = Arc::new(match (pending, self.open_object(digest)?) {
            (_, Some(file)) => self.partial_of_file(file, true, digest, size, extents, list)?,
            (Some(file), None) => self.partial_of_file(file, false, digest, size, extents, list)?,
            (None, None) => self.open_partial(digest, size, extents, list)?,
        });
        *live = Arc::downgrade(&partial);
        Ok(partial)
    }

    fn partial_of_file(
        &self,
        data: File,
        is_object: bool,
        digest: &Digest,
        size: u64,
        chunks: Box<[Extent]>,
        list: Digest,
    ) -> Result<PartialObject, Error> {
        let found = data
            .metadata()
            .context("look at object", &self.object_path(digest))?
            .len();
        if found != size {
            return Err(Error::SizeMismatch {
                digest: *digest,
                expected: size,
                found,
            });
        }
        Ok(PartialObject {
            store: self.clone(),
            digest: *digest,
            size,
            list,
            states: chunks.iter().map(|_| AtomicU8::new(HERE)).collect(),
            stamps: foreign(&chunks),
            chunks,
            absent: AtomicUsize::new(0),
            phase: AtomicU8::new(COMPLETE),
            data,
            map: None,
            is_object,
        })
    }

    fn open_partial(
        &self,
        digest: &Digest,
        size: u64,
        chunks: Box<[Extent]>,
        list: Digest,
    ) -> Result<PartialObject, Error> {
        let (data_path, map_path) = self.partial_paths(digest);
        let identity = map::Identity {
            size,
            chunks: chunks.len(),
            list,
        };
        let (data, map, here) = match load(&data_path, &map_path, &identity)? {
            Some(found) => found,
            None => self.make_partial(&data_path, &map_path, &identity)?,
        };
        let mut absent = chunks.len();
        let mut states = Vec::with_capacity(chunks.len());
        for (extent, here) in chunks.iter().zip(&here) {
            states.push(AtomicU8::new(if extent.zeros {
                absent -= 1;
                // Nothing else vouches for what an earlier process or a power loss left there.
                punch(&data, extent).context("clear zeros in", &data_path)?;
                HERE
            } else if *here {
                ChunkState::Unverified as u8
            } else {
                ChunkState::Missing as u8
            }));
        }
        Ok(PartialObject {
            store: self.clone(),
            digest: *digest,
            size,
            stamps: foreign(&chunks),
            chunks,
            list,
            states: states.into_boxed_slice(),
            absent: AtomicUsize::new(absent),
            phase: AtomicU8::new(OPEN),
            data,
            map: Some(map),
            is_object: false,
        })
    }

    /// Makes both files anew; what stood there goes.
    fn make_partial(
        &self,
        data_path: &Path,
        map_path: &Path,
        identity: &map::Identity,
    ) -> Result<(File, File, Vec<bool>), Error> {
        if let Some(shard) = data_path.parent() {
            make_directory(shard, 0o700)?;
        }
        remove_quietly(map_path);
        remove_quietly(data_path);
        let result = || -> Result<(File, File), Error> {
            let data = create(data_path)?;
            data.set_len(identity.size)
                .context("set the length of", data_path)?;
            let map = create(map_path)?;
            map::write_new(&map, identity).context("write", map_path)?;
            Ok((data, map))
        };
        match result() {
            Ok((data, map)) => Ok((data, map, vec![false; identity.chunks])),
            Err(error) => {
                remove_quietly(map_path);
                remove_quietly(data_path);
                Err(error)
            }
        }
    }

    /// Where data and map of a partial object stand.
    pub(crate) fn partial_paths(&self, digest: &Digest) -> (PathBuf, PathBuf) {
        let base = self.root().join("partial").join(Self::object_name(digest));
        (base.with_extension("data"), base.with_extension("map"))
    }
}

/// The stamps of chunks that this process has not written.
fn foreign(chunks: &[Extent]) -> Box<[AtomicU64]> {
    chunks
        .iter()
        .map(|_| AtomicU64::new(Stamp::FOREIGN.pack()))
        .collect()
}

fn create(path: &Path) -> Result<File, Error> {
    File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .context("make", path)
}

/// Opens what an earlier process left; `None` when it is missing, torn or of another chunk list.
fn load(
    data_path: &Path,
    map_path: &Path,
    identity: &map::Identity,
) -> Result<Option<(File, File, Vec<bool>)>, Error> {
    let open = |path: &Path| match File::options().read(true).write(true).open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).context("open", path),
    };
    let (Some(data), Some(map)) = (open(data_path)?, open(map_path)?) else {
        return Ok(None);
    };
    if data.metadata().context("look at", data_path)?.len() != identity.size {
        return Ok(None);
    }
    let here = map::read(&map, identity).context("read", map_path)?;
    Ok(here.map(|here| (data, map, here)))
}

/// Makes the range a hole again.
fn punch(data: &File, extent: &Extent) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(data, flags, extent.offset, extent.size) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP) => {
            let zeros = vec![0; HASH_BUFFER];
            let mut done = 0;
            while done < extent.size {
                let length =
                    usize::try_from(extent.size - done).map_or(HASH_BUFFER, |left| left.min(HASH_BUFFER));
                data.write_all_at(zeros.get(..length).unwrap_or_default(), extent.offset + done)?;
                done += length as u64;
            }
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// The list must cover the file exactly; a lone chunk is the file, so it must have its digest.
fn check_list(digest: &Digest, size: u64, chunks: &[Chunk]) -> Result<(), Error> {
    let fail = |problem: String| {
        Err(Error::ChunkList {
            digest: *digest,
            problem,
        })
    };
    let mut end = 0;
    for (index, chunk) in chunks.iter().enumerate() {
        if chunk.size == 0 || chunk.file_offset != end {
            return fail(format!(
                "chunk {index} has {} bytes at {}, expected some at {end}",
                chunk.size, chunk.file_offset
            ));
        }
        end = match chunk.file_offset.checked_add(chunk.size) {
            Some(end) => end,
            None => return fail(format!("chunk {index} ends beyond the largest offset")),
        };
    }
    if end != size || size == 0 {
        return fail(format!("it covers {end} of {size} bytes"));
    }
    match chunks {
        [only] if matches!(only.source, ChunkSource::Blob { .. }) && only.digest != *digest => {
            fail(format!("the only chunk has digest {}", only.digest))
        }
        _ => Ok(()),
    }
}

/// Names a chunk list: everything that decides which bytes are accepted where. The place of a chunk in its blob is left
/// out, so two layers that cut the same file alike share its chunks.
fn list_identity(size: u64, chunks: &[Chunk]) -> Digest {
    let mut hasher = Hasher::new();
    hasher.update(&size.to_le_bytes());
    for chunk in chunks {
        hasher.update(&chunk.file_offset.to_le_bytes());
        hasher.update(&chunk.size.to_le_bytes());
        hasher.update(chunk.digest.as_bytes());
        hasher.update(&[u8::from(matches!(chunk.source, ChunkSource::Zeros))]);
    }
    hasher.finish()
}

/// Removes partial objects that can never be used: half a pair, or an object that is complete. Called with the store
/// locked and nothing open.
pub(crate) fn remove_leftovers(store: &Store) -> Result<(), Error> {
    let root = store.root().join("partial");
    for shard in fs::read_dir(&root).context("list", &root)? {
        let shard = shard.context("list", &root)?;
        let directory = shard.path();
        for entry in fs::read_dir(&directory).context("list", &directory)? {
            let path = entry.context("list", &directory)?.path();
            let digest = path.file_stem().and_then(|stem| {
                crate::objects::digest_of_name(&shard.file_name().to_string_lossy(), stem.as_ref())
            });
            let keep = digest.is_some_and(|digest| {
                let (data, map) = store.partial_paths(&digest);
                (path == data || path == map)
                    && data.exists()
                    && map.exists()
                    && !store.has_object(&digest)
                    && store.pending_size(&digest).is_none()
            });
            if !keep {
                tracing::info!(?path, "removing a partial object that cannot be used");
                remove_quietly(&path);
            }
        }
    }
    Ok(())
}
