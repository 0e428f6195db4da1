//! Access records in files: [`Profile`], whose lines ctr-remote reads and writes too.

use std::fs::File;
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};

use anyhow::Context;
use peel_image::Digest;
use peel_image::profile::{LayerRef, Profile};

use peel_convert::plan::Plan;

/// Reads a record.
pub(super) fn read(path: &Path) -> anyhow::Result<Profile> {
    let file = File::open(path).with_context(|| format!("{}: cannot be read", path.display()))?;
    Profile::read(BufReader::new(file)).with_context(|| path.display().to_string())
}

/// Reads the records of several runs as one.
pub(super) fn read_all(paths: &[PathBuf]) -> anyhow::Result<Profile> {
    let runs = paths
        .iter()
        .map(|path| read(path))
        .collect::<anyhow::Result<Vec<_>>>()?;
    Ok(Profile::merge(&runs))
}

/// Writes what the plan was made from, each file with the layer that it was found in.
pub(super) fn write(path: &Path, manifest: Digest, profile: &Profile, plan: &Plan) -> anyhow::Result<()> {
    let accesses = plan.files.iter().filter_map(|file| {
        let mut access = profile.accesses.get(file.input)?.clone();
        access.path = file.path.clone();
        access.layer = Some(LayerRef {
            manifest,
            index: u32::try_from(file.layer).ok(),
        });
        Some(access)
    });
    let found = Profile {
        accesses: accesses.collect(),
    };
    let write = || -> anyhow::Result<()> { Ok(found.write(BufWriter::new(File::create(path)?))?) };
    write().with_context(|| format!("{}: cannot be written", path.display()))
}
