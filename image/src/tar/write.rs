//! Encoding of tar entries: USTAR where everything fits, PAX records where not (POSIX pax(1)). Equal input gives equal
//! bytes. Called by the eStargz writer (landmarks, the TOC, entries that cannot be copied verbatim) and by tests.

use std::io::{self, Read, Write};

use super::header::{self, BLOCK, Block};
use super::pax::{self, XATTR};
use super::{
    EXTENSION_MAX, HEADERS_MAX, TarError, TarKind, TarProblem, XATTR_NAME_MAX, XATTR_VALUE_MAX, len64, read,
};
use crate::layer::{MODE_MASK, Metadata};
use crate::path::{EntryPath, PATH_MAX};

/// Two blocks of zeros: the end-of-archive marker.
pub const END_OF_ARCHIVE: [u8; 2 * BLOCK] = [0; 2 * BLOCK];

/// What a header is made of.
#[derive(Debug, Clone, Copy)]
pub struct NewEntry<'a> {
    /// The name as it is to stand in the stream; a directory gets a trailing `/` if it has none.
    pub name: &'a [u8],
    /// Owner, mode, times, attributes.
    pub metadata: &'a Metadata,
    /// What it is; of a hard link, the raw target is written.
    pub kind: &'a TarKind,
    /// Name of the owning user, may be empty.
    pub user_name: &'a [u8],
    /// Name of the owning group, may be empty.
    pub group_name: &'a [u8],
}

/// Zeros that must follow `size` bytes of content.
pub fn padding(size: u64) -> &'static [u8] {
    const ZEROS: [u8; BLOCK] = [0; BLOCK];
    usize::try_from(read::padding(size))
        .ok()
        .and_then(|padding| ZEROS.get(..padding))
        .unwrap_or_default()
}

/// The header blocks of one entry: a PAX header where one is needed, then the entry's own.
pub fn encode_header(entry: &NewEntry<'_>) -> Result<Vec<u8>, TarError> {
    encode(entry).map_err(|problem| TarError::new(entry.name, 0, problem))
}

fn encode(entry: &NewEntry<'_>) -> Result<Vec<u8>, TarProblem> {
    EntryPath::clean(entry.name)?;
    let mut name = entry.name.to_vec();
    if matches!(entry.kind, TarKind::Directory) && !name.ends_with(b"/") {
        name.push(b'/');
    } else if matches!(entry.kind, TarKind::Regular { .. }) {
        // GNU tar takes a file whose name ends in a slash for a directory.
        let end = name
            .iter()
            .rposition(|byte| *byte != b'/')
            .map_or(0, |last| last + 1);
        name.truncate(end);
    }
    let mut block = Block([0; BLOCK]);
    // Kept sorted by key, as Go's writer does, so that equal entries are equal bytes.
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    let mut record = |key: &[u8], value: &[u8]| records.push((key.to_vec(), value.to_vec()));

    block.put(header::MAGIC, header::MAGIC_USTAR);
    if !put_name(&mut block, &name) {
        block.put(header::NAME, &name);
        record(b"path", &name);
    }
    let link = match entry.kind {
        TarKind::Symlink(target) if target.is_empty() || target.len() > PATH_MAX || target.contains(&0) => {
            return Err(TarProblem::SymlinkTarget);
        }
        TarKind::Symlink(target) => target.as_ref(),
        TarKind::Hardlink { raw, .. } => {
            EntryPath::clean(raw)?;
            raw.as_ref()
        }
        _ => b"",
    };
    block.put(header::LINK, link);
    if link.len() > header::LINK.length {
        record(b"linkpath", link);
    }
    for (key, field, text) in [
        (&b"uname"[..], header::USER, entry.user_name),
        (b"gname", header::GROUP, entry.group_name),
    ] {
        if text.contains(&0) || text.len() > PATH_MAX {
            return Err(TarProblem::Text("a user or group name"));
        }
        block.put(field, text);
        // The field must keep a NUL at its end.
        if text.len() >= field.length {
            block.bytes_mut(field).fill(0);
            record(key, text);
        }
    }
    let metadata = entry.metadata;
    block.put_octal(header::MODE, u64::from(metadata.mode & MODE_MASK));
    let size = entry.kind.size();
    for (key, field, value) in [
        (&b"uid"[..], header::UID, u64::from(metadata.uid)),
        (b"gid", header::GID, u64::from(metadata.gid)),
        (b"size", header::SIZE, size),
    ] {
        if !block.put_octal(field, value) {
            block.put_octal(field, 0);
            record(key, value.to_string().as_bytes());
        }
    }
    let mtime = u64::try_from(metadata.mtime)
        .ok()
        .filter(|_| metadata.mtime_nanoseconds == 0);
    if !mtime.is_some_and(|mtime| block.put_octal(header::MTIME, mtime)) {
        block.put_octal(header::MTIME, 0);
        if metadata.mtime == i64::MIN || metadata.mtime_nanoseconds >= 1_000_000_000 {
            return Err(TarProblem::Number("mtime"));
        }
        record(
            b"mtime",
            pax::format_time(metadata.mtime, metadata.mtime_nanoseconds).as_bytes(),
        );
    }
    for (key, value) in &metadata.xattrs {
        // A = in the name would be read back as the end of the key.
        if key.is_empty() || key.len() > XATTR_NAME_MAX || key.iter().any(|byte| matches!(byte, 0 | b'=')) {
            return Err(TarProblem::Text("the name of an extended attribute"));
        }
        if value.len() > XATTR_VALUE_MAX {
            return Err(TarProblem::Text("the value of an extended attribute"));
        }
        record(&[XATTR, key].concat(), value);
    }
    let (kind, device) = match entry.kind {
        TarKind::Regular { .. } => (b'0', None),
        TarKind::Hardlink { .. } => (b'1', None),
        TarKind::Symlink(_) => (b'2', None),
        TarKind::CharDevice(device) => (b'3', Some(device)),
        TarKind::BlockDevice(device) => (b'4', Some(device)),
        TarKind::Directory => (b'5', None),
        TarKind::Fifo => (b'6', None),
    };
    block.put_number(
        header::DEVICE_MAJOR,
        device.map_or(0, |device| u64::from(device.major)),
    );
    block.put_number(
        header::DEVICE_MINOR,
        device.map_or(0, |device| u64::from(device.minor)),
    );
    seal(&mut block, kind);

    let mut blocks = Vec::new();
    if !records.is_empty() {
        records.sort();
        let mut data = Vec::new();
        for (key, value) in &records {
            pax::push(&mut data, key, value);
        }
        if len64(&data) > EXTENSION_MAX {
            return Err(TarProblem::TooLarge {
                what: "PAX records",
                limit: EXTENSION_MAX.min(HEADERS_MAX),
            });
        }
        blocks.extend_from_slice(&pax_header(&name, len64(&data)).0);
        blocks.extend_from_slice(&data);
        blocks.extend_from_slice(padding(len64(&data)));
    }
    blocks.extend_from_slice(&block.0);
    Ok(blocks)
}

