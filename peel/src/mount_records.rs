//! What the store keeps of each mount while it exists: `<store>/mounts/<id>/` with `record.json` and `scratch/` (the
//! writable layer).
//!
//! The server writes a record before it hands a mount out. `peel umount` and the next server read them, so that nothing
//! is left behind when a server was killed. A record is removed together with its writable layer, and only when no
//! mount namespace has the overlay any more.

use std::fs;
use std::io::{self, Read};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use peel_image::Digest;
use serde::{Deserialize, Serialize};

use crate::mountinfo::DeviceNumber;

/// One mount of the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MountRecord {
    /// Its name: 12 hexadecimal digits.
    pub id: String,
    /// The image as the user wrote it.
    pub image: String,
    /// Digest of the platform's manifest.
    pub manifest_digest: Digest,
    /// The overlay's device number, which it has until it is unmounted everywhere.
    pub device: DeviceNumber,
    /// The boot in which it was made; none of its mounts outlives that.
    pub boot_id: String,
    /// Where `peel mount` put it; `None` while a connection leases it.
    pub dir: Option<PathBuf>,
}

/// The records of one store.
#[derive(Debug, Clone)]
pub struct MountRecords {
    dir: PathBuf,
}

/// Identifies this boot of the kernel (random(4)).
pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?
        .trim()
        .to_owned())
}

/// A name for a new mount that no other has.
pub fn new_id() -> io::Result<String> {
    let mut bytes = [0; 6];
    fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(Digest::from_bytes(std::array::from_fn(|index| {
        bytes.get(index).copied().unwrap_or_default()
    }))
    .hex()
    .chars()
    .take(12)
    .collect())
}

/// Whether `id` is what [`new_id`] makes; anything else must not become part of a path.
fn is_id(id: &str) -> bool {
    id.len() == 12 && id.bytes().all(|byte| byte.is_ascii_hexdigit())
}

impl MountRecords {
    /// The records of the store in `store`; nothing is made yet.
    pub fn new(store: &Path) -> Self {
        Self {
            dir: store.join("mounts"),
        }
    }

    fn path(&self, id: &str) -> anyhow::Result<PathBuf> {
        anyhow::ensure!(is_id(id), "{id:?} is not the name of a mount");
        Ok(self.dir.join(id))
    }

    /// Makes the directory of a new mount and returns its empty `scratch`.
    pub fn create(&self, id: &str) -> anyhow::Result<PathBuf> {
        let scratch = self.path(id)?.join("scratch");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&scratch)
            .with_context(|| format!("{}: cannot be made", scratch.display()))?;
        Ok(scratch)
    }

    /// Writes or replaces a record.
    pub fn put(&self, record: &MountRecord) -> anyhow::Result<()> {
        let path = self.path(&record.id)?.join("record.json");
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(record)?)
            .and_then(|()| fs::rename(&new, &path))
            .with_context(|| format!("{}: cannot be written", path.display()))
    }

    /// Removes a mount's record and its writable layer.
    pub fn remove(&self, id: &str) -> anyhow::Result<()> {
        let path = self.path(id)?;
        match fs::remove_dir_all(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).with_context(|| format!("{}: cannot be removed", path.display()))
            }
            _ => Ok(()),
        }
    }

    /// All mounts; a directory whose record cannot be read (its server was killed while it made it) comes with `None`.
    pub fn list(&self) -> anyhow::Result<Vec<(String, Option<MountRecord>)>> {
        let entries = match fs::read_dir(&self.dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            result => result.with_context(|| format!("{}: cannot be read", self.dir.display()))?,
        };
        let mut all = Vec::new();
        for entry in entries {
            let entry = entry?;
            let Some(id) = entry
                .file_name()
                .to_str()
                .filter(|id| is_id(id))
                .map(str::to_owned)
            else {
                continue;
            };
            let record = fs::read(entry.path().join("record.json"))
                .ok()
                .and_then(|text| serde_json::from_slice::<MountRecord>(&text).ok())
                .filter(|record| record.id == id);
            all.push((id, record));
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(id: &str) -> MountRecord {
        MountRecord {
            id: id.to_owned(),
            image: "oci:/x:y".to_owned(),
            manifest_digest: Digest::EMPTY,
            device: DeviceNumber { major: 0, minor: 7 },
            boot_id: boot_id().unwrap(),
            dir: Some("/mnt".into()),
        }
    }

    #[test]
    fn records_are_kept_until_they_are_removed() {
        let store = tempfile::tempdir().unwrap();
        let records = MountRecords::new(store.path());
        assert!(records.list().unwrap().is_empty());
        let (first, second) = (new_id().unwrap(), new_id().unwrap());
        assert_ne!(first, second);
        assert!(records.create(&first).unwrap().is_dir());
        records.create(&second).unwrap();
        records.put(&record(&first)).unwrap();
        let mut all = records.list().unwrap();
        all.sort_by_key(|(id, _)| *id != first);
        assert_eq!(
            all,
            [(first.clone(), Some(record(&first))), (second.clone(), None)]
        );
        records.remove(&first).unwrap();
        records.remove(&first).unwrap();
        records.remove(&second).unwrap();
        assert!(records.list().unwrap().is_empty());
    }

    #[test]
    fn an_id_cannot_leave_the_directory() {
        let records = MountRecords::new(Path::new("/nonexistent"));
        for id in ["", "..", "../../../etc", "0123456789a/", "0123456789abc"] {
            assert!(records.remove(id).is_err(), "{id:?}");
        }
    }
}
