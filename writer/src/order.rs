//! Which entry of a layer comes when: what a container opens first stands first.
//!
//! For each prioritized path, in the given order: its parent directories (the root directory too, where it has an entry), for a
//! hard link its target, then the entry itself. Then the landmark, then everything else in the order of the input. So far that is
//! the order of upstream's sorter, and a layer made by either tool from the same list has its files at the same
//! places. A path that has no entry is left out and reported; so is one whose parent or link target has none, and then what
//! was moved for its sake stays moved. Symbolic links are not followed. Layers without entries for parent directories exist
//! (Bazel makes them): [`Orphans::Move`] departs from upstream to have their files first too.
//!
//! Beyond upstream, an entry takes along every earlier one on which its meaning depends, and stays behind every earlier one
//! that depends on it, because unpackers run a layer entry by entry:
//!
//! * Whiteouts of its path and of its parents, and opaque marks of its parents: containerd and Podman make nodes of them, which must
//!   not find anything in their place.
//! * For a whiteout, what stands at and below the path that it hides; for a directory, what stands below it before its
//!   own entry. More than [`TRAIN_MAX`] of those, and the path stays where it was.
//! * Hard links to it that come before it, which mean a file of a lower layer to some tools. A parent or a target that
//!   comes later in the input does not come earlier in the output.
//! * For a hard link, the earlier links to the same file, where one of them gives it other metadata: the last link decides.
//!
//! No path may occur twice, and none lead through a symbolic link of the layer: [`super::normal`] sees to that.

use std::collections::{HashMap, HashSet};
use std::rc::Rc;

use super::seen::{is_within, parent_of};
use peel_image::estargz::is_reserved;
use peel_image::path::{EntryPath, components};
use peel_image::tree::{OPAQUE, Special, WHITEOUT, special};

pub use super::names::{Kind, Names};

/// Most entries that one directory or whiteout takes along because they stand before it. Where there are more, moving them would
/// bring a good part of the layer to the front.
pub const TRAIN_MAX: usize = 64;

/// A prioritized path that was not moved to the front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The path as it was given.
    pub path: Vec<u8>,
    /// The path without an entry in this layer: the same one, one of its parents, or what a hard link leads to; or the one that
    /// cannot move. `None` where the given path is no possible name, or where no entry of the layer may move.
    pub absent: Option<EntryPath>,
}

/// The order of a layer's entries.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Order {
    /// Entries before the landmark, as indices of the input.
    pub first: Vec<usize>,
    /// Entries after the landmark.
    pub rest: Vec<usize>,
    /// What could not be moved.
    pub missing: Vec<Missing>,
}

impl Order {
    /// The order of the input, whatever is prioritized.
    pub(super) fn unmoved<P: AsRef<[u8]>>(count: usize, prioritized: &[P]) -> Self {
        let missing = prioritized.iter().map(|path| Missing {
            path: path.as_ref().to_vec(),
            absent: None,
        });
        Self {
            first: Vec::new(),
            rest: (0..count).collect(),
            missing: missing.collect(),
        }
    }
}

/// What becomes of a prioritized path with a parent directory that has no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orphans {
    /// It stays where it was and is reported, as with upstream.
    #[default]
    Leave,
    /// It is moved with those of its parents that have entries. Unpackers make the others, as they had to before.
    Move,
}

/// Puts the entries in order. Reserved names ([`is_reserved`]) are dropped.
pub fn sort<P: AsRef<[u8]>>(names: &Names, prioritized: &[P], orphans: Orphans) -> Order {
    let mut mover = Mover {
        names,
        orphans,
        by_path: Vec::new(),
        has_marks: false,
        early_links: HashMap::new(),
        sisters: HashMap::new(),
        stuck: HashMap::new(),
        states: Vec::new(),
        moved: Vec::new(),
    };
    let mut missing = Vec::new();
    if !prioritized.is_empty() {
        mover.prepare();
    }
    for path in prioritized {
        let outcome = match EntryPath::clean(path.as_ref()) {
            Ok(clean) => mover.bring(&clean).map_err(Some),
            Err(_) => Err(None),
        };
        if let Err(absent) = outcome {
            let path = path.as_ref().to_vec();
            missing.push(Missing { path, absent });
        }
    }
    let stays = |index: &usize| mover.state(*index) != State::Moved && !is_reserved(names.path(*index));
    let rest = (0..names.len()).filter(stays).collect();
    Order {
        first: mover.moved,
        rest,
        missing,
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    /// Something is being moved for its sake.
    Open,
    Moved,
}

struct Mover<'a> {
    names: &'a Names,
    orphans: Orphans,
    /// The entries by their paths, reserved ones left out.
    by_path: Vec<u32>,
    /// Whether there are whiteouts or opaque marks.
    has_marks: bool,
    /// Hard links before their targets, by target.
    early_links: HashMap<usize, Vec<usize>>,
    /// The link before each hard link that leads to the same file, of files that not all links describe alike.
    sisters: HashMap<usize, usize>,
    /// What cannot move, and the path that is in its way: to find that out may have taken a look at every entry.
    stuck: HashMap<usize, Rc<EntryPath>>,
    states: Vec<State>,
    moved: Vec<usize>,
}

