//! The marker file: what a process tells the next one about how far its store can be trusted.
//!
//! Called by [`crate::recovery`] and [`crate::durable`], by one thread at a time: they hold the turn. It is
//! written with `fsync` of file and directory.
//!
//! Objects are on the disk before they have their names, so the marker is the second line: it says which
//! objects are young, for disks that confirm what they do not keep, and for stores of earlier versions.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::{AtFlags, StatxFlags};
use serde::{Deserialize, Serialize};

use crate::error::{Context, Error};
use crate::recovery::{SLACK, now};

/// The kernel's name of this boot.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// Longest marker file that is read, in bytes.
const MARKER_LIMIT: u64 = 4096;
/// `STATX_MNT_ID_UNIQUE` (linux/stat.h, Linux 6.8): an identity of the mount that is never given again in
/// this boot.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// What the file says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Mark {
    /// Boot during which it was written.
    pub(crate) boot_id: String,
    /// Nothing was named since the checkpoint.
    pub(crate) clean: bool,
    /// Files whose ctime is older, in nanoseconds since the epoch, are on the disk.
    pub(crate) checkpoint: i64,
    /// Mount of the store's file system; `None` in a marker of an earlier version, which named objects before
    /// they were on the disk.
    #[serde(default)]
    pub(crate) mount: Option<u64>,
    /// A sync of the process that wrote this has failed.
    #[serde(default)]
    pub(crate) failed: bool,
}

/// The marker file and what this process knows of it.
#[derive(Debug)]
pub(crate) struct Marker {
    path: PathBuf,
    boot_id: String,
    mount: Option<u64>,
    known: Mutex<Known>,
}

/// What this process knows of the file.
#[derive(Debug, Default)]
struct Known {
    /// What it says; `None` when its content is unknown.
    file: Option<Mark>,
    /// What it should say and may not, because a write of it has failed: the next one says it.
    owed: Option<Owed>,
}

/// What a dirty marker must not forget.
#[derive(Debug, Clone, Copy)]
struct Owed {
    checkpoint: i64,
    failed: bool,
}

impl Known {
    /// What the next dirty marker has to say, whatever else it says.
    fn owed(&self) -> Option<Owed> {
        let of = |mark: &Mark| Owed {
            checkpoint: mark.checkpoint,
            failed: mark.failed,
        };
        self.owed
            .or_else(|| self.file.as_ref().filter(|mark| !mark.clean).map(of))
    }
}

impl Marker {
    /// The marker of the store below `root`; nothing is read before [`crate::Store::lock`].
    pub(crate) fn new(root: &Path, root_fd: BorrowedFd<'_>) -> Result<Self, Error> {
        let boot_id = fs::read_to_string(BOOT_ID).context("read", Path::new(BOOT_ID))?;
        Ok(Self {
            path: root.join("marker"),
            boot_id: boot_id.trim().to_owned(),
            mount: mount_of(root_fd),
            known: Mutex::default(),
        })
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        // A write begins by noting what it owes.
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What the file says; `None` when there is none that makes sense.
    pub(crate) fn read(&self) -> Result<Option<Mark>, Error> {
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

    /// Whether it was written in this boot and on this mount of the file system.
    pub(crate) fn is_of_here(&self, mark: &Mark) -> bool {
        mark.boot_id == self.boot_id && mark.mount.is_some() && mark.mount == self.mount
    }

    /// Takes over what the file says.
    pub(crate) fn adopt(&self, mark: Mark) {
        *self.known() = Known {
            file: Some(mark),
            owed: None,
        };
    }

    /// The next marker that is written says no later checkpoint, unless it is a clean one.
    pub(crate) fn owe(&self, checkpoint: i64) {
        let failed = false;
        self.known().owed = Some(Owed { checkpoint, failed });
    }

    /// Whether the file says clean.
    pub(crate) fn is_clean(&self) -> bool {
        self.known().file.as_ref().is_some_and(|mark| mark.clean)
    }

    /// Announces that objects get their names: the file is dirty afterwards.
    pub(crate) fn begin(&self) -> Result<(), Error> {
        let now = now();
        let mut known = self.known();
        // A clock that was set back takes the checkpoint along. Half of the slack is left for the file
        // system's coarser clock.
        let marked = |mark: &Mark| !mark.clean && now >= mark.checkpoint.saturating_sub(SLACK / 2);
        if known.file.as_ref().is_some_and(marked) {
            return Ok(());
        }
        let failed = known.file.as_ref().is_some_and(|mark| mark.failed);
        self.write(&mut known, false, now, failed)
    }

    /// Writes that a sync has failed, unless the file is clean: then nothing was named since the sync before. Where nothing is known of
    /// a checkpoint, there was none.
    pub(crate) fn note_failure(&self) -> Result<(), Error> {
        let mut known = self.known();
        if known.file.as_ref().is_some_and(|mark| mark.clean) {
            return Ok(());
        }
        let checkpoint = known.owed().map_or(i64::MIN, |owed| owed.checkpoint);
        self.write(&mut known, false, checkpoint, true)
    }

    /// Everything that was named before that time is on the disk. Without `clean` a sync has failed in this
    /// process, and the checkpoint stays what it was.
    pub(crate) fn checkpoint(&self, clean: bool, time: i64) -> Result<(), Error> {
        let mut known = self.known();
        if clean {
            return self.write(&mut known, true, time, false);
        }
        let written = known.file.as_ref().map(|mark| mark.checkpoint);
        let owed = known.owed().map(|owed| owed.checkpoint);
        let checkpoint = written.or(owed).unwrap_or(i64::MIN);
        self.write(&mut known, false, checkpoint, true)
    }

    /// Writes the file durably. On an error its content is unknown: the next name in the store has it written
    /// again, with the earliest checkpoint and the failure that it should have told of by then.
    fn write(
        &self,
        known: &mut Known,
        clean: bool,
        mut checkpoint: i64,
        mut failed: bool,
    ) -> Result<(), Error> {
        if let Some(owed) = known.owed.filter(|_| !clean) {
            checkpoint = checkpoint.min(owed.checkpoint);
            failed |= owed.failed;
        }
        known.owed = if clean {
            known.owed()
        } else {
            Some(Owed { checkpoint, failed })
        };
        known.file = None;
        let mark = Mark {
            boot_id: self.boot_id.clone(),
            clean,
            checkpoint,
            mount: self.mount,
            failed,
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
        *known = Known {
            file: Some(mark),
            owed: None,
        };
        Ok(())
    }
}

/// An identity of the mount that the directory is on: it changes when the file system is mounted anew.
fn mount_of(directory: BorrowedFd<'_>) -> Option<u64> {
    [MNT_ID_UNIQUE, StatxFlags::MNT_ID]
        .into_iter()
        .find_map(|wanted| {
            let found = rustix::fs::statx(directory, c"", AtFlags::EMPTY_PATH, wanted).ok()?;
            (found.stx_mask & wanted.bits() != 0).then_some(found.stx_mnt_id)
        })
}
