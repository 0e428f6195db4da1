//! Whole files, with a queue that does not move: what reads wait for must not be in it.

use std::path::PathBuf;
use std::time::Duration;

use oci_spec::image::{Descriptor, MediaType, Sha256Digest};
use peel_image::Digest;
use peel_image::layer::{Chunk, ChunkSource, Encoding, Entry, EntryKind, FileContent, LayerIndex, Metadata};
use peel_image::path::EntryPath;
use peel_registry::{Blob, ClientOptions, Source};
use peel_store::Store;
use rustix::io::Errno;

use super::*;
use crate::Options;
use crate::fetch::claim::Claimed;
use crate::fetch::layer::{Layer, Position};
use crate::object::ListId;
use crate::settle::Settler;

const CHUNK: usize = 3 << 20;
const CHUNKS: usize = 3;

/// An engine that brings files of three chunks from a registry that is not there: the tests have their bytes.
struct Bench {
    engine: Arc<Engine>,
    settler: Settler,
    /// Of the store.
    _directory: tempfile::TempDir,
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.engine.stop();
        self.settler.stop();
    }
}

impl Bench {
    /// Nothing can be completed until the second path is renamed to the first.
    fn take_pending_away(&self) -> (PathBuf, PathBuf) {
        let pending = self.engine.store.root().join("pending");
        let away = pending.with_extension("away");
        std::fs::rename(&pending, &away).unwrap();
        (pending, away)
    }

    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("store")).unwrap();
        store.lock().unwrap();
        let engine = Engine::start(store, &Options::default()).unwrap();
        let settler = Settler::start(&engine).unwrap();
        Self {
            engine,
            settler,
            _directory: directory,
        }
    }

    /// Ends `peel-complete`: from now on its queue does not move.
    fn block_queue(&self) {
        self.engine.completer.stop.send(()).unwrap();
        // The thread has the other end of this.
        while self.engine.completer.wake.send(()).is_ok() {}
    }

    fn blob(&self) -> Blob {
        let digest: Sha256Digest = Digest::EMPTY.hex().parse().unwrap();
        let descriptor = Descriptor::new(MediaType::ImageLayerGzip, 1 << 30, digest);
        let name = "localhost:1/image".parse().unwrap();
        let options = ClientOptions::default();
        let opening = Source::open(&name, &options);
        let source = self.engine.handle().block_on(opening).unwrap();
        source.blob(&descriptor).unwrap()
    }

    /// Registers a layer with one file.
    fn register(&self, digest: Digest, chunks: Vec<Chunk>) -> (Arc<Layer>, Arc<Object>) {
        let content = FileContent {
            size: chunks.iter().map(|chunk| chunk.size).sum(),
            digest: Some(digest),
            chunks,
        };
        let index = LayerIndex {
            entries: vec![Entry {
                path: EntryPath::clean(b"file").unwrap(),
                metadata: Metadata::default(),
                kind: EntryKind::Regular(content),
            }],
            prefetch_end: None,
        };
        let engine = &self.engine;
        let layer = Arc::new(Layer::new(1, self.blob(), &index, false, &engine.table));
        engine.register(&layer);
        (layer, engine.table.find(&digest).unwrap())
    }

    /// Brings the first chunks of the layer's file.
    fn bring(&self, layer: &Arc<Layer>, bytes: &[u8]) {
        let pieces = bytes.chunks(CHUNK);
        let claims = (0..).take(pieces.len()).map(|chunk| {
            match self.engine.claim(layer, Position { file: 0, chunk }) {
                Claimed::Fetch(claim) => claim,
                other => panic!("chunk {chunk} is not missing: {other:?}"),
            }
        });
        // All at once: an object that nobody needs lets go of its file.
        let claims: Vec<_> = claims.collect();
        for (claim, data) in claims.into_iter().zip(pieces) {
            claim.deliver(data.to_vec());
        }
    }

    /// Reads the first bytes; the answer comes through the channel.
    fn read(&self, object: &Arc<Object>) -> Receiver<Result<Vec<u8>, Errno>> {
        self.read_at(object, 0)
    }

    fn read_at(&self, object: &Arc<Object>, offset: usize) -> Receiver<Result<Vec<u8>, Errno>> {
        let (sender, answer) = bounded(1);
        self.engine.read(
            object,
            offset as u64,
            100,
            Box::new(move |read| drop(sender.send(read.map(<[u8]>::to_vec)))),
        );
        answer
    }
}

