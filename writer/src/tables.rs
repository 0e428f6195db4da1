//! What readers find by: the TOC's entries and the tar-split data, made one entry after the other while the blob is made. Called
//! once an entry's chunks have their places.

use std::collections::HashMap;

use crossbeam_channel::Sender;

use super::record::{Entry, Record};
use super::sink::Message;
use super::toc::{Placed, Renderer};
use super::{Settings, WriteError};
use peel_hash::Digest;
use peel_image::estargz::time;
use peel_image::path::EntryPath;

/// What an entry is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Prioritized,
    Landmark,
    Other,
}

/// What is to be known of the places of some entries.
#[derive(Debug, Default)]
pub(super) struct Marks {
    /// Offset of the landmark's content.
    pub(super) landmark: Option<u64>,
    /// Where the content of each prioritized file ends.
    pub(super) file_ends: HashMap<EntryPath, u64>,
}

/// The tables in the making; what compresses them is another thread.
pub(super) struct Tables {
    renderer: Renderer,
    messages: Sender<Message>,
    has_split: bool,
    /// Bytes of the tar stream for the next segment of the tar-split data.
    gap: Vec<u8>,
    marks: Marks,
}

impl Tables {
    /// `has_split`: tar-split data is made.
    pub(super) fn new(settings: &Settings, has_split: bool, messages: Sender<Message>) -> Self {
        Self {
            renderer: Renderer::new(settings.shape, settings.chunk_size()),
            messages,
            has_split,
            gap: Vec::new(),
            marks: Marks::default(),
        }
    }

    /// Tells the tar-split data of the next record; `after` is what stands behind its content.
    pub(super) fn split(
        &mut self,
        entry: Option<&Entry>,
        record: &Record,
        after: &[u8],
    ) -> Result<(), WriteError> {
        if !self.has_split {
            return Ok(());
        }
        self.gap.extend_from_slice(&record.headers);
        self.end_gap()?;
        if let Some(entry) = entry {
            self.send(Message::File {
                name: entry.name.clone(),
                size: record.size,
                crc64: record.crc64,
            })?;
        }
        self.gap.extend_from_slice(after);
        Ok(())
    }

    /// Tells the TOC of the next entry, all of whose chunks have places.
    pub(super) fn add(
        &mut self,
        entry: &Entry,
        record: &Record,
        places: &[Placed],
        role: Role,
    ) -> Result<(), WriteError> {
        match (role, places.first(), places.last()) {
            (Role::Landmark, Some(first), _) => self.marks.landmark = Some(first.offset),
            (Role::Prioritized, _, Some(last)) => {
                if let Ok(path) = EntryPath::clean(entry.name.as_bytes()) {
                    self.marks.file_ends.insert(path, last.end);
                }
            }
            _ => {}
        }
        let times = [Some(entry.modified), entry.accessed, entry.changed];
        if times
            .iter()
            .flatten()
            .any(|(seconds, _)| !time::is_tellable(*seconds))
        {
            self.send(Message::Inexact)?;
        }
        let json = self.renderer.render(entry, record, places)?;
        self.send(Message::Json(json))
    }

    /// Ends both.
    pub(super) fn finish(mut self) -> Result<Marks, WriteError> {
        self.end_gap()?;
        Ok(self.marks)
    }

    fn end_gap(&mut self) -> Result<(), WriteError> {
        if self.gap.is_empty() {
            return Ok(());
        }
        let gap = std::mem::take(&mut self.gap);
        self.send(Message::Segment(gap))
    }

    fn send(&self, message: Message) -> Result<(), WriteError> {
        self.messages.send(message).map_err(|_| WriteError::ThreadLost)
    }
}

/// Takes what the TOC says of an entry; `None` for bytes that are none.
pub(super) fn describe(record: &mut Record) -> Result<Option<Box<Entry>>, WriteError> {
    let entry = record.describe()?;
    if entry.as_ref().is_some_and(|entry| entry.is_regular()) && record.size == 0 {
        record.digest = Some(Digest::EMPTY);
    }
    Ok(entry)
}
