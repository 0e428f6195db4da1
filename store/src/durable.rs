//! What the disk has confirmed, and when a pending file becomes an object.
//!
//! Called by `fs` from a thread of its own ([`Store::settle`], [`Store::heal`]) and by whoever ends a server
//! ([`Store::checkpoint`]). A write to a file only reaches the page cache. The disk may refuse the pages
//! later; the kernel then drops them, tells of it once, and what is read afterwards may be zeros. So nothing
//! counts as kept before a `syncfs` that began after the write has returned without an error.
//!
//! `syncfs` reports an error that was met since the descriptor's last report. The store's descriptor of its
//! root is open since before the first write of the process, so an error of any of these writes shows there,
//! whoever else syncs. Nothing tells whose pages were lost, so after a failed sync everything that no earlier
//! sync had confirmed is *suspect*, for good: it counts again only once its bytes were hashed and written
//! anew ([`Store::heal`]).
//!
//! Syncs are numbered. A [`Stamp`] holds the number of the last sync that had begun before a write, and the
//! same after it. With `good` the number of the last sync that succeeded, and `bad` that of the last one that
//! failed, the write is confirmed if
//! `after < good` (that sync began after the write) and `bad < before` (no sync that failed can have met its
//! pages: one that was under way when the write began may have).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{MutexGuard, PoisonError};

use peel_image::{Digest, Hasher};
use rustix::fs::RenameFlags;
use rustix::io::Errno;

use crate::error::{Context, Error};
use crate::{Store, remove_quietly};

/// Bytes of a suspect file that are hashed and written again at a time.
const PIECE: usize = 256 << 10;

/// Hears what becomes of what was written. Calls come from the thread that calls the store and must not call
/// it back for long.
pub trait Watch: Send + Sync {
    /// Something was written that only a sync can confirm.
    fn written(&self);
    /// A sync has succeeded: more chunks of partial objects may be [`crate::ChunkState::Present`].
    fn confirmed(&self);
    /// These have become objects.
    fn named(&self, objects: &[Digest]);
    /// The disk has lost these; they were pending and are no more.
    fn lost(&self, objects: &[Digest]);
}

/// The numbers of the last sync that had begun before a write, and after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    before: u32,
    after: u32,
}

impl Stamp {
    /// Of bytes that this process has not written: never confirmed.
    pub(crate) const FOREIGN: Self = Self { before: 0, after: 0 };

    /// That of two writes together.
    pub(crate) fn join(self, other: Self) -> Self {
        Self {
            before: self.before.min(other.before),
            after: self.after.max(other.after),
        }
    }

    /// As one number, to be kept in an atomic one.
    pub(crate) fn pack(self) -> u64 {
        u64::from(self.before) << 32 | u64::from(self.after)
    }

    /// The reverse of [`Stamp::pack`].
    pub(crate) fn unpack(packed: u64) -> Self {
        // Both halves fit by construction.
        let half = |half: u64| u32::try_from(half & u64::from(u32::MAX)).unwrap_or(0);
        Self {
            before: half(packed >> 32),
            after: half(packed),
        }
    }
}

/// The numbers of syncs.
#[derive(Debug)]
pub(crate) struct Syncs {
    begun: AtomicU32,
    good: AtomicU32,
    bad: AtomicU32,
}

impl Default for Syncs {
    fn default() -> Self {
        Self {
            // Above `bad` from the start.
            begun: AtomicU32::new(1),
            good: AtomicU32::new(0),
            bad: AtomicU32::new(0),
        }
    }
}

/// A write that has begun.
#[derive(Debug)]
#[must_use = "only its end makes a stamp"]
pub(crate) struct Begun(u32);

impl Syncs {
    /// Call it before the first byte of a write.
    pub(crate) fn begin_write(&self) -> Begun {
        Begun(self.begun.load(Ordering::SeqCst))
    }

    /// Call it after the last byte.
    pub(crate) fn end_write(&self, begun: &Begun) -> Stamp {
        Stamp {
            before: begun.0,
            after: self.begun.load(Ordering::SeqCst),
        }
    }

    /// Whether the disk has confirmed a write.
    pub(crate) fn confirm(&self, stamp: Stamp) -> bool {
        // In this order: a failure after the success that counts must not be missed.
        self.good.load(Ordering::SeqCst) > stamp.after && self.bad.load(Ordering::SeqCst) < stamp.before
    }

