//! The chunk map of a partial object on disk: a header that names one chunk list, then one byte for each chunk.
//!
//! A byte, not a bit: two threads that write different chunks then never write the same byte, so no lock is needed and no
//! mark is lost. A file of 100 GiB in chunks of 4 MiB has a map of 25 KiB.
//!
//! The map is a hint. What it marks is hashed again before use, so only the header is checked.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use peel_image::Digest;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// First bytes of every map.
const MAGIC: [u8; 8] = *b"peel map";
/// Another layout of the map, or another way to name a chunk list, gets another number.
const VERSION: u32 = 1;
/// The chunk is not here.
const MISSING: u8 = 0;
/// The chunk was written.
const HERE: u8 = 1;

/// What a map must be about to be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Identity {
    /// Length of the file in bytes.
    pub(super) size: u64,
    /// Number of chunks.
    pub(super) chunks: usize,
    /// Name of the chunk list.
    pub(super) list: Digest,
}

#[derive(Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U32,
    /// crc32c of the header with this field 0.
    checksum: U32,
    size: U64,
    chunks: U64,
    list: [u8; 32],
}

const _: () = assert!(size_of::<Header>() == 64);

impl Header {
    fn new(identity: &Identity) -> Self {
        let mut header = Self {
            magic: MAGIC,
            version: VERSION.into(),
            checksum: 0.into(),
            size: identity.size.into(),
            chunks: (identity.chunks as u64).into(),
            list: *identity.list.as_bytes(),
        };
        header.checksum = crc32c::crc32c(header.as_bytes()).into();
        header
    }
}

/// Fills a new file. All of it is written, so that a full disk shows here and not when a chunk is marked.
pub(super) fn write_new(file: &File, identity: &Identity) -> io::Result<()> {
    let header = Header::new(identity);
    let mut content = Vec::with_capacity(size_of::<Header>() + identity.chunks);
    content.extend_from_slice(header.as_bytes());
    content.resize(size_of::<Header>() + identity.chunks, MISSING);
    file.write_all_at(&content, 0)
}

/// Which chunks are marked; `None` when the file is not a whole map of this identity.
pub(super) fn read(file: &File, identity: &Identity) -> io::Result<Option<Vec<bool>>> {
    let expected = Header::new(identity);
    let length = size_of::<Header>() + identity.chunks;
    if file.metadata()?.len() != length as u64 {
        return Ok(None);
    }
    let mut content = vec![0; length];
    file.read_exact_at(&mut content, 0)?;
    Ok(content
        .strip_prefix(expected.as_bytes())
        .map(|marks| marks.iter().map(|mark| *mark == HERE).collect()))
}

/// Marks a chunk as written.
pub(super) fn set(file: &File, index: usize) -> io::Result<()> {
    file.write_all_at(&[HERE], (size_of::<Header>() + index) as u64)
}