/// A file, its digest and its chunks.
fn file(seed: u8) -> (Vec<u8>, Digest, Vec<Chunk>) {
    let pieces = (0_u8..).take(CHUNKS);
    let bytes: Vec<u8> = pieces
        .flat_map(|piece| std::iter::repeat_n(piece ^ seed, CHUNK))
        .collect();
    let chunks = bytes.chunks(CHUNK).zip(0..).map(|(data, number)| Chunk {
        file_offset: number * CHUNK as u64,
        size: CHUNK as u64,
        digest: Digest::of(data),
        source: ChunkSource::Blob {
            encoding: Encoding::Gzip,
            offset: number * 1000,
            compressed_size: 1000,
            inner_offset: 0,
        },
    });
    let chunks = chunks.collect();
    let digest = Digest::of(&bytes);
    (bytes, digest, chunks)
}

/// Long enough for any machine; only a test that fails waits for it.
const PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_read_of_the_whole_does_not_wait_for_the_queue() {
    for disagree_first in [true, false] {
        let bench = Bench::new();
        bench.block_queue();
        let (bytes, digest, chunks) = file(1);
        let (layer, object) = bench.register(digest, chunks.clone());
        let mut other_way = chunks;
        other_way[1].digest = Digest::EMPTY;
        if disagree_first {
            bench.register(digest, other_way.clone());
        }
        bench.bring(&layer, &bytes);
        assert!(!bench.engine.store.has_object(&digest), "it waits in the queue");
        assert_eq!(lock(&bench.engine.completer.waiting).files.len(), 1);
        if !disagree_first {
            bench.register(digest, other_way);
        }
        let reads: Vec<_> = (0..3).map(|_| bench.read(&object)).collect();
        for read in reads {
            let answer = read.recv_timeout(PATIENCE).unwrap();
            assert!(answer.unwrap() == bytes[..100]);
        }
        eventually("it is an object", || bench.engine.store.has_object(&digest));
        let waiting = lock(&bench.engine.completer.waiting);
        assert!(waiting.files.is_empty() && waiting.urgent.is_empty());
    }
}

#[test]
fn files_that_nobody_reads_stay_in_the_queue() {
    let bench = Bench::new();
    bench.block_queue();
    let (bytes, digest, chunks) = file(2);
    let (layer, object) = bench.register(digest, chunks);
    bench.bring(&layer, &bytes);
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert!(answer.unwrap() == bytes[..100], "its chunks are enough");
    assert!(!bench.engine.store.has_object(&digest));
    assert_eq!(lock(&bench.engine.completer.waiting).files.len(), 1);
}

/// Waits until something holds, at most [`PATIENCE`].
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "it never came true: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn a_file_that_the_disk_did_not_take_is_tried_again() {
    for is_read in [false, true] {
        let bench = Bench::new();
        let (bytes, digest, chunks) = file(3);
        let (layer, object) = bench.register(digest, chunks.clone());
        if is_read {
            let mut other_way = chunks;
            other_way[1].digest = Digest::EMPTY;
            bench.register(digest, other_way);
        }
        let (pending, away) = bench.take_pending_away();
        bench.bring(&layer, &bytes);
        eventually("the first attempt fails", || lock(&object.state).unkept);
        let read = is_read.then(|| bench.read(&object));
        eventually("it is put off", || {
            lock(&bench.engine.completer.waiting).put_off.len() == 1
        });
        std::fs::rename(&away, &pending).unwrap();
        eventually("it is an object", || bench.engine.store.has_object(&digest));
        if let Some(read) = read {
            assert!(read.recv_timeout(PATIENCE).unwrap().unwrap() == bytes[..100]);
        }
        eventually("all is well again", || !lock(&object.state).unkept);
        assert!(lock(&bench.engine.completer.waiting).put_off.is_empty());
    }
}

