//! One layer between its source and its target: decompression, writer and upload at the same time, each waiting for the next.
//!
//! ```text
//! source (network)  ->  peel-inflate  ->  writer and its threads  ->  Sink  ->  upload (network)
//! ```
//!
//! Every arrow is a bounded queue, so that a slow network holds the writer up instead of filling memory. Whichever end fails
//! ends the others: a queue without its other end is an error.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc as blocking;

use anyhow::Context;
use bytes::Bytes;
use peel_image::{Digest, Hasher, compression};
use peel_writer::{self as writer, Options, WriteError, Written};
use tokio::sync::mpsc;

/// Bytes of one element of a queue.
const PIECE: usize = 256 << 10;
/// Pieces of the uncompressed stream that wait for the writer: 2 MiB.
const INFLATED: usize = 8;
/// Pieces of the blob that wait for the upload. Together they are what an upload sends at once (8 MiB), so that the writer goes on
/// while that is on its way.
const WRITTEN: usize = 32;

/// Where the writer's output goes. The other end is a receiver that uploads.
#[derive(Debug)]
pub struct Sink {
    pieces: mpsc::Sender<Bytes>,
    gathered: Vec<u8>,
    failed: Arc<AtomicBool>,
}

/// A sink and its other end.
pub fn sink() -> (Sink, mpsc::Receiver<Bytes>) {
    let (pieces, receiver) = mpsc::channel(WRITTEN);
    let sink = Sink {
        pieces,
        gathered: Vec::with_capacity(PIECE),
        failed: Arc::default(),
    };
    (sink, receiver)
}

impl Sink {
    /// Whether nobody needs what is on its way any more: the writer has failed.
    pub fn failed(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.failed)
    }

    fn send(&mut self) -> io::Result<()> {
        if self.gathered.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.gathered, Vec::with_capacity(PIECE));
        self.pieces
            .blocking_send(piece.into())
            .map_err(|_| io::Error::new(io::ErrorKind::BrokenPipe, "the upload has ended"))
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = PIECE.saturating_sub(self.gathered.len());
        let (now, _) = bytes.split_at(room.min(bytes.len()));
        self.gathered.extend_from_slice(now);
        if self.gathered.len() >= PIECE {
            self.send()?;
        }
        Ok(now.len())
    }

    /// Sends what is gathered.
    fn flush(&mut self) -> io::Result<()> {
        self.send()
    }
}

/// The uncompressed stream, decompressed by a thread of its own.
struct Inflated {
    /// An empty piece is the end; a queue that closes without it has lost its thread.
    pieces: blocking::Receiver<io::Result<Vec<u8>>>,
    current: io::Cursor<Vec<u8>>,
    ended: bool,
    /// Hashes what the writer reads.
    hasher: Option<Hasher>,
}

impl Inflated {
    fn start(compressed: impl Read + Send + 'static, hash: bool) -> io::Result<Self> {
        let (sender, pieces) = blocking::sync_channel(INFLATED);
        std::thread::Builder::new()
            .name("peel-inflate".to_owned())
            .spawn(move || {
                if let Err(error) = inflate(compressed, &sender) {
                    // Without a reader nobody wants to know.
                    let _ = sender.send(Err(error));
                }
            })?;
        Ok(Self {
            pieces,
            current: io::Cursor::default(),
            ended: false,
            hasher: hash.then(Hasher::new),
        })
    }
}

/// Sends the stream until its end, or until nobody reads it any more.
fn inflate(
    compressed: impl Read + Send + 'static,
    pieces: &blocking::SyncSender<io::Result<Vec<u8>>>,
) -> io::Result<()> {
    let (_, mut tar) = compression::decoder(compressed, compression::Guard::default())?;
    loop {
        let mut piece = Vec::with_capacity(PIECE);
        let limit = u64::try_from(PIECE).unwrap_or(u64::MAX);
        let last = tar.by_ref().take(limit).read_to_end(&mut piece)? == 0;
        if pieces.send(Ok(piece)).is_err() || last {
            return Ok(());
        }
    }
}

impl Read for Inflated {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let length = self.current.read(buffer)?;
            if length > 0 || buffer.is_empty() {
                if let (Some(hasher), Some(part)) = (&mut self.hasher, buffer.get(..length)) {
                    hasher.update(part);
                }
                return Ok(length);
            }
            if self.ended {
                return Ok(0);
            }
            let piece = self.pieces.recv().map_err(|_| {
                io::Error::new(io::ErrorKind::UnexpectedEof, "the decompressing thread is gone")
            })??;
            self.ended = piece.is_empty();
            self.current = io::Cursor::new(piece);
        }
    }
}

