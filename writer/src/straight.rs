//! A blob whose entries stay in the order of the input: it comes out while the input is read, and nothing is spooled.
//!
//! It has the same bytes as one that went through the spool. That entries stay is known beforehand but for one thing: an entry
//! may take the place of an earlier one, or lead through one. The first such entry is an error, after which the caller begins
//! again through the spool; layers that have one are rare.

use std::io::{Read, Write};
use std::thread;

use crossbeam_channel::{Receiver, Sender};

use super::assembly::Assembled;
use super::names::{Described, Kind};
use super::outlet::Outlet;
use super::pack::Packing;
use super::record::Record;
use super::seen::Seen;
use super::tables::{self, Role, Tables};
use super::toc::Placed;
use super::{Settings, WriteError, blob, hashing, intake, sink};
use peel_image::path::EntryPath;
use peel_image::tar::write::padding;

/// Writes all but the TOC; beside that, the number of entries.
pub(super) fn run<R, W>(input: R, output: W, settings: &Settings) -> Result<(Assembled<W>, u64), WriteError>
where
    R: Read,
    W: Write + Send,
{
    thread::scope(|scope| {
        let (messages, toc) = sink::start(scope, settings.shape, settings.split_file)?;
        let hash = hashing::start(scope, true, settings.waiting())?;
        let blob = blob::start(scope, output, hash.work.clone(), settings.waiting())?;
        let outlet = Straight {
            tables: Tables::new(settings, settings.split_file, messages),
            unwritten: blob.unwritten,
            rooms: hash.rooms,
            size: 0,
            seen: Seen::default(),
            entries: 0,
            next: settings.landmark().map_or(Role::Other, |_| Role::Landmark),
        };
        // In any case this drops the outlet, and with it the channels that the threads wait for.
        let outcome = intake::run(input, outlet, hash.work, settings)
            .and_then(|outlet| Ok((outlet.tables.finish()?, outlet.entries)));
        // An error of these threads is why the intake cannot reach them.
        let mut blob = blob.thread.join().map_err(|_| WriteError::ThreadLost)??;
        let toc = toc.join().map_err(|_| WriteError::ThreadLost)??;
        let (tar, hash) = hash.thread.join().map_err(|_| WriteError::ThreadLost)?;
        blob.set_hash(hash);
        let (marks, entries) = outcome?;
        let tar = tar.ok_or(WriteError::ThreadLost)?;
        let assembled = Assembled {
            blob,
            toc,
            tar,
            marks,
        };
        Ok((assembled, entries))
    })
}

struct Straight {
    tables: Tables,
    unwritten: Sender<Vec<u8>>,
    /// Buffers whose bytes were written.
    rooms: Receiver<Vec<u8>>,
    /// Bytes of the blob so far.
    size: u64,
    seen: Seen,
    entries: u64,
    /// What the next entry is for.
    next: Role,
}

impl Outlet for Straight {
    fn packing(&self) -> Packing {
        Packing::Stream(self.rooms.clone())
    }

    fn append_name(
        &mut self,
        path: &EntryPath,
        kind: Kind<'_>,
        _metadata: Described,
    ) -> Result<(), WriteError> {
        self.entries += 1;
        if self.seen.insert(path.as_bytes(), kind) {
            return Ok(());
        }
        Err(WriteError::Duplicate {
            entry: path.to_string(),
        })
    }

    fn append(&mut self, data: Vec<u8>) -> Result<u64, WriteError> {
        let start = self.size;
        self.size += data.len() as u64;
        self.unwritten.send(data).map_err(|_| WriteError::ThreadLost)?;
        Ok(start)
    }

    fn append_record(&mut self, mut record: Record) -> Result<(), WriteError> {
        let entry = tables::describe(&mut record)?;
        let after = record.padding.take();
        let after = after.as_deref().unwrap_or_else(|| padding(record.size));
        self.tables.split(entry.as_deref(), &record, after)?;
        let Some(entry) = entry else {
            return Ok(());
        };
        let places: Vec<Placed> = record
            .chunks
            .iter()
            .map(|chunk| Placed {
                offset: chunk.at,
                inner: 0,
                end: chunk.at + chunk.stored as u64,
            })
            .collect();
        let role = std::mem::replace(&mut self.next, Role::Other);
        self.tables.add(&entry, &record, &places, role)
    }
}