    /// Whether no sync to come can confirm it.
    pub(crate) fn suspect(&self, stamp: Stamp) -> bool {
        self.bad.load(Ordering::SeqCst) >= stamp.before
    }

    fn begin(&self) -> u32 {
        self.begun.fetch_add(1, Ordering::SeqCst) + 1
    }

    fn end(&self, number: u32, succeeded: bool) {
        if succeeded {
            return self.good.store(number, Ordering::SeqCst);
        }
        self.bad.store(number, Ordering::SeqCst);
        // A number that no sync has: what is written from now on is not met by the one that failed.
        self.begun.fetch_add(1, Ordering::SeqCst);
    }
}

/// Who syncs, heals or checkpoints: one at a time. Guards no data that others wait for; readers and writers
/// of objects never take it.
#[derive(Debug, Default)]
pub(crate) struct Turn {
    /// A sync of this process has failed.
    pub(crate) failed: bool,
}

impl Store {
    /// Sets who hears what becomes of what is written. Once.
    pub fn watch(&self, watch: Box<dyn Watch>) {
        if self.inner.watch.0.set(watch).is_err() {
            tracing::error!("the store is watched already");
        }
    }

    pub(crate) fn watcher(&self) -> Option<&dyn Watch> {
        self.inner.watch.0.get().map(Box::as_ref)
    }

    pub(crate) fn turn(&self) -> MutexGuard<'_, Turn> {
        self.inner.turn.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes out what is on its way to the disk and makes objects of the pending files that the disk has
    /// confirmed. On an error of the sync all that waited is suspect: [`Store::heal`] has it tried again.
    /// Takes as long as the disk, also for what other programs have written to its file system.
    pub fn settle(&self) -> Result<(), Error> {
        self.check_locked()?;
        self.settle_in(&mut self.turn())
    }

    pub(crate) fn settle_in(&self, turn: &mut Turn) -> Result<(), Error> {
        let syncs = &self.inner.syncs;
        let number = syncs.begin();
        let result = self.sync_disk();
        syncs.end(number, result.is_ok());
        if result.is_err() {
            self.note_failure(turn);
            return result;
        }
        if let Some(watcher) = self.watcher() {
            watcher.confirmed();
        }
        self.name_confirmed()
    }

    /// Remembers that a sync has failed, for this process and the next one.
    pub(crate) fn note_failure(&self, turn: &mut Turn) {
        if !std::mem::replace(&mut turn.failed, true)
            && let Err(error) = self.inner.marker.note_failure()
        {
            tracing::warn!(%error, "cannot note in the store's marker that a sync has failed");
        }
    }

    /// Waits until the disk has everything. The second call finds a file system that was shut down, for which
    /// some kernels let `syncfs` succeed.
    pub(crate) fn sync_disk(&self) -> Result<(), Error> {
        #[cfg(test)]
        if self.inner.failures.load(Ordering::SeqCst) > 0 {
            self.inner.failures.fetch_sub(1, Ordering::SeqCst);
            return Err(Errno::IO).context("sync", self.root());
        }
        let root = &self.inner.root_fd;
        rustix::fs::syncfs(root)
            .and_then(|()| rustix::fs::fsync(root))
            .context("sync", self.root())
    }

    /// Makes objects of the pending files that are confirmed. One that cannot be named stays pending; the
    /// error is that of the first.
    fn name_confirmed(&self) -> Result<(), Error> {
        let confirmed = self.inner.pending.list(|stamp| self.inner.syncs.confirm(stamp));
        if confirmed.is_empty() {
            return Ok(());
        }
        self.inner.marker.begin()?;
        let mut result = Ok(());
        let mut named = Vec::with_capacity(confirmed.len());
        for digest in confirmed {
            match self.name_object(&digest) {
                Ok(true) => named.push(digest),
                // A read has found it damaged and removed it.
                Ok(false) => {}
                Err(error) if result.is_ok() => result = Err(error),
                Err(_) => {}
            }
        }
        if let Some(watcher) = self.watcher() {
            watcher.named(&named);
        }
        result
    }

    fn name_object(&self, digest: &Digest) -> Result<bool, Error> {
        let pending = self.pending_path(digest);
        let name = Self::object_name(digest);
        let renamed = rustix::fs::renameat_with(
            rustix::fs::CWD,
            &pending,
            &self.inner.objects_fd,
            &name,
            RenameFlags::NOREPLACE,
        );
        match renamed {
            Ok(()) => {}
            Err(Errno::EXIST) => remove_quietly(&pending),
            Err(Errno::NOENT) if !pending.exists() => {
                self.inner.pending.forget(digest);
                return Ok(self.has_object(digest));
            }
            Err(error) => return Err(error).context("name object", &self.objects_dir().join(name)),
        }
        // Only now: whoever does not find it pending finds the object.
        self.inner.pending.forget(digest);
        Ok(true)
    }

