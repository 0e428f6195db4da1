//! The objects that the service knows: contents of files, named by their sha256, whoever's image they belong to.
//!
//! The [`Table`] gives every object a number for the life of the service, from which its inode number follows. An
//! [`Object`] holds what changes: the images that can bring it, how much of it is here, which chunks are on their way,
//! and the reads that wait.
//!
//! Locks: one per object and one for the table, both held for a few instructions, never across I/O, and never one
//! inside the other.

mod snapshot;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::time::{Duration, Instant};

use peel_image::layer::{Chunk, ChunkSource};
use peel_image::{Digest, Hasher};
use peel_store::{ChunkState, PartialObject};

use crate::fetch::layer::{Layer, LayerFile};
use crate::lock;
pub(crate) use snapshot::Snapshot;

/// Which list of chunks describes an object.
///
/// A list of one chunk, or of zeros alone, is vouched for by the object's own name; any other is only as good as the TOC that it stands
/// in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ListId {
    /// No chunks: only the whole layer brings the object.
    Whole,
    /// One chunk, the whole file, of this size.
    Single(u64),
    /// Nothing but zeros, this many, says the TOC: its word is not taken for it, but found false it must not speak against the bytes
    /// that others have for the object.
    Zeros(u64),
    /// Several chunks: hash over sizes and digests, and which are runs of zeros.
    Several(Digest),
}

impl ListId {
    /// Identifies the list of a file of `size` bytes. Where in which blob the chunks lie does not matter; whether they are runs of
    /// zeros does, because those are answered by this word of the TOC alone, before the whole file is here.
    pub(crate) fn of(size: u64, chunks: &[Chunk]) -> Self {
        match chunks {
            [] => Self::Whole,
            [chunk] if chunk.source == ChunkSource::Zeros => Self::Zeros(size),
            [_] => Self::Single(size),
            _ => {
                let mut hasher = Hasher::new();
                for chunk in chunks {
                    hasher.update(&chunk.file_offset.to_le_bytes());
                    hasher.update(&chunk.size.to_le_bytes());
                    hasher.update(chunk.digest.as_bytes());
                    hasher.update(&[u8::from(chunk.source == ChunkSource::Zeros)]);
                }
                Self::Several(hasher.finish())
            }
        }
    }
}

/// How long a chunk list that images disagree about may bring nothing before another one has its turn: longer than the pauses
/// of a registry that works, much shorter than reads wait.
const STUCK: Duration = Duration::from_secs(2);

/// How soon after a read in vain the kernel's second one comes: at once, but both have to pass through threads that may be busy.
const AGAIN: Duration = Duration::from_millis(500);
/// Reads in vain of one object that are kept for that.
const MAX_GIVEN_UP: usize = 64;

/// A layer that can bring an object.
#[derive(Debug, Clone)]
pub(crate) struct Source {
    /// The layer.
    pub(crate) layer: Arc<Layer>,
    /// Index into its files.
    pub(crate) file: u32,
}

impl Source {
    /// The file in that layer.
    pub(crate) fn file(&self) -> Option<&LayerFile> {
        self.layer.files.get(self.file as usize)
    }
}

/// How much of an object is here.
#[derive(Debug, Clone, Default)]
pub(crate) enum Backing {
    /// Nobody has looked yet.
    #[default]
    Unknown,
    /// Nothing that could be read piece by piece.
    Nothing,
    /// The disk does not take a partial object: chunks are in memory only.
    Unkept,
    /// Some chunks may be here.
    Partial(Arc<PartialObject>),
    /// All of it, verified, but the disk has not confirmed it: what is read is hashed again.
    Pending,
    /// All of it, in the store's objects. The file is there while the object is open.
    Complete(Option<Arc<File>>),
}

/// A chunk between the decision to fetch it and its rest on disk.
#[derive(Debug, Clone)]
pub(crate) enum Flight {
    /// Somebody holds the claim to bring it.
    Claimed,
    /// Verified, in memory: being written, or waiting for a disk that takes it.
    Writing(Arc<Vec<u8>>),
}

/// How a read that had to wait is answered: bytes or EIO. Called once; dropping it answers EIO.
pub(crate) type Answer = Box<dyn FnOnce(Result<&[u8], rustix::io::Errno>) + Send>;

