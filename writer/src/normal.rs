//! What a layer with repeated paths becomes where a TOC describes it.
//!
//! A tar stream is a program: unpackers run it entry by entry. A TOC is a map: its readers take the last entry of a name and look
//! hard links up by name. So the TOC gets what the program leaves: nothing that was replaced, and nothing that went with it; where
//! the first name of a file was replaced, the next one takes its place; names that led through symbolic links stand where they
//! lead to. The tar stream gets the same, so that Podman takes it, which refuses repeated paths; but it stays whole, with
//! every entry, where leaving some out could show:
//!
//! * A directory took the place of something else. Tools that unpack into the merged tree lose what lower layers have there,
//!   overlays do not. Only the TOC gets a whiteout of that name, which readers that would show both ignore.
//! * An entry leads through a symbolic link, or a whiteout stands there twice.
//! * A directory is repeated and had other attributes, which some tools keep.
//!
//! Of a directory the last entry stands where the first one did, since what is made for a child is not what an entry makes.

use std::collections::{BTreeMap, HashMap};

use super::WriteError;
use super::names::{Kind, Names};
use super::replay::{self, Impossible, Outcome, Shown};
use super::seen::{Seen, is_within, parent_of};
use peel_image::tree::WHITEOUT;

/// How a record differs from the entry of the input that it was made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// The TOC does not list it.
    Hidden,
    /// It has another path or, as a hard link, another target.
    Renamed {
        path: Vec<u8>,
        /// The target of a hard link, where it is another one.
        link: Option<Vec<u8>>,
    },
}

/// Where the result has to go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// The tar stream must stay what it is.
    pub(super) keeps_stream: bool,
    /// Readers compare the names of the TOC with those of the tar stream.
    pub(super) compares_names: bool,
}

/// The records of a blob.
#[derive(Debug, Default)]
pub(super) struct Normal {
    /// Which entries of the input they are made of, in the order of the stream; `None` if it is all of them.
    pub(super) records: Option<Vec<usize>>,
    /// What they are called, in that order; `None` if it is as in the input.
    pub(super) names: Option<Names>,
    /// By entry of the input.
    pub(super) changes: HashMap<usize, Change>,
    /// Whether changes concern the TOC alone.
    pub(super) keeps_stream: bool,
    /// Whether entries may move.
    pub(super) is_movable: bool,
    /// Paths of whiteouts that only the TOC has.
    pub(super) whiteouts: Vec<Vec<u8>>,
    /// Number of entries that only the tar stream has.
    pub(super) hidden: u64,
    /// What each path shows in the end, where that was asked for.
    expected: Option<BTreeMap<Vec<u8>, usize>>,
}

impl Normal {
    /// Decides what becomes of the entries of a layer.
    pub(super) fn of(names: &Names, rules: Rules) -> Result<Self, WriteError> {
        let mut seen = Seen::default();
        if (0..names.len()).all(|index| seen.insert(names.path(index), names.kind(index))) {
            return Ok(Self {
                is_movable: true,
                ..Self::default()
            });
        }
        drop(seen);
        let outcome = replay::run(names).map_err(|impossible| refusal(names, impossible))?;
        // What is left of such a file would have the metadata of a header that may be left out.
        if let Some((_, link)) = outcome
            .links
            .iter()
            .find(|(made, link)| !names.repeats(*link, *made))
        {
            return Err(WriteError::Indescribable {
                entry: String::from_utf8_lossy(names.path(*link)).into_owned(),
                what: "it gives the file that it is a hard link to other metadata, in a layer that names a path twice",
            });
        }
        // A TOC has only the name, which is another file's by now.
        if let Some(link) = outcome.severed.first() {
            return Err(WriteError::Indescribable {
                entry: String::from_utf8_lossy(names.path(*link)).into_owned(),
                what: "it is a hard link to a hard link to a file of a lower layer, and that link is replaced later",
            });
        }
        let primaries = primaries(&outcome);
        let mut normal = if !rules.keeps_stream && can_be_left_out(&outcome) {
            Self::short(names, &outcome, &primaries)
        } else {
            refuse_hidden_target(names, &outcome)?;
            Self::whole(names, &outcome, &primaries)
        };
        let is_other = |change: &Change| !matches!(change, Change::Renamed { link: None, .. });
        if rules.compares_names
            && normal.keeps_stream
            && normal.whiteouts.is_empty()
            && !normal.changes.values().any(is_other)
            && outcome
                .names
                .iter()
                .all(|shown| record_of(shown, &primaries) == shown.entry)
        {
            // Readers find such names by their symbolic links.
            normal.changes.clear();
            return Ok(normal);
        }
        drop(primaries);
        normal.expected = Some(
            outcome
                .names
                .into_iter()
                .map(|shown| (shown.path, shown.made))
                .collect(),
        );
        Ok(normal)
    }

