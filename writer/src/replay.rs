//! Runs a layer entry by entry, as an unpacker does, to know what it leaves: which entry each name shows in the end. Called by
//! [`super::normal`] for the few layers in which that is not every entry by itself.
//!
//! The rules are those of [`peel_image::tree`], which are containerd's, for one layer by itself: an entry replaces what has its name,
//! children included, unless both are directories; a hard link is one more name of what its target is at that time; symbolic
//! links above an entry are followed, inside the tree. Nothing here recurses, and a layer that takes more than [`Limits`] is refused.

use std::collections::BTreeMap;

use super::names::{Kind, Names};
use peel_image::estargz::index::RECORDS_MAX;
use peel_image::path::{PATH_MAX, components};
use peel_image::tree::{IMPLIED_MAX, STEPS_MAX, SYMLINKS_MAX, Special, special};

const ROOT: u32 = 0;
/// Most bytes of all paths that a layer leaves: ten times as many as those of large layers. A short entry below a symbolic link can
/// have a path of 4 KiB.
const PATHS_MAX: usize = 1 << 30;

/// What a run may take.
#[derive(Debug, Clone, Copy)]
struct Limits {
    /// See [`STEPS_MAX`].
    steps: u64,
    /// See [`IMPLIED_MAX`].
    implied: u32,
    /// See [`PATHS_MAX`].
    paths: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            steps: STEPS_MAX,
            implied: IMPLIED_MAX,
            paths: PATHS_MAX,
        }
    }
}

/// What a layer leaves.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Every name that is there in the end and that an entry made, by path. Directories without an entry are left out.
    pub(super) names: Vec<Shown>,
    /// Whiteouts and opaque marks whose directory is there in the end.
    pub(super) marks: Vec<Mark>,
    /// Paths of directories that took the place of something else of the layer: of lower layers nothing shows below them.
    pub(super) fresh: Vec<Vec<u8>>,
    /// Whether an entry led through a symbolic link.
    pub(super) has_detours: bool,
    /// Of what shows and was linked to in its layer: the entry that made it, and one that linked to it, for each.
    pub(super) links: Vec<(usize, usize)>,
    /// Links that show and were made to what was a link to a file of a lower layer, and shows no more.
    pub(super) severed: Vec<usize>,
}

/// A name that is there in the end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) path: Vec<u8>,
    /// The entry that gave the name.
    pub(super) entry: usize,
    /// The entry that made what the name stands for: another one than `entry` for a hard link. Of a directory, the last one.
    pub(super) made: usize,
    /// Of a directory, its first entry; else as `made`.
    pub(super) first: usize,
    /// Whether an earlier entry of this directory has other attributes: some unpackers keep those.
    pub(super) has_more_xattrs: bool,
}

/// A whiteout or opaque mark.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mark {
    pub(super) path: Vec<u8>,
    pub(super) entry: usize,
}

/// Why a layer cannot be run. Holds the entry's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Impossible {
    /// It lies below something that is no directory.
    BelowFile(usize),
    /// It leads through too many symbolic links, or to a path that is too long.
    TooDeep(usize),
    /// It is a hard link to what is a directory at that time.
    ToDirectory(usize),
    /// It is not a directory and stands for the root.
    Root(usize),
    /// The layer names more directories than a reader would take, or its paths are too long or lead through too many of them.
    TooMany,
}

/// Runs a layer.
pub(super) fn run(names: &Names) -> Result<Outcome, Impossible> {
    run_within(names, Limits::default())
}

fn run_within(names: &Names, limits: Limits) -> Result<Outcome, Impossible> {
    let mut replay = Replay {
        nodes: vec![Node::Directory(Box::default())],
        marks: Vec::new(),
        has_detours: false,
        links: Vec::new(),
        chains: Vec::new(),
        steps: 0,
        implied: 0,
        limits,
    };
    for index in 0..names.len() {
        // Those on the way to one path are few enough to count them first.
        if replay.steps > limits.steps {
            return Err(Impossible::TooMany);
        }
        replay.apply(names, index)?;
    }
    replay.outcome()
}

#[derive(Default)]
struct Directory<'a> {
    children: BTreeMap<&'a [u8], Child>,
    first: Option<usize>,
    last: Option<usize>,
    has_more_xattrs: bool,
    xattrs: u64,
    is_fresh: bool,
}