/// A read that waits for chunks.
pub(crate) struct Waiter {
    pub(crate) offset: u64,
    pub(crate) length: usize,
    pub(crate) deadline: Instant,
    /// Chunks that it still waits for; with [`Waiter::whole`], it waits for the whole object besides.
    pub(crate) missing: BTreeSet<u32>,
    /// The read may only be answered once the object is complete.
    pub(crate) whole: bool,
    pub(crate) answer: Answer,
}

impl std::fmt::Debug for Waiter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Waiter({}+{}, missing {:?})",
            self.offset, self.length, self.missing
        )
    }
}

/// What changes of an object.
#[derive(Debug, Default)]
pub(crate) struct State {
    /// Who can bring it.
    pub(crate) sources: Vec<Source>,
    /// How much is here.
    pub(crate) backing: Backing,
    /// The chunk list by which bytes were or are exposed.
    pub(crate) list: Option<ListId>,
    /// Images disagree about the chunk list: nothing is exposed before the whole hash was checked.
    pub(crate) strict: bool,
    /// The list by which all of the object was brought and its whole hash was right.
    pub(crate) proven: Option<ListId>,
    /// Images disagree about the length: nobody is told it before the object is complete. Implies `strict`.
    disputed: bool,
    /// Which of the lists that images disagree about is to be used next; see [`State::turn`].
    turn: u32,
    /// Turns that wrong chunks led to since reads failed or the object was complete.
    pub(crate) wrong_turns: usize,
    /// When the list in use was chosen or last brought a chunk.
    pub(crate) progress: Option<Instant>,
    /// Bytes that were found false may be in the kernel's cache: a mark of the time that they were; 0 if there are none.
    pub(crate) tainted: u32,
    /// Lists that led to a file with another hash.
    pub(crate) false_lists: Vec<ListId>,
    /// Counts changes of the list: what was claimed under an earlier one no longer matters.
    pub(crate) generation: u32,
    /// FUSE opens.
    pub(crate) opens: u32,
    /// Chunks on their way, by index.
    pub(crate) flights: BTreeMap<u32, Flight>,
    /// Verified chunks that are still in memory, because the disk has not confirmed them.
    pub(crate) recent: BTreeMap<u32, Arc<Vec<u8>>>,
    /// Reads that wait.
    pub(crate) waiters: Vec<Waiter>,
    /// Chunks whose bytes were wrong once; the next time the reads that wait fail.
    pub(crate) wrong: BTreeSet<u32>,
    /// Failed fetches since the last good one.
    pub(crate) failures: u32,
    /// The disk keeps it from being completed, and that was said.
    pub(crate) unkept: bool,
    /// Sources that will not give what was wanted of them: number of the image, and layer.
    refused: Vec<(u64, Digest)>,
    /// Ranges of reads whose time was over, and when.
    given_up: Vec<(Range<u64>, Instant)>,
}

impl State {
    /// The source to fetch from: one with the list in use. Takes turns after failures.
    pub(crate) fn source(&self) -> Option<Source> {
        let list = self.list_to_use()?;
        let refused = self.refused_by_all(list);
        let usable = || {
            self.usable()
                .filter(|(source, file)| file.list == list && (refused || !self.has_refused(&source.layer)))
                .map(|(source, _)| source)
        };
        let turn = usize::try_from(self.failures).unwrap_or(0);
        usable().nth(turn.checked_rem(usable().count())?).cloned()
    }

    fn has_refused(&self, layer: &Layer) -> bool {
        self.refused.contains(&(layer.image, layer.digest))
    }

    fn refused_by_all(&self, list: ListId) -> bool {
        self.usable()
            .filter(|(_, file)| file.list == list)
            .all(|(source, _)| self.has_refused(&source.layer))
    }

    /// The layer will not give what was wanted of it. True if that goes for all that could: then all of them may be asked again.
    pub(crate) fn refuse(&mut self, layer: &Layer) -> bool {
        if !self.has_refused(layer) {
            self.refused.push((layer.image, layer.digest));
        }
        let all = self.list.is_none_or(|list| self.refused_by_all(list));
        if all {
            self.refused.clear();
        }
        all
    }

    /// Whether chunks may be fetched by this file's list.
    pub(crate) fn may_use(&self, file: &LayerFile) -> bool {
        file.list != ListId::Whole
            && !self.false_lists.contains(&file.list)
            && self.list_to_use().is_none_or(|list| list == file.list)
    }

