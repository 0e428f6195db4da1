//! tar-split: all of a tar stream but the contents of its files, so that the stream can be made again, byte for byte, from
//! the contents.
//!
//! Podman's dialect of zstd:chunked carries it beside the TOC, because the TOC alone does not give the tar stream back and
//! so not the DiffID. The writer of that dialect calls [`Writer`]; the check of a whole layer calls [`Rebuilt`].
//!
//! The format is that of github.com/vbatts/tar-split (`tar/storage/entry.go`, `tar/asm/disassemble.go`): one JSON
//! object per line, as Go's `json.Encoder` prints it.
//!
//! ```text
//! {"type":2,"payload":"<base64>","position":0}                            raw bytes: headers, padding, the trailer
//! {"type":1,"name":"etc/hosts","size":55,"payload":"<base64>","position":1}   a file's content goes here
//! {"type":1,"name":"etc/","payload":null,"position":2}                    an entry without content
//! ```
//!
//! The payload of a file is the CRC-64 of its content ([`Crc64`]), big-endian. A name that is not UTF-8 stands in
//! `name_raw`, in base64. The padding after a file stands in the next line of type 2. Every tar header, whatever its
//! type, has a line of type 1 after the line of its bytes.
//!
//! The reader takes lines from strangers: it holds one line in memory, never the whole, and every line has a limit.

mod crc64;
mod read;
mod rebuild;
#[cfg(test)]
mod tests;
mod write;

pub use crc64::Crc64;
pub use read::Reader;
pub use rebuild::{RebuildError, Rebuilt, rebuild};
pub use write::Writer;

use crate::tar::BLOCK;

/// Most bytes of a tar-split, uncompressed: what Podman accepts for it and for a TOC (150 MiB, `maxTocSize` of
/// containers/storage).
pub const TAR_SPLIT_MAX: u64 = 150 << 20;
/// Most raw bytes of one line: the headers of one entry ([`crate::tar::HEADERS_MAX`]) and the padding before them. Longer
/// trailers are cut.
pub const SEGMENT_MAX: usize = (4 << 20) + BLOCK;
/// Pieces into which what follows the end-of-archive marker is cut, in bytes. Upstream reads up to as much at a time, so that its
/// pieces are shorter where a read is; the marker itself stands in one line with the padding before it.
pub const TRAILER_PIECE: usize = 1 << 20;
/// Longest name in bytes. Our tar reader allows `PATH_MAX`; upstream's names reach the limit of an extended header.
pub const NAME_MAX: usize = 1 << 20;
/// Longest line in bytes: a segment in base64 and the fields around it, or a name each byte of which is escaped.
const LINE_MAX: usize = SEGMENT_MAX * 3 / 2 + 4096;

/// One line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// Bytes of the tar stream as they are; at most [`SEGMENT_MAX`].
    Segment(Vec<u8>),
    /// Here the content of a file goes; an entry without content (of any type) has size 0.
    File {
        /// The name as it stands in the tar stream.
        name: Vec<u8>,
        /// Length of the content in bytes, at most `i64::MAX`.
        size: u64,
        /// CRC-64 of the content; there exactly where `size` is not 0.
        crc64: Option<u64>,
    },
}

/// Why a tar-split cannot be read, and where.
#[derive(Debug, thiserror::Error)]
#[error("tar-split line {line}: {problem}")]
pub struct TarSplitError {
    /// Number of the line, from 1.
    pub line: u64,
    /// What is wrong.
    #[source]
    pub problem: TarSplitProblem,
}

/// What is wrong with a line.
#[derive(Debug, thiserror::Error)]
pub enum TarSplitProblem {
    /// The stream below failed.
    #[error("reading failed")]
    Read(#[source] std::io::Error),
    /// No JSON object of this format.
    #[error("not a line of tar-split")]
    Json(#[source] serde_json::Error),
    /// Too many bytes.
    #[error("{what} of more than {limit} bytes")]
    TooLarge {
        /// What is too large.
        what: &'static str,
        /// The limit in bytes.
        limit: u64,
    },
    /// `position` does not count the lines from 0.
    #[error("its position is {found}")]
    Position {
        /// The number that stands there.
        found: i64,
    },
    /// `type` is neither 1 nor 2.
    #[error("unknown type {0}")]
    Type(i64),
    /// A field that does not belong to the type, or does not have the form that it must have.
    #[error("the field {0} is malformed or does not belong there")]
    Field(&'static str),
}