#[derive(Clone, Copy)]
struct Child {
    node: u32,
    /// The entry that gave the name; `None` for a directory without one.
    entry: Option<usize>,
}

enum Node<'a> {
    Directory(Box<Directory<'a>>),
    /// Made by this entry.
    Leaf(usize),
    /// Likewise, and where it points.
    Symlink(usize, &'a [u8]),
    /// A hard link whose target is not in the layer so far.
    Pending(usize),
}

struct Replay<'a> {
    nodes: Vec<Node<'a>>,
    /// Directory, name and entry of each whiteout and opaque mark.
    marks: Vec<(u32, &'a [u8], usize)>,
    has_detours: bool,
    /// The node and the entry of each link to something that was there.
    links: Vec<(u32, usize)>,
    /// The entry of each link whose target is not in the layer, and of one more link to it.
    chains: Vec<(usize, usize)>,
    /// Components of paths that were looked up so far.
    steps: u64,
    /// Directories so far that have no entry.
    implied: u32,
    limits: Limits,
}

impl<'a> Replay<'a> {
    fn apply(&mut self, names: &'a Names, index: usize) -> Result<(), Impossible> {
        let (path, kind) = (names.path(index), names.kind(index));
        let Some(name) = components(path).next_back() else {
            let Kind::Directory { xattrs } = kind else {
                return Err(Impossible::Root(index));
            };
            self.enter(ROOT, index, xattrs);
            return Ok(());
        };
        let parent = self.parent(path, index)?;
        if matches!(special(path), Special::Opaque | Special::Whiteout(_)) {
            self.marks.push((parent, name, index));
            return Ok(());
        }
        let before = self.child(parent, name).map(|child| child.node);
        let node = match kind {
            Kind::Directory { xattrs } => {
                let there = before.filter(|id| matches!(self.node(*id), Some(Node::Directory(_))));
                let id = match there {
                    Some(id) => id,
                    None => self.add(Node::Directory(Box::new(Directory {
                        is_fresh: before.is_some(),
                        ..Directory::default()
                    })))?,
                };
                self.enter(id, index, xattrs);
                id
            }
            Kind::Hardlink(target) => {
                let found = self.find(target);
                if matches!(found.and_then(|id| self.node(id)), Some(Node::Directory(_))) {
                    return Err(Impossible::ToDirectory(index));
                }
                let linked =
                    found.filter(|id| matches!(self.node(*id), Some(Node::Leaf(_) | Node::Symlink(..))));
                match linked {
                    Some(id) => {
                        self.links.push((id, index));
                        id
                    }
                    None => {
                        if let Some(Node::Pending(before)) = found.and_then(|id| self.node(id)) {
                            self.chains.push((*before, index));
                        }
                        self.add(Node::Pending(index))?
                    }
                }
            }
            Kind::Symlink(target) => self.add(Node::Symlink(index, target))?,
            Kind::Other => self.add(Node::Leaf(index))?,
        };
        self.put(
            parent,
            name,
            Child {
                node,
                entry: Some(index),
            },
        );
        Ok(())
    }

    /// Notes one more entry of a directory.
    fn enter(&mut self, id: u32, index: usize, xattrs: u64) {
        if let Some(directory) = self.directory_mut(id) {
            directory.first = directory.first.or(Some(index));
            directory.last = Some(index);
            directory.has_more_xattrs |= directory.xattrs != 0 && directory.xattrs != xattrs;
            directory.xattrs = xattrs;
        }
    }

    /// The directory that is to hold the entry; what is missing of it is made.
    fn parent(&mut self, path: &'a [u8], index: usize) -> Result<u32, Impossible> {
        let mut todo: Vec<&'a [u8]> = components(path).rev().skip(1).collect();
        let name_length = path.len();
        // The directories down to the one in question; no id where one is missing.
        let mut stack: Vec<(&'a [u8], Option<u32>)> = Vec::with_capacity(todo.len());
        let mut followed = 0;
        while let Some(component) = todo.pop() {
            self.steps = self.steps.saturating_add(1);
            match component {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => {}
            }
            let current = stack.last().map_or(Some(ROOT), |(_, id)| *id);
            let child = current.and_then(|id| self.child(id, component));
            let Some(Child { node: id, .. }) = child else {
                stack.push((component, None));
                continue;
            };
            match self.node(id) {
                Some(Node::Directory(_)) => stack.push((component, Some(id))),
                Some(Node::Symlink(_, target)) => {
                    followed += 1;
                    if followed > SYMLINKS_MAX {
                        return Err(Impossible::TooDeep(index));
                    }
                    if target.starts_with(b"/") {
                        stack.clear();
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev());
                }
                _ => return Err(Impossible::BelowFile(index)),
            }
        }
        if followed > 0 {
            self.has_detours = true;
            let length: usize = stack.iter().map(|(component, _)| component.len() + 1).sum();
            if length + name_length > PATH_MAX {
                return Err(Impossible::TooDeep(index));
            }
        }
        let mut directory = ROOT;
        for (component, id) in stack {
            directory = match id {
                Some(id) => id,
                None => {
                    self.implied = self.implied.saturating_add(1);
                    if self.implied > self.limits.implied {
                        return Err(Impossible::TooMany);
                    }
                    let node = self.add(Node::Directory(Box::default()))?;
                    self.put(directory, component, Child { node, entry: None });
                    node
                }
            };
        }
        Ok(directory)
    }

    /// The node at the target of a hard link. Symbolic links on the way are followed, the last component is not.
    fn find(&mut self, target: &'a [u8]) -> Option<u32> {
        let mut todo: Vec<&'a [u8]> = components(target).rev().collect();
        let mut stack = Vec::new();
        let mut followed = 0;
        while let Some(component) = todo.pop() {
            self.steps = self.steps.saturating_add(1);
            match component {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => {}
            }
            let id = self.child(stack.last().copied().unwrap_or(ROOT), component)?.node;
            match self.node(id)? {
                Node::Symlink(_, link) if !todo.is_empty() => {
                    followed += 1;
                    if followed > SYMLINKS_MAX {
                        return None;
                    }
                    if link.starts_with(b"/") {
                        stack.clear();
                    }
                    todo.extend(link.split(|byte| *byte == b'/').rev());
                }
                _ => stack.push(id),
            }
        }
        self.has_detours |= followed > 0;
        Some(stack.last().copied().unwrap_or(ROOT))
    }

    fn outcome(self) -> Result<Outcome, Impossible> {
        let mut outcome = Outcome {
            has_detours: self.has_detours,
            ..Outcome::default()
        };
        let mut room = Room(self.limits.paths);
        let mut paths: BTreeMap<u32, Vec<u8>> = BTreeMap::from([(ROOT, Vec::new())]);
        let mut pending = vec![ROOT];
        while let Some(id) = pending.pop() {
            let (Some(Node::Directory(directory)), Some(path)) = (self.node(id), paths.get(&id).cloned())
            else {
                continue;
            };
            if let (Some(first), Some(last)) = (directory.first, directory.last) {
                outcome.names.push(Shown {
                    path: room.copy(&path)?,
                    entry: last,
                    made: last,
                    first,
                    has_more_xattrs: directory.has_more_xattrs,
                });
            }
            if directory.is_fresh {
                outcome.fresh.push(room.copy(&path)?);
            }
            for (name, child) in &directory.children {
                let below = room.join(&path, name)?;
                let made = match self.node(child.node) {
                    Some(Node::Directory(_)) => {
                        paths.insert(child.node, below);
                        pending.push(child.node);
                        continue;
                    }
                    Some(Node::Leaf(made) | Node::Symlink(made, _) | Node::Pending(made)) => *made,
                    None => continue,
                };
                outcome.names.push(Shown {
                    path: below,
                    entry: child.entry.unwrap_or(made),
                    made,
                    first: made,
                    has_more_xattrs: false,
                });
            }
        }
        let mut shown: Vec<usize> = outcome.names.iter().map(|shown| shown.made).collect();
        shown.sort_unstable();
        let links = self.links.iter().filter_map(|(id, link)| match self.node(*id)? {
            Node::Leaf(made) | Node::Symlink(made, _) => Some((*made, *link)),
            Node::Directory(_) | Node::Pending(_) => None,
        });
        let is_shown = |made: &usize| shown.binary_search(made).is_ok();
        outcome.links = links.filter(|(made, _)| is_shown(made)).collect();
        let severed = self.chains.iter();
        let severed = severed.filter(|(before, link)| is_shown(link) && !is_shown(before));
        outcome.severed = severed.map(|(_, link)| *link).collect();
        for (directory, name, entry) in &self.marks {
            if let Some(path) = paths.get(directory) {
                let path = room.join(path, name)?;
                outcome.marks.push(Mark { path, entry: *entry });
            }
        }
        Ok(outcome)
    }

    fn put(&mut self, parent: u32, name: &'a [u8], child: Child) {
        if let Some(directory) = self.directory_mut(parent) {
            directory.children.insert(name, child);
        }
    }

    fn add(&mut self, node: Node<'a>) -> Result<u32, Impossible> {
        if self.nodes.len() >= RECORDS_MAX {
            return Err(Impossible::TooMany);
        }
        let id = u32::try_from(self.nodes.len()).map_err(|_| Impossible::TooMany)?;
        self.nodes.push(node);
        Ok(id)
    }

    fn node(&self, id: u32) -> Option<&Node<'a>> {
        self.nodes.get(usize::try_from(id).ok()?)
    }

    fn directory_mut(&mut self, id: u32) -> Option<&mut Directory<'a>> {
        match self.nodes.get_mut(usize::try_from(id).ok()?)? {
            Node::Directory(directory) => Some(directory),
            _ => None,
        }
    }

    fn child(&self, directory: u32, name: &[u8]) -> Option<Child> {
        match self.node(directory)? {
            Node::Directory(directory) => directory.children.get(name).copied(),
            _ => None,
        }
    }
}