/// The header of PAX records; its name is only seen by readers that do not know PAX, and has no times or ids in it, so
/// that equal entries are equal bytes.
fn pax_header(name: &[u8], size: u64) -> Block {
    let mut block = Block([0; BLOCK]);
    block.put(header::MAGIC, header::MAGIC_USTAR);
    let last = name.split(|byte| *byte == b'/').rfind(|part| !part.is_empty());
    let shown = [b"PaxHeaders.0/", last.unwrap_or_default()].concat();
    block.put(header::NAME, &shown);
    block.put_octal(header::MODE, 0o644);
    for field in [
        header::UID,
        header::GID,
        header::MTIME,
        header::DEVICE_MAJOR,
        header::DEVICE_MINOR,
    ] {
        block.put_octal(field, 0);
    }
    block.put_octal(header::SIZE, size);
    seal(&mut block, b'x');
    block
}

fn seal(block: &mut Block, kind: u8) {
    block.0[header::TYPE] = kind;
    block.seal();
}

/// Writes the name, split at a `/` into prefix and name if it is long. Returns whether it fitted.
fn put_name(block: &mut Block, name: &[u8]) -> bool {
    if name.len() <= header::NAME.length {
        block.put(header::NAME, name);
        return true;
    }
    // The name after the slash must not be empty, so a directory's trailing slash cannot be the place.
    let inner = name.get(..name.len() - 1).unwrap_or_default();
    let shortest = name.len().saturating_sub(header::NAME.length + 1);
    let split = inner
        .iter()
        .enumerate()
        .skip(shortest)
        .take_while(|(position, _)| *position <= header::PREFIX.length)
        .find(|(_, byte)| **byte == b'/')
        .map(|(position, _)| position);
    // An empty prefix means no prefix: it would lose a leading slash.
    match split {
        Some(position) if position > 0 => {
            block.put(header::PREFIX, name.get(..position).unwrap_or_default());
            block.put(header::NAME, name.get(position + 1..).unwrap_or_default());
            true
        }
        _ => false,
    }
}

/// Writes a tar stream.
#[derive(Debug)]
pub struct Writer<W> {
    stream: W,
}

impl<W: Write> Writer<W> {
    /// A writer at the start of a stream.
    pub fn new(stream: W) -> Self {
        Self { stream }
    }

    /// Appends one entry. `content` must hold exactly as many bytes as the kind says (more are left unread).
    pub fn append(&mut self, entry: &NewEntry<'_>, content: &mut dyn Read) -> Result<(), TarError> {
        let fail = |problem| TarError::new(entry.name, 0, problem);
        let headers = encode_header(entry)?;
        self.stream
            .write_all(&headers)
            .map_err(|error| fail(TarProblem::Write(error)))?;
        let size = entry.kind.size();
        let copied = io::copy(&mut content.take(size), &mut self.stream)
            .map_err(|error| fail(TarProblem::Write(error)))?;
        if copied != size {
            return Err(fail(TarProblem::Truncated("a file's content")));
        }
        self.stream
            .write_all(padding(size))
            .map_err(|error| fail(TarProblem::Write(error)))
    }

    /// Writes the end-of-archive marker and gives the stream back.
    pub fn finish(mut self) -> Result<W, TarError> {
        let written = self
            .stream
            .write_all(&END_OF_ARCHIVE)
            .and_then(|()| self.stream.flush());
        written.map_err(|error| TarError::new(b"", 0, TarProblem::Write(error)))?;
        Ok(self.stream)
    }
}
