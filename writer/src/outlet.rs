//! Where the intake's results go, in the order of the input: into the spool, while the order of the entries is open, or [straight
//! into the blob](super::straight).

use std::io::{Read, Seek, Write};

use super::WriteError;
use super::names::{Described, Kind, Names};
use super::pack::Packing;
use super::record::Record;
use super::spool::{Place, Spool};
use peel_image::path::EntryPath;

/// Takes what the intake makes of a tar stream.
pub(super) trait Outlet {
    /// What the pool shall make of batches.
    fn packing(&self) -> Packing;

    /// Takes path and kind of the next entry, and its metadata. What is no entry of the input has none.
    fn append_name(
        &mut self,
        path: &EntryPath,
        kind: Kind<'_>,
        metadata: Described,
    ) -> Result<(), WriteError>;

    /// Takes the next compressed bytes, and says where they start among all of them.
    fn append(&mut self, data: Vec<u8>) -> Result<u64, WriteError>;

    /// Takes the next record, all of whose chunks were appended before.
    fn append_record(&mut self, record: Record) -> Result<(), WriteError>;
}

/// Keeps everything until the order is known.
pub(super) struct Spooled<S: Write> {
    is_shared: bool,
    pub(super) spool: Spool<S>,
    /// The entries, the landmark left out.
    pub(super) names: Names,
    /// Where all records are: the landmark's comes first, those of no entry last.
    places: Vec<Place>,
}

/// Where records are.
pub(super) struct Places {
    pub(super) landmark: Option<Place>,
    /// The record of each entry of the input.
    pub(super) entries: Vec<Place>,
    /// The records after the last entry.
    pub(super) trailer: Vec<Place>,
}

impl<S: Read + Write + Seek> Spooled<S> {
    /// Nothing yet. `is_shared`: chunks will share streams.
    pub(super) fn new(spool: Spool<S>, is_shared: bool) -> Self {
        Self {
            is_shared,
            spool,
            names: Names::default(),
            places: Vec::new(),
        }
    }

    /// Takes the places of all records.
    pub(super) fn take_places(&mut self, has_landmark: bool) -> Result<Places, WriteError> {
        let mut places = std::mem::take(&mut self.places).into_iter();
        let landmark = has_landmark.then(|| places.next()).flatten();
        let entries: Vec<_> = places.by_ref().take(self.names.len()).collect();
        if entries.len() < self.names.len() {
            return Err(WriteError::ThreadLost);
        }
        Ok(Places {
            landmark,
            entries,
            trailer: places.collect(),
        })
    }
}

impl<S: Read + Write + Seek> Outlet for Spooled<S> {
    fn packing(&self) -> Packing {
        if self.is_shared {
            Packing::Shared
        } else {
            Packing::Chunks
        }
    }

    fn append_name(
        &mut self,
        path: &EntryPath,
        kind: Kind<'_>,
        metadata: Described,
    ) -> Result<(), WriteError> {
        self.names.push_entry(path, kind, metadata);
        Ok(())
    }

    fn append(&mut self, data: Vec<u8>) -> Result<u64, WriteError> {
        self.spool.append(data).map_err(WriteError::Spool)
    }

    fn append_record(&mut self, mut record: Record) -> Result<(), WriteError> {
        let place = self.spool.append_record(&mut record).map_err(WriteError::Spool)?;
        self.places.push(place);
        Ok(())
    }
}
