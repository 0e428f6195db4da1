//! The two views of a lazy layer compared: what its table of contents says, and what its tar stream says.
//!
//! A lazy mount shows the first, a tool that unpacks the second. Nothing in the formats makes them agree: whoever writes a layer
//! can put one set of names and modes (or other offsets in the blob) into the table, and another into the stream that the
//! DiffID names. So a right DiffID alone says nothing about what a lazy mount showed; only this comparison does.
//! Called by the check of whole layers, with the index of the TOC and the one that [`crate::tar::index_tar`] gives.
//!
//! What counts is what a mount shows: names, types, owners, modes, times, attributes, contents, link targets. Files of
//! the format itself (the TOC entry, landmarks) are left out. Times below a second count only where the table has them,
//! because eStargz drops them; a time that no table can tell may be cut ([`time::may_tell`]). The entries may stand in another order where order means nothing.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::estargz::{is_reserved, time};
use crate::layer::{Entry, EntryKind, LayerIndex, Metadata};
use crate::path::EntryPath;

/// The first difference between the two views of a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its table of contents and its tar stream disagree about {path}: {what}")]
pub struct Difference {
    /// Where they differ.
    pub path: EntryPath,
    /// How they differ, in a few words.
    pub what: &'static str,
}

/// `Ok` where both views are the same tree. `toc` and `tar` must be indexes of the same layer.
pub fn compare(toc: &LayerIndex, tar: &LayerIndex) -> Result<(), Difference> {
    let fine = toc
        .entries
        .iter()
        .any(|entry| entry.metadata.mtime_nanoseconds != 0);
    let listed: Vec<&Entry> = toc.entries.iter().collect();
    let reserved: Vec<&EntryPath> = listed
        .iter()
        .map(|entry| &entry.path)
        .filter(|path| is_reserved(path.as_bytes()))
        .collect();
    // A reader leaves the format's own files out of the index, and only those of its format.
    let unpacked: Vec<&Entry> = tar
        .entries
        .iter()
        .filter(|entry| !is_reserved(entry.path.as_bytes()) || reserved.contains(&&entry.path))
        .collect();
    Views { fine }.compare(&listed, &unpacked)
}

struct Views {
    /// Whether times below a second count.
    fine: bool,
}

impl Views {
    fn compare(&self, toc: &[&Entry], tar: &[&Entry]) -> Result<(), Difference> {
        let same_order = toc.len() == tar.len() && toc.iter().zip(tar).all(|(toc, tar)| toc.path == tar.path);
        if same_order {
            return toc
                .iter()
                .zip(tar)
                .try_for_each(|(toc, tar)| self.entry(toc, tar));
        }
        let (listed, unpacked) = (by_path(toc)?, by_path(tar)?);
        self.links_repeat(&listed)?;
        self.links_repeat(&unpacked)?;
        for (path, entry) in &listed {
            match unpacked.get(path) {
                None => return Err(differ(entry, "it is not in the tar stream")),
                Some(tar) => self.entry(entry, tar)?,
            }
        }
        match unpacked.iter().find(|(path, _)| !listed.contains_key(*path)) {
            Some((_, entry)) => Err(differ(entry, "it is not in the table of contents")),
            None => Ok(()),
        }
    }

    /// Whether every hard link says what its target says: else their order decides.
    fn links_repeat(&self, entries: &BTreeMap<&[u8], &Entry>) -> Result<(), Difference> {
        for entry in entries.values() {
            if let EntryKind::Hardlink(target) = &entry.kind
                && let Some(target) = entries.get(target.as_bytes())
                && self.metadata(&entry.metadata, &target.metadata).is_some()
            {
                return Err(differ(
                    entry,
                    "it changes the file that it is a hard link to, in another order",
                ));
            }
        }
        Ok(())
    }

