//! One entry of a TOC by itself: the JSON's fields to a [`Record`], with everything checked that needs no other entry. Called for
//! every entry by [`super::parts`], on several threads, and by [`super::whole`]; [`super::build`] puts records together.

use std::borrow::Cow;
use std::collections::BTreeMap;

use base64::Engine as _;

use super::super::time;
use super::super::toc::{TocEntry, TocError};
use crate::layer::{self, Device, EntryKind, MODE_MASK, Metadata, SYMLINK_MODE, Xattrs};
use crate::path::{EntryPath, PATH_MAX};
use crate::tar::{XATTR_NAME_MAX, XATTR_VALUE_MAX};
use peel_hash::Digest;

/// A run of zeros as `chunkType`.
const ZEROS: &str = "zeros";

/// What one element of the TOC's `entries` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Record {
    pub(super) path: EntryPath,
    pub(super) body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Body {
    /// Anything but a regular file.
    Node(Metadata, EntryKind),
    /// A regular file.
    File(File),
    /// A further chunk of the file before.
    Chunk(Piece),
}

/// A regular file, as far as its own entry tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct File {
    pub(super) metadata: Metadata,
    pub(super) size: u64,
    pub(super) digest: Option<Digest>,
    /// The first chunk; `None` for a file of no bytes.
    pub(super) piece: Option<Piece>,
    /// Where in the blob the file's bytes end; 0 if the TOC does not say.
    pub(super) end_offset: u64,
}

/// A chunk, as far as its own entry tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    /// Where it starts in the file.
    pub(super) file_offset: u64,
    /// Its length; 0 means up to the end of the file.
    pub(super) size: u64,
    pub(super) digest: Option<Digest>,
    pub(super) zeros: bool,
    pub(super) offset: u64,
    pub(super) inner_offset: u64,
}

impl Record {
    /// The meaning of an entry.
    pub(super) fn new(entry: &TocEntry<'_>) -> Result<Self, TocError> {
        let fields = Fields(entry);
        let path = fields.path("name", &entry.name)?;
        let body = match &*entry.kind {
            "reg" => Body::File(fields.file()?),
            "chunk" => {
                let digest = fields.digest("chunkDigest", &entry.chunk_digest)?;
                Body::Chunk(fields.piece(digest)?)
            }
            "dir" => fields.node(EntryKind::Directory)?,
            "symlink" => fields.node(fields.symlink()?)?,
            "hardlink" => fields.node(fields.hardlink()?)?,
            "char" => fields.node(EntryKind::CharDevice(fields.device()?))?,
            "block" => fields.node(EntryKind::BlockDevice(fields.device()?))?,
            "fifo" => fields.node(EntryKind::Fifo)?,
            other => return Err(fields.error("type", format!("{:?} is unknown", shorten(other)))),
        };
        Ok(Self { path, body })
    }

    /// What the record costs a reader, see [`super::RECORDS_MAX`].
    pub(super) fn count(&self) -> usize {
        match &self.body {
            Body::Node(metadata, _) | Body::File(File { metadata, .. }) => 1 + metadata.xattrs.len(),
            Body::Chunk(_) => 1,
        }
    }
}

/// An entry and the making of errors about it.
struct Fields<'e>(&'e TocEntry<'e>);