#[test]
fn attempts_become_rare_and_end() {
    let bench = Bench::new();
    bench.block_queue();
    let (bytes, digest, chunks) = file(4);
    let (layer, object) = bench.register(digest, chunks);
    bench.bring(&layer, &bytes);
    let mut waiting = std::mem::take(&mut *lock(&bench.engine.completer.waiting));
    let mut now = Instant::now();
    let mut completion = waiting.next(now).unwrap();
    for pause in PAUSES {
        waiting.put_off(completion, now).unwrap();
        let early = pause - Duration::from_millis(1);
        assert_eq!(
            waiting.next(now + early).unwrap_err(),
            Some(Duration::from_millis(1))
        );
        now += pause;
        completion = waiting.next(now).unwrap();
    }
    let mut completion = waiting.put_off(completion, now).unwrap_err();
    assert_eq!(waiting.next(now).unwrap_err(), None);
    // A read has it tried soon, and then from the beginning.
    completion.attempts = PAUSES.len() - 1;
    waiting.put_off(completion, now).unwrap();
    assert!(matches!(waiting.take(object.number), Taken::PutOff));
    assert_eq!(waiting.next(now).unwrap_err(), Some(PAUSES[0]));
    assert_eq!(waiting.next(now + PAUSES[0]).unwrap().attempts, 0);
    assert!(matches!(waiting.take(object.number), Taken::Unknown));
}

/// A file that is called nothing but zeros.
fn zeros(digest: Digest, size: u64) -> Vec<Chunk> {
    vec![Chunk {
        file_offset: 0,
        size,
        digest,
        source: ChunkSource::Zeros,
    }]
}

#[test]
fn zeros_come_without_the_decode_threads() {
    let bench = Bench::new();
    bench.engine.decoders.stop();
    let size = 3 << 20;
    let digest = Digest::of_zeros(size);
    let (_, object) = bench.register(digest, zeros(digest, size));
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert_eq!(answer.unwrap(), [0; 100]);
    eventually("it is an object", || {
        bench.engine.store.object_size(&digest) == Some(size)
    });
}

#[test]
fn false_zeros_are_hashed_once_and_hurt_nobody_else() {
    let bench = Bench::new();
    let data = vec![5; CHUNK];
    let digest = Digest::of(&data);
    let size = CHUNK as u64;
    let (liar, object) = bench.register(digest, zeros(digest, size));
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert_eq!(answer.unwrap_err(), Errno::IO);
    assert_eq!(lock(&object.state).false_lists, [ListId::Zeros(size)]);
    let position = Position { file: 0, chunk: 0 };
    assert!(matches!(bench.engine.claim(&liar, position), Claimed::No));
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert_eq!(answer.unwrap_err(), Errno::IO, "without another look");
    // An image that has the file, in one chunk of the same length.
    let mut chunks = zeros(digest, size);
    chunks[0].source = ChunkSource::Blob {
        encoding: Encoding::Gzip,
        offset: 0,
        compressed_size: 1000,
        inner_offset: 0,
    };
    let (honest, _) = bench.register(digest, chunks);
    let Claimed::Fetch(claim) = bench.engine.claim(&honest, position) else {
        panic!("the file is not here");
    };
    claim.deliver(data.to_vec());
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert!(answer.unwrap() == data[..100]);
}

#[test]
fn zeros_that_the_disk_does_not_take_fail_their_reads_only() {
    let bench = Bench::new();
    let size = 1 << 20;
    let digest = Digest::of_zeros(size);
    let (_, object) = bench.register(digest, zeros(digest, size));
    let (pending, away) = bench.take_pending_away();
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert_eq!(answer.unwrap_err(), Errno::IO);
    std::fs::rename(&away, &pending).unwrap();
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert_eq!(answer.unwrap(), [0; 100]);
}

#[test]
fn holes_of_a_pending_file_are_zeros() {
    let bench = Bench::new();
    // No sync from here on: nothing becomes an object.
    bench.settler.stop();
    let (mut bytes, _, mut chunks) = file(7);
    let last = CHUNKS - 1;
    bytes[last * CHUNK..].fill(0);
    chunks[last].source = ChunkSource::Zeros;
    chunks[last].digest = Digest::of_zeros(CHUNK as u64);
    let (layer, object) = bench.register(Digest::of(&bytes), chunks);
    bench.bring(&layer, &bytes[..last * CHUNK]);
    eventually("it is pending", || {
        matches!(lock(&object.state).backing, Backing::Pending)
    });
    for from_memory in [true, false] {
        for chunk in 0..CHUNKS {
            for offset in [
                chunk * CHUNK,
                (chunk + 1) * CHUNK - 150,
                ((chunk + 1) * CHUNK).saturating_sub(50),
            ] {
                let offset = offset.min(bytes.len() - 100);
                if !from_memory {
                    lock(&object.state).recent.clear();
                }
                let answer = bench.read_at(&object, offset).recv_timeout(PATIENCE).unwrap();
                assert!(answer.unwrap() == bytes[offset..offset + 100], "at {offset}");
            }
        }
    }
    let state = lock(&object.state);
    assert!(state.false_lists.is_empty() && matches!(state.backing, Backing::Pending));
}

