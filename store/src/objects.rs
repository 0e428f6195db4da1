//! Complete objects: files named by the sha256 of their content, made visible only when whole.
//!
//! Called by the fetcher for every small file of an image ([`Store::add_verified`], thousands per second) and by those who
//! lay out a whole layer ([`Store::object_writer`]). An object is written to an unnamed file (`O_TMPFILE`) in the directory
//! where it will stand and then linked into `pending/`: a kill at any moment leaves nothing half-written,
//! `link` never replaces what is there, and the blocks lie where the directory's files do. Where the file
//! system has no unnamed files, a named one in
//! `tmp/` takes their place. It is an object once the disk has confirmed it ([`crate::durable`]).
//!
//! Mode 0444: nobody has a reason to write, and overlayfs opens it with the mounter's rights for reading and copy-up.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

use peel_image::{Digest, Hasher};
use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::durable::Begun;
use crate::error::{Context, Error};
use crate::{Store, remove_quietly};

/// Bytes that an [`ObjectWriter`] keeps in memory before it makes a file. Most files of an image are smaller, and those
/// that the store has already then cost no write at all.
const WRITER_BUFFER: usize = 256 << 10;

/// Bytes read at a time when a file is hashed.
const HASH_BUFFER: usize = 256 << 10;

/// What a check of an object found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The store does not have it.
    Absent,
    /// Its content hashes to its name.
    Intact,
    /// Its content has changed; [`Store::remove_object`] makes room for a good copy.
    Damaged,
}

/// An object that is being written; nothing is visible before it is finished. Implements `std::io::Write` and hashes
/// what passes.
#[derive(Debug)]
pub struct ObjectWriter {
    store: Store,
    hasher: Hasher,
    buffer: Vec<u8>,
    file: Option<Temporary>,
    /// Bytes that the file has.
    size: u64,
    begun: Begun,
    /// A write has failed, so the file may lack bytes that the hasher has seen.
    broken: bool,
}

/// A file on its way to becoming an object.
#[derive(Debug)]
struct Temporary {
    file: File,
    /// Its name in `tmp/` where unnamed files are missing. Gone once it is an object.
    name: Option<PathBuf>,
}

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            remove_quietly(name);
        }
    }
}

impl Store {
    /// Name of an object below the objects directory: `ab/cdef...`.
    pub fn object_name(digest: &Digest) -> String {
        let mut name = digest.hex();
        name.insert(2, '/');
        name
    }

    /// Where the object is or would be.
    pub fn object_path(&self, digest: &Digest) -> PathBuf {
        self.objects_dir().join(Self::object_name(digest))
    }

    /// Whether the object is complete and on the disk.
    pub fn has_object(&self, digest: &Digest) -> bool {
        let name = Self::object_name(digest);
        rustix::fs::accessat(&self.inner.objects_fd, &name, Access::EXISTS, AtFlags::empty()).is_ok()
    }

    /// Length of the object in bytes, `None` when it is not complete.
    pub fn object_size(&self, digest: &Digest) -> Option<u64> {
        let name = Self::object_name(digest);
        let status = rustix::fs::statat(&self.inner.objects_fd, &name, AtFlags::SYMLINK_NOFOLLOW).ok()?;
        u64::try_from(status.st_size).ok()
    }