/// Bytes that paths may still take.
struct Room(usize);

impl Room {
    fn copy(&mut self, path: &[u8]) -> Result<Vec<u8>, Impossible> {
        self.join(path, b"")
    }

    /// The path of `name` in the directory at `path`; that itself for no name.
    fn join(&mut self, path: &[u8], name: &[u8]) -> Result<Vec<u8>, Impossible> {
        let slash = match path.is_empty() || name.is_empty() {
            true => &b""[..],
            false => b"/",
        };
        let length = path.len() + slash.len() + name.len();
        self.0 = self.0.checked_sub(length).ok_or(Impossible::TooMany)?;
        Ok([path, slash, name].concat())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: Kind<'_> = Kind::Other;

    fn names(entries: &[(String, Kind<'_>)]) -> Names {
        let mut names = Names::default();
        for (path, kind) in entries {
            names.push_bytes(path.as_bytes(), *kind);
        }
        names
    }

    #[test]
    fn directories_without_entries_have_a_limit() {
        let deep = |count: usize| {
            let path = |number| (format!("{number}{}", "/d".repeat(1999)), FILE);
            names(&(0..count).map(path).collect::<Vec<_>>())
        };
        assert_eq!(run(&deep(125)).map(|outcome| outcome.names.len()), Ok(125));
        assert_eq!(run(&deep(200)), Err(Impossible::TooMany));
    }

    #[test]
    fn steps_and_paths_have_limits() {
        let long = "d".repeat(250);
        let mut entries = vec![
            (format!("{long}/{long}/real"), Kind::Directory { xattrs: 0 }),
            ("s".to_owned(), Kind::Symlink(b"")),
        ];
        let target = format!("{long}/{long}/real");
        entries[1].1 = Kind::Symlink(target.as_bytes());
        entries.extend((0..100).map(|number| (format!("s/{number}"), FILE)));
        entries.extend((0..100).map(|number| (format!("l{number}"), Kind::Hardlink(b"s/0"))));
        let layer = names(&entries);
        let usual = Limits::default();
        let found = run_within(&layer, usual).unwrap();
        assert_eq!(found.names.len(), 202);
        for limits in [
            Limits { steps: 400, ..usual },
            Limits { steps: 700, ..usual },
            Limits {
                paths: 50_000,
                ..usual
            },
            Limits { implied: 1, ..usual },
        ] {
            assert_eq!(run_within(&layer, limits), Err(Impossible::TooMany), "{limits:?}");
        }
    }
}
