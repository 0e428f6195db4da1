//! Who owns the store, and what is checked when it is taken.
//!
//! Objects are on the disk before they have their names ([`crate::durable`]), so there is little to do:
//! `tmp/` is emptied, pending and partial files are taken over as suspect, records carry checksums. The
//! marker ([`crate::marker`]) is the second line, for disks that confirm what they do not keep, and for
//! stores of earlier versions:
//!
//! | marker | written | same boot and mount | another boot or mount |
//! |---|---|---|---|
//! | clean | by [`Store::checkpoint`], if no sync of its process has failed | nothing | nothing |
//! | dirty, time T | before the first object is named after a clean one | nothing | objects with ctime >= T - 2 s are hashed again, EROFS images that young are removed |
//! | dirty, failed | when a sync fails | as at the right | the same |
//!
//! Naming an object changes its file's ctime, which nobody can set back, so every object younger than the
//! last checkpoint is found. A clock that is set back during the run is noticed at the next name, and T
//! follows it.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use crate::error::{Context, Error};
use crate::objects::{digest_of_name, hash_file};
use crate::{Store, partial, remove_quietly};

/// Made when a recovery has removed objects, and kept for good: such a store looks twice.
const LOST: &str = "lost-objects";
/// How much younger than the checkpoint a file must look to be trusted, in nanoseconds. The kernel stamps ctime from a
/// clock that ticks every 1 to 10 ms; 2 s also covers file systems that keep whole seconds.
pub(crate) const SLACK: i64 = 2_000_000_000;

/// Threads that hash after a power loss; more would only queue at the disk.
const RECOVERY_THREADS: usize = 4;

/// Nanoseconds since the epoch.
pub(crate) fn now() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

/// Time of the last change, in nanoseconds since the epoch.
pub(crate) fn ctime(metadata: &fs::Metadata) -> i64 {
    metadata
        .ctime()
        .saturating_mul(1_000_000_000)
        .saturating_add(metadata.ctime_nsec())
}

