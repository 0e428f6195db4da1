//! Whether a layer needs to be run entry by entry to know what it leaves: it does where an entry takes the place of an earlier one,
//! or leads through one that is no directory. Nearly all layers do neither, and then each entry stands for itself.

use std::collections::HashSet;
use std::hash::{BuildHasher, DefaultHasher, Hasher, RandomState};

use super::names::Kind;
use peel_image::path::components;
use peel_image::tree::IMPLIED_MAX;

/// Two hashes with keys of their own: no two paths of a layer have both in common.
type Hashes = [u64; 2];

/// The paths so far, 16 bytes for each, and for each directory once more.
#[derive(Default)]
pub(super) struct Seen {
    keys: [RandomState; 2],
    entries: HashSet<Hashes>,
    /// Directories, with and without an entry of their own.
    directories: HashSet<Hashes>,
    /// The directory of the entry before, which is known to be fine.
    parent: Vec<u8>,
}

impl Seen {
    /// Takes the next entry; `false` if it stands for itself no longer, or makes an earlier one do so, or if the layer has more
    /// directories without entries than the run takes.
    pub(super) fn insert(&mut self, path: &[u8], kind: Kind<'_>) -> bool {
        let hashes = self.hash(path);
        if !self.entries.insert(hashes) {
            return false;
        }
        match kind {
            Kind::Directory { .. } => {
                self.directories.insert(hashes);
            }
            // Something lies below it already.
            _ if self.directories.contains(&hashes) => return false,
            Kind::Hardlink(target) if !self.is_direct(target) => return false,
            _ => {}
        }
        let parent = parent_of(path);
        if parent == self.parent {
            return true;
        }
        self.parent.clear();
        self.parent.extend_from_slice(parent);
        self.add_parents(path)
    }

    /// Notes the directories that hold `path`; `false` if one of them is something else.
    fn add_parents(&mut self, path: &[u8]) -> bool {
        let most = usize::try_from(IMPLIED_MAX).unwrap_or(usize::MAX);
        for hashes in self.above(path).into_iter().rev() {
            if !self.directories.insert(hashes) {
                // So are those above it.
                return true;
            }
            if self.entries.contains(&hashes)
                || self.directories.len() > self.entries.len().saturating_add(most)
            {
                return false;
            }
        }
        true
    }

    /// Whether nothing above `path` is known to be something else than a directory.
    fn is_direct(&self, path: &[u8]) -> bool {
        for hashes in self.above(path).into_iter().rev() {
            if self.directories.contains(&hashes) {
                return true;
            }
            if self.entries.contains(&hashes) {
                return false;
            }
        }
        true
    }

    fn hash(&self, path: &[u8]) -> Hashes {
        let mut hashers = self.hashers();
        for name in components(path) {
            add(&mut hashers, name);
        }
        hashers.map(|hasher| hasher.finish())
    }

    /// The directories above `path`, from the top down, without the root. Takes the length of the path once, not its square.
    fn above(&self, path: &[u8]) -> Vec<Hashes> {
        let mut hashers = self.hashers();
        let names = components(parent_of(path)).map(|name| {
            add(&mut hashers, name);
            hashers.each_ref().map(|hasher| hasher.clone().finish())
        });
        names.collect()
    }

    fn hashers(&self) -> [DefaultHasher; 2] {
        self.keys.each_ref().map(BuildHasher::build_hasher)
    }
}

/// Goes on to one more component, which ends somewhere.
fn add(hashers: &mut [DefaultHasher; 2], name: &[u8]) {
    for hasher in hashers {
        hasher.write(name);
        hasher.write(b"/");
    }
}

/// The clean path of the directory that holds a clean path; empty for the root.
pub(super) fn parent_of(path: &[u8]) -> &[u8] {
    let slash = path.iter().rposition(|byte| *byte == b'/');
    slash.and_then(|slash| path.get(..slash)).unwrap_or_default()
}

/// Whether a clean path lies at or below another one.
pub(super) fn is_within(path: &[u8], top: &[u8]) -> bool {
    match path.strip_prefix(top) {
        Some(rest) => top.is_empty() || rest.is_empty() || rest.starts_with(b"/"),
        None => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Kind<'_> = Kind::Other;
    const DIR: Kind<'_> = Kind::Directory { xattrs: 0 };

    #[test]
    fn what_depends_on_the_order_is_found() {
        for (entries, expected) in [
            (&[("", DIR), ("a", DIR), ("a/b", FILE), ("c", FILE)][..], true),
            (&[("a/b/c", FILE), ("a/b", DIR), ("a", DIR), ("a/d", FILE)], true),
            (
                &[
                    ("a/b", FILE),
                    ("c", Kind::Hardlink(b"a/b")),
                    ("d", Kind::Hardlink(b"x/y")),
                ],
                true,
            ),
            (&[("a", FILE), ("a", FILE)], false),
            (&[("a", DIR), ("a", DIR)], false),
            (&[("", DIR), ("", DIR)], false),
            (&[("a/b/c", FILE), ("a", FILE)], false),
            (&[("a/b/c", FILE), ("a/b", Kind::Symlink(b"x"))], false),
            (&[("s", Kind::Symlink(b"x")), ("s/a", FILE)], false),
            (&[("s", Kind::Symlink(b"x")), ("a", FILE), ("s/b/c", FILE)], false),
            (&[("a/b", FILE), ("a/b/c/d", FILE)], false),
            (
                &[
                    ("d/x", FILE),
                    ("s", Kind::Symlink(b"d")),
                    ("l", Kind::Hardlink(b"s/x")),
                ],
                false,
            ),
        ] {
            let mut seen = Seen::default();
            let mut all = true;
            for (path, kind) in entries {
                all &= seen.insert(path.as_bytes(), *kind);
            }
            assert_eq!(all, expected, "{entries:?}");
        }
    }
    #[test]
    fn too_many_directories_without_entries_are_left_to_the_run() {
        let deep = |number: usize| format!("{number}{}", "/d".repeat(1999));
        let mut seen = Seen::default();
        let taken = (0..200).take_while(|number| seen.insert(deep(*number).as_bytes(), FILE));
        assert_eq!(taken.count(), 125);
    }
}