    /// The list in use, or the one to begin with.
    fn list_to_use(&self) -> Option<ListId> {
        if self.list.is_some() {
            return self.list;
        }
        if !self.strict {
            return self.usable().next().map(|(_, file)| file.list);
        }
        let lists = self.lists();
        let turn = usize::try_from(self.turn).unwrap_or(0);
        lists.get(turn.checked_rem(lists.len())?).copied()
    }

    /// The sources that chunks may be fetched from, by whichever list.
    fn usable(&self) -> impl Iterator<Item = (&Source, &LayerFile)> {
        self.sources
            .iter()
            .filter(|source| !source.layer.is_closed())
            .filter_map(|source| Some((source, source.file()?)))
            .filter(|(_, file)| file.list != ListId::Whole && !self.false_lists.contains(&file.list))
    }

    /// The lists that may be used, those of short files first: whoever is wrong about a file must not make others fetch more than
    /// the file that they want.
    fn lists(&self) -> Vec<ListId> {
        let mut lists: Vec<(u64, ListId)> = Vec::new();
        for (_, file) in self.usable() {
            if lists.iter().all(|(_, list)| *list != file.list) {
                lists.push((file.size(), file.list));
            }
        }
        lists.sort_by_key(|(size, _)| *size);
        lists.into_iter().map(|(_, list)| list).collect()
    }

    /// How many lists may be used.
    pub(crate) fn choices(&self) -> usize {
        self.lists().len()
    }

    /// Lets another list be used where images disagree: by the one in use nothing was exposed, and it leads nowhere. False when there
    /// is no other. The reads that wait have to start over.
    pub(crate) fn turn(&mut self) -> bool {
        if !self.strict || self.choices() < 2 {
            return false;
        }
        self.turn = self.turn.wrapping_add(1);
        self.failures = 0;
        self.change_list();
        true
    }

    /// Whether the list in use has brought nothing for so long that another one should have its turn.
    pub(crate) fn is_stuck(&self) -> bool {
        self.progress.is_none_or(|progress| progress.elapsed() >= STUCK)
    }

    /// The list in use, if any, has led to a file with another hash. From now on nothing is exposed before the object is complete.
    pub(crate) fn falsify(&mut self) {
        self.false_lists.extend(self.list);
        if !self.strict {
            self.strict = true;
            self.tainted = self.tainted.wrapping_add(1).max(1);
        }
        self.change_list();
    }

    /// Leaves the chunk list in use, and all that came by it.
    pub(crate) fn change_list(&mut self) {
        self.generation = self.generation.wrapping_add(1);
        self.flights.clear();
        self.recent.clear();
        self.wrong.clear();
        self.list = None;
        self.progress = None;
        self.unkept = false;
        self.backing = Backing::Unknown;
    }

    /// Chunks are fetched by this list from now on.
    pub(crate) fn use_list(&mut self, list: ListId) {
        if self.list != Some(list) {
            self.progress = Some(Instant::now());
        }
        self.list = Some(list);
    }

    /// Lets go of files that nobody needs open: a process may only have so many.
    pub(crate) fn rest(&mut self) {
        if self.opens > 0 || !self.flights.is_empty() || !self.waiters.is_empty() {
            return;
        }
        match &mut self.backing {
            Backing::Partial(_) | Backing::Unkept => {
                self.backing = Backing::Unknown;
                // The next one to open it counts its chunks anew; one that is only in memory would never be
                // counted.
                self.recent.clear();
            }
            Backing::Complete(file) => *file = None,
            Backing::Unknown | Backing::Nothing | Backing::Pending => {}
        }
    }

    /// Whether nothing may be exposed before the object is complete. The chunks of a list that led to the
    /// right whole are right, also while the disk has not confirmed the object.
    pub(crate) fn is_withheld(&self) -> bool {
        self.strict && !self.is_proven()
    }

    fn is_proven(&self) -> bool {
        matches!(self.backing, Backing::Pending) && self.list.is_some() && self.list == self.proven
    }

