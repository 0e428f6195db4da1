//! Directory blocks: an array of entries, then their names. Entries are sorted by name over the whole directory, `.` and
//! `..` in their places, because the kernel searches first among blocks and then inside one by halving.

use std::collections::BTreeMap;
use std::ops::Range;

use peel_image::tree::InodeId;
use zerocopy::IntoBytes;

use super::format::{BLOCK, DirectoryEntry, ENTRY_SIZE};

/// The entries of one directory in the order of the disk.
pub(super) struct Names<'a> {
    entries: Vec<(&'a [u8], InodeId)>,
}

impl<'a> Names<'a> {
    pub(super) fn new(children: &'a BTreeMap<Box<[u8]>, InodeId>, own: InodeId, parent: InodeId) -> Self {
        let mut entries = Vec::with_capacity(children.len() + 2);
        entries.push((&b"."[..], own));
        entries.push((&b".."[..], parent));
        entries.extend(children.iter().map(|(name, child)| (&**name, *child)));
        // Two runs in order: a stable sort only merges them.
        entries.sort_by_key(|(name, _)| *name);
        Self { entries }
    }

    /// The entries of each block: as many as fit.
    pub(super) fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let mut start = 0;
        std::iter::from_fn(move || {
            let rest = self.entries.get(start..).filter(|rest| !rest.is_empty())?;
            let mut used = 0;
            let count = rest
                .iter()
                .take_while(|(name, _)| {
                    used += ENTRY_SIZE + name.len();
                    used <= BLOCK
                })
                .count();
            let range = start..start + count.max(1);
            start = range.end;
            Some(range)
        })
    }

    /// How many whole blocks there are before the last one, and the bytes used in that.
    pub(super) fn size(&self) -> (u64, u64) {
        let mut blocks = 0;
        let mut last = 0;
        for range in self.blocks() {
            blocks += 1;
            last = self
                .slice(range)
                .iter()
                .map(|(name, _)| ENTRY_SIZE + name.len())
                .sum();
        }
        (blocks - 1, last as u64)
    }

    /// One block without its padding. `target` gives node id and type of an inode.
    pub(super) fn encode(&self, range: Range<usize>, target: impl Fn(InodeId) -> (u64, u8)) -> Vec<u8> {
        let entries = self.slice(range);
        let mut block = Vec::with_capacity(BLOCK);
        let mut offset = entries.len() * ENTRY_SIZE;
        for (name, child) in entries {
            let (node, file_type) = target(*child);
            let entry = DirectoryEntry {
                node: node.into(),
                name_offset: u16::try_from(offset).unwrap_or(u16::MAX).into(),
                file_type,
                reserved: 0,
            };
            block.extend_from_slice(entry.as_bytes());
            offset += name.len();
        }
        for (name, _) in entries {
            block.extend_from_slice(name);
        }
        block
    }

    fn slice(&self, range: Range<usize>) -> &[(&'a [u8], InodeId)] {
        self.entries.get(range).unwrap_or_default()
    }
}
