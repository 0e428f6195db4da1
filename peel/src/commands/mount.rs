//! `peel mount`: an image's root file system at a directory.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use anyhow::{Context, bail};
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, move_mount};
use serde::Serialize;

use crate::cli::{Global, MountArgs};
use crate::client::Client;
use crate::progress::LoadProgress;
use crate::protocol::{Mounted, WritableLayer};

/// What `--json` prints.
#[derive(Debug, Serialize)]
struct Report<'a> {
    dir: &'a Path,
    #[serde(flatten)]
    mounted: MountReport<'a>,
}

/// What a mount cost and how it is served.
#[derive(Debug, Serialize)]
struct MountReport<'a> {
    id: &'a str,
    manifest_digest: peel_image::Digest,
    layers: &'a [peel_fs::LayerReport],
    resolve_s: f64,
    mount_s: f64,
    requests: u64,
    bytes: u64,
}

/// Mounts it and returns when it is ready.
pub(super) fn run(global: &Global, args: &MountArgs) -> anyhow::Result<()> {
    let dir = args
        .dir
        .canonicalize()
        .with_context(|| format!("{}: cannot be mounted on", args.dir.display()))?;
    if !dir.is_dir() {
        bail!("{}: not a directory", dir.display());
    }
    let layer = if args.read_only {
        WritableLayer::None
    } else {
        WritableLayer::Required
    };
    let request = super::mount_request(global, &args.image, &args.load, layer)?;
    let mut client = Client::connect(global)?;
    let mut progress = LoadProgress::new(&args.image);
    let (mounted, fd) = client.mount(request, &mut |step| progress.update(&step))?;
    progress.finish();
    super::warn_of_platform(&args.image, &mounted.config, args.load.platform.as_deref());
    client.keep(&mounted.id, &dir)?;
    let attached = peel_sandbox::restrict_mount(fd.as_fd(), !args.suid, !args.dev)
        .context("making the mount nosuid and nodev")
        .and_then(|()| attach(fd.as_fd(), &dir));
    if let Err(error) = attached {
        drop(fd);
        client.release(&mounted.id)?;
        return Err(error);
    }
    if global.json {
        let stats = client.stats()?;
        super::print_json(&Report {
            dir: &dir,
            mounted: report(&mounted, stats),
        })?;
    }
    Ok(())
}

fn report(mounted: &Mounted, stats: peel_fs::Stats) -> MountReport<'_> {
    MountReport {
        id: &mounted.id,
        manifest_digest: mounted.manifest_digest,
        layers: &mounted.layers,
        resolve_s: mounted.resolve.as_secs_f64(),
        mount_s: mounted.mount.as_secs_f64(),
        requests: stats.requests.saturating_sub(mounted.stats_before.requests),
        bytes: stats.bytes.saturating_sub(mounted.stats_before.bytes),
    }
}

/// Moves a detached mount to a directory of this mount namespace.
fn attach(mount: BorrowedFd<'_>, dir: &Path) -> anyhow::Result<()> {
    move_mount(mount, "", CWD, dir, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
        .with_context(|| format!("{}: cannot be mounted on", dir.display()))
}