    fn entry(&self, toc: &Entry, tar: &Entry) -> Result<(), Difference> {
        match (&toc.kind, &tar.kind) {
            (EntryKind::Regular(listed), EntryKind::Regular(unpacked)) => {
                if listed.size != unpacked.size {
                    return Err(differ(toc, "the size"));
                }
                if listed.digest != unpacked.digest {
                    return Err(differ(toc, "the content"));
                }
            }
            (EntryKind::Symlink(listed), EntryKind::Symlink(unpacked)) => {
                if listed != unpacked {
                    return Err(differ(toc, "the target of the symbolic link"));
                }
            }
            // What a hard link says of owner and mode is given to its target.
            (EntryKind::Hardlink(listed), EntryKind::Hardlink(unpacked)) => {
                if listed != unpacked {
                    return Err(differ(toc, "the target of the hard link"));
                }
            }
            (EntryKind::CharDevice(listed), EntryKind::CharDevice(unpacked))
            | (EntryKind::BlockDevice(listed), EntryKind::BlockDevice(unpacked)) => {
                if listed != unpacked {
                    return Err(differ(toc, "the device number"));
                }
            }
            (EntryKind::Directory, EntryKind::Directory) | (EntryKind::Fifo, EntryKind::Fifo) => {}
            _ => return Err(differ(toc, "the type")),
        }
        match self.metadata(&toc.metadata, &tar.metadata) {
            Some(what) => Err(differ(toc, what)),
            None => Ok(()),
        }
    }

    fn metadata(&self, toc: &Metadata, tar: &Metadata) -> Option<&'static str> {
        if toc.mode != tar.mode {
            Some("the mode")
        } else if (toc.uid, toc.gid) != (tar.uid, tar.gid) {
            Some("the owner")
        } else if !time::may_tell(
            (toc.mtime, toc.mtime_nanoseconds),
            (tar.mtime, tar.mtime_nanoseconds),
            self.fine,
        ) {
            Some("the modification time")
        } else if toc.xattrs != tar.xattrs {
            Some("the extended attributes")
        } else {
            None
        }
    }
}

/// The entries by path, where their order means nothing: every path once, and every parent that is there a directory.
fn by_path<'a>(entries: &[&'a Entry]) -> Result<BTreeMap<&'a [u8], &'a Entry>, Difference> {
    let mut map = BTreeMap::new();
    for entry in entries {
        if map.insert(entry.path.as_bytes(), *entry).is_some() {
            return Err(differ(entry, "it stands there more than once, in another order"));
        }
    }
    // What lies below a path stands together in the map. To look at every parent of every path would take its length squared.
    let leaves = entries
        .iter()
        .filter(|entry| !matches!(entry.kind, EntryKind::Directory));
    for leaf in leaves {
        let below = [leaf.path.as_bytes(), b"/"].concat();
        let from = (Bound::Included(below.as_slice()), Bound::Unbounded);
        let next = map.range::<[u8], _>(from).next();
        if let Some((_, entry)) = next.filter(|(path, _)| path.starts_with(&below)) {
            return Err(differ(entry, "it lies below a file, in another order"));
        }
    }
    Ok(map)
}

