//! Who owns the store, and what is checked after a crash or a power loss.
//!
//! Nothing is synced object by object. After SIGKILL the page cache still holds every byte, and names appear only for whole
//! files, so there is nothing to do but to empty `tmp/`. After a power loss a name may be on disk without its content. So
//! the store keeps a marker, synced with its directory:
//!
//! | marker | written | after a restart of the same boot | after another boot |
//! |---|---|---|---|
//! | clean | by [`Store::checkpoint`], when nothing was written since its `syncfs` began | nothing | nothing |
//! | dirty, boot id, time T | before the first write after a clean one; by a checkpoint during writes | nothing | objects with ctime >= T - 2 s are hashed again, EROFS images that young are removed |
//!
//! Writing or linking a name changes a file's ctime, which nobody can set back, so every object younger than the last
//! checkpoint is found. A clock that is set back during the run is noticed at the next write, and T follows it.
//! Records carry a checksum and partial objects are hashed anyway; both need no rule here.
//!
//! Two orders matter. A writer counts itself as started before it looks whether the marker is clean; a checkpoint declares
//! the marker clean in memory before it looks whether a writer has started: one of them sees the other. The mutex here is
//! held while the marker is written and by nothing on the hot path.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error};
use crate::objects::{digest_of_name, hash_file};
use crate::{Store, partial, remove_quietly};

/// The kernel's name of this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Made when a recovery has removed objects, and kept for good: such a store looks twice.
const LOST: &str = "lost-objects";
/// How much younger than the checkpoint a file must look to be trusted, in nanoseconds. The kernel stamps ctime from a
/// clock that ticks every 1 to 10 ms; 2 s also covers file systems that keep whole seconds.
const SLACK: i64 = 2_000_000_000;

/// Threads that hash after a power loss; more would only queue at the disk.
const RECOVERY_THREADS: usize = 4;

/// Longest marker file that is read, in bytes.
const MARKER_LIMIT: u64 = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Mark {
    /// Boot during which it was written.
    boot_id: String,
    /// Nothing was written since the checkpoint.
    clean: bool,
    /// Files whose ctime is older, in nanoseconds since the epoch, are on the disk.
    checkpoint: i64,
}

/// The marker file and what this process knows of it.
#[derive(Debug)]
pub(crate) struct Marker {
    path: PathBuf,
    boot_id: String,
    /// What the file says, as far as this process knows. Orders its writes.
    file: Mutex<Option<Mark>>,
    /// This process owns the store and has recovered it.
    locked: AtomicBool,
    /// The file may say clean, so it must be written before anything else is.
    clean: AtomicBool,
    checkpoint: AtomicI64,
    started: AtomicU64,
    finished: AtomicU64,
}

/// Counts one write to the store from before its first effect to after its last.
#[derive(Debug)]
pub(crate) struct Writing<'a>(&'a Marker);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.0.finished.fetch_add(1, Ordering::SeqCst);
    }
}

impl Marker {
    /// The marker of the store below `root`; nothing is read before [`Store::lock`].
    pub(crate) fn new(root: &Path) -> Result<Self, Error> {
        let boot_id = fs::read_to_string(BOOT_ID).context("read", Path::new(BOOT_ID))?;
        Ok(Self {
            path: root.join("marker"),
            boot_id: boot_id.trim().to_owned(),
            file: Mutex::new(None),
            locked: AtomicBool::new(false),
            clean: AtomicBool::new(true),
            checkpoint: AtomicI64::new(i64::MIN),
            started: AtomicU64::new(0),
            finished: AtomicU64::new(0),
        })
    }

