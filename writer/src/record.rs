//! What the writer keeps of one entry between taking the input apart and putting the blob together.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::WriteError;
use peel_hash::Digest;
use peel_image::layer::Metadata;
use peel_image::tar::write::{NewEntry, encode_header};
use peel_image::tar::{self, TarEntry, TarKind};

/// One entry, or bytes of the tar stream that belong to none.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Record {
    /// Every header block.
    pub(super) headers: Vec<u8>,
    /// What the TOC says of the entry, where the headers do not: they say it by themselves, as a rule, and then
    /// [`Record::describe`] asks them again, so that the spool holds it only once.
    pub(super) entry: Option<Box<Entry>>,
    /// Whether this is an entry at all, and not bytes after the end of the archive.
    pub(super) is_entry: bool,
    /// Length of the content in bytes.
    pub(super) size: u64,
    /// Digest of the content of a regular file.
    pub(super) digest: Option<Digest>,
    /// CRC-64 of the content, where the format wants it.
    pub(super) crc64: u64,
    /// The content.
    pub(super) chunks: Vec<Chunk>,
    /// The bytes after the content up to the next block, where they are not the usual zeros.
    pub(super) padding: Option<Vec<u8>>,
}

impl Record {
    /// Takes what the TOC says of the entry; `None` for bytes that are none.
    pub(super) fn describe(&mut self) -> Result<Option<Box<Entry>>, WriteError> {
        if self.entry.is_some() || !self.is_entry {
            return Ok(self.entry.take());
        }
        let entry = tar::Reader::new(self.headers.as_slice()).next_entry()?;
        let entry = entry.ok_or(WriteError::SpoolDamaged)?;
        Entry::describe(&entry).map(|entry| Some(Box::new(entry)))
    }

    /// Gives the entry another path and, as a hard link, another target, in its headers.
    pub(super) fn rename(&mut self, path: &[u8], link: Option<&[u8]>) -> Result<(), WriteError> {
        let entry = tar::Reader::new(self.headers.as_slice()).next_entry()?;
        let mut entry = entry.ok_or(WriteError::SpoolDamaged)?;
        if let (Some(link), TarKind::Hardlink { raw, .. }) = (link, &mut entry.kind) {
            *raw = link.into();
        }
        self.headers = encode_header(&NewEntry {
            name: path,
            metadata: &entry.metadata,
            kind: &entry.kind,
            user_name: &entry.user_name,
            group_name: &entry.group_name,
        })?;
        self.entry = None;
        Ok(())
    }

    /// The record of an empty file that only the TOC has.
    pub(super) fn listed(path: &[u8]) -> Result<Self, WriteError> {
        let headers = encode_header(&NewEntry {
            name: path,
            metadata: &Metadata::default(),
            kind: &TarKind::Regular { size: 0 },
            user_name: b"",
            group_name: b"",
        })?;
        Ok(Self {
            headers,
            is_entry: true,
            ..Self::default()
        })
    }
}

/// A chunk of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chunk {
    /// Length in the file.
    pub(super) size: u64,
    /// sha256 of its bytes.
    pub(super) digest: Digest,
    /// Whether they are zeros, and the format says so.
    pub(super) is_hole: bool,
    /// Where in the spool the compressed data starts that holds the chunk.
    pub(super) at: u64,
    /// Length of that data.
    pub(super) stored: usize,
    /// Where the chunk starts in that data, decompressed, and how long all of it is; 0 where it holds nothing else.
    pub(super) inner: usize,
    /// See [`Chunk::inner`].
    pub(super) shared: usize,
}

impl Default for Chunk {
    fn default() -> Self {
        Self {
            size: 0,
            digest: Digest::EMPTY,
            is_hole: false,
            at: 0,
            stored: 0,
            inner: 0,
            shared: 0,
        }
    }
}

/// An entry as a TOC describes it, apart from its content.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) kind: Kind,
    /// Target of a symbolic or hard link.
    pub(super) link: String,
    /// As it stands in the headers.
    pub(super) mode: i64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Both as they stand in the headers.
    pub(super) raw_owner: (i64, i64),
    pub(super) user_name: String,
    pub(super) group_name: String,
    pub(super) modified: (i64, u32),
    pub(super) accessed: Option<(i64, u32)>,
    pub(super) changed: Option<(i64, u32)>,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
    pub(super) xattrs: BTreeMap<String, Vec<u8>>,
}

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub(super) enum Kind {
    #[default]
    Regular,
    Directory,
    Symlink,
    Hardlink,
    Char,
    Block,
    Fifo,
}

impl Kind {
    /// The name that every TOC has for it.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Regular => "reg",
            Self::Directory => "dir",
            Self::Symlink => "symlink",
            Self::Hardlink => "hardlink",
            Self::Char => "char",
            Self::Block => "block",
            Self::Fifo => "fifo",
        }
    }
}

impl Entry {
    pub(super) fn is_regular(&self) -> bool {
        self.kind == Kind::Regular
    }

    /// Gives the entry another path and, as a hard link, another target.
    pub(super) fn rename(&mut self, path: &[u8], link: Option<&[u8]>) -> Result<(), WriteError> {
        let text = |bytes: &[u8], field: &'static str| {
            String::from_utf8(bytes.to_vec()).map_err(|_| WriteError::NotUtf8 {
                entry: self.name.clone(),
                field,
            })
        };
        let mut name = text(path, "the name")?;
        if self.kind == Kind::Directory {
            name.push('/');
        }
        if let Some(link) = link {
            self.link = text(link, "the target")?;
        }
        self.name = name;
        Ok(())
    }

    /// Describes an entry of a tar stream. Everything that a TOC holds as text must be UTF-8.
    pub(super) fn describe(entry: &TarEntry) -> Result<Self, WriteError> {
        let text = |field: &'static str, bytes: &[u8]| {
            String::from_utf8(bytes.to_vec()).map_err(|_| WriteError::NotUtf8 {
                entry: String::from_utf8_lossy(&entry.name).into_owned(),
                field,
            })
        };
        // A name that is no text helps nobody; the ids say the same.
        let owner = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap_or_default();
        let metadata = &entry.metadata;
        let mut xattrs = BTreeMap::new();
        for (name, value) in &metadata.xattrs {
            xattrs.insert(text("the name of an extended attribute", name)?, value.to_vec());
        }
        let (mut link, mut device) = (String::new(), (0, 0));
        let kind = match &entry.kind {
            TarKind::Directory => Kind::Directory,
            TarKind::Regular { .. } => Kind::Regular,
            TarKind::Symlink(target) => {
                link = text("the target", target)?;
                Kind::Symlink
            }
            TarKind::Hardlink { raw, .. } => {
                link = text("the target", raw)?;
                Kind::Hardlink
            }
            TarKind::CharDevice(number) => {
                device = (number.major, number.minor);
                Kind::Char
            }
            TarKind::BlockDevice(number) => {
                device = (number.major, number.minor);
                Kind::Block
            }
            TarKind::Fifo => Kind::Fifo,
        };
        Ok(Self {
            name: text("the name", &entry.name)?,
            kind,
            link,
            mode: entry.raw_mode,
            uid: metadata.uid,
            gid: metadata.gid,
            raw_owner: entry.raw_owner,
            user_name: owner(&entry.user_name),
            group_name: owner(&entry.group_name),
            modified: (metadata.mtime, metadata.mtime_nanoseconds),
            accessed: entry.access_time,
            changed: entry.change_time,
            device,
            xattrs,
        })
    }
}
