//! How much the store holds, for status displays. Walks directories; not for hot paths.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::Store;
use crate::error::{Context, Error};

/// Files of one kind.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Count {
    /// How many.
    pub files: u64,
    /// Sum of their lengths in bytes.
    pub bytes: u64,
    /// Bytes that they occupy on the disk; holes take none.
    pub disk_bytes: u64,
}

impl Count {
    const fn plus(self, other: Self) -> Self {
        Self {
            files: self.files + other.files,
            bytes: self.bytes + other.bytes,
            disk_bytes: self.disk_bytes + other.disk_bytes,
        }
    }
}

/// What the store holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Complete objects, and pending ones.
    pub objects: Count,
    /// Data files of partial objects.
    pub partials: Count,
    /// EROFS images.
    pub erofs_images: Count,
    /// Image records; as many images can be mounted offline when their content is complete.
    pub images: Count,
    /// Layer indexes.
    pub layers: Count,
}

impl Store {
    /// Counts files and bytes. Files that come or go meanwhile may or may not be counted.
    pub fn usage(&self) -> Result<Usage, Error> {
        let root = self.root();
        Ok(Usage {
            objects: count(&root.join("objects"), "")?.plus(count(&root.join("pending"), "")?),
            partials: count(&root.join("partial"), ".data")?,
            erofs_images: count(&root.join("erofs"), "")?,
            images: count(&root.join("records/images"), "")?,
            layers: count(&root.join("records/layers"), "")?,
        })
    }
}

/// Counts the files below a directory and its direct children.
fn count(directory: &Path, suffix: &str) -> Result<Count, Error> {
    let mut total = Count::default();
    for entry in fs::read_dir(directory).context("list", directory)? {
        let entry = entry.context("list", directory)?;
        let path = entry.path();
        let Ok(metadata) = entry.metadata() else {
            continue;
        };
        if metadata.is_dir() {
            let below = count(&path, suffix)?;
            total = total.plus(below);
        } else if entry.file_name().to_string_lossy().ends_with(suffix) {
            total.files += 1;
            total.bytes += metadata.len();
            total.disk_bytes += metadata.blocks() * 512;
        }
    }
    Ok(total)
}