    /// The stream that has only what is left.
    fn short(names: &Names, outcome: &Outcome, primaries: &HashMap<usize, &Shown>) -> Self {
        let mut changes = HashMap::new();
        // By the place in the stream.
        let mut records = BTreeMap::new();
        for shown in &outcome.names {
            let record = record_of(shown, primaries);
            if let Some(change) = change(names, shown, primaries) {
                changes.insert(record, change);
            }
            let is_directory = matches!(names.kind(shown.made), Kind::Directory { .. });
            records.insert(if is_directory { shown.first } else { shown.entry }, record);
        }
        for mark in &outcome.marks {
            records.insert(mark.entry, mark.entry);
        }
        let records: Vec<usize> = records.into_values().collect();
        let mut renamed = Names::default();
        for record in &records {
            let (path, kind) = described(names, *record, changes.get(record));
            renamed.push_bytes(path, kind);
        }
        Self {
            records: Some(records),
            names: Some(renamed),
            changes,
            is_movable: true,
            ..Self::default()
        }
    }

    /// The stream as it was, and a TOC that says what it leaves.
    fn whole(names: &Names, outcome: &Outcome, primaries: &HashMap<usize, &Shown>) -> Self {
        let mut changes: HashMap<usize, Change> =
            (0..names.len()).map(|index| (index, Change::Hidden)).collect();
        for shown in &outcome.names {
            let record = record_of(shown, primaries);
            match change(names, shown, primaries) {
                Some(change) => changes.insert(record, change),
                None => changes.remove(&record),
            };
        }
        // Of several at one place the last one counts.
        let marks: BTreeMap<&[u8], usize> = outcome
            .marks
            .iter()
            .map(|mark| (mark.path.as_slice(), mark.entry))
            .collect();
        for (path, entry) in &marks {
            if *path == names.path(*entry) {
                changes.remove(entry);
            } else {
                let path = path.to_vec();
                changes.insert(*entry, Change::Renamed { path, link: None });
            }
        }
        let whiteouts = outcome.fresh.iter().map(|path| whiteout_of(path));
        let whiteouts = whiteouts
            .filter(|path| !marks.contains_key(path.as_slice()))
            .collect();
        let hidden = changes
            .values()
            .filter(|change| **change == Change::Hidden)
            .count();
        Self {
            changes,
            keeps_stream: true,
            whiteouts,
            hidden: hidden as u64,
            ..Self::default()
        }
    }

    /// The records by their places in the stream, as entries of the input.
    pub(super) fn record(&self, index: usize) -> Option<usize> {
        match &self.records {
            Some(records) => records.get(index).copied(),
            None => Some(index),
        }
    }

    /// Whether every entry stands in the stream as it was.
    pub(super) fn keeps_all(&self) -> bool {
        self.records.is_none()
    }

    /// Whether TOC and tar stream list the same entries.
    pub(super) fn has_one_view(&self) -> bool {
        !self.keeps_stream || self.changes.is_empty()
    }

    /// Runs the TOC, whose records come in this order, and compares what it leaves with what the input leaves. The error names
    /// the first path at which they differ.
    pub(super) fn check(&self, names: &Names, order: impl Iterator<Item = usize>) -> Result<(), WriteError> {
        let Some(expected) = &self.expected else {
            return Ok(());
        };
        let (mut listed, mut records) = (Names::default(), Vec::new());
        for record in order {
            match self.changes.get(&record) {
                Some(Change::Hidden) => {}
                change => {
                    let (path, kind) = described(names, record, change);
                    listed.push_bytes(path, kind);
                    records.push(record);
                }
            }
        }
        let outcome = replay::run(&listed).map_err(|impossible| refusal(&listed, impossible))?;
        let made = outcome
            .names
            .into_iter()
            .filter_map(|shown| Some((shown.path, *records.get(shown.made)?)));
        let found: BTreeMap<Vec<u8>, usize> = made.collect();
        if found == *expected {
            return Ok(());
        }
        let other = |map: &BTreeMap<Vec<u8>, usize>, than: &BTreeMap<Vec<u8>, usize>| {
            let differs = |(path, made): &(&Vec<u8>, &usize)| than.get(*path) != Some(*made);
            map.iter().find(differs).map(|(path, _)| path.clone())
        };
        let path = other(expected, &found).or_else(|| other(&found, expected));
        Err(WriteError::Meaning {
            entry: String::from_utf8_lossy(&path.unwrap_or_default()).into_owned(),
        })
    }
}