    /// The bytes of a range, if they are here and may be exposed.
    pub(crate) fn snapshot(&self, offset: u64, length: usize) -> Option<Snapshot> {
        if let Backing::Complete(_) = self.backing {
            return Some(Snapshot::complete(&self.backing));
        }
        if self.is_proven() && matches!(self.list, Some(ListId::Zeros(_))) {
            return Some(Snapshot::zeros());
        }
        if self.is_withheld() {
            return None;
        }
        let source = self.source()?;
        let chunks = &source.file()?.chunks;
        let (mut memory, mut holes) = (Vec::new(), Vec::new());
        for index in chunks_under(chunks, offset, length) {
            if self.has(index) != Presence::Here {
                return None;
            }
            holes.extend(self.pending_hole(index));
            let in_memory = match self.flights.get(&index) {
                Some(Flight::Writing(bytes)) => Some(bytes),
                _ => self.recent.get(&index),
            };
            if let (Some(bytes), Some(chunk)) = (in_memory, chunks.get(index as usize)) {
                memory.push((chunk.file_offset, Arc::clone(bytes)));
            }
        }
        Some(Snapshot::new(&self.backing, memory, holes).doubt_holes(!self.is_proven()))
    }

    /// Where in the file the chunk is, if it is a run of zeros in a pending object of several chunks: it is here by the word of the
    /// list in use, as in a partial object. But nobody hashes the whole by a list that did not bring it: then the file is looked at.
    fn pending_hole(&self, chunk: u32) -> Option<Range<u64>> {
        let (Backing::Pending, Some(list @ ListId::Several(_))) = (&self.backing, self.list) else {
            return None;
        };
        let (_, file) = self.usable().find(|(_, file)| file.list == list)?;
        let chunk = file.chunks.get(chunk as usize)?;
        let end = chunk.file_offset.saturating_add(chunk.size);
        (chunk.source == ChunkSource::Zeros).then_some(chunk.file_offset..end)
    }

    /// Whether the disk has confirmed the chunk.
    pub(crate) fn is_confirmed(&self, chunk: u32) -> bool {
        match &self.backing {
            Backing::Complete(_) => true,
            Backing::Partial(partial) => partial.state(chunk as usize) == ChunkState::Present,
            Backing::Unknown | Backing::Nothing | Backing::Unkept | Backing::Pending => false,
        }
    }

    /// Whether the chunk is here or on its way.
    pub(crate) fn has(&self, chunk: u32) -> Presence {
        if let Backing::Complete(_) = self.backing {
            return Presence::Here;
        }
        match self.flights.get(&chunk) {
            Some(Flight::Claimed) => return Presence::Coming,
            Some(Flight::Writing(_)) => return Presence::Here,
            None if self.recent.contains_key(&chunk) => return Presence::Here,
            None => {}
        }
        let partial = match &self.backing {
            Backing::Partial(partial) => partial,
            Backing::Pending if self.pending_hole(chunk).is_some() => return Presence::Here,
            Backing::Pending => return Presence::Unconfirmed,
            _ => return Presence::Missing,
        };
        match partial.state(chunk as usize) {
            ChunkState::Present => Presence::Here,
            ChunkState::Unconfirmed => Presence::Unconfirmed,
            ChunkState::Unverified => Presence::Unverified,
            ChunkState::Missing => Presence::Missing,
        }
    }
}

/// Numbers of the chunks that hold a range of the file.
pub(crate) fn chunks_under(chunks: &[Chunk], offset: u64, length: usize) -> Range<u32> {
    let end = offset.saturating_add(length as u64);
    let first = chunks.partition_point(|chunk| chunk.file_offset.saturating_add(chunk.size) <= offset);
    let last = chunks.partition_point(|chunk| chunk.file_offset < end);
    let number = |index: usize| u32::try_from(index).unwrap_or(u32::MAX);
    number(first)..number(last.max(first))
}

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Presence {
    /// Verified: in memory, or on disk and confirmed.
    Here,
    /// Claimed.
    Coming,
    /// On disk from an earlier process.
    Unverified,
    /// Verified once, and on disk as far as the kernel has said until now.
    Unconfirmed,
    /// Nowhere.
    Missing,
}

/// The content of a file.
#[derive(Debug)]
pub(crate) struct Object {
    /// Its name.
    pub(crate) digest: Digest,
    /// Its place in the table.
    pub(crate) number: u32,
    size: AtomicU64,
    /// An overlay may have found it in FUSE since the overlays were last made to forget.
    pub(crate) seen: AtomicBool,
    /// What changes.
    pub(crate) state: Mutex<State>,
}