impl Store {
    /// Takes the store for this process, recovers from a crash or power loss, clears what half-finished work left.
    /// The lock ends with the process. An error when another process has it.
    pub fn lock(&self) -> Result<(), Error> {
        let path = self.root().join("lock");
        let mut held = self.inner.lock.lock().unwrap_or_else(PoisonError::into_inner);
        if held.is_some() {
            return Ok(());
        }
        let mut file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .context("open", &path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                let read = (&mut file).take(32).read_to_string(&mut holder);
                let known = read.is_ok() && !holder.trim().is_empty();
                return Err(Error::Locked {
                    root: self.root().to_owned(),
                    holder: if known {
                        holder.trim().to_owned()
                    } else {
                        "unknown".to_owned()
                    },
                });
            }
            Err(error) => return Err(error).context("lock", &path),
        }
        file.set_len(0)
            .and_then(|()| write!(file, "{}", std::process::id()))
            .context("write", &path)?;
        self.clear_temporaries()?;
        self.recover()?;
        self.load_pending()?;
        partial::remove_leftovers(self)?;
        self.remove_other_images()?;
        self.inner.locked.store(true, Ordering::Release);
        *held = Some(file);
        Ok(())
    }

    /// Whether a recovery had to remove objects, now or in the life of an earlier process. An image whose layers were pulled
    /// whole may lack files then, and nobody but the registry has them.
    pub fn has_lost_objects(&self) -> bool {
        self.root().join(LOST).exists()
    }

    /// Refuses to write to a store that another process may own.
    pub(crate) fn check_locked(&self) -> Result<(), Error> {
        if self.inner.locked.load(Ordering::Acquire) {
            Ok(())
        } else {
            Err(Error::NotLocked(self.root().to_owned()))
        }
    }

    fn clear_temporaries(&self) -> Result<(), Error> {
        let path = self.root().join("tmp");
        for entry in fs::read_dir(&path).context("list", &path)? {
            remove_quietly(&entry.context("list", &path)?.path());
        }
        Ok(())
    }

    fn recover(&self) -> Result<(), Error> {
        let marker = &self.inner.marker;
        let checkpoint = match marker.read()? {
            Some(mark) if mark.clean || (marker.is_of_here(&mark) && !mark.failed) => {
                marker.adopt(mark);
                return Ok(());
            }
            Some(mark) => mark.checkpoint,
            None => i64::MIN,
        };
        let before = now();
        let limit = checkpoint.saturating_sub(SLACK);
        // What is dirty would be read from memory. An error of this one is of earlier writes, which are about
        // to be checked.
        if let Err(error) = self.sync_disk() {
            tracing::warn!(%error, "the disk has not taken all that was written to it before");
        }
        let (checked, removed) = self.check_young_objects(limit)?;
        // Without a marker and without an object, nothing was ever named here but images, which are durable.
        let images = match checked {
            0 if checkpoint == i64::MIN => 0,
            _ => self.remove_young_images(limit)?,
        };
        if removed > 0 {
            let path = self.root().join(LOST);
            File::create(&path).context("make", &path)?;
        }
        if checked > 0 || images > 0 || checkpoint > i64::MIN {
            tracing::warn!(
                root = ?self.root(), checked, removed, images,
                "the machine or its disk went down while the store was in use; objects since the last checkpoint were checked"
            );
            match self.sync_disk() {
                Ok(()) => marker.checkpoint(true, before)?,
                Err(error) => {
                    tracing::error!(%error, "the disk of the store has errors; what it does not take is not kept");
                    marker.owe(checkpoint);
                    self.note_failure(&mut self.turn());
                }
            }
        }
        Ok(())
    }

    /// Hashes every object with a ctime of at least `limit` and removes those that do not match. Returns how many were
    /// hashed and how many removed.
    fn check_young_objects(&self, limit: i64) -> Result<(usize, usize), Error> {
        let next = AtomicUsize::new(0);
        let checked = AtomicUsize::new(0);
        let removed = AtomicUsize::new(0);
        let work = || -> Result<(), Error> {
            while let Ok(shard) = u8::try_from(next.fetch_add(1, Ordering::Relaxed)) {
                let shard = format!("{shard:02x}");
                let directory = self.objects_dir().join(&shard);
                for entry in fs::read_dir(&directory).context("list", &directory)? {
                    let entry = entry.context("list", &directory)?;
                    let path = entry.path();
                    if ctime(&entry.metadata().context("look at", &path)?) < limit {
                        continue;
                    }
                    checked.fetch_add(1, Ordering::Relaxed);
                    if !intact(&shard, &path)? {
                        tracing::warn!(?path, "removing an object that the disk has damaged");
                        fs::remove_file(&path).context("remove", &path)?;
                        removed.fetch_add(1, Ordering::Relaxed);
                    }
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let mut threads = Vec::new();
            for number in 0..RECOVERY_THREADS {
                let thread = std::thread::Builder::new()
                    .name(format!("store-check-{number}"))
                    .spawn_scoped(scope, work)
                    .context("start a thread to check", &self.objects_dir())?;
                threads.push(thread);
            }
            threads.into_iter().try_for_each(|thread| {
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            })
        })?;
        Ok((checked.into_inner(), removed.into_inner()))
    }
}

fn intact(shard: &str, path: &Path) -> Result<bool, Error> {
    let name = Path::new(path.file_name().unwrap_or_default());
    let Some(digest) = digest_of_name(shard, name) else {
        return Ok(false);
    };
    let mut file = File::open(path).context("open object", path)?;
    // What counts is on the disk. Advice that is not taken leaves the hash of what readers would see.
    let _ = rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed);
    match hash_file(&mut file) {
        Ok(found) => Ok(found == digest),
        // A block that the disk cannot read is no reason to refuse the whole store.
        Err(error) => {
            tracing::warn!(?path, %error, "cannot read an object");
            Ok(false)
        }
    }
}

#[cfg(test)]
mod tests;
