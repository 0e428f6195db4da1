//! Pulls a layer whole: the ordinary way, for layers that cannot be lazy. Nothing of it counts before the digest of the
//! blob and the digest of its uncompressed bytes (DiffID) are right; files are laid out as objects while they pass. A pull that is
//! given up leaves whole objects, each right by its own digest, and nothing else. A layer counts as pulled
//! once the disk has confirmed its files.

use std::io::{self, Read};
use std::sync::{Arc, Mutex};
use std::thread;

use bytes::{Buf, Bytes};
use peel_image::compression::{self, Guard};
use peel_image::layer::{EntryKind, LayerIndex};
use peel_image::path::EntryPath;
use peel_image::tar::index::{FileSink, HashSink, index_tar};
use peel_image::{Digest, Hasher};
use peel_registry::Blob;
use peel_store::{ObjectWriter, Store};
use tokio::sync::{mpsc, oneshot};

use crate::error::chain;
use crate::lock;

/// Buffers between network and unpacking, each some hundred KiB at most.
const QUEUE: usize = 32;

/// Why a layer could not be pulled.
#[derive(Debug)]
pub(crate) enum PullFailure {
    /// The bytes could not be had.
    Registry(peel_registry::Error),
    /// The objects could not be written.
    Store(peel_store::Error),
    /// The bytes are wrong.
    Broken(String),
    /// The blob is right, but its uncompressed bytes have this digest and not the DiffID.
    DiffId(Digest),
    /// No thread to unpack.
    Thread(io::Error),
}

/// Pulls the blob and returns its index. `tell` hears how many bytes are here.
pub(super) async fn pull(
    store: &Store,
    blob: Blob,
    diff_id: Digest,
    position: usize,
    tell: impl Fn(u64) + Send,
) -> Result<LayerIndex, PullFailure> {
    let (sender, receiver) = mpsc::channel(QUEUE);
    let (done, unpacked) = oneshot::channel();
    let store = store.clone();
    thread::Builder::new()
        .name(format!("peel-pull-{position}"))
        .spawn(move || {
            // The receiver is gone when the load was given up.
            let _ = done.send(unpack(&store, receiver, diff_id));
        })
        .map_err(PullFailure::Thread)?;
    let received = receive(&blob, sender, tell).await;
    let index = unpacked
        .await
        .unwrap_or_else(|_| Err(PullFailure::Broken("its unpacking ended early".to_owned())));
    // What is wrong with the blob as a whole explains whatever its unpacking ran into.
    received?;
    index
}

/// Moves the blob's bytes to the thread. Goes on to the end when the thread needs no more, because only the end
/// tells whether the digest is right.
async fn receive(
    blob: &Blob,
    sender: mpsc::Sender<Bytes>,
    tell: impl Fn(u64) + Send,
) -> Result<(), PullFailure> {
    let mut stream = blob.stream_verified().await.map_err(PullFailure::Registry)?;
    let mut done = 0;
    tell(done);
    while let Some(bytes) = stream.next().await {
        let bytes = bytes.map_err(PullFailure::Registry)?;
        done += bytes.len() as u64;
        tell(done);
        // Closed means that the thread is done, well or not; it says so itself.
        let _ = sender.send(bytes).await;
    }
    Ok(())
}

fn unpack(
    store: &Store,
    receiver: mpsc::Receiver<Bytes>,
    diff_id: Digest,
) -> Result<LayerIndex, PullFailure> {
    let mut sink = Objects {
        store,
        writer: None,
        error: None,
    };
    let result = walk(receiver, diff_id, &mut sink);
    if let Some(error) = sink.error.take() {
        return Err(PullFailure::Store(error));
    }
    let index = result?;
    // Nothing but the whole layer brings these, so nobody could serve them before they are objects.
    let objects = index.entries.iter().filter_map(|entry| match &entry.kind {
        EntryKind::Regular(content) if content.size > 0 => content.digest.as_ref(),
        _ => None,
    });
    store.make_durable(objects).map_err(PullFailure::Store)?;
    Ok(index)
}

/// Reads a blob and keeps nothing of it: its index, if its uncompressed bytes have the DiffID.
pub(crate) fn inspect(receiver: mpsc::Receiver<Bytes>, diff_id: Digest) -> Result<LayerIndex, PullFailure> {
    walk(receiver, diff_id, &mut HashSink::default())
}

fn walk(
    receiver: mpsc::Receiver<Bytes>,
    diff_id: Digest,
    sink: &mut dyn FileSink,
) -> Result<LayerIndex, PullFailure> {
    let broken = |error: &dyn std::error::Error| PullFailure::Broken(chain(error));
    let body = Body {
        receiver,
        current: Bytes::new(),
    };
    let (_, stream) = compression::decoder(body, Guard::default()).map_err(|error| broken(&error))?;
    let hashed = Arc::new(Mutex::new(Hasher::new()));
    let stream = Hashing {
        stream,
        hasher: Arc::clone(&hashed),
    };
    let (index, _) = index_tar(stream, sink).map_err(|error| broken(&error))?;
    let found = std::mem::take(&mut *lock(&hashed)).finish();
    if found == diff_id {
        Ok(index)
    } else {
        Err(PullFailure::DiffId(found))
    }
}

/// The blob as a `Read`.
#[derive(Debug)]
struct Body {
    receiver: mpsc::Receiver<Bytes>,
    current: Bytes,
}

impl Read for Body {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            match self.receiver.blocking_recv() {
                Some(bytes) => self.current = bytes,
                None => return Ok(0),
            }
        }
        let length = self.current.len().min(buffer.len());
        if let (Some(to), Some(from)) = (buffer.get_mut(..length), self.current.get(..length)) {
            to.copy_from_slice(from);
        }
        self.current.advance(length);
        Ok(length)
    }
}

/// Hashes what passes.
struct Hashing {
    stream: Box<dyn Read + Send>,
    hasher: Arc<Mutex<Hasher>>,
}

impl Read for Hashing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let length = self.stream.read(buffer)?;
        lock(&self.hasher).update(buffer.get(..length).unwrap_or_default());
        Ok(length)
    }
}

/// Writes files as objects.
struct Objects<'a> {
    store: &'a Store,
    writer: Option<ObjectWriter>,
    error: Option<peel_store::Error>,
}

impl Objects<'_> {
    fn keep<T>(&mut self, result: Result<T, peel_store::Error>) -> io::Result<T> {
        result.map_err(|error| {
            self.error = Some(error);
            io::Error::other("the store failed")
        })
    }
}

impl FileSink for Objects<'_> {
    fn begin(&mut self, _path: &EntryPath, _size: u64) -> io::Result<()> {
        let writer = self.store.object_writer();
        self.writer = Some(self.keep(writer)?);
        Ok(())
    }

    fn write(&mut self, data: &[u8]) -> io::Result<()> {
        match &mut self.writer {
            Some(writer) => io::Write::write_all(writer, data),
            None => Err(io::Error::other("bytes of no file")),
        }
    }

    fn finish(&mut self) -> io::Result<Digest> {
        let writer = self
            .writer
            .take()
            .ok_or_else(|| io::Error::other("end of no file"))?;
        let digest = writer.finish(None);
        self.keep(digest)
    }
}