    /// The object opened for reading, `None` when it is not complete.
    pub fn open_object(&self, digest: &Digest) -> Result<Option<File>, Error> {
        let name = Self::object_name(digest);
        match rustix::fs::openat(
            &self.inner.objects_fd,
            &name,
            OFlags::RDONLY | OFlags::CLOEXEC,
            Mode::empty(),
        ) {
            Ok(fd) => Ok(Some(fd.into())),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error).context("open object", &self.object_path(digest)),
        }
    }

    /// Starts a new object whose digest is not known or not checked yet.
    pub fn object_writer(&self) -> Result<ObjectWriter, Error> {
        Ok(ObjectWriter {
            store: self.clone(),
            hasher: Hasher::new(),
            buffer: Vec::new(),
            file: None,
            size: 0,
            begun: self.inner.syncs.begin_write(),
            broken: false,
        })
    }

    /// Adds an object whose bytes the caller has already hashed to `digest`: it is pending, until
    /// [`Store::settle`]. Nothing happens when the store has it.
    pub fn add_verified(&self, digest: &Digest, bytes: &[u8]) -> Result<(), Error> {
        debug_assert_eq!(Digest::of(bytes), *digest, "add_verified needs verified bytes");
        if self.has_object(digest) || self.pending_size(digest).is_some() {
            return Ok(());
        }
        self.check_locked()?;
        let begun = self.inner.syncs.begin_write();
        let name = Self::object_name(digest);
        let shard = name.get(..2).unwrap_or(".");
        let mut temporary = self.temporary(shard)?;
        temporary
            .file
            .write_all(bytes)
            .context("write object", &self.object_path(digest))?;
        self.publish(temporary, digest, bytes.len() as u64, &begun)
    }

    /// Adds an object of `size` zeros as a hole, which takes neither memory nor space; false if `digest` is not that of these zeros. Takes
    /// as long as hashing them. It is pending, until [`Store::settle`]. Nothing happens when the store has
    /// it.
    pub fn add_zeros(&self, digest: &Digest, size: u64) -> Result<bool, Error> {
        if self.has_object(digest) {
            return Ok(self.object_size(digest) == Some(size));
        }
        if let Some(pending) = self.pending_size(digest) {
            return Ok(pending == size && Digest::of_zeros(size) == *digest);
        }
        if Digest::of_zeros(size) != *digest {
            return Ok(false);
        }
        self.check_locked()?;
        let begun = self.inner.syncs.begin_write();
        let name = Self::object_name(digest);
        let temporary = self.temporary(name.get(..2).unwrap_or("."))?;
        temporary
            .file
            .set_len(size)
            .context("write object", &self.object_path(digest))?;
        self.publish(temporary, digest, size, &begun)?;
        Ok(true)
    }

    /// Hashes the object again.
    pub fn verify_object(&self, digest: &Digest) -> Result<Verdict, Error> {
        let Some(mut file) = self.open_object(digest)? else {
            return Ok(Verdict::Absent);
        };
        let found = hash_file(&mut file).context("read object", &self.object_path(digest))?;
        Ok(if found == *digest {
            Verdict::Intact
        } else {
            Verdict::Damaged
        })
    }

    /// Removes an object; true when it was there. Whoever has it open keeps its bytes.
    pub fn remove_object(&self, digest: &Digest) -> Result<bool, Error> {
        match fs::remove_file(self.object_path(digest)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error).context("remove object", &self.object_path(digest)),
        }
    }

    /// Makes an invisible file on the objects' file system. `shard` is the directory below `objects/` where it will
    /// stand, `.` when that is not known yet.
    fn temporary(&self, shard: &str) -> Result<Temporary, Error> {
        let objects = &self.inner.objects_fd;
        if !self.inner.named_temporaries.load(Ordering::Relaxed) {
            let flags = OFlags::TMPFILE | OFlags::WRONLY | OFlags::CLOEXEC;
            match rustix::fs::openat(objects, shard, flags, Mode::from_raw_mode(0o444)) {
                Ok(fd) => {
                    return Ok(Temporary {
                        file: fd.into(),
                        name: None,
                    });
                }
                // open(2): a file system without O_TMPFILE answers EOPNOTSUPP, an old kernel EISDIR.
                Err(Errno::OPNOTSUPP | Errno::ISDIR) => {
                    self.inner.named_temporaries.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(error).context("make a file in", &self.objects_dir().join(shard)),
            }
        }
        let name = self.temporary_path();
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&name)
            .context("make", &name)?;
        Ok(Temporary {
            file,
            name: Some(name),
        })
    }

    /// Makes a complete file pending. One that is there already stays, and the new file goes.
    fn publish(
        &self,
        mut temporary: Temporary,
        digest: &Digest,
        size: u64,
        begun: &Begun,
    ) -> Result<(), Error> {
        let path = self.pending_path(digest);
        let stamp = self.inner.syncs.end_write(begun);
        let taken = self.pend(digest, size, stamp, || match &temporary.name {
            Some(old) => rustix::fs::renameat_with(CWD, old, CWD, &path, RenameFlags::NOREPLACE),
            None => match rustix::fs::linkat(&temporary.file, c"", CWD, &path, AtFlags::EMPTY_PATH) {
                // open_by_handle-like rights are needed for an empty path before Linux 6.10; /proc needs none.
                Err(Errno::NOENT) => {
                    let link = format!("/proc/self/fd/{}", temporary.file.as_raw_fd());
                    rustix::fs::linkat(CWD, link, CWD, &path, AtFlags::SYMLINK_FOLLOW)
                }
                result => result,
            },
        })?;
        if taken {
            temporary.name = None;
        }
        Ok(())
    }
}