fn differ(entry: &Entry, what: &'static str) -> Difference {
    Difference {
        path: entry.path.clone(),
        what,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Digest;
    use crate::layer::{Device, FileContent};

    fn entry(path: &str, kind: EntryKind) -> Entry {
        Entry {
            path: EntryPath::clean(path.as_bytes()).unwrap(),
            metadata: Metadata {
                mode: 0o644,
                mtime: 7,
                ..Metadata::default()
            },
            kind,
        }
    }

    fn file(path: &str, content: &[u8]) -> Entry {
        let content = FileContent {
            size: content.len() as u64,
            digest: Some(Digest::of(content)),
            chunks: Vec::new(),
        };
        entry(path, EntryKind::Regular(content))
    }

    fn layer(entries: &[Entry]) -> LayerIndex {
        LayerIndex {
            entries: entries.to_vec(),
            prefetch_end: None,
        }
    }

    fn device(major: u32) -> EntryKind {
        EntryKind::CharDevice(Device { major, minor: 3 })
    }

    #[test]
    fn differences_are_found() {
        let with = |change: fn(&mut Metadata)| {
            let mut entry = file("a", b"x");
            change(&mut entry.metadata);
            entry
        };
        let link = |target: &str| {
            entry(
                "a",
                EntryKind::Hardlink(EntryPath::clean(target.as_bytes()).unwrap()),
            )
        };
        let symlink = |target: &[u8]| entry("a", EntryKind::Symlink(target.into()));
        for (toc, tar, what) in [
            (file("a", b"x"), file("a", b"xx"), "the size"),
            (file("a", b"x"), file("a", b"y"), "the content"),
            (file("a", b"x"), entry("a", EntryKind::Directory), "the type"),
            (link("b"), link("c"), "the target of the hard link"),
            (
                link("b"),
                Entry {
                    metadata: Metadata::default(),
                    ..link("b")
                },
                "the mode",
            ),
            (symlink(b"b"), symlink(b"./b"), "the target of the symbolic link"),
            (entry("a", device(1)), entry("a", device(2)), "the device number"),
            (file("a", b"x"), with(|m| m.mode = 0o4644), "the mode"),
            (file("a", b"x"), with(|m| m.uid = 1), "the owner"),
            (file("a", b"x"), with(|m| m.gid = 1), "the owner"),
            (file("a", b"x"), with(|m| m.mtime = 8), "the modification time"),
            (
                with(|m| m.mtime_nanoseconds = 1),
                with(|m| m.mtime_nanoseconds = 2),
                "the modification time",
            ),
            (
                with(|m| drop(m.xattrs.insert(b"user.x"[..].into(), b"1"[..].into()))),
                file("a", b"x"),
                "the extended attributes",
            ),
            (file("a", b"x"), file("b", b"x"), "it is not in the tar stream"),
        ] {
            let difference = compare(&layer(&[toc]), &layer(&[tar])).unwrap_err();
            assert_eq!(difference.what, what);
            assert_eq!(difference.path.as_bytes(), b"a");
        }
        let more = layer(&[file("a", b"x"), file(".wh.b", b"")]);
        let difference = compare(&layer(&[file("a", b"x")]), &more).unwrap_err();
        assert_eq!(difference.what, "it is not in the table of contents");
    }

    #[test]
    fn what_means_nothing_is_no_difference() {
        let (a, b) = (file("a", b"x"), file("b", b"y"));
        let mut late = a.clone();
        late.metadata.mtime_nanoseconds = 5;
        let linked = entry("l", EntryKind::Hardlink(EntryPath::clean(b"a").unwrap()));
        let mut tar = vec![
            file(".no.prefetch.landmark", b"\x0f"),
            b.clone(),
            late,
            linked.clone(),
        ];
        tar.push(file("stargz.index.json", b"{}"));
        assert_eq!(compare(&layer(&[a.clone(), b, linked]), &layer(&tar)), Ok(()));
        // The names of the format mean something only in the root directory.
        let deep = layer(&[a.clone(), file("d/stargz.index.json", b"{}")]);
        assert!(compare(&layer(&[a]), &deep).is_err());
    }

    #[test]
    fn an_order_that_matters_must_be_the_same() {
        let link = || entry("a", EntryKind::Symlink(b"/etc"[..].into()));
        let directory = entry("a", EntryKind::Directory);
        let below = file("a/passwd", b"x");
        let toc = layer(&[directory.clone(), below.clone(), link()]);
        let tar = layer(&[link(), below.clone()]);
        let deep = file("a/not/listed", b"x");
        assert!(compare(&layer(&[link(), deep.clone()]), &layer(&[deep, link()])).is_err());
        assert!(compare(&toc, &tar).is_err());
        assert!(compare(&tar, &toc).is_err());
        assert!(compare(&tar, &layer(&[below, link()])).is_err());
        assert_eq!(compare(&toc, &toc), Ok(()));
        let twice = layer(&[directory, file("b", b"1"), file("b", b"2")]);
        let once = layer(&[file("b", b"2"), entry("a", EntryKind::Directory)]);
        assert!(compare(&twice, &once).is_err());
        // The last link decides about the mode.
        let (a, mut strict) = (
            file("a", b"x"),
            entry("l", EntryKind::Hardlink(EntryPath::clean(b"a").unwrap())),
        );
        let mut loose = Entry {
            path: EntryPath::clean(b"m").unwrap(),
            ..strict.clone()
        };
        strict.metadata.mode = 0o600;
        loose.metadata.mode = 0o4755;
        let one = layer(&[a.clone(), strict.clone(), loose.clone()]);
        let other = layer(&[a, loose, strict]);
        assert_eq!(compare(&one, &one), Ok(()));
        assert!(compare(&one, &other).is_err());
    }
}
