//! Which entry of a layer comes when: what a container opens first stands first.
//!
//! The order is that of upstream's sorter, so that a layer made by either tool from the same list has its files at the same
//! places. For each prioritized path, in the given order: its parent directories (the root directory too, where it has an
//! entry), for a hard link its target, then the entry itself. Then the landmark, then everything else in the order of the
//! input. A path that has no entry is left out and reported; so is one whose parent or link target has none, and then what
//! was moved for its sake stays moved. Symbolic links are not followed. Layers without entries for parent directories exist
//! (Bazel makes them): [`Orphans::Move`] departs from upstream to have their files first too.
//!
//! Where upstream would not return, on hard links that lead back to themselves, the circle is cut where it closes.

use std::collections::HashMap;

use peel_image::estargz::is_reserved;
use peel_image::path::EntryPath;

/// What the order depends on: the path of each entry of the input and, of a hard link, its target. All of it lies in one
/// buffer, since layers of a million entries exist.
#[derive(Debug, Default)]
pub struct Names {
    bytes: Vec<u8>,
    /// Where in `bytes` each entry's path ends, and its target.
    ends: Vec<(usize, usize)>,
}

impl Names {
    /// Adds an entry.
    pub fn push(&mut self, path: &EntryPath, link: Option<&EntryPath>) {
        self.bytes.extend_from_slice(path.as_bytes());
        let path_end = self.bytes.len();
        if let Some(link) = link {
            // The root is a target too.
            self.bytes.push(b'/');
            self.bytes.extend_from_slice(link.as_bytes());
        }
        self.ends.push((path_end, self.bytes.len()));
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.ends.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.ends.is_empty()
    }

    /// The path of an entry; empty for an index that is none.
    pub fn path(&self, index: usize) -> &[u8] {
        let end = self.ends.get(index).map_or(0, |(path_end, _)| *path_end);
        self.bytes.get(self.start(index)..end).unwrap_or_default()
    }

    fn link(&self, index: usize) -> Option<EntryPath> {
        let (start, end) = self.ends.get(index)?;
        let link = self.bytes.get(*start..*end)?.strip_prefix(b"/")?;
        EntryPath::clean(link).ok()
    }

    fn start(&self, index: usize) -> usize {
        let before = index.checked_sub(1).and_then(|before| self.ends.get(before));
        before.map_or(0, |(_, end)| *end)
    }
}

/// A prioritized path that was not moved to the front.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The path as it was given.
    pub path: Vec<u8>,
    /// The path without an entry in this layer: the same one, one of its parents, or what a hard link leads to. `None` where
    /// the given path is no possible name.
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

/// What becomes of a prioritized path with a parent directory that has no entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Orphans {
    /// It stays where it was and is reported, as with upstream.
    #[default]
    Leave,
    /// It is moved with those of its parents that have entries. Unpackers make the others, as they had to before.
    Move,
}

/// Puts the entries in order. Of several entries with one path the last one counts and the others are dropped; reserved
/// names ([`is_reserved`]) are dropped too.
pub fn sort<P: AsRef<[u8]>>(names: &Names, prioritized: &[P], orphans: Orphans) -> Order {
    let mut last: HashMap<&[u8], usize> = HashMap::with_capacity(names.len());
    for index in 0..names.len() {
        let path = names.path(index);
        if !is_reserved(path) {
            last.insert(path, index);
        }
    }
    let mut mover = Mover {
        names,
        orphans,
        last,
        states: vec![State::Waiting; names.len()],
        moved: Vec::new(),
    };
    let mut missing = Vec::new();
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
    let stays = |index: &usize| {
        mover.last.get(names.path(*index)) == Some(index) && mover.state(*index) != State::Moved
    };
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
    last: HashMap<&'a [u8], usize>,
    states: Vec<State>,
    moved: Vec<usize>,
}

