//! A TOC in parts, which several threads read at once, and its digest beside that. Called by [`super::read_index_by`] and
//! [`super::read_verified`].
//!
//! Where an entry begins is a guess: a brace behind a brace and a comma. The part before it shows whether it is right, by ending
//! there exactly; so what comes out is what comes out of the whole, whatever the number of threads. Where that is not so, where
//! an entry is wrong, or where the JSON is not as all writers write it, nothing comes out, and [`super::whole`] has the word.

use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::build::Builder;
use super::record::Record;
use super::{Rules, scan, whole};
use crate::estargz::toc::TocEntry;
use crate::layer::LayerIndex;
use peel_hash::Digest;

/// JSON of one part in bytes: some hundred entries, whose records stay in a processor's cache.
const PART: usize = 128 << 10;
/// Shortest JSON that is worth a thread.
const LONG: usize = 1 << 20;
/// Most threads beside the caller's. The caller's puts everything together, and cannot do that for many.
const HELPERS_MAX: usize = 3;
/// JSON of a file with two digests in bytes. A guess.
const USUAL_ENTRY: usize = 250;
/// Parts that are begun but not yet in the index, for each thread. Bounds the memory.
const AHEAD: usize = 4;
/// Longest JSON behind the list of entries. Podman writes the digest of the tar-split there.
const TAIL_MAX: usize = 64 << 10;
/// A part takes a millisecond. Whoever waits for so long waits for a thread that is no more.
const STALLED: Duration = Duration::from_secs(60);

/// How a TOC is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Plan {
    /// Threads beside the caller's.
    pub(super) helpers: usize,
    /// JSON of one part in bytes.
    pub(super) part: usize,
    /// Whether the JSON is hashed.
    pub(super) hash: bool,
}

impl Plan {
    /// What a TOC of `length` bytes deserves on this machine.
    pub(super) fn new(length: usize, hash: bool) -> Self {
        let cores = || thread::available_parallelism().map_or(1, usize::from);
        Self {
            helpers: if length < LONG {
                0
            } else {
                (cores() - 1).min(HELPERS_MAX)
            },
            part: PART,
            hash,
        }
    }
}

/// Reads a TOC, and hashes it if asked to. No index if there is anything unusual about it. Nothing is wrong with making one of JSON
/// whose digest turns out to be another, as long as the caller compares that before it looks at the index: memory and time are
/// bounded by the length of the JSON, and no more parts are read once one of them does not fit.
pub(super) fn read(json: &[u8], rules: &Rules, plan: Plan) -> (Option<LayerIndex>, Option<Digest>) {
    let Plan { helpers, part, hash } = plan;
    let Some(parts) = Parts::new(json, part) else {
        return (None, hash.then(|| Digest::of(json)));
    };
    let (index, digest) = thread::scope(|scope| {
        let window = AHEAD * (helpers + 1);
        let (tickets, taken) = bounded(window);
        let (sender, receiver) = bounded(window);
        let helpers: Vec<_> = (0..helpers)
            .map_while(|number| {
                let (taken, sender) = (taken.clone(), sender.clone());
                let work = move || {
                    let digest = (hash && number == 0).then(|| Digest::of(json));
                    for number in taken {
                        if sender.send((number, parts.part(number))).is_err() {
                            break;
                        }
                    }
                    digest
                };
                let name = format!("toc-{number}");
                thread::Builder::new().name(name).spawn_scoped(scope, work).ok()
            })
            .collect();
        drop(sender);
        let index = Assembly {
            parts,
            tickets,
            taken,
            receiver,
        }
        .index(rules, window);
        let digests = helpers.into_iter().map(|helper| helper.join().ok().flatten());
        (index, digests.fold(None, Option::or))
    });
    (index, digest.or_else(|| hash.then(|| Digest::of(json))))
}

/// A TOC cut into parts.
#[derive(Clone, Copy)]
struct Parts<'a> {
    json: &'a [u8],
    /// The first entry.
    start: usize,
    /// JSON of one part in bytes.
    length: usize,
}

/// The entries of one part.
struct Part {
    /// Where the first one begins.
    start: usize,
    records: Vec<Record>,
    end: End,
}

/// What is behind the last entry of a part.
enum End {
    /// The next entry begins here.
    Entry(usize),
    /// The list of entries ended before this.
    List(usize),
}

impl<'a> Parts<'a> {
    fn new(json: &'a [u8], length: usize) -> Option<Self> {
        let start = scan::opening(json)?;
        let start = start + scan::space(json.get(start..)?);
        Some(Self { json, start, length })
    }