/// Whether every tool finds the same tree when what was replaced is left out of the stream.
fn can_be_left_out(outcome: &Outcome) -> bool {
    let mut marks: Vec<&[u8]> = outcome.marks.iter().map(|mark| mark.path.as_slice()).collect();
    marks.sort_unstable();
    outcome.fresh.is_empty()
        && !outcome.has_detours
        && !outcome.names.iter().any(|shown| shown.has_more_xattrs)
        && marks.array_windows().all(|[mark, next]| mark != next)
}

/// Refuses hard links to what a whiteout of the TOC hides: such a file was there when the link came, and a TOC has no time.
fn refuse_hidden_target(names: &Names, outcome: &Outcome) -> Result<(), WriteError> {
    let is_hidden = |target: &[u8]| {
        let mut fresh = outcome.fresh.iter();
        !outcome.fresh.is_empty() && (outcome.has_detours || fresh.any(|top| is_within(target, top)))
    };
    let leads_there =
        |shown: &&Shown| matches!(names.kind(shown.made), Kind::Hardlink(target) if is_hidden(target));
    match outcome.names.iter().find(leads_there) {
        None => Ok(()),
        Some(shown) => Err(WriteError::Indescribable {
            entry: String::from_utf8_lossy(&shown.path).into_owned(),
            what: "it is a hard link to a file of a lower layer that is replaced later",
        }),
    }
}

/// Of each entry whose own name does not show: the name in its place.
fn primaries(outcome: &Outcome) -> HashMap<usize, &Shown> {
    let mut primaries: HashMap<usize, &Shown> = HashMap::new();
    for shown in &outcome.names {
        let rank = |shown: &Shown| (shown.entry != shown.made, shown.entry);
        let primary = primaries.entry(shown.made).or_insert(shown);
        if rank(shown) < rank(primary) {
            *primary = shown;
        }
    }
    primaries
}

/// The entry whose headers and content stand for a name.
fn record_of(shown: &Shown, primaries: &HashMap<usize, &Shown>) -> usize {
    match primaries.get(&shown.made) {
        Some(primary) if primary.path != shown.path => shown.entry,
        _ => shown.made,
    }
}

/// How that entry must be changed.
fn change(names: &Names, shown: &Shown, primaries: &HashMap<usize, &Shown>) -> Option<Change> {
    let record = record_of(shown, primaries);
    let target = primaries
        .get(&shown.made)
        .filter(|_| record != shown.made)
        .map(|primary| &primary.path);
    let link = target
        .filter(|target| names.kind(record) != Kind::Hardlink(target))
        .cloned();
    let is_same = link.is_none() && names.path(record) == shown.path;
    (!is_same).then(|| Change::Renamed {
        path: shown.path.clone(),
        link,
    })
}

/// Path and kind of a record.
fn described<'a>(names: &'a Names, record: usize, change: Option<&'a Change>) -> (&'a [u8], Kind<'a>) {
    match change {
        Some(Change::Renamed {
            path,
            link: Some(link),
        }) => (path, Kind::Hardlink(link)),
        Some(Change::Renamed { path, link: None }) => (path, names.kind(record)),
        Some(Change::Hidden) | None => (names.path(record), names.kind(record)),
    }
}

fn whiteout_of(path: &[u8]) -> Vec<u8> {
    let parent = parent_of(path);
    let start = if parent.is_empty() { 0 } else { parent.len() + 1 };
    let name = path.get(start..).unwrap_or_default();
    [path.get(..start).unwrap_or_default(), WHITEOUT, name].concat()
}

fn refusal(names: &Names, impossible: Impossible) -> WriteError {
    let (index, what) = match impossible {
        Impossible::TooMany => return WriteError::TooMany,
        Impossible::BelowFile(index) => (
            index,
            "it lies below an entry of the same layer that is no directory",
        ),
        Impossible::TooDeep(index) => (
            index,
            "symbolic links of the same layer lead it in circles or too deep",
        ),
        Impossible::ToDirectory(index) => (index, "it is a hard link to a directory"),
        Impossible::Root(index) => (index, "it would replace the root directory with something else"),
    };
    WriteError::Impossible {
        entry: String::from_utf8_lossy(names.path(index)).into_owned(),
        what,
    }
}
