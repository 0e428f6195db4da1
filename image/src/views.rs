//! The two views of a lazy layer compared: what its table of contents says, and what its tar stream says.
//!
//! A lazy mount shows the first, a tool that unpacks the second. Nothing in the formats makes them agree: whoever writes a layer
//! can put one set of names and modes (or other offsets in the blob) into the table, and another into the stream that the
//! DiffID names. So a right DiffID alone says nothing about what a lazy mount showed; only this comparison does.
//! Called by the check of whole layers, with the index of the TOC and the one that [`crate::tar::index_tar`] gives.
//!
//! What counts is what a mount shows: names, types, owners, modes, times, attributes, contents, link targets, and what of lower layers
//! shows. Files of the format itself (the TOC entry, landmarks) are left out. Times below a second count only where the table has
//! them, because eStargz rounds them; a time that no table can tell may be cut ([`time::may_tell`]). Where the entries are not
//! one by one the same, both views are run as a layer over one that has something at every path, and the trees are compared: a
//! tar stream may hold entries that later ones replace, of which the table says only what is left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Bound;

use crate::estargz::{is_reserved, time};
use crate::layer::{Entry, EntryKind, FileContent, LayerIndex, Metadata};
use crate::path::EntryPath;
use crate::tree::{InodeId, InodeKind, Special, Tree, special};
use peel_hash::Digest;

/// Name of what lower layers have in the directories of the comparison.
const PROBE: &[u8] = b".wh-peel-probe";

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
    let reserved: BTreeSet<&EntryPath> = listed
        .iter()
        .map(|entry| &entry.path)
        .filter(|path| is_reserved(path.as_bytes()))
        .collect();
    // A reader leaves the format's own files out of the index, and only those of its format.
    let unpacked: Vec<&Entry> = tar
        .entries
        .iter()
        .filter(|entry| !is_reserved(entry.path.as_bytes()) || reserved.contains(&entry.path))
        .collect();
    match (Views { fine }).compare(&listed, &unpacked) {
        Some(outcome) => outcome,
        None => Views { fine }.compare_trees(toc, tar),
    }
}

struct Views {
    /// Whether times below a second count.
    fine: bool,
}

impl Views {
    /// Compares entry by entry; `None` where that does not tell.
    fn compare(&self, toc: &[&Entry], tar: &[&Entry]) -> Option<Result<(), Difference>> {
        let same_order = toc.len() == tar.len() && toc.iter().zip(tar).all(|(toc, tar)| toc.path == tar.path);
        if same_order {
            let mut pairs = toc.iter().zip(tar);
            return Some(pairs.try_for_each(|(toc, tar)| self.entry(toc, tar)));
        }
        let (listed, unpacked) = (by_path(toc)?, by_path(tar)?);
        if !self.links_repeat(&listed) || !self.links_repeat(&unpacked) {
            return None;
        }
        for (path, entry) in &listed {
            match unpacked.get(path) {
                None => return Some(Err(differ(entry, "it is not in the tar stream"))),
                Some(tar) => {
                    if let Err(difference) = self.entry(entry, tar) {
                        return Some(Err(difference));
                    }
                }
            }
        }
        Some(
            match unpacked.iter().find(|(path, _)| !listed.contains_key(*path)) {
                Some((_, entry)) => Err(differ(entry, "it is not in the table of contents")),
                None => Ok(()),
            },
        )
    }

    /// Compares what both leave, over a layer that has something wherever one of them could hide it.
    fn compare_trees(&self, toc: &LayerIndex, tar: &LayerIndex) -> Result<(), Difference> {
        let lower = probes(&[toc, tar]);
        let root = |what| Difference {
            path: EntryPath::root(),
            what,
        };
        match (Tree::merge_of([&lower, toc]), Tree::merge_of([&lower, tar])) {
            (Ok(listed), Ok(unpacked)) => self.trees(&listed, &unpacked),
            // They end where the limit is reached, whatever comes after it.
            (Err(listed), Err(unpacked)) if listed.is_limit() && unpacked.is_limit() => {
                Err(root("both are too large to be compared"))
            }
            (Err(listed), Err(unpacked)) if listed == unpacked => Ok(()),
            (Err(_), Err(_)) => Err(root("both are no trees, for different reasons")),
            (Err(_), Ok(_)) => Err(root("the table of contents is no tree")),
            (Ok(_), Err(_)) => Err(root("the tar stream is no tree")),
        }
    }