    fn count(&self) -> usize {
        (self.json.len() - self.start).div_ceil(self.length)
    }

    /// Where the part of this number seems to begin. `None` if an entry is longer than a part.
    fn guess(&self, number: usize) -> Option<usize> {
        let from = self.start + number * self.length;
        if number == 0 || from >= self.json.len() {
            return Some(from.min(self.json.len()));
        }
        let rest = self.json.get(from..)?;
        let near = rest.get(..self.length).unwrap_or(rest);
        let mut braces = near.iter().enumerate().filter(|(_, byte)| **byte == b'}');
        let behind_brace = braces.find_map(|(brace, _)| {
            let next = near.get(brace + 1..)?.strip_prefix(b",")?;
            let space = scan::space(next);
            (next.get(space) == Some(&b'{')).then_some(from + brace + 2 + space)
        });
        behind_brace.or_else(|| (near.len() == rest.len()).then_some(self.json.len()))
    }

    /// Reads the part of this number. `None` if there is anything unusual or wrong.
    fn part(&self, number: usize) -> Option<Part> {
        let start = self.guess(number)?;
        let limit = self.guess(number + 1)?;
        let mut at = start;
        let mut records = Vec::with_capacity(limit.saturating_sub(start).min(PART) / USUAL_ENTRY);
        while at < limit {
            let rest = self.json.get(at..)?;
            let mut entry = TocEntry::default();
            let length = read_entry(rest, &mut entry)?;
            records.push(Record::new(&entry).ok()?);
            let behind = rest.get(length..)?;
            let space = scan::space(behind);
            at += length + space + 1;
            match behind.get(space)? {
                b',' => at += scan::space(self.json.get(at..)?),
                b']' => {
                    let end = End::List(at);
                    return Some(Part { start, records, end });
                }
                _ => return None,
            }
        }
        let end = End::Entry(at);
        Some(Part { start, records, end })
    }
}

/// Reads the entry at the start of `json` and returns its length in bytes. `entry` must be the default one.
fn read_entry<'a>(json: &'a [u8], entry: &mut TocEntry<'a>) -> Option<usize> {
    if let Some(length) = scan::entry(json, entry) {
        return Some(length);
    }
    // Serde would take a list, too, and other things behind it.
    json.starts_with(b"{").then_some(())?;
    let mut values = serde_json::Deserializer::from_slice(json).into_iter::<TocEntry<'_>>();
    *entry = values.next()?.ok()?;
    Some(values.byte_offset())
}

/// Where the parts come together.
struct Assembly<'a> {
    parts: Parts<'a>,
    /// Gives a part to whoever takes it next.
    tickets: Sender<usize>,
    taken: Receiver<usize>,
    /// Parts that helpers have read.
    receiver: Receiver<(usize, Option<Part>)>,
}

impl Assembly<'_> {
    fn index(self, rules: &Rules, window: usize) -> Option<LayerIndex> {
        let (json, count) = (self.parts.json, self.parts.count());
        for number in 0..count.min(window) {
            self.tickets.send(number).ok()?;
        }
        let mut builder = Builder::new(rules);
        let mut at = self.parts.start;
        // Those that are there before their turn; never more than tickets.
        let mut early: Vec<(usize, Option<Part>)> = Vec::with_capacity(window);
        for number in 0..count {
            let part = loop {
                if let Some(place) = early.iter().position(|(early, _)| *early == number) {
                    break early.swap_remove(place).1?;
                }
                let ready = self.receiver.try_recv().ok();
                let own = || {
                    let ticket = self.taken.try_recv().ok()?;
                    Some((ticket, self.parts.part(ticket)))
                };
                let theirs = || self.receiver.recv_timeout(STALLED).ok();
                early.push(ready.or_else(own).or_else(theirs)?);
            };
            if part.start != at {
                return None;
            }
            for record in part.records {
                builder.add(record).ok()?;
            }
            if number + window < count {
                self.tickets.send(number + window).ok()?;
            }
            match part.end {
                End::Entry(next) => at = next,
                End::List(end) => {
                    closes(json.get(end..)?, rules)?;
                    return builder.finish().ok();
                }
            }
        }
        None
    }
}

/// Whether what is behind the list of entries is the end of a TOC.
fn closes(tail: &[u8], rules: &Rules) -> Option<()> {
    if tail.len() > TAIL_MAX {
        return None;
    }
    let json = [b"{\"entries\":[]", tail].concat();
    whole::read(&json, rules).ok().map(drop)
}

#[cfg(test)]
mod tests;
