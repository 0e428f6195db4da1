//! The metadata of a node of the merge, which hard links change. Called by [`super::merge`].
//!
//! Unpackers apply the header of a hard link to the inode that it names: chown(2), the attributes of the header, chmod(2), the
//! time. Most links repeat what their target has, so nothing is copied before one says something else.

use crate::layer::{Metadata, SYMLINK_MODE};

/// Dropped by every chown(2) of a file that is no directory, unless the header brings it again.
const CAPABILITY: &[u8] = b"security.capability";

/// Metadata as an entry gave it, or as links made it.
#[derive(Debug)]
pub(super) enum Inherited<'a> {
    /// That of an entry.
    Given(&'a Metadata),
    /// Changed since.
    Changed(Box<Metadata>),
}

impl Inherited<'_> {
    pub(super) fn get(&self) -> &Metadata {
        match self {
            Self::Given(metadata) => metadata,
            Self::Changed(metadata) => metadata,
        }
    }

    /// Applies the header of a link. Costs no more than the header is long, but for the first one that changes anything.
    pub(super) fn apply(&mut self, link: &Metadata, is_symlink: bool) {
        let mode = if is_symlink { SYMLINK_MODE } else { link.mode };
        let current = self.get();
        let same_inode = (current.mode, current.uid, current.gid) == (mode, link.uid, link.gid)
            && (current.mtime, current.mtime_nanoseconds) == (link.mtime, link.mtime_nanoseconds);
        let has = |name: &[u8], value: &[u8]| current.xattrs.get(name).is_some_and(|have| **have == *value);
        let same_xattrs = link.xattrs.iter().all(|(name, value)| has(name, value))
            && (link.xattrs.contains_key(CAPABILITY) || !current.xattrs.contains_key(CAPABILITY));
        if same_inode && same_xattrs {
            return;
        }
        if let Self::Given(metadata) = *self {
            *self = Self::Changed(Box::new(metadata.clone()));
        }
        let Self::Changed(changed) = self else {
            return;
        };
        changed.mode = mode;
        (changed.uid, changed.gid) = (link.uid, link.gid);
        (changed.mtime, changed.mtime_nanoseconds) = (link.mtime, link.mtime_nanoseconds);
        changed.xattrs.remove(CAPABILITY);
        let xattrs = link.xattrs.iter();
        changed
            .xattrs
            .extend(xattrs.map(|(name, value)| (name.clone(), value.clone())));
    }
}