impl Object {
    /// Length in bytes: of a complete object the right one, else what the first image that named it says.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Relaxed)
    }

    /// Length in bytes, as far as it may be told to the kernel: `None` while images disagree about it.
    pub(crate) fn known_size(&self) -> Option<u64> {
        let disputed = lock(&self.state).disputed;
        (!disputed).then(|| self.size())
    }

    /// The object is complete and this long. True when the kernel may have been told otherwise.
    pub(crate) fn settle_size(&self, state: &mut State, size: u64) -> bool {
        state.disputed = false;
        self.size.swap(size, Ordering::Relaxed) != size
    }

    /// Adds a source. When the images disagree about the chunk list or the length from now on, returns the reads that wait, which
    /// have to start over; and what the kernel may have cached of the object must go.
    pub(crate) fn add_source(&self, source: Source) -> Option<Vec<Waiter>> {
        let file = source.file()?;
        let (list, size) = (file.list, file.size());
        let mut state = lock(&self.state);
        let files = || state.sources.iter().filter_map(Source::file);
        let known = state
            .list
            .or_else(|| files().map(|file| file.list).find(|list| *list != ListId::Whole));
        let known_size = files().find(|file| Some(file.list) == known).map(LayerFile::size);
        state.sources.push(source);
        if list == ListId::Whole {
            return None;
        }
        let other_list = known.is_some_and(|known| known != list);
        let other_size = size != self.size();
        if let Backing::Complete(_) = state.backing {
            // It may go again: then the lists count.
            state.strict |= other_list || other_size;
            return None;
        }
        let news = (other_list && !state.strict) || (other_size && !state.disputed) || state.tainted != 0;
        state.strict |= other_list || other_size;
        state.disputed |= other_size;
        let shorter = other_list && known_size.is_some_and(|known| size < known);
        // The list in use may also be that of an image which is gone; nobody could go on with it.
        if shorter || (news && state.source().is_none()) {
            state.turn = 0;
            state.change_list();
        }
        (news || shorter).then(|| std::mem::take(&mut state.waiters))
    }

    /// Removes the sources of an image. Returns the reads that have to start over: those that nobody can answer any more, and
    /// those that wait for the chunks of a list that nobody has any more.
    pub(crate) fn remove_image(&self, image: u64) -> Vec<Waiter> {
        let mut state = lock(&self.state);
        state.sources.retain(|source| source.layer.image != image);
        if matches!(state.backing, Backing::Complete(_)) {
            return Vec::new();
        }
        let changed = state.strict && state.source().is_none();
        if changed {
            state.change_list();
        }
        if changed || state.sources.is_empty() {
            // Claims that are under way resolve by themselves.
            return std::mem::take(&mut state.waiters);
        }
        Vec::new()
    }

    /// Takes the reads whose time is over.
    pub(crate) fn expired(&self, now: Instant) -> Vec<Waiter> {
        let mut state = lock(&self.state);
        let (expired, waiting) = std::mem::take(&mut state.waiters)
            .into_iter()
            .partition::<Vec<_>, _>(|waiter: &Waiter| waiter.deadline <= now);
        state.waiters = waiting;
        state.given_up.retain(|(_, when)| when.elapsed() < AGAIN);
        let room = MAX_GIVEN_UP.saturating_sub(state.given_up.len());
        let ranges = expired.iter().take(room).map(|waiter: &Waiter| {
            let end = waiter.offset.saturating_add(waiter.length as u64);
            (waiter.offset..end, Instant::now())
        });
        state.given_up.extend(ranges);
        state.rest();
        expired
    }

    /// Whether a read of this range has just been in vain. True once for each: where a read ahead has failed, the kernel asks for its first
    /// page again, which nobody should have to wait for twice.
    pub(crate) fn gave_up(&self, offset: u64, length: usize) -> bool {
        let mut state = lock(&self.state);
        if state.given_up.is_empty() {
            return false;
        }
        state.given_up.retain(|(_, when)| when.elapsed() < AGAIN);
        let end = offset.saturating_add(length as u64);
        let inside = |(range, _): &(Range<u64>, Instant)| range.start <= offset && end <= range.end;
        let place = state.given_up.iter().position(inside);
        place.map(|place| state.given_up.swap_remove(place)).is_some()
    }

    /// A path by which some image knows the object, for messages, with the digest of its layer.
    pub(crate) fn describe(&self) -> String {
        let state = lock(&self.state);
        match state.sources.first() {
            Some(source) => {
                let path = source
                    .file()
                    .map(|file| file.path.to_string())
                    .unwrap_or_default();
                format!("{path} of layer {}", source.layer.digest)
            }
            None => format!("object {}", self.digest),
        }
    }
}