/// One step of the work that is still to be done. It is kept on the heap: chains of links can be as long as a layer.
enum Step {
    Parent(EntryPath),
    Visit(EntryPath),
    Follow(usize),
    Move(usize),
}

impl Mover<'_> {
    /// Moves `path` and what must stand before it. The error is the first path that has no entry.
    fn bring(&mut self, path: &EntryPath) -> Result<(), EntryPath> {
        let mut steps = vec![Step::Visit(path.clone())];
        let mut outcome = Ok(());
        while let Some(step) = steps.pop() {
            match step {
                Step::Parent(path) if self.skips(&path) => {
                    steps.extend(path.parent().map(Step::Parent));
                }
                Step::Parent(path) | Step::Visit(path) => match self.last.get(path.as_bytes()).copied() {
                    None if path.is_root() => {}
                    None => {
                        outcome = Err(path);
                        break;
                    }
                    Some(index) if self.state(index) != State::Waiting => {}
                    Some(index) => {
                        self.set(index, State::Open);
                        steps.push(Step::Move(index));
                        steps.push(Step::Follow(index));
                        steps.extend(path.parent().map(Step::Parent));
                    }
                },
                Step::Follow(index) => {
                    steps.extend(self.names.link(index).map(Step::Visit));
                }
                Step::Move(index) => {
                    self.set(index, State::Moved);
                    self.moved.push(index);
                }
            }
        }
        // What was waiting for the absent path stays where it was, and may be asked for again.
        for step in steps {
            if let Step::Move(index) = step {
                self.set(index, State::Waiting);
            }
        }
        outcome
    }

    /// Whether this parent directory may be absent.
    fn skips(&self, path: &EntryPath) -> bool {
        self.orphans == Orphans::Move && !self.last.contains_key(path.as_bytes())
    }

    fn state(&self, index: usize) -> State {
        self.states.get(index).copied().unwrap_or(State::Moved)
    }

    fn set(&mut self, index: usize, state: State) {
        if let Some(slot) = self.states.get_mut(index) {
            *slot = state;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Entries written as `name` or `name -> hard link target`; the result with `|` for the landmark and numbers after
    /// names that occur more than once (`name#position`).
    fn sorted(input: &str, prioritized: &[&str]) -> (String, Vec<String>) {
        sorted_with(input, prioritized, Orphans::Leave)
    }

    fn sorted_with(input: &str, prioritized: &[&str], orphans: Orphans) -> (String, Vec<String>) {
        let clean = |name: &str| EntryPath::clean(name.as_bytes()).unwrap();
        let parsed: Vec<(&str, EntryPath, Option<EntryPath>)> = input
            .split_whitespace()
            .map(|text| match text.split_once("->") {
                Some((name, target)) => (text, clean(name), Some(clean(target))),
                None => (text, clean(text), None),
            })
            .collect();
        let mut names = Names::default();
        for (_, path, link) in &parsed {
            names.push(path, link.as_ref());
        }
        let order = sort(&names, prioritized, orphans);
        let name = |index: &usize| {
            let (name, path, _) = &parsed[*index];
            let count = parsed.iter().filter(|(_, other, _)| other == path).count();
            if count > 1 {
                format!("{name}#{index}")
            } else {
                (*name).to_owned()
            }
        };
        let first = order.first.iter().map(name);
        let rest = order.rest.iter().map(name);
        let text: Vec<String> = first.chain(["|".to_owned()]).chain(rest).collect();
        let missing = order.missing.iter().map(|missing| {
            let absent = missing
                .absent
                .as_ref()
                .map_or("?".to_owned(), ToString::to_string);
            format!("{}: {absent}", String::from_utf8_lossy(&missing.path))
        });
        (text.join(" "), missing.collect())
    }

    #[test]
    fn entries_come_in_upstreams_order() {
        for (case, input, prioritized, expected) in [
            ("no list", "foo bar/ bar/baz", vec![], "| foo bar/ bar/baz"),
            (
                "files",
                "foo baz bar baa",
                vec!["baa", "bar", "baz"],
                "baa bar baz | foo",
            ),
            (
                "parents first",
                "foo bar/ bar/a baz/ baz/1 baz/2 baz/q/ baz/q/b baz/q/a",
                vec!["baz/q/a", "baz/2", "foo"],
                "baz/ baz/q/ baz/q/a baz/2 foo | bar/ bar/a baz/1 baz/q/b",
            ),
            (
                "a directory by itself",
                "foo bar/ bar/a",
                vec!["bar"],
                "bar/ | foo bar/a",
            ),
            (
                "a target alone",
                "foo baz bar->baz",
                vec!["baz"],
                "baz | foo bar->baz",
            ),
            (
                "target before link",
                "a baz bar->baz",
                vec!["bar"],
                "baz bar->baz | a",
            ),
            (
                "target's parents before target",
                "d/ d/t e/ e/l->d/t x",
                vec!["e/l"],
                "e/ d/ d/t e/l->d/t | x",
            ),
            ("chain of links", "c->b b->a a x", vec!["c"], "a b->a c->b | x"),
            (
                "the root too",
                "./ ./foo ./baz ./baa ./l->./baz",
                vec!["baa", "l"],
                "./ ./baa ./baz ./l->./baz | ./foo",
            ),
            ("the root alone", "a ./ b", vec!["/"], "./ | a b"),
            ("no root entry", "a b", vec!["/", "b"], "b | a"),
            (
                "last duplicate wins",
                "foo bar/ bar/baz bar/ bar/baz x",
                vec!["bar/baz"],
                "bar/#3 bar/baz#4 | foo x",
            ),
            ("duplicates without a list", "a b ./a", vec![], "| b ./a#2"),
            ("named twice", "a b c", vec!["b", "/b", "c", "b"], "b c | a"),
            (
                "landmarks and TOC are dropped",
                ".no.prefetch.landmark a ./.prefetch.landmark b stargz.index.json d/.prefetch.landmark",
                vec!["b", ".prefetch.landmark"],
                "b | a d/.prefetch.landmark",
            ),
        ] {
            assert_eq!(sorted(input, &prioritized).0, expected, "{case}");
        }
    }

    #[test]
    fn forms_of_a_name_are_alike() {
        for tar in ["", "/", "./", "../"] {
            for list in ["", "/", "./", "../"] {
                let input = format!("{tar}foo {tar}d/ {tar}d/x {tar}d/l->{tar}foo");
                let prioritized = format!("{list}d/l");
                let expected = format!("{tar}d/ {tar}foo {tar}d/l->{tar}foo | {tar}d/x");
                assert_eq!(sorted(&input, &[&prioritized]), (expected, vec![]));
            }
        }
    }

    #[test]
    fn what_is_missing_is_left_and_reported() {
        for (case, input, prioritized, expected, missing) in [
            (
                "file",
                "a b",
                vec!["x", "b", "d/y"],
                "b | a",
                vec!["x: /x", "d/y: /d/y"],
            ),
            (
                "parent",
                "a d/f b",
                vec!["d/f", "b"],
                "b | a d/f",
                vec!["d/f: /d"],
            ),
            (
                "grandparent",
                "a d/e/ d/e/f",
                vec!["/d/e/f", "a"],
                "a | d/e/ d/e/f",
                vec!["/d/e/f: /d"],
            ),
            (
                "link target: parents stay moved",
                "a d/ d/l->gone b",
                vec!["d/l", "b"],
                "d/ b | a d/l->gone",
                vec!["d/l: /gone"],
            ),
            ("no name", "a", vec!["x\0"], "| a", vec!["x\0: ?"]),
            (
                "reserved",
                "a .prefetch.landmark",
                vec![".prefetch.landmark"],
                "| a",
                vec![".prefetch.landmark: /.prefetch.landmark"],
            ),
        ] {
            let missing: Vec<String> = missing.into_iter().map(str::to_owned).collect();
            assert_eq!(
                sorted(input, &prioritized),
                (expected.to_owned(), missing),
                "{case}"
            );
        }
    }

    #[test]
    fn orphans_can_be_moved() {
        for (input, prioritized, expected, missing) in [
            ("a d/f b", vec!["d/f", "b"], "d/f b | a", vec![]),
            ("./ a d/ d/e/f", vec!["d/e/f"], "./ d/ d/e/f | a", vec![]),
            ("a x/t d/l->x/t", vec!["d/l"], "x/t d/l->x/t | a", vec![]),
            (
                "a d/ d/l->gone",
                vec!["d/l", "d/x"],
                "d/ | a d/l->gone",
                vec!["d/l: /gone", "d/x: /d/x"],
            ),
        ] {
            let missing: Vec<String> = missing.into_iter().map(str::to_owned).collect();
            let outcome = sorted_with(input, &prioritized, Orphans::Move);
            assert_eq!(outcome, (expected.to_owned(), missing), "{input}");
        }
    }

    #[test]
    fn circles_are_cut() {
        for (input, prioritized, expected) in [
            ("a->a b", vec!["a"], "a->a | b"),
            ("x a->b b->a", vec!["a"], "b->a a->b | x"),
            ("x d->d/f d/f->d", vec!["d/f"], "d->d/f d/f->d | x"),
        ] {
            assert_eq!(
                sorted(input, &prioritized),
                (expected.to_owned(), vec![]),
                "{input}"
            );
        }
    }

    #[test]
    fn long_chains_need_no_stack() {
        let count = 200_000;
        let paths: Vec<EntryPath> = (0..count)
            .map(|index| EntryPath::clean(format!("f{index}").as_bytes()).unwrap())
            .collect();
        let mut names = Names::default();
        for (index, path) in paths.iter().enumerate() {
            names.push(path, paths.get(index + 1));
        }
        let order = sort(&names, &["f0"], Orphans::Leave);
        assert_eq!(order.first, (0..count).rev().collect::<Vec<_>>());
        assert_eq!((order.rest, order.missing), (vec![], vec![]));
    }

    proptest! {
        /// Every entry comes once, parents and targets of what is moved come before it.
        #[test]
        fn nothing_is_lost(
            names in proptest::collection::vec(("[abc](/[abc]){0,2}", proptest::option::of("[abc](/[abc]){0,2}")), 0..20),
            prioritized in proptest::collection::vec("[abcd](/[abc]){0,2}", 0..6),
            orphans in any::<bool>(),
        ) {
            let clean = |name: &String| EntryPath::clean(name.as_bytes()).unwrap();
            let parsed: Vec<_> = names.iter().map(|(name, link)| (clean(name), link.as_ref().map(clean))).collect();
            let mut entries = Names::default();
            for (path, link) in &parsed {
                entries.push(path, link.as_ref());
            }
            let order = sort(&entries, &prioritized, if orphans { Orphans::Move } else { Orphans::Leave });
            let mut all: Vec<usize> = order.first.iter().chain(&order.rest).copied().collect();
            for (position, index) in order.first.iter().enumerate() {
                let parent = parsed[*index].0.parent().unwrap();
                let is_before = |path: &EntryPath| order.first[..position].iter().any(|other| parsed[*other].0 == *path);
                let in_circle = parsed.iter().any(|(_, link)| link.is_some());
                let is_orphan = orphans && parsed.iter().all(|(path, _)| *path != parent);
                prop_assert!(parent.is_root() || is_before(&parent) || in_circle || is_orphan);
            }
            all.sort_unstable();
            let last: Vec<usize> = (0..parsed.len())
                .filter(|index| parsed[index + 1..].iter().all(|(path, _)| *path != parsed[*index].0))
                .collect();
            prop_assert_eq!(all, last);
        }
    }
}
