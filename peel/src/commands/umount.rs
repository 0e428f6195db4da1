//! `peel umount`: takes away what `peel mount` mounted, with a server, without one, or with a later one.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use rustix::io::Errno;
use rustix::mount::{UnmountFlags, unmount};

use crate::cli::{Global, UmountArgs};
use crate::client::Client;
use crate::mount_records::{MountRecord, MountRecords, boot_id};
use crate::mountinfo::{self, Mount};
use crate::store_dir::StoreDir;

/// Unmounts, then removes the mount's writable layer.
pub(super) fn run(global: &Global, args: &UmountArgs) -> anyhow::Result<()> {
    let store = std::path::absolute(&global.store).context("store directory")?;
    let dir = resolve(&args.dir)?;
    let mount = mountinfo::at(&dir).context("/proc/self/mountinfo")?;
    StoreDir::open(&store)?;
    let records = MountRecords::new(&store);
    let Some(record) = find(&records, &dir, mount.as_ref())? else {
        let what = match &mount {
            Some(mount) => format!("a mount of {}, not of", String::from_utf8_lossy(&mount.kind)),
            None => "not a mount of".to_owned(),
        };
        bail!(
            "{}: {what} the store {}; give the directory and the --store that `peel mount` was given",
            dir.display(),
            store.display()
        );
    };
    if mount.is_some_and(|mount| mount.device == record.device) {
        take_away(&dir, args.lazy)?;
    }
    match Client::connect_if_running(&store)? {
        // The server holds the mount's handle, and removes the writable layer after it has let go.
        Some(mut client) => client.release(&record.id),
        // Another mount namespace may have it still; the next server removes the layer when none has.
        None if mountinfo::overlays_everywhere()
            .context("/proc")?
            .contains(&record.device) =>
        {
            Ok(())
        }
        None => records.remove(&record.id),
    }
}

/// The directory as mountinfo writes it. What a dead server left may be a directory that cannot be looked into, so only
/// its parent is resolved.
fn resolve(dir: &Path) -> anyhow::Result<PathBuf> {
    let absolute = std::path::absolute(dir).context("path")?;
    let resolved = match (absolute.parent(), absolute.file_name()) {
        (Some(parent), Some(name)) => parent.canonicalize().map(|parent| parent.join(name)),
        _ => absolute.canonicalize(),
    };
    let resolved = resolved.with_context(|| absolute.display().to_string())?;
    // A symbolic link to the directory is resolved as `peel mount` did.
    match std::fs::read_link(&resolved) {
        Ok(_) => resolved
            .canonicalize()
            .with_context(|| resolved.display().to_string()),
        Err(_) => Ok(resolved),
    }
}

/// The record of what is mounted at `dir`; or, when nothing of ours is any more, the one that says it was.
fn find(records: &MountRecords, dir: &Path, mount: Option<&Mount>) -> anyhow::Result<Option<MountRecord>> {
    let boot_id = boot_id().context("/proc/sys/kernel/random/boot_id")?;
    let all: Vec<MountRecord> = records
        .list()?
        .into_iter()
        .filter_map(|(_, record)| record.filter(|record| record.dir.is_some()))
        .collect();
    let overlay = mount.filter(|mount| mount.kind == b"overlay");
    let mounted = all.iter().find(|record| {
        record.boot_id == boot_id && overlay.is_some_and(|mount| mount.device == record.device)
    });
    let gone = || {
        all.iter()
            .find(|record| overlay.is_none() && record.dir.as_deref() == Some(dir))
    };
    Ok(mounted.or_else(gone).cloned())
}

fn take_away(dir: &Path, lazy: bool) -> anyhow::Result<()> {
    let mut flags = UnmountFlags::NOFOLLOW;
    if lazy {
        flags |= UnmountFlags::DETACH;
    }
    match unmount(dir, flags) {
        Err(Errno::BUSY) => bail!(
            "{}: still used by some process; end it, or give --lazy",
            dir.display()
        ),
        result => result.with_context(|| format!("{}: cannot be unmounted", dir.display())),
    }
}
