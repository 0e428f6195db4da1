//! Pending files: complete and verified, but not confirmed by the disk. They stand in `pending/`, where no
//! kernel mount looks, and become objects by a rename ([`crate::durable`]).
//!
//! Called by everything that adds objects, and by `fs` for reads of what is pending
//! ([`Store::read_pending`]). What must hold: no byte of a pending file is exposed that was not hashed after
//! it was read, because the disk may have refused its pages; what an earlier process left is pending too, and
//! suspect.
//!
//! The table's lock is held across the link or rename that makes a name, so that name and stamp belong
//! together; names are made one after the other in a directory anyway.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use peel_image::Digest;
use peel_image::layer::Chunk;
use rustix::io::Errno;

use crate::durable::Stamp;
use crate::error::{Context, Error};
use crate::objects::hash_file;
use crate::{Store, remove_quietly};

/// The pending files of a store.
#[derive(Debug, Default)]
pub(crate) struct Pending(Mutex<HashMap<Digest, Entry>>);

#[derive(Debug, Clone, Copy)]
struct Entry {
    size: u64,
    stamp: Stamp,
}

/// What a look into a pending file came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Checked {
    /// The chunk, verified after it was read.
    Right(Vec<u8>),
    /// The file is what its name says, but the chunk is not what its list says: the list lies.
    Wrong,
    /// The disk has lost the file; it is removed.
    Lost,
}

impl Pending {
    fn lock(&self) -> MutexGuard<'_, HashMap<Digest, Entry>> {
        // A panic while it was held left a whole table; at worst a name is unknown until the next process.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.lock().len()
    }

    /// Those whose stamp is as wanted.
    pub(crate) fn list(&self, wanted: impl Fn(Stamp) -> bool) -> Vec<Digest> {
        let files = self.lock();
        let wanted = files.iter().filter(|(_, entry)| wanted(entry.stamp));
        wanted.map(|(digest, _)| *digest).collect()
    }

    pub(crate) fn forget(&self, digest: &Digest) {
        self.lock().remove(digest);
    }

    pub(crate) fn restamp(&self, digest: &Digest, stamp: Stamp) {
        if let Some(entry) = self.lock().get_mut(digest) {
            entry.stamp = stamp;
        }
    }
}

impl Store {
    /// Length of the pending file of that name, `None` when there is none.
    pub fn pending_size(&self, digest: &Digest) -> Option<u64> {
        self.inner.pending.lock().get(digest).map(|entry| entry.size)
    }

    /// How many files are pending.
    pub fn pending_count(&self) -> usize {
        self.inner.pending.len()
    }

    /// Where a pending file is or would be.
    pub(crate) fn pending_path(&self, digest: &Digest) -> PathBuf {
        self.root().join("pending").join(digest.hex())
    }

    /// Makes a verified file pending: `name_it` gives it its name in `pending/` and must not replace one that
    /// is there. True if it was taken, false if there is one already.
    pub(crate) fn pend(
        &self,
        digest: &Digest,
        size: u64,
        stamp: Stamp,
        mut name_it: impl FnMut() -> Result<(), Errno>,
    ) -> Result<bool, Error> {
        {
            let mut files = self.inner.pending.lock();
            if files.contains_key(digest) {
                return Ok(false);
            }
            let path = || self.pending_path(digest);
            let named = match name_it() {
                // What is in nobody's table could not be removed once.
                Err(Errno::EXIST) => {
                    remove_quietly(&path());
                    name_it()
                }
                result => result,
            };
            named.context("name object", &path())?;
            files.insert(*digest, Entry { size, stamp });
        }
        if let Some(watcher) = self.watcher() {
            watcher.written();
        }
        Ok(true)
    }

    /// Removes a pending file whose content is not what it should be.
    pub(crate) fn drop_pending(&self, digest: &Digest) {
        let mut files = self.inner.pending.lock();
        remove_quietly(&self.pending_path(digest));
        files.remove(digest);
    }

    /// Opens a pending file, or the object if the file has become one; `None` when there is neither. What is read from a pending file
    /// may be wrong.
    pub fn open_pending(&self, digest: &Digest) -> Result<Option<File>, Error> {
        let path = self.pending_path(digest);
        match File::open(&path) {
            Ok(file) => Ok(Some(file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => self.open_object(digest),
            Err(error) => Err(error).context("open", &path),
        }
    }

    /// Reads a chunk of a pending file and hashes what was read. Takes as long as hashing the chunk, or the
    /// whole file if the chunk is wrong. Finds an object too, if the file has become one.
    pub fn read_pending(&self, digest: &Digest, chunk: &Chunk) -> Result<Checked, Error> {
        let Some(mut file) = self.open_pending(digest)? else {
            self.inner.pending.forget(digest);
            return Ok(Checked::Lost);
        };
        match read_chunk(&file, chunk) {
            Ok(bytes) if Digest::of(&bytes) == chunk.digest => return Ok(Checked::Right(bytes)),
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(object = %digest, %error, "cannot read a file that the disk has not confirmed");
            }
        }
        if hash_file(&mut file).is_ok_and(|found| found == *digest) {
            return Ok(Checked::Wrong);
        }
        tracing::warn!(object = %digest, "the disk has lost a file that was on its way to it; it is fetched again");
        self.drop_pending(digest);
        Ok(Checked::Lost)
    }

    /// Takes over what an earlier process left. Called with the store locked.
    pub(crate) fn load_pending(&self) -> Result<(), Error> {
        let directory = self.root().join("pending");
        let mut files = self.inner.pending.lock();
        for entry in fs::read_dir(&directory).context("list", &directory)? {
            let entry = entry.context("list", &directory)?;
            let digest = entry
                .file_name()
                .to_str()
                .and_then(|name| Digest::from_hex(name).ok());
            match digest.filter(|digest| !self.has_object(digest)) {
                Some(digest) => {
                    let size = entry.metadata().context("look at", &entry.path())?.size();
                    let stamp = Stamp::FOREIGN;
                    files.insert(digest, Entry { size, stamp });
                }
                None => remove_quietly(&entry.path()),
            }
        }
        Ok(())
    }
}

/// The bytes of a chunk; an error when the file does not have them all.
fn read_chunk(file: &File, chunk: &Chunk) -> io::Result<Vec<u8>> {
    let end = chunk.file_offset.checked_add(chunk.size);
    if end.is_none_or(|end| end > file.metadata().map_or(0, |metadata| metadata.len())) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let length = usize::try_from(chunk.size).map_err(io::Error::other)?;
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, chunk.file_offset)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests;