    fn file(&self) -> MutexGuard<'_, Option<Mark>> {
        // After a panic during a write the file is of unknown content, and `clean` says so.
        self.file.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Result<Option<Mark>, Error> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context("open", &self.path),
        };
        let mut text = Vec::new();
        file.take(MARKER_LIMIT)
            .read_to_end(&mut text)
            .context("read", &self.path)?;
        match serde_json::from_slice(&text) {
            Ok(mark) => Ok(Some(mark)),
            Err(error) => {
                tracing::warn!(path = ?self.path, %error, "the store's marker is damaged; everything will be checked");
                Ok(None)
            }
        }
    }

    /// Writes the file durably. On an error its content is unknown: the next write to the store marks it again.
    fn write(&self, file: &mut Option<Mark>, clean: bool, checkpoint: i64) -> Result<(), Error> {
        self.clean.store(true, Ordering::SeqCst);
        *file = None;
        let mark = Mark {
            boot_id: self.boot_id.clone(),
            clean,
            checkpoint,
        };
        let text = serde_json::to_string(&mark)
            .map_err(io::Error::from)
            .context("encode", &self.path)?;
        let temporary = self.path.with_extension("new");
        let mut new = File::options()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)
            .context("make", &temporary)?;
        new.write_all(text.as_bytes())
            .and_then(|()| new.sync_all())
            .context("write", &temporary)?;
        fs::rename(&temporary, &self.path).context("rename to", &self.path)?;
        let directory = self.path.parent().unwrap_or(&self.path);
        File::open(directory)
            .and_then(|directory| directory.sync_all())
            .context("sync", directory)?;
        self.checkpoint.store(checkpoint, Ordering::SeqCst);
        self.clean.store(clean, Ordering::SeqCst);
        *file = Some(mark);
        Ok(())
    }

    fn begin(&self) -> Result<Writing<'_>, Error> {
        self.started.fetch_add(1, Ordering::SeqCst);
        let writing = Writing(self);
        let now = now();
        if self.must_mark(now) {
            let mut file = self.file();
            // Several writers may have waited for the first.
            if self.must_mark(now) {
                self.write(&mut file, false, now)?;
            }
        }
        Ok(writing)
    }

    /// Half of the slack is left for the file system's coarser clock.
    fn must_mark(&self, now: i64) -> bool {
        self.clean.load(Ordering::SeqCst)
            || now < self.checkpoint.load(Ordering::SeqCst).saturating_sub(SLACK / 2)
    }
}

/// Nanoseconds since the epoch; the range of `i64` ends in the year 2262.
fn now() -> i64 {
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
        partial::remove_leftovers(self)?;
        self.remove_other_images()?;
        self.inner.marker.locked.store(true, Ordering::Release);
        *held = Some(file);
        Ok(())
    }

    /// Makes everything durable (`syncfs`) and marks the store as cleanly closed. During writes it is only marked with the
    /// time up to which all is durable, which shortens the check after a power loss; so call it now and then too.
    pub fn checkpoint(&self) -> Result<(), Error> {
        let marker = self.marker()?;
        let before = now();
        // In this order: equal numbers mean that no writer was between its start and its end.
        let finished = marker.finished.load(Ordering::SeqCst);
        let started = marker.started.load(Ordering::SeqCst);
        // syncfs waits for everything on that file system, so it is not called for nothing.
        if started == finished && marker.file().as_ref().is_some_and(|mark| mark.clean) {
            return Ok(());
        }
        rustix::fs::syncfs(&self.inner.root_fd).context("sync", self.root())?;
        let mut file = marker.file();
        marker.clean.store(true, Ordering::SeqCst);
        let quiet = started == finished && marker.started.load(Ordering::SeqCst) == started;
        marker.write(&mut file, quiet, before)
    }

    /// Whether a recovery had to remove objects, now or in the life of an earlier process. An image whose layers were pulled
    /// whole may lack files then, and nobody but the registry has them.
    pub fn has_lost_objects(&self) -> bool {
        self.root().join(LOST).exists()
    }

    /// Announces a write, so that the marker on disk is dirty before it. Dropped when the write has taken effect.
    pub(crate) fn begin_write(&self) -> Result<Writing<'_>, Error> {
        self.marker()?.begin()
    }

    /// Refuses to write to a store that another process may own.
    pub(crate) fn check_locked(&self) -> Result<(), Error> {
        self.marker().map(|_| ())
    }

    /// The marker of a store that this process owns.
    fn marker(&self) -> Result<&Marker, Error> {
        let marker = &self.inner.marker;
        if marker.locked.load(Ordering::Acquire) {
            Ok(marker)
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
            Some(mark) if mark.clean || mark.boot_id == marker.boot_id => {
                let mut file = marker.file();
                marker.checkpoint.store(mark.checkpoint, Ordering::SeqCst);
                marker.clean.store(mark.clean, Ordering::SeqCst);
                *file = Some(mark);
                return Ok(());
            }
            Some(mark) => mark.checkpoint,
            None => i64::MIN,
        };
        let before = now();
        let limit = checkpoint.saturating_sub(SLACK);
        let (checked, removed) = self.check_young_objects(limit)?;
        let images = self.remove_young_images(limit)?;
        if removed > 0 {
            let path = self.root().join(LOST);
            File::create(&path).context("make", &path)?;
        }
        if checked > 0 || images > 0 || checkpoint > i64::MIN {
            tracing::warn!(
                root = ?self.root(), checked, removed, images,
                "the machine went down while the store was in use; objects since the last checkpoint were checked"
            );
            rustix::fs::syncfs(&self.inner.root_fd).context("sync", self.root())?;
            marker.write(&mut marker.file(), true, before)?;
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
                        tracing::warn!(?path, "removing an object that a power loss has damaged");
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