#[test]
fn a_list_that_did_not_bring_the_file_cannot_make_zeros_of_it() {
    for honest in [true, false] {
        let bench = Bench::new();
        // No sync from here on: nothing becomes an object.
        bench.settler.stop();
        let (mut bytes, _, mut chunks) = file(9);
        let hole = (CHUNKS - 1) * CHUNK;
        if honest {
            bytes[hole..].fill(0);
        }
        chunks[CHUNKS - 1].source = ChunkSource::Zeros;
        chunks[CHUNKS - 1].digest = Digest::of_zeros(CHUNK as u64);
        let digest = Digest::of(&bytes);
        bench.engine.store.add_verified(&digest, &bytes).unwrap();
        let (_, object) = bench.register(digest, chunks);
        let answer = bench.read_at(&object, hole).recv_timeout(PATIENCE).unwrap();
        assert_eq!(answer, if honest { Ok(vec![0; 100]) } else { Err(Errno::IO) });
    }
}

#[test]
fn chunks_in_memory_go_with_the_images_that_could_use_them() {
    let bench = Bench::new();
    let (bytes, digest, chunks) = file(8);
    let (layer, object) = bench.register(digest, chunks);
    let Claimed::Fetch(claim) = bench.engine.claim(&layer, Position { file: 0, chunk: 0 }) else {
        panic!("the chunk is not missing");
    };
    // The store has no place for the object.
    bench.engine.shelf.failed(Instant::now());
    lock(&object.state).backing = Backing::Unkept;
    claim.deliver(bytes[..CHUNK].to_vec());
    assert_eq!(bench.engine.shelf.count(), 1);
    object.remove_image(1);
    eventually("it is let go", || bench.engine.shelf.count() == 0);
    eventually("all of it", || lock(&object.state).flights.is_empty());
}

/// Spoils what is in `pending/`, as a disk does that did not take the pages.
fn lose_pending(engine: &Engine) {
    for entry in std::fs::read_dir(engine.store.root().join("pending")).unwrap() {
        let path = entry.unwrap().path();
        let length = std::fs::metadata(&path).unwrap().len();
        // The same file, so that nothing but its bytes has changed.
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(0).unwrap();
        file.set_len(length).unwrap();
    }
}

#[test]
fn what_the_disk_has_not_confirmed_is_hashed_and_fetched_again() {
    let bench = Bench::new();
    // No sync from here on: nothing becomes an object.
    bench.settler.stop();
    let (bytes, digest, chunks) = file(6);
    let (layer, object) = bench.register(digest, chunks);
    bench.bring(&layer, &bytes);
    eventually("it is pending", || bench.engine.store.pending_count() == 1);
    eventually("the engine knows", || {
        matches!(lock(&object.state).backing, Backing::Pending)
    });
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert!(answer.unwrap() == bytes[..100], "from memory");
    lock(&object.state).recent.clear();
    let answer = bench.read(&object).recv_timeout(PATIENCE).unwrap();
    assert!(answer.unwrap() == bytes[..100], "from the disk, hashed");
    lock(&object.state).recent.clear();
    lose_pending(&bench.engine);
    // The registry is not there, so the read cannot be answered; it must not be with zeros.
    let read = bench.read(&object);
    eventually("the loss is noticed", || bench.engine.store.pending_count() == 0);
    let mut claims = Vec::new();
    for chunk in 0..3 {
        eventually("nobody else brings the chunk", || {
            let claimed = bench.engine.claim(&layer, Position { file: 0, chunk });
            let Claimed::Fetch(claim) = claimed else {
                return false;
            };
            claims.push(claim);
            true
        });
    }
    for (claim, data) in claims.into_iter().zip(bytes.chunks(CHUNK)) {
        claim.deliver(data.to_vec());
    }
    assert!(read.recv_timeout(PATIENCE).unwrap().unwrap() == bytes[..100]);
}