impl Numbered {
    fn add(&mut self, digest: &Digest, size: u64) -> u32 {
        if let Some(number) = self.by_digest.get(digest) {
            return *number;
        }
        // Each object costs some 200 bytes of memory: four billion of them do not fit.
        let number = u32::try_from(self.objects.len()).unwrap_or(u32::MAX);
        self.objects.push(Arc::new(Object {
            digest: *digest,
            number,
            size: AtomicU64::new(size),
            seen: AtomicBool::new(false),
            state: Mutex::default(),
        }));
        self.by_digest.insert(*digest, number);
        number
    }
}

/// All objects, by digest and by number.
#[derive(Debug, Default)]
pub(crate) struct Table(RwLock<Numbered>);

#[derive(Debug, Default)]
struct Numbered {
    by_digest: HashMap<Digest, u32>,
    objects: Vec<Arc<Object>>,
}

impl Table {
    /// Numbers of objects, in order; those that are not known are added.
    pub(crate) fn add_all<'a>(&self, objects: impl ExactSizeIterator<Item = (&'a Digest, u64)>) -> Vec<u32> {
        let mut table = self.0.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        table.by_digest.reserve(objects.len());
        table.objects.reserve(objects.len());
        objects.map(|(digest, size)| table.add(digest, size)).collect()
    }

    /// The object of that number.
    pub(crate) fn get(&self, number: u32) -> Option<Arc<Object>> {
        let table = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        table.objects.get(number as usize).cloned()
    }

    /// The object of that name.
    pub(crate) fn find(&self, digest: &Digest) -> Option<Arc<Object>> {
        let table = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let number = table.by_digest.get(digest)?;
        table.objects.get(*number as usize).cloned()
    }

    /// All objects.
    pub(crate) fn all(&self) -> Vec<Arc<Object>> {
        let table = self.0.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        table.objects.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_differ_by_what_is_answered_without_a_look() {
        let chunk = |file_offset, source| Chunk {
            file_offset,
            size: 10,
            digest: Digest::of(b"chunk"),
            source,
        };
        let blob = |offset| ChunkSource::Blob {
            encoding: peel_image::layer::Encoding::Zstd,
            offset,
            compressed_size: 5,
            inner_offset: 0,
        };
        let list = |first, second| ListId::of(20, &[chunk(0, first), chunk(10, second)]);
        assert_eq!(list(blob(0), blob(5)), list(blob(70), blob(90)));
        // A false word about zeros in one image must not be believed by another.
        assert_ne!(list(blob(0), blob(5)), list(blob(0), ChunkSource::Zeros));
        let single = |source| ListId::of(10, &[chunk(0, source)]);
        assert_ne!(single(blob(0)), single(ChunkSource::Zeros));
    }

    #[test]
    fn numbers_stay_with_their_digest() {
        let table = Table::default();
        let (a, b) = (Digest::of(b"a"), Digest::of(b"b"));
        let numbers = table.add_all([(&a, 1), (&b, 2)].into_iter());
        let (first, second) = (numbers[0], numbers[1]);
        assert_ne!(first, second);
        assert_eq!(table.add_all([(&a, 99)].into_iter()), [first]);
        assert_eq!(table.find(&a).unwrap().size(), 1, "the first size counts");
        assert_eq!(table.get(second).unwrap().digest, b);
        assert!(table.find(&Digest::EMPTY).is_none());
    }

    #[test]
    fn reads_expire_at_their_deadline() {
        let table = Table::default();
        let object = table
            .get(table.add_all([(&Digest::EMPTY, 10)].into_iter())[0])
            .unwrap();
        let now = Instant::now();
        for seconds in [1, 3] {
            lock(&object.state).waiters.push(Waiter {
                offset: 0,
                length: 1,
                deadline: now + std::time::Duration::from_secs(seconds),
                missing: BTreeSet::from([0]),
                whole: false,
                answer: Box::new(|_| {}),
            });
        }
        assert_eq!(object.expired(now).len(), 0);
        assert_eq!(object.expired(now + std::time::Duration::from_secs(2)).len(), 1);
        assert_eq!(lock(&object.state).waiters.len(), 1);
    }
}