/// Decompresses a layer and writes it anew into `sink`. With `hash` it also gives the sha256 of the stream that was read; formats that
/// keep that stream have hashed it already. Blocks.
pub fn write(
    compressed: impl Read + Send + 'static,
    mut sink: Sink,
    options: &Options,
    hash: bool,
) -> anyhow::Result<(Written, Option<Digest>)> {
    let dir = temporary_directory();
    let elsewhere = || format!("temporary file in {}; TMPDIR names another place", dir.display());
    let spool = Spool {
        dir: &dir,
        file: None,
    };
    let mut tar = Inflated::start(compressed, hash).context("thread")?;
    let written = writer::write(&mut tar, spool, &mut sink, options);
    sink.failed.store(written.is_err(), Ordering::Relaxed);
    let written = match written {
        Err(error @ WriteError::Spool(_)) => return Err(error).with_context(elsewhere),
        result => result?,
    };
    sink.flush().context("upload")?;
    // The digest is that of the whole stream, whatever the writer needed of it.
    io::copy(&mut tar, &mut io::sink()).context("rest of the layer")?;
    Ok((written, tar.hasher.map(Hasher::finish)))
}

/// A temporary file that is made when it is needed: most layers need none.
struct Spool<'a> {
    dir: &'a Path,
    file: Option<File>,
}

impl Spool<'_> {
    fn file(&mut self) -> io::Result<&mut File> {
        let file = match self.file.take() {
            Some(file) => file,
            // Without a name, so that nothing is left when this process is killed.
            None => tempfile::tempfile_in(self.dir)?,
        };
        Ok(self.file.insert(file))
    }
}

impl Read for Spool<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.file()?.read(buffer)
    }
}

impl Write for Spool<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file()?.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file()?.flush()
    }
}

impl Seek for Spool<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        self.file()?.seek(to)
    }
}

/// sha256 of the uncompressed stream. Blocks.
pub fn diff_id(compressed: impl Read + Send + 'static) -> anyhow::Result<Digest> {
    let mut tar = Inflated::start(compressed, true).context("thread")?;
    io::copy(&mut tar, &mut io::sink())?;
    let hasher = tar.hasher.take().context("hasher")?;
    Ok(hasher.finish())
}

/// Where chunks wait for the order of their files: like Podman's, a place that is not memory.
fn temporary_directory() -> PathBuf {
    std::env::var_os("TMPDIR")
        .filter(|dir| !dir.is_empty())
        .map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from)
}

/// Counts what is read. What one attempt has counted is taken back when another begins.
#[derive(Debug)]
pub struct Counted<R> {
    inner: R,
    total: Arc<AtomicU64>,
    here: Arc<AtomicU64>,
}

impl<R> Counted<R> {
    /// Counts into `total`, and into `here`.
    pub fn new(inner: R, total: Arc<AtomicU64>, here: Arc<AtomicU64>) -> Self {
        Self { inner, total, here }
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.inner.read(buffer)?;
        self.total.fetch_add(length as u64, Ordering::Relaxed);
        self.here.fetch_add(length as u64, Ordering::Relaxed);
        Ok(length)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;

    /// A tar stream that is more than every queue holds.
    fn tar() -> Vec<u8> {
        let content: Vec<u8> = (0..20_000_000_u32)
            .flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes())
            .take(20_000_000)
            .collect();
        let mut header = vec![0; 512];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"file");
        put(100, b"0000644\0");
        put(124, format!("{:011o}\0", content.len()).as_bytes());
        put(136, b"00000000000\0");
        put(148, b"        ");
        put(156, b"0");
        put(257, b"ustar\x0000");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        header.extend(content);
        let padded = header.len().next_multiple_of(512) + 1024;
        header.resize(padded, 0);
        // What follows the end of an archive belongs to the DiffID.
        header.extend(b"trailing bytes");
        header
    }

    #[test]
    fn the_stream_that_was_read_is_hashed_whole() {
        let tar = tar();
        let (sink, mut pieces) = sink();
        let reader = std::thread::spawn(move || {
            let mut blob = Vec::new();
            while let Some(piece) = pieces.blocking_recv() {
                blob.extend_from_slice(&piece);
            }
            blob
        });
        let (written, source) = write(Cursor::new(tar.clone()), sink, &Options::default(), true).unwrap();
        let blob = reader.join().unwrap();
        assert_eq!(source, Some(Digest::of(&tar)));
        assert_eq!(
            (written.blob_digest, written.blob_size),
            (Digest::of(&blob), blob.len() as u64)
        );
    }

    #[test]
    fn an_upload_that_ends_stops_the_writer() {
        let (sink, pieces) = sink();
        drop(pieces);
        let error = write(Cursor::new(tar()), sink, &Options::default(), true).unwrap_err();
        assert!(format!("{error:#}").contains("the upload has ended"), "{error:#}");
    }

    #[test]
    fn a_damaged_layer_is_an_error() {
        let mut tar = tar();
        tar.truncate(1_000_000);
        let (sink, _pieces) = sink();
        assert!(write(Cursor::new(tar), sink, &Options::default(), true).is_err());
    }
}