impl ObjectWriter {
    /// Ends the object, which is pending then, until [`Store::settle`]. With `expected`, a different digest
    /// is an error and nothing appears.
    /// An error too when an earlier write has failed.
    pub fn finish(mut self, expected: Option<&Digest>) -> Result<Digest, Error> {
        if self.broken {
            return Err(io::Error::other("an earlier write of this object failed"))
                .context("finish an object in", &self.store.objects_dir());
        }
        let found = std::mem::take(&mut self.hasher).finish();
        if let Some(expected) = expected.filter(|expected| **expected != found) {
            return Err(Error::DigestMismatch {
                expected: *expected,
                found,
            });
        }
        if self.store.has_object(&found) || self.store.pending_size(&found).is_some() {
            return Ok(found);
        }
        self.store.check_locked()?;
        let name = Store::object_name(&found);
        let mut temporary = match self.file.take() {
            Some(temporary) => temporary,
            None => self.store.temporary(name.get(..2).unwrap_or("."))?,
        };
        temporary
            .file
            .write_all(&self.buffer)
            .context("write object", &self.store.object_path(&found))?;
        self.size += self.buffer.len() as u64;
        self.store.publish(temporary, &found, self.size, &self.begun)?;
        Ok(found)
    }
}

impl Write for ObjectWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        if self.broken {
            return Err(io::Error::other("an earlier write of this object failed"));
        }
        if self.buffer.len() + data.len() <= WRITER_BUFFER {
            self.buffer.extend_from_slice(data);
        } else {
            self.broken = true;
            self.spill(data)?;
            self.broken = false;
        }
        self.hasher.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl ObjectWriter {
    /// Appends the buffer and `data` to the file, which is made when there is none yet.
    fn spill(&mut self, data: &[u8]) -> io::Result<()> {
        let temporary = match &mut self.file {
            Some(temporary) => temporary,
            none => none.insert(self.store.temporary(".").map_err(|error| match error {
                Error::Io { source, .. } => source,
                Error::NoSpace { .. } => io::ErrorKind::StorageFull.into(),
                other => io::Error::other(other),
            })?),
        };
        temporary.file.write_all(&self.buffer)?;
        self.size += (self.buffer.len() + data.len()) as u64;
        self.buffer.clear();
        temporary.file.write_all(data)
    }
}

/// The digest of what the file holds from its current position on.
pub(crate) fn hash_file(file: &mut File) -> io::Result<Digest> {
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; HASH_BUFFER];
    loop {
        match io::Read::read(file, &mut buffer) {
            Ok(0) => return Ok(hasher.finish()),
            Ok(count) => hasher.update(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// The digest that a path `.../ab/cdef...` names, `None` when it names none.
pub(crate) fn digest_of_name(shard: &str, name: &Path) -> Option<Digest> {
    Digest::from_hex(&format!("{shard}{}", name.to_str()?)).ok()
}

#[cfg(test)]
mod tests;