/// One step of the work that is still to be done. It is kept on the heap: chains of links can be as long as a layer.
enum Step {
    Visit(usize),
    Move(usize),
    /// What the entry links to is not there.
    Fail(usize),
}

/// The target of a hard link, as far as it does not stand before the link.
enum Target {
    None,
    /// It comes later in the input. It holds the content, so it follows.
    Later(usize),
    Absent,
}

impl Mover<'_> {
    fn prepare(&mut self) {
        let names = self.names;
        self.states = vec![State::Waiting; names.len()];
        let all = (0..names.len()).filter(|index| !is_reserved(names.path(*index)));
        self.by_path = all.filter_map(|index| u32::try_from(index).ok()).collect();
        self.by_path
            .sort_unstable_by_key(|index| (names.path(at(*index)), *index));
        self.has_marks = (0..names.len()).any(|index| mark(names.path(index)));
        let mut has_changes = false;
        for index in 0..names.len() {
            if let Kind::Hardlink(target) = names.kind(index)
                && let Some(target) = self.find(target)
            {
                has_changes |= !names.repeats(index, target);
                if target > index {
                    self.early_links.entry(target).or_default().push(index);
                }
            }
        }
        if has_changes {
            self.find_sisters();
        }
    }

    /// Finds the links that must keep their order among themselves.
    fn find_sisters(&mut self) {
        let names = self.names;
        // What each link leads to in the end; nothing for links in circles and to other layers.
        let mut ends: HashMap<usize, Option<usize>> = HashMap::new();
        let mut changed = HashSet::new();
        for index in 0..names.len() {
            let (mut chain, mut current) = (Vec::new(), index);
            let end = loop {
                let Kind::Hardlink(target) = names.kind(current) else {
                    break Some(current);
                };
                if let Some(known) = ends.get(&current) {
                    break *known;
                }
                ends.insert(current, None);
                chain.push(current);
                match self.find(target) {
                    Some(next) => current = next,
                    None => break None,
                }
            };
            for link in chain {
                ends.insert(link, end);
                changed.extend(end.filter(|end| !names.repeats(link, *end)));
            }
        }
        let mut last = HashMap::new();
        for index in 0..names.len() {
            if let Some(Some(end)) = ends.get(&index)
                && changed.contains(end)
                && let Some(before) = last.insert(*end, index)
            {
                self.sisters.insert(index, before);
            }
        }
    }

    /// Moves `path` and what must stand before it. The error is the first path that has no entry, or that cannot move.
    fn bring(&mut self, path: &EntryPath) -> Result<(), EntryPath> {
        let absent = |path: &[u8]| EntryPath::clean(path).unwrap_or_default();
        let Some(index) = self.find(path.as_bytes()) else {
            return if path.is_root() { Ok(()) } else { Err(path.clone()) };
        };
        let mut steps = vec![Step::Visit(index)];
        let mut in_the_way = None;
        let mut needed = Vec::new();
        // Targets behind their links: only what comes before an entry in the input is brought before it.
        let mut later = Vec::new();
        while let Some(step) = steps.pop().or_else(|| later.pop().map(Step::Visit)) {
            match step {
                Step::Visit(index) if self.state(index) != State::Waiting => {}
                Step::Visit(index) => {
                    if let Some(known) = self.stuck.get(&index) {
                        in_the_way = Some(Rc::clone(known));
                        break;
                    }
                    self.set(index, State::Open);
                    needed.clear();
                    let target = match self.needs(index, &mut needed) {
                        Ok(target) => target,
                        Err(path) => {
                            in_the_way = Some(Rc::new(absent(&path)));
                            steps.push(Step::Fail(index));
                            break;
                        }
                    };
                    steps.push(match target {
                        Target::Absent => Step::Fail(index),
                        Target::None | Target::Later(_) => Step::Move(index),
                    });
                    if let Target::Later(target) = target {
                        later.push(target);
                    }
                    steps.extend(needed.drain(..).rev().map(Step::Visit));
                }
                Step::Fail(index) => {
                    let target = match self.names.kind(index) {
                        Kind::Hardlink(target) => target,
                        _ => &[],
                    };
                    in_the_way = Some(Rc::new(absent(target)));
                    steps.push(step);
                    break;
                }
                Step::Move(index) => {
                    self.set(index, State::Moved);
                    self.moved.push(index);
                }
            }
        }
        let Some(in_the_way) = in_the_way else {
            return Ok(());
        };
        // What was waiting for that path stays where it was, whoever asks for it again.
        for step in steps {
            if let Step::Move(index) | Step::Fail(index) = step {
                self.set(index, State::Waiting);
                self.stuck.insert(index, Rc::clone(&in_the_way));
            }
        }
        Err(EntryPath::clone(&in_the_way))
    }

    /// The entries that must stand before one, in their order, and what is to be known of the target of a hard link. The error is
    /// the path that has no entry, or that cannot move.
    fn needs(&self, index: usize, needed: &mut Vec<usize>) -> Result<Target, Vec<u8>> {
        let path = self.names.path(index);
        let earlier = |found: Option<usize>| found.filter(|found| *found < index);
        let mut parent: Vec<u8> = Vec::with_capacity(path.len() + OPAQUE.len() + 1);
        if !path.is_empty() {
            needed.extend(earlier(self.find(b"")));
            if self.has_marks {
                needed.extend(earlier(self.find(OPAQUE)));
            }
        }
        for name in components(path) {
            let top = parent.len();
            let is_last = top + usize::from(top > 0) + name.len() == path.len();
            // A mark cannot be hidden itself.
            if self.has_marks && !(is_last && mark(path)) {
                let start = if top == 0 { &b""[..] } else { b"/" };
                let whiteout = [&parent, start, WHITEOUT, name].concat();
                needed.extend(earlier(self.find(&whiteout)));
            }
            if top > 0 {
                parent.push(b'/');
            }
            parent.extend_from_slice(name);
            if is_last {
                break;
            }
            match self.find(&parent) {
                Some(found) => needed.extend(earlier(Some(found))),
                None if self.orphans == Orphans::Leave => return Err(parent),
                None => {}
            }
            if self.has_marks {
                let opaque = [&parent, &b"/"[..], OPAQUE].concat();
                needed.extend(earlier(self.find(&opaque)).filter(|found| *found != index));
            }
        }
        let hidden = match special(path) {
            Special::Whiteout(name) => {
                let parent = parent_of(path);
                let start = if parent.is_empty() { &b""[..] } else { b"/" };
                Some([parent, start, name].concat())
            }
            _ => None,
        };
        match (hidden, self.names.kind(index)) {
            (Some(hidden), _) => self.train(&hidden, index, needed)?,
            // Every tree has a root to begin with.
            (None, Kind::Directory { .. }) if !path.is_empty() => self.train(path, index, needed)?,
            _ => {}
        }
        needed.extend(self.early_links.get(&index).into_iter().flatten());
        let Kind::Hardlink(target) = self.names.kind(index) else {
            return Ok(Target::None);
        };
        needed.extend(self.sisters.get(&index));
        Ok(match self.find(target) {
            Some(target) if target < index => {
                needed.push(target);
                Target::None
            }
            Some(target) => Target::Later(target),
            None if target.is_empty() => Target::None,
            None => Target::Absent,
        })
    }

    /// Adds the entries at and below `top` that stand before `index`, in the order of the input.
    fn train(&self, top: &[u8], index: usize, needed: &mut Vec<usize>) -> Result<(), Vec<u8>> {
        let start = needed.len();
        let first = self
            .by_path
            .partition_point(|at_path| self.names.path(at(*at_path)) < top);
        let behind = self.by_path.get(first..).unwrap_or_default();
        for other in behind.iter().map(|other| at(*other)) {
            let path = self.names.path(other);
            if !path.starts_with(top) {
                break;
            }
            if other < index && is_within(path, top) {
                needed.push(other);
                if needed.len() - start > TRAIN_MAX {
                    return Err(self.names.path(index).to_vec());
                }
            }
        }
        if let Some(train) = needed.get_mut(start..) {
            train.sort_unstable();
        }
        Ok(())
    }

    /// The entry at a path.
    fn find(&self, path: &[u8]) -> Option<usize> {
        // Of several the last one: there are none but in a layer that no tool takes.
        let behind = self
            .by_path
            .partition_point(|index| self.names.path(at(*index)) <= path);
        let last = at(*self.by_path.get(behind.checked_sub(1)?)?);
        (self.names.path(last) == path).then_some(last)
    }

    fn state(&self, index: usize) -> State {
        self.states.get(index).copied().unwrap_or(State::Waiting)
    }

    fn set(&mut self, index: usize, state: State) {
        if let Some(slot) = self.states.get_mut(index) {
            *slot = state;
        }
    }
}

/// Whether this is the path of a whiteout or an opaque mark.
fn mark(path: &[u8]) -> bool {
    matches!(special(path), Special::Opaque | Special::Whiteout(_))
}

/// An index that was kept in fewer bytes.
fn at(index: u32) -> usize {
    usize::try_from(index).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests;
