//! The mounts that a server keeps: their handles, their records, and when they are over.

use std::collections::{HashMap, HashSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use peel_fs::{Image, MountedImage, Service};
use rustix::mount::OpenTreeFlags;

use crate::describe::describe;
use crate::mount_records::{MountRecord, MountRecords, boot_id, new_id};
use crate::mountinfo::{self, DeviceNumber};
use crate::protocol::WritableLayer;

/// The table of mounts.
#[derive(Debug)]
pub(super) struct Mounts {
    service: Service,
    records: MountRecords,
    boot_id: String,
    table: Mutex<HashMap<String, Kept>>,
    /// Being made: their directories look like those of a dead server.
    unfinished: Mutex<HashSet<String>>,
}

/// One mount. The handle comes first: what it needs must outlive it.
#[derive(Debug)]
struct Kept {
    _mount: MountedImage,
    _image: Arc<Image>,
    record: MountRecord,
    /// How many times in a row nobody was found to have it mounted.
    missed: u32,
}

/// After so many misses a kept mount is over. More than one: it is kept just before it is moved to its directory.
const MISSES: u32 = 2;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A second mount of the same file system to hand out. The server keeps the first open, which would make the one that the
/// user has mounted look busy to `umount` for as long as the server lives.
fn twin(mount: &MountedImage) -> anyhow::Result<OwnedFd> {
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    rustix::mount::open_tree(mount.mount_fd(), "", flags).context("a second mount of the root file system")
}

impl Mounts {
    pub(super) fn new(store: &Path, service: Service) -> anyhow::Result<Self> {
        Ok(Self {
            service,
            records: MountRecords::new(store),
            boot_id: boot_id().context("/proc/sys/kernel/random/boot_id")?,
            table: Mutex::default(),
            unfinished: Mutex::default(),
        })
    }

    /// Whether any mount is kept.
    pub(super) fn any(&self) -> bool {
        !lock(&self.table).is_empty() || !lock(&self.unfinished).is_empty()
    }

    /// The records of all mounts.
    pub(super) fn records(&self) -> Vec<MountRecord> {
        lock(&self.table)
            .values()
            .map(|kept| kept.record.clone())
            .collect()
    }

    /// Mounts an image, detached; returns the mount's name and a descriptor of it.
    pub(super) fn add(
        &self,
        name: &str,
        image: Arc<Image>,
        layer: WritableLayer,
    ) -> anyhow::Result<(String, OwnedFd)> {
        let id = new_id().context("/dev/urandom")?;
        lock(&self.unfinished).insert(id.clone());
        let result = self.add_as(&id, name, image, layer);
        if result.is_err() {
            self.remove_files(&id);
        }
        lock(&self.unfinished).remove(&id);
        Ok((id, result?))
    }

    fn add_as(
        &self,
        id: &str,
        name: &str,
        image: Arc<Image>,
        layer: WritableLayer,
    ) -> anyhow::Result<OwnedFd> {
        let scratch = self.records.create(id)?;
        let scratch = (layer != WritableLayer::None).then_some(scratch.as_path());
        let mount = match self.service.mount(&image, scratch) {
            Err(error) if layer == WritableLayer::Optional => {
                tracing::warn!(image = name, %error, "mounted without a writable layer");
                self.service.mount(&image, None)?
            }
            mount => mount?,
        };
        let fd = twin(&mount)?;
        let stat = rustix::fs::fstat(&fd).context("mount descriptor")?;
        let record = MountRecord {
            id: id.to_owned(),
            image: name.to_owned(),
            manifest_digest: image.manifest_digest(),
            device: DeviceNumber::from_raw(stat.st_dev),
            boot_id: self.boot_id.clone(),
            dir: None,
        };
        self.records.put(&record)?;
        let kept = Kept {
            _mount: mount,
            _image: image,
            record,
            missed: 0,
        };
        lock(&self.table).insert(id.to_owned(), kept);
        Ok(fd)
    }

    /// The mount is about to be moved to `dir` and stays when its connection closes.
    pub(super) fn keep(&self, id: &str, dir: PathBuf) -> anyhow::Result<()> {
        let record = {
            let mut table = lock(&self.table);
            let kept = table.get_mut(id).with_context(|| format!("no mount {id}"))?;
            kept.record.dir = Some(dir);
            kept.record.clone()
        };
        self.records.put(&record)
    }

    /// Whether the mount outlives its connection.
    pub(super) fn is_kept(&self, id: &str) -> bool {
        lock(&self.table)
            .get(id)
            .is_some_and(|kept| kept.record.dir.is_some())
    }

    /// Drops the mount and removes its writable layer. Harmless for one that is gone.
    pub(super) fn release(&self, id: &str) {
        // Taken out first, so that neither the drop nor the removal happens under the lock.
        let kept = lock(&self.table).remove(id);
        let device = kept
            .as_ref()
            .filter(|kept| kept.record.dir.is_some())
            .map(|kept| kept.record.device);
        drop(kept);
        // Another mount namespace may have what was mounted for good: then its layer stays until it is found gone. A
        // container's mount went with the container.
        if device.is_some_and(|device| self.is_mounted(device)) {
            return;
        }
        self.remove_files(id);
    }

    fn is_mounted(&self, device: DeviceNumber) -> bool {
        match mountinfo::overlays_everywhere() {
            Ok(everywhere) => everywhere.contains(&device),
            Err(error) => {
                tracing::warn!("looking for mounts in other namespaces: {error}");
                true
            }
        }
    }

    fn remove_files(&self, id: &str) {
        if let Err(error) = self.records.remove(id) {
            tracing::warn!("writable layer of a mount that is gone: {}", describe(&error));
        }
    }

    /// Releases kept mounts that nobody has mounted any more, and removes what dead servers left.
    pub(super) fn clean_up(&self) {
        if let Err(error) = self.try_clean_up() {
            tracing::warn!("looking for mounts that are gone: {}", describe(&error));
        }
    }

    fn try_clean_up(&self) -> anyhow::Result<()> {
        // The order matters: a mount that is made while this runs is in the table before it is on the list.
        let listed = self.records.list()?;
        let kept: Vec<MountRecord> = self
            .records()
            .into_iter()
            .filter(|record| record.dir.is_some())
            .collect();
        let orphans: Vec<(String, Option<MountRecord>)> = listed
            .into_iter()
            .filter(|(id, _)| !lock(&self.unfinished).contains(id) && !lock(&self.table).contains_key(id))
            .collect();
        if kept.is_empty() && orphans.is_empty() {
            return Ok(());
        }
        let own: HashSet<DeviceNumber> = mountinfo::own()?.into_iter().map(|mount| mount.device).collect();
        let in_sight = |record: &MountRecord| own.contains(&record.device);
        if orphans.is_empty() && kept.iter().all(in_sight) {
            return Ok(());
        }
        let everywhere = mountinfo::overlays_everywhere()?;
        for record in self.gone(&everywhere) {
            tracing::info!(id = record.id, image = record.image, "unmounted everywhere");
            self.release(&record.id);
        }
        for (id, record) in orphans {
            let lives = record
                .is_some_and(|record| record.boot_id == self.boot_id && everywhere.contains(&record.device));
            if !lives {
                tracing::info!(id, "left by an earlier server, gone now");
                self.remove_files(&id);
            }
        }
        Ok(())
    }

    /// Kept mounts that have been missed often enough.
    fn gone(&self, everywhere: &HashSet<DeviceNumber>) -> Vec<MountRecord> {
        let mut table = lock(&self.table);
        let kept = table.values_mut().filter(|kept| kept.record.dir.is_some());
        kept.filter_map(|kept| {
            let found = everywhere.contains(&kept.record.device);
            kept.missed = if found { 0 } else { kept.missed + 1 };
            (kept.missed >= MISSES).then(|| kept.record.clone())
        })
        .collect()
    }

    /// Drops every handle; what is mounted stays mounted, and so do the records of what is.
    pub(super) fn drop_all(&self) {
        let all: Vec<Kept> = lock(&self.table).drain().map(|(_, kept)| kept).collect();
        let leased: Vec<String> = all
            .iter()
            .filter(|kept| kept.record.dir.is_none())
            .map(|kept| kept.record.id.clone())
            .collect();
        drop(all);
        // A leased mount's container may still run: then its layer must stay until a later server finds it gone.
        let everywhere = mountinfo::overlays_everywhere().unwrap_or_default();
        for (id, record) in self.records.list().unwrap_or_default() {
            if leased.contains(&id) && record.is_none_or(|record| !everywhere.contains(&record.device)) {
                self.remove_files(&id);
            }
        }
    }
}
