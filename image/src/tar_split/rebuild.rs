//! The tar stream again, from a tar-split and the contents of the files.

use std::io::{self, BufRead, ErrorKind, Read, Write};

use super::{Crc64, Item, Reader, TarSplitError};

/// Why a tar stream cannot be made again.
#[derive(Debug, thiserror::Error)]
pub enum RebuildError {
    /// The tar-split itself is wrong.
    #[error(transparent)]
    TarSplit(#[from] TarSplitError),
    /// The content of a file cannot be had.
    #[error("the content of {name:?} cannot be read")]
    Content {
        /// The file as the tar-split names it.
        name: String,
        /// What its reader said.
        #[source]
        source: io::Error,
    },
    /// The content of a file is shorter or longer than the tar-split says.
    #[error("the content of {name:?} has not the {size} bytes that the tar-split says")]
    Size {
        /// The file as the tar-split names it.
        name: String,
        /// The length that the tar-split says, in bytes.
        size: u64,
    },
    /// The content of a file has another checksum than the tar-split says.
    #[error("the content of {name:?} has the checksum {found:016x}, the tar-split says {expected:016x}")]
    Checksum {
        /// The file as the tar-split names it.
        name: String,
        /// The CRC-64 that the tar-split says.
        expected: u64,
        /// The CRC-64 of the content.
        found: u64,
    },
    /// The output failed.
    #[error("writing the tar stream failed")]
    Write(#[source] io::Error),
}

/// The rebuilt tar stream as a [`Read`]. Its own errors come as an [`io::Error`] around a [`RebuildError`]
/// (`io::Error::downcast`).
#[derive(Debug)]
pub struct Rebuilt<R, F, C> {
    lines: Reader<R>,
    open: F,
    state: State<C>,
}

#[derive(Debug)]
enum State<C> {
    /// The next line comes.
    Between,
    /// A segment and how much of it was given.
    Segment(Vec<u8>, usize),
    File {
        content: C,
        name: Vec<u8>,
        size: u64,
        remaining: u64,
        crc: Box<Crc64>,
        expected: u64,
    },
    /// An error was given.
    Failed,
}

impl<R, F, C> Rebuilt<R, F, C>
where
    R: BufRead,
    F: FnMut(&[u8], u64) -> io::Result<C>,
    C: Read,
{
    /// `open` is asked once for the content of each file that is not empty, with the name and the size of the line; what it
    /// returns is read to its end.
    pub fn new(lines: Reader<R>, open: F) -> Self {
        Self {
            lines,
            open,
            state: State::Between,
        }
    }

    /// Reads on; an error ends the stream.
    fn step(&mut self, buffer: &mut [u8]) -> Result<usize, RebuildError> {
        loop {
            match std::mem::replace(&mut self.state, State::Failed) {
                State::Failed => return Ok(0),
                State::Between => match self.lines.next_item()? {
                    None => {
                        self.state = State::Between;
                        return Ok(0);
                    }
                    Some(Item::Segment(bytes)) => self.state = State::Segment(bytes, 0),
                    Some(Item::File { name, size, crc64 }) => {
                        self.state = match crc64 {
                            None => State::Between,
                            Some(expected) => State::File {
                                content: (self.open)(&name, size)
                                    .map_err(|source| content_error(&name, source))?,
                                name,
                                size,
                                remaining: size,
                                crc: Box::default(),
                                expected,
                            },
                        };
                    }
                },
                State::Segment(bytes, given) => {
                    let rest = bytes.get(given..).unwrap_or_default();
                    if rest.is_empty() {
                        self.state = State::Between;
                        continue;
                    }
                    let count = rest.len().min(buffer.len());
                    for (to, from) in buffer.iter_mut().zip(rest) {
                        *to = *from;
                    }
                    self.state = State::Segment(bytes, given + count);
                    return Ok(count);
                }
                State::File {
                    mut content,
                    name,
                    size,
                    remaining,
                    mut crc,
                    expected,
                } => {
                    if remaining == 0 {
                        finish_file(&mut content, &name, size, &crc, expected)?;
                        self.state = State::Between;
                        continue;
                    }
                    let limit = usize::try_from(remaining).unwrap_or(usize::MAX).min(buffer.len());
                    let piece = buffer.get_mut(..limit).unwrap_or_default();
                    let count =
                        read_some(&mut content, piece).map_err(|source| content_error(&name, source))?;
                    if count == 0 {
                        let name = shown(&name);
                        return Err(RebuildError::Size { name, size });
                    }
                    crc.update(piece.get(..count).unwrap_or_default());
                    self.state = State::File {
                        content,
                        name,
                        size,
                        remaining: remaining.saturating_sub(u64::try_from(count).unwrap_or(u64::MAX)),
                        crc,
                        expected,
                    };
                    return Ok(count);
                }
            }
        }
    }
}

impl<R, F, C> Read for Rebuilt<R, F, C>
where
    R: BufRead,
    F: FnMut(&[u8], u64) -> io::Result<C>,
    C: Read,
{
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if buffer.is_empty() {
            return Ok(0);
        }
        self.step(buffer)
            .map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
    }
}

/// Writes the whole rebuilt stream to `out` and gives its length in bytes. `contents` as in [`Rebuilt::new`].
pub fn rebuild<R: BufRead, C: Read>(
    lines: Reader<R>,
    contents: impl FnMut(&[u8], u64) -> io::Result<C>,
    out: &mut impl Write,
) -> Result<u64, RebuildError> {
    /// Bytes that go from a content to the output at once.
    const PIECE: usize = 128 << 10;
    let mut stream = Rebuilt::new(lines, contents);
    let mut buffer = vec![0; PIECE];
    let mut total = 0_u64;
    loop {
        let count = stream.step(&mut buffer)?;
        let piece = buffer.get(..count).unwrap_or_default();
        if piece.is_empty() {
            return Ok(total);
        }
        out.write_all(piece).map_err(RebuildError::Write)?;
        total = total.saturating_add(u64::try_from(count).unwrap_or(u64::MAX));
    }
}

/// All bytes were taken: nothing may follow, and the checksum must be right.
fn finish_file(
    content: &mut impl Read,
    name: &[u8],
    size: u64,
    crc: &Crc64,
    expected: u64,
) -> Result<(), RebuildError> {
    let more = read_some(content, &mut [0]).map_err(|source| content_error(name, source))?;
    let name = || shown(name);
    if more != 0 {
        return Err(RebuildError::Size { name: name(), size });
    }
    let found = crc.finish();
    if found != expected {
        return Err(RebuildError::Checksum {
            name: name(),
            expected,
            found,
        });
    }
    Ok(())
}

fn read_some(content: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match content.read(buffer) {
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

fn content_error(name: &[u8], source: io::Error) -> RebuildError {
    RebuildError::Content {
        name: shown(name),
        source,
    }
}

/// A name for a message, shortened.
fn shown(name: &[u8]) -> String {
    /// Keeps a message readable when the name is hostile.
    const SHOWN: usize = 200;
    String::from_utf8_lossy(name.get(..SHOWN).unwrap_or(name)).into_owned()
}
