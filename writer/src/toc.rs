//! The JSON of a TOC, entry by entry, in the two shapes that there are: upstream's for eStargz and zstd:chunked, and Podman's.
//! Called by the tables, once the places of all chunks of an entry are known.
//!
//! Absent numbers are 0 and absent texts empty. Which fields stand there, and when, follows the tools that made the formats
//! (stargz-snapshotter, `estargz/types.go`; containers/storage, `pkg/chunked/internal/minimal/compression.go`).

use std::collections::HashMap;

use base64::Engine as _;

use super::record::{Entry, Kind, Record};
use super::{Dialect, WriteError};
use peel_hash::Digest;
use peel_image::estargz::time;
use peel_image::layer::{MODE_MASK, SYMLINK_MODE};

/// Where a chunk is in the blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placed {
    /// First byte of the compressed stream that holds it.
    pub(super) offset: u64,
    /// Where it starts in that stream, uncompressed.
    pub(super) inner: u64,
    /// End of that stream.
    pub(super) end: u64,
}

/// How a TOC is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shape {
    /// eStargz: upstream's fields, compact.
    Estargz,
    /// Upstream's fields, indented by tabs as its own writer does.
    StargzZstd,
    /// Podman's, compact.
    Podman,
}

impl From<Dialect> for Shape {
    fn from(dialect: Dialect) -> Self {
        match dialect {
            Dialect::Podman => Self::Podman,
            Dialect::Stargz => Self::StargzZstd,
        }
    }
}

impl Shape {
    /// What stands before the first entry.
    pub(super) fn start(self) -> &'static [u8] {
        match self {
            Self::StargzZstd => b"{\n\t\"version\": 1,\n\t\"entries\": [\n\t\t",
            Self::Estargz | Self::Podman => b"{\"version\":1,\"entries\":[",
        }
    }

    fn between(self) -> &'static [u8] {
        match self {
            Self::StargzZstd => b",\n\t\t",
            Self::Estargz | Self::Podman => b",",
        }
    }

    /// What stands after the last entry.
    pub(super) fn end(self, tar_split: Option<Digest>) -> Vec<u8> {
        match (self, tar_split) {
            (Self::StargzZstd, _) => b"\n\t]\n}".to_vec(),
            (_, Some(digest)) => format!("],\"tarSplitDigest\":\"{digest}\"}}").into_bytes(),
            _ => b"]}\n".to_vec(),
        }
    }
}

/// Turns records into JSON.
pub(super) struct Renderer {
    shape: Shape,
    chunk_size: u64,
    is_first: bool,
    users: HashMap<u32, String>,
    groups: HashMap<u32, String>,
}

impl Renderer {
    /// `chunk_size`: the length of all chunks but the last ones of files, where there is one.
    pub(super) fn new(shape: Shape, chunk_size: u64) -> Self {
        Self {
            shape,
            chunk_size,
            is_first: true,
            users: HashMap::new(),
            groups: HashMap::new(),
        }
    }

    /// The JSON objects of an entry, with what separates them from the ones before.
    pub(super) fn render(
        &mut self,
        entry: &Entry,
        record: &Record,
        places: &[Placed],
    ) -> Result<Vec<u8>, WriteError> {
        let mut out = Vec::with_capacity(256);
        match self.shape {
            Shape::Podman => self.podman(entry, record, places, &mut out)?,
            Shape::Estargz | Shape::StargzZstd => self.stargz(entry, record, places, &mut out)?,
        }
        Ok(out)
    }