impl Fields<'_> {
    fn error(&self, field: &'static str, problem: impl Into<String>) -> TocError {
        TocError::Field {
            entry: shorten(&self.0.name),
            field,
            problem: problem.into(),
        }
    }

    fn number<T: TryFrom<i64>>(&self, field: &'static str, number: i64) -> Result<T, TocError> {
        T::try_from(number).map_err(|_| self.error(field, format!("{number} is out of range")))
    }

    fn owner(&self, field: &'static str, id: i64) -> Result<u32, TocError> {
        layer::owner(id).ok_or_else(|| self.error(field, format!("{id} is out of range")))
    }

    #[expect(
        clippy::ptr_arg,
        reason = "whether the text is borrowed tells whether the JSON has an escape in it"
    )]
    fn path(&self, field: &'static str, name: &Cow<'_, str>) -> Result<EntryPath, TocError> {
        self.exact(field, name)?;
        EntryPath::clean(name.as_bytes()).map_err(|source| TocError::Name {
            entry: shorten(&self.0.name),
            field,
            source,
        })
    }

    /// Whether the JSON can have told the name as it is in the tar stream. Go's encoding/json, and the encoder that containers/storage
    /// uses, write `\ufffd` with an escape for a byte that is not UTF-8, and the three bytes of a real U+FFFD as they are. A name
    /// that is borrowed from the JSON has no escape.
    #[expect(
        clippy::ptr_arg,
        reason = "whether the text is borrowed tells whether the JSON has an escape in it"
    )]
    fn exact(&self, field: &'static str, name: &Cow<'_, str>) -> Result<(), TocError> {
        if matches!(name, Cow::Owned(_)) && name.contains(char::REPLACEMENT_CHARACTER) {
            return Err(self.error(
                field,
                "the name is not UTF-8 and was replaced when the TOC was written",
            ));
        }
        Ok(())
    }

    fn digest(&self, field: &'static str, text: &str) -> Result<Option<Digest>, TocError> {
        if text.is_empty() {
            return Ok(None);
        }
        text.parse()
            .map(Some)
            .map_err(|error: peel_hash::DigestError| self.error(field, error.to_string()))
    }

    fn metadata(&self) -> Result<Metadata, TocError> {
        let entry = self.0;
        let mode = match &*entry.kind {
            "symlink" => i64::from(SYMLINK_MODE),
            _ => entry.mode,
        };
        let mode: u64 = self.number("mode", mode)?;
        let (mtime, mtime_nanoseconds) = if entry.modtime.is_empty() {
            (0, 0)
        } else {
            time::parse(&entry.modtime).ok_or_else(|| {
                self.error(
                    "modtime",
                    format!("{:?} is no RFC 3339 time", shorten(&entry.modtime)),
                )
            })?
        };
        // What Go makes of a time that nobody set.
        let mtime = if mtime == time::GO_ZERO { 0 } else { mtime };
        Ok(Metadata {
            // Some builders leave the file type in; the entry's type says it already.
            mode: u16::try_from(mode & u64::from(MODE_MASK)).unwrap_or(0),
            uid: self.owner("uid", entry.uid)?,
            gid: self.owner("gid", entry.gid)?,
            mtime,
            mtime_nanoseconds,
            xattrs: entry
                .xattrs
                .as_ref()
                .map_or(Ok(Xattrs::new()), |xattrs| self.xattrs(xattrs))?,
        })
    }

    fn xattrs(&self, xattrs: &BTreeMap<String, String>) -> Result<Xattrs, TocError> {
        xattrs
            .iter()
            .map(|(name, value)| {
                let problem = |what: &str| self.error("xattrs", format!("{:?} {what}", shorten(name)));
                if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains('\0') {
                    return Err(problem("is no name of an extended attribute"));
                }
                let value = base64::engine::general_purpose::STANDARD
                    .decode(value)
                    .map_err(|_| problem("has a value that is not base64"))?;
                if value.len() > XATTR_VALUE_MAX {
                    return Err(problem("has a value that is too long"));
                }
                Ok((name.as_bytes().into(), value.into_boxed_slice()))
            })
            .collect()
    }

    fn node(&self, kind: EntryKind) -> Result<Body, TocError> {
        Ok(Body::Node(self.metadata()?, kind))
    }

    fn device(&self) -> Result<Device, TocError> {
        Ok(Device {
            major: self.number("devMajor", self.0.dev_major)?,
            minor: self.number("devMinor", self.0.dev_minor)?,
        })
    }

    fn symlink(&self) -> Result<EntryKind, TocError> {
        self.exact("linkName", &self.0.link_name)?;
        let target = self.0.link_name.as_bytes();
        if target.is_empty() || target.len() > PATH_MAX || target.contains(&0) {
            return Err(self.error("linkName", "the target is empty, too long, or holds a NUL byte"));
        }
        Ok(EntryKind::Symlink(target.into()))
    }

    fn hardlink(&self) -> Result<EntryKind, TocError> {
        if self.0.link_name.is_empty() {
            return Err(self.error("linkName", "a hard link without a target"));
        }
        self.path("linkName", &self.0.link_name).map(EntryKind::Hardlink)
    }

    fn file(&self) -> Result<File, TocError> {
        let entry = self.0;
        let metadata = self.metadata()?;
        let size: u64 = self.number("size", entry.size)?;
        let digest = self.digest("digest", &entry.digest)?;
        if size == 0 {
            if digest.is_some_and(|digest| digest != Digest::EMPTY) {
                return Err(self.error("digest", "an empty file has another digest"));
            }
            return Ok(File {
                metadata,
                size,
                digest,
                piece: None,
                end_offset: 0,
            });
        }
        if entry.chunk_offset != 0 {
            return Err(self.error("chunkOffset", "a file must start with its first chunk"));
        }
        let of_chunk = if entry.chunk_digest == entry.digest {
            // The usual case, a file of one chunk; nothing is gained by parsing the text twice.
            digest
        } else {
            self.digest("chunkDigest", &entry.chunk_digest)?
        };
        Ok(File {
            metadata,
            size,
            digest,
            piece: Some(self.piece(of_chunk)?),
            end_offset: self.number("endOffset", entry.end_offset)?,
        })
    }

    fn piece(&self, digest: Option<Digest>) -> Result<Piece, TocError> {
        let entry = self.0;
        let zeros = match &*entry.chunk_type {
            "" => false,
            ZEROS => true,
            other => return Err(self.error("chunkType", format!("{:?} is unknown", shorten(other)))),
        };
        Ok(Piece {
            file_offset: self.number("chunkOffset", entry.chunk_offset)?,
            size: self.number("chunkSize", entry.chunk_size)?,
            digest,
            zeros,
            offset: self.number("offset", entry.offset)?,
            inner_offset: self.number("innerOffset", entry.inner_offset)?,
        })
    }
}

/// Keeps a message readable when a name is hostile.
pub(super) fn shorten(text: &str) -> String {
    text.chars().take(200).collect()
}
