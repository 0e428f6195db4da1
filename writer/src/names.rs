//! What the order and the final state of a layer depend on: the path of each entry, and what kind of thing it puts there. Filled by
//! the outlets while the input is read, or by tests.

use peel_image::path::EntryPath;

/// What an entry is, as far as other entries of its layer depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind<'a> {
    /// A directory.
    Directory {
        /// Stands for the names of its extended attributes; 0 for none.
        xattrs: u64,
    },
    /// A symbolic link and its target.
    Symlink(&'a [u8]),
    /// A hard link and the clean path of its target.
    Hardlink(&'a [u8]),
    /// Anything else.
    Other,
}

/// The metadata of an entry, to be compared with that of another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Described {
    /// Permissions, which mean nothing of a symbolic link.
    pub(super) mode: u16,
    /// Stands for all the rest.
    pub(super) rest: u64,
}

/// The entries of a layer, in its order. All of it lies in one buffer, since layers of a million entries exist.
#[derive(Debug, Default)]
pub struct Names {
    bytes: Vec<u8>,
    /// Where in `bytes` each entry's path ends, and what follows it: one byte for the kind, and the target of a link.
    ends: Vec<(usize, usize)>,
    metadata: Vec<Described>,
}

const DIRECTORY: u8 = b'd';
const SYMLINK: u8 = b's';
const HARDLINK: u8 = b'h';
const OTHER: u8 = b'f';

impl Names {
    /// Adds an entry whose metadata is like that of all others.
    pub fn push(&mut self, path: &EntryPath, kind: Kind<'_>) {
        self.push_bytes(path.as_bytes(), kind);
    }

    /// Adds an entry and what its metadata is.
    pub(super) fn push_entry(&mut self, path: &EntryPath, kind: Kind<'_>, metadata: Described) {
        self.push_bytes(path.as_bytes(), kind);
        if let Some(last) = self.metadata.last_mut() {
            *last = metadata;
        }
    }

    /// As [`Names::push`], with the bytes of a clean path.
    pub(super) fn push_bytes(&mut self, path: &[u8], kind: Kind<'_>) {
        self.bytes.extend_from_slice(path);
        let path_end = self.bytes.len();
        let number;
        let (tag, target) = match kind {
            Kind::Directory { xattrs: 0 } => (DIRECTORY, &[][..]),
            Kind::Directory { xattrs } => {
                number = xattrs.to_le_bytes();
                (DIRECTORY, &number[..])
            }
            Kind::Symlink(target) => (SYMLINK, target),
            Kind::Hardlink(target) => (HARDLINK, target),
            Kind::Other => (OTHER, &[][..]),
        };
        self.bytes.push(tag);
        self.bytes.extend_from_slice(target);
        self.ends.push((path_end, self.bytes.len()));
        self.metadata.push(Described::default());
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

    /// What an entry is; [`Kind::Other`] for an index that is none.
    pub fn kind(&self, index: usize) -> Kind<'_> {
        let rest = self
            .ends
            .get(index)
            .and_then(|(start, end)| self.bytes.get(*start..*end));
        match rest.and_then(<[u8]>::split_first) {
            Some((&DIRECTORY, number)) => Kind::Directory {
                xattrs: number
                    .first_chunk()
                    .map_or(0, |number| u64::from_le_bytes(*number)),
            },
            Some((&SYMLINK, target)) => Kind::Symlink(target),
            Some((&HARDLINK, target)) => Kind::Hardlink(target),
            _ => Kind::Other,
        }
    }

    /// Whether a hard link repeats the metadata of what it leads to.
    pub(super) fn repeats(&self, link: usize, made: usize) -> bool {
        let metadata = |index| self.metadata.get(index).copied().unwrap_or_default();
        let (link, given) = (metadata(link), metadata(made));
        link.rest == given.rest && (link.mode == given.mode || matches!(self.kind(made), Kind::Symlink(_)))
    }

    fn start(&self, index: usize) -> usize {
        let before = index.checked_sub(1).and_then(|before| self.ends.get(before));
        before.map_or(0, |(_, end)| *end)
    }
}