    /// Whether every hard link says what its target says: else their order decides.
    fn links_repeat(&self, entries: &BTreeMap<&[u8], &Entry>) -> bool {
        entries.values().all(|entry| match &entry.kind {
            EntryKind::Hardlink(target) => entries
                .get(target.as_bytes())
                .is_none_or(|target| self.metadata(&entry.metadata, &target.metadata).is_none()),
            _ => true,
        })
    }

    fn trees(&self, listed: &Tree, unpacked: &Tree) -> Result<(), Difference> {
        let mut pending = vec![(EntryPath::root(), InodeId::ROOT, InodeId::ROOT)];
        // Hard links are the same inode in both.
        let (mut there, mut back) = (HashMap::new(), HashMap::new());
        while let Some((path, left, right)) = pending.pop() {
            let at = |what| {
                Err(Difference {
                    path: path.clone(),
                    what,
                })
            };
            if *there.entry(left).or_insert(right) != right || *back.entry(right).or_insert(left) != left {
                return at("what it is a hard link to");
            }
            let (Some(one), Some(other)) = (listed.inode(left), unpacked.inode(right)) else {
                return at("the inode");
            };
            if let Some(what) = self.metadata(&one.metadata, &other.metadata) {
                return at(what);
            }
            match (&one.kind, &other.kind) {
                (InodeKind::Directory(names), InodeKind::Directory(others)) => {
                    let child = |name: &[u8]| path.join(name).unwrap_or_else(|_| path.clone());
                    for (name, left) in names {
                        match others.get(name) {
                            Some(right) => pending.push((child(name), *left, *right)),
                            None if **name == *PROBE => return at("what of lower layers it hides"),
                            None => {
                                let what = "it is not in the tar stream";
                                return Err(Difference {
                                    path: child(name),
                                    what,
                                });
                            }
                        }
                    }
                    match others.keys().find(|name| !names.contains_key(*name)) {
                        None => {}
                        Some(name) if **name == *PROBE => return at("what of lower layers it hides"),
                        Some(name) => {
                            let what = "it is not in the table of contents";
                            return Err(Difference {
                                path: child(name),
                                what,
                            });
                        }
                    }
                }
                (InodeKind::Regular(one), InodeKind::Regular(other)) if one.size != other.size => {
                    return at("the size");
                }
                (InodeKind::Regular(one), InodeKind::Regular(other)) if one.object != other.object => {
                    return at("the content");
                }
                (InodeKind::Regular(_), InodeKind::Regular(_)) => {}
                (InodeKind::Symlink(one), InodeKind::Symlink(other)) if one != other => {
                    return at("the target of the symbolic link");
                }
                (one, other) if std::mem::discriminant(one) != std::mem::discriminant(other) => {
                    return at("the type");
                }
                (one, other) if one != other => return at("the device number"),
                _ => {}
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
fn by_path<'a>(entries: &[&'a Entry]) -> Option<BTreeMap<&'a [u8], &'a Entry>> {
    let mut map = BTreeMap::new();
    for entry in entries {
        if map.insert(entry.path.as_bytes(), *entry).is_some() {
            return None;
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
        if next.is_some_and(|(path, _)| path.starts_with(&below)) {
            return None;
        }
    }
    Some(map)
}

/// A layer that has a directory with a file in it at every path that the views name or hide, and a file where only a hard link
/// leads.
fn probes(views: &[&LayerIndex]) -> LayerIndex {
    let entries = || views.iter().flat_map(|view| &view.entries);
    let named = entries().filter_map(
        |entry| match (special(entry.path.as_bytes()), entry.path.parent()) {
            (Special::Whiteout(name), Some(parent)) => parent.join(name).ok(),
            (Special::Opaque, parent) => parent,
            _ => Some(entry.path.clone()),
        },
    );
    let named: BTreeSet<EntryPath> = named.filter(|path| !path.is_root()).collect();
    let targets = entries().filter_map(|entry| match &entry.kind {
        EntryKind::Hardlink(target) => Some(target),
        _ => None,
    });
    let is_parent = |path: &EntryPath| {
        let below = path.join(b"\0").or_else(|_| path.join(b"\x01"));
        below.is_ok_and(|below| {
            let next = named.range(below..).next();
            next.is_some_and(|next| {
                next.as_bytes()
                    .strip_prefix(path.as_bytes())
                    .is_some_and(|rest| rest.starts_with(b"/"))
            })
        })
    };
    let free: BTreeSet<&EntryPath> = targets
        .filter(|target| !target.is_root() && !named.contains(*target) && !is_parent(target))
        .collect();
    let file = |path| Entry {
        path,
        metadata: Metadata::default(),
        kind: EntryKind::Regular(FileContent {
            size: 1,
            digest: Some(Digest::of(PROBE)),
            chunks: Vec::new(),
        }),
    };
    let mut lower: Vec<Entry> = Vec::with_capacity(named.len() * 2 + free.len());
    for path in &named {
        lower.push(Entry {
            path: path.clone(),
            metadata: Metadata::default(),
            kind: EntryKind::Directory,
        });
        lower.extend(path.join(PROBE).ok().map(file));
    }
    lower.extend(free.into_iter().cloned().map(file));
    LayerIndex {
        entries: lower,
        prefetch_end: None,
    }
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
        let twice = layer(&[directory.clone(), file("b", b"1"), file("b", b"2")]);
        let once = layer(&[file("b", b"2"), entry("a", EntryKind::Directory)]);
        assert_eq!(compare(&once, &twice), Ok(()));
        let other = layer(&[directory.clone(), file("b", b"2"), file("b", b"1")]);
        assert_eq!(compare(&once, &other).unwrap_err().what, "the content");
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

    #[test]
    fn views_that_reach_a_limit_are_not_the_same() {
        // Each alone has fewer directories than a layer may imply, both together have more.
        let deep = |first: &str| {
            let paths = (0..65).map(|number| format!("{first}{number}{}", "/d".repeat(2000)));
            paths.map(|path| file(&path, b"x")).collect::<Vec<Entry>>()
        };
        let toc = layer(&[vec![file("a", b"x")], deep("t")].concat());
        let tar = layer(&[vec![file("a", b"x"), file("a", b"x")], deep("u")].concat());
        for view in [&toc, &tar] {
            assert!(Tree::merge_of([view]).is_ok());
        }
        let difference = compare(&toc, &tar).unwrap_err();
        assert_eq!(difference.what, "both are too large to be compared");
        assert!(difference.path.is_root());
        // What makes no tree of both is no difference.
        let below = [file("f", b"x"), file("f/x", b"x"), file("a", b"x")];
        assert_eq!(
            compare(&layer(&below), &layer(&[&below[..], &below[2..]].concat())),
            Ok(())
        );
    }

    #[test]
    fn a_stream_that_replaces_entries_is_compared_by_what_it_leaves() {
        let path = |name: &str| EntryPath::clean(name.as_bytes()).unwrap();
        let link = |name: &str, target: &str| entry(name, EntryKind::Hardlink(path(target)));
        let dir = |name: &str| entry(name, EntryKind::Directory);
        let symlink = |name: &str, target: &[u8]| entry(name, EntryKind::Symlink(target.into()));
        let stream = layer(&[
            file("a", b"one"),
            link("l", "a"),
            link("m", "l"),
            file("a", b"two!"),
        ]);
        for (toc, what) in [
            (vec![file("l", b"one"), link("m", "l"), file("a", b"two!")], None),
            (
                vec![link("m", "l"), link("l", "a"), file("a", b"two!")],
                Some("the size"),
            ),
            (
                vec![file("l", b"one"), file("m", b"one"), file("a", b"two!")],
                Some("what it is a hard link to"),
            ),
            (
                vec![file("m", b"one"), file("a", b"two!")],
                Some("what it is a hard link to"),
            ),
        ] {
            let found = compare(&layer(&toc), &stream)
                .err()
                .map(|difference| difference.what);
            assert_eq!(found, what, "{toc:?}");
        }
        // What lower layers have below a directory that took the place of a file.
        let stream = layer(&[file("d", b"x"), dir("d"), file("d/a", b"a")]);
        let toc = layer(&[dir("d"), file("d/a", b"a")]);
        assert_eq!(
            compare(&toc, &stream).unwrap_err().what,
            "what of lower layers it hides"
        );
        let toc = layer(&[dir("d"), file("d/a", b"a"), file(".wh.d", b"")]);
        assert_eq!(compare(&toc, &stream), Ok(()));
        let toc = layer(&[dir("d"), file("d/a", b"a"), file("d/.wh..wh..opq", b"")]);
        assert_eq!(compare(&toc, &stream), Ok(()));
        // By way of a symbolic link.
        let stream = layer(&[dir("real"), symlink("s", b"real"), file("s/x", b"x")]);
        let toc = layer(&[dir("real"), symlink("s", b"real"), file("real/x", b"x")]);
        assert_eq!(compare(&toc, &stream), Ok(()));
        // Links to lower layers.
        let stream = layer(&[link("l", "low/file"), file("b", b"1"), file("b", b"2")]);
        let toc = layer(&[file("b", b"2"), link("l", "low/file")]);
        assert_eq!(compare(&toc, &stream), Ok(()));
        let toc = layer(&[file("b", b"2"), link("l", "low/other")]);
        assert!(compare(&toc, &stream).is_err());
    }
}