    /// Gives suspect files another chance: those that are right as far as can be read are written again, so
    /// that the next sync decides. The others are removed. Returns how many are left to be confirmed.
    pub fn heal(&self) -> Result<usize, Error> {
        self.check_locked()?;
        let _turn = self.turn();
        self.heal_in()
    }

    pub(crate) fn heal_in(&self) -> Result<usize, Error> {
        let syncs = &self.inner.syncs;
        let mut lost = Vec::new();
        let mut result = Ok(());
        for digest in self.inner.pending.list(|stamp| syncs.suspect(stamp)) {
            let path = self.pending_path(&digest);
            let begun = syncs.begin_write();
            match rewrite(&path, &digest) {
                Ok(true) => self.inner.pending.restamp(&digest, syncs.end_write(&begun)),
                Ok(false) => {
                    tracing::warn!(object = %digest, "the disk has lost a file that was on its way to it; it is fetched again when it is needed");
                    self.drop_pending(&digest);
                    lost.push(digest);
                }
                Err(error) => {
                    result = Err(error).context("write again", &path);
                    break;
                }
            }
        }
        if let Some(watcher) = self.watcher().filter(|_| !lost.is_empty()) {
            watcher.lost(&lost);
        }
        result.map(|()| self.inner.pending.len())
    }

    /// How many pending files no sync can confirm before [`Store::heal`] has written them again.
    pub fn suspect_count(&self) -> usize {
        let syncs = &self.inner.syncs;
        self.inner.pending.list(|stamp| syncs.suspect(stamp)).len()
    }

    /// Waits until the disk has these as objects; an error if it does not take them.
    pub fn make_durable<'a>(&self, objects: impl Iterator<Item = &'a Digest> + Clone) -> Result<(), Error> {
        let here = || objects.clone().all(|object| self.has_object(object));
        let mut settled = Ok(());
        for attempt in 0..2 {
            if here() {
                return Ok(());
            }
            if attempt > 0 {
                self.heal()?;
            }
            settled = self.settle();
        }
        settled?;
        if here() {
            return Ok(());
        }
        Err(Error::NotKept(self.root().to_owned()))
    }

    /// Makes everything durable and marks the store as cleanly closed, unless a sync of this process has
    /// failed: then the next process looks at what this one wrote. Call it now and then too: it shortens the
    /// check after a power loss.
    pub fn checkpoint(&self) -> Result<(), Error> {
        self.check_locked()?;
        let mut turn = self.turn();
        let before = crate::recovery::now();
        let marker = &self.inner.marker;
        // syncfs waits for everything on that file system, so it is not called for nothing.
        if self.inner.pending.is_empty() && marker.is_clean() {
            return Ok(());
        }
        self.settle_in(&mut turn)?;
        if !self.inner.pending.is_empty() && self.heal_in()? > 0 {
            self.settle_in(&mut turn)?;
        }
        let clean = !turn.failed;
        marker.checkpoint(clean, before)
    }
}

/// Hashes a file and writes every byte that was hashed again, so that all its pages go to the disk once more.
/// False if its content is not that of the digest, or cannot be read.
fn rewrite(path: &Path, digest: &Digest) -> io::Result<bool> {
    let mode = |mode| fs::set_permissions(path, fs::Permissions::from_mode(mode));
    if let Err(error) = mode(0o600) {
        return if error.kind() == io::ErrorKind::NotFound {
            Ok(false)
        } else {
            Err(error)
        };
    }
    let file = File::options().read(true).write(true).open(path)?;
    let mut hasher = Hasher::new();
    let mut buffer = vec![0; PIECE];
    let mut done = 0;
    loop {
        let length = match file.read_at(&mut buffer, done) {
            Ok(0) => break,
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                tracing::warn!(?path, %error, "cannot read a file of the store");
                return Ok(false);
            }
        };
        let piece = buffer.get(..length).unwrap_or_default();
        hasher.update(piece);
        file.write_all_at(piece, done)?;
        done += length as u64;
    }
    mode(0o444)?;
    Ok(hasher.finish() == *digest)
}

#[cfg(test)]
mod tests;