    fn object<'o>(&mut self, out: &'o mut Vec<u8>) -> Object<'o> {
        if !std::mem::replace(&mut self.is_first, false) {
            out.extend_from_slice(self.shape.between());
        }
        out.push(b'{');
        Object {
            out,
            is_indented: self.shape == Shape::StargzZstd,
            is_empty: true,
        }
    }

    fn stargz(
        &mut self,
        entry: &Entry,
        record: &Record,
        places: &[Placed],
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        let user = changed(&mut self.users, entry.uid, &entry.user_name);
        let group = changed(&mut self.groups, entry.gid, &entry.group_name);
        let chunk_size = self.chunk_size;
        let full = |size: u64| if size == chunk_size { size } else { 0 };
        let (seconds, nanoseconds) = entry.modified;
        let mut object = self.object(out);
        object.text("name", &entry.name)?;
        object.text("type", entry.kind.name())?;
        object.number("size", record.size);
        object.text("modtime", &time::format(seconds, nanoseconds))?;
        // An empty target is the root directory, which readers want to see.
        let is_to_root = entry.kind == Kind::Hardlink && entry.link.is_empty();
        object.text("linkName", if is_to_root { "/" } else { &entry.link })?;
        object.signed(
            "mode",
            match entry.kind {
                Kind::Symlink => SYMLINK_MODE.into(),
                _ => entry.mode & i64::from(MODE_MASK),
            },
        );
        object.number("uid", entry.uid.into());
        object.number("gid", entry.gid.into());
        object.text("userName", user)?;
        object.text("groupName", group)?;
        if let Some(place) = places.first() {
            object.number("offset", place.offset);
            object.number("innerOffset", place.inner);
        }
        object.number("devMajor", entry.device.0.into());
        object.number("devMinor", entry.device.1.into());
        object.xattrs(entry)?;
        object.digest("digest", record.digest.filter(|_| entry.is_regular()));
        if let Some(chunk) = record.chunks.first() {
            object.number("chunkSize", full(chunk.size));
            object.digest("chunkDigest", Some(chunk.digest));
        }
        object.end();
        let mut position = 0;
        for (index, (chunk, place)) in record.chunks.iter().zip(places).enumerate() {
            if index > 0 {
                let mut object = self.object(out);
                object.text("name", &entry.name)?;
                object.text("type", "chunk")?;
                object.number("offset", place.offset);
                object.number("innerOffset", place.inner);
                object.number("chunkOffset", position);
                object.number("chunkSize", full(chunk.size));
                object.digest("chunkDigest", Some(chunk.digest));
                object.end();
            }
            position += chunk.size;
        }
        Ok(())
    }

    /// Mode, owner and times as they stand in the headers: Podman compares them with those of the tar-split data.
    fn podman(
        &mut self,
        entry: &Entry,
        record: &Record,
        places: &[Placed],
        out: &mut Vec<u8>,
    ) -> Result<(), WriteError> {
        let is_one = record.chunks.len() == 1;
        let mut object = self.object(out);
        object.text("type", entry.kind.name())?;
        object.text("name", &entry.name)?;
        object.text("linkName", &entry.link)?;
        object.signed("mode", entry.mode);
        object.number("size", record.size);
        object.signed("uid", entry.raw_owner.0);
        object.signed("gid", entry.raw_owner.1);
        object.time("modtime", Some(entry.modified))?;
        object.time("accesstime", entry.accessed)?;
        object.time("changetime", entry.changed)?;
        object.number("devMajor", entry.device.0.into());
        object.number("devMinor", entry.device.1.into());
        object.xattrs(entry)?;
        object.digest("digest", record.digest.filter(|_| record.size > 0));
        object.number("offset", places.first().map_or(0, |place| place.offset));
        object.number("endOffset", places.last().map_or(0, |place| place.end));
        if let Some(chunk) = record.chunks.first().filter(|_| !is_one) {
            object.number("chunkSize", chunk.size);
            object.digest("chunkDigest", Some(chunk.digest));
            object.text("chunkType", if chunk.is_hole { "zeros" } else { "" })?;
        }
        object.end();
        let mut position = 0;
        for (index, (chunk, place)) in record.chunks.iter().zip(places).enumerate() {
            if index > 0 {
                let mut object = self.object(out);
                object.text("type", "chunk")?;
                object.text("name", &entry.name)?;
                object.number("offset", place.offset);
                object.number("chunkSize", chunk.size);
                object.number("chunkOffset", position);
                object.digest("chunkDigest", Some(chunk.digest));
                object.text("chunkType", if chunk.is_hole { "zeros" } else { "" })?;
                object.end();
            }
            position += chunk.size;
        }
        Ok(())
    }
}

/// The name of an id, where it is not the one that was given last: a TOC repeats it only then.
fn changed<'n>(names: &mut HashMap<u32, String>, id: u32, name: &'n str) -> &'n str {
    if name.is_empty() || names.get(&id).is_some_and(|last| last == name) {
        return "";
    }
    names.insert(id, name.to_owned());
    name
}

/// A JSON object in the making. Fields that say nothing are left out.
struct Object<'o> {
    out: &'o mut Vec<u8>,
    is_indented: bool,
    is_empty: bool,
}

impl Object<'_> {
    fn key(&mut self, key: &str) {
        if !std::mem::replace(&mut self.is_empty, false) {
            self.out.push(b',');
        }
        if self.is_indented {
            self.out.extend_from_slice(b"\n\t\t\t");
        }
        self.out.push(b'"');
        self.out.extend_from_slice(key.as_bytes());
        self.out
            .extend_from_slice(if self.is_indented { b"\": " } else { b"\":" });
    }

    fn text(&mut self, key: &str, text: &str) -> Result<(), WriteError> {
        if !text.is_empty() || key == "name" {
            self.key(key);
            serde_json::to_writer(&mut *self.out, text)?;
        }
        Ok(())
    }

    fn number(&mut self, key: &str, number: u64) {
        if number != 0 {
            self.key(key);
            self.out.extend_from_slice(number.to_string().as_bytes());
        }
    }

    fn signed(&mut self, key: &str, number: i64) {
        if number != 0 {
            self.key(key);
            self.out.extend_from_slice(number.to_string().as_bytes());
        }
    }

    fn digest(&mut self, key: &str, digest: Option<Digest>) {
        if let Some(digest) = digest {
            self.key(key);
            self.out.extend_from_slice(b"\"sha256:");
            self.out.extend_from_slice(digest.hex().as_bytes());
            self.out.push(b'"');
        }
    }

    /// A time with its fraction; the epoch itself is no time.
    fn time(&mut self, key: &str, time: Option<(i64, u32)>) -> Result<(), WriteError> {
        match time {
            None | Some((0, 0)) => Ok(()),
            Some((seconds, nanoseconds)) => self.text(key, &time::format_exactly(seconds, nanoseconds)),
        }
    }

    fn xattrs(&mut self, entry: &Entry) -> Result<(), WriteError> {
        if entry.xattrs.is_empty() {
            return Ok(());
        }
        self.key("xattrs");
        self.out.push(b'{');
        for (index, (name, value)) in entry.xattrs.iter().enumerate() {
            if index > 0 {
                self.out.push(b',');
            }
            if self.is_indented {
                self.out.extend_from_slice(b"\n\t\t\t\t");
            }
            serde_json::to_writer(&mut *self.out, name)?;
            self.out
                .extend_from_slice(if self.is_indented { b": \"" } else { b":\"" });
            let value = base64::engine::general_purpose::STANDARD.encode(value);
            self.out.extend_from_slice(value.as_bytes());
            self.out.push(b'"');
        }
        if self.is_indented {
            self.out.extend_from_slice(b"\n\t\t\t");
        }
        self.out.push(b'}');
        Ok(())
    }

    fn end(self) {
        if self.is_indented {
            self.out.extend_from_slice(b"\n\t\t");
        }
        self.out.push(b'}');
    }
}
