//! The thread that hashes what consists of several chunks: the stream as it will come out if no entry moves, the files, and the
//! blob where it comes out meanwhile. Of these always two are hashed together: the first two see nearly the same bytes, and
//! the blob goes with whichever has bytes left. Called by the intake and by what writes the blob.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::WriteError;
use super::pack::{Batch, ROOM_MAX, each_zeros};
use peel_hash::{Digest, Hasher};

/// Bytes that sha256 takes at once: a stream that is cut elsewhere is hashed more slowly.
const BLOCK: usize = 64;

/// A file in a batch, or a part of one.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// Its bytes in the batch, those that are left out lying between them or at either end.
    pub(super) start: usize,
    pub(super) end: usize,
    pub(super) extent: Extent,
}

/// How much of a file a part is.
#[derive(Debug, Default)]
pub(super) enum Extent {
    /// All of it.
    Whole,
    /// The start, or what follows a part in the batch before; more will come.
    #[default]
    Open,
    /// The end, and who waits for the file's digest.
    Last(Sender<Digest>),
}

/// What is to be hashed.
pub(super) enum Work {
    /// The next batch of the stream.
    Batch(Arc<Batch>),
    /// The next bytes of the blob.
    Blob(Vec<u8>),
}

/// Hash and length of the stream; `None` if it was not to be hashed.
pub(super) type Hashed = Option<(Hasher, u64)>;

/// The thread.
pub(super) struct Thread<'scope> {
    /// It ends when nobody has this any more.
    pub(super) work: Sender<Work>,
    /// The buffers of the blob, emptied.
    pub(super) rooms: Receiver<Vec<u8>>,
    /// The stream, and the blob.
    pub(super) thread: ScopedJoinHandle<'scope, (Hashed, Hasher)>,
}

/// Starts the thread. So many pieces may wait for it, and as many of the blob in it.
pub(super) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    has_stream: bool,
    waiting: usize,
) -> Result<Thread<'scope>, WriteError> {
    let (work, received) = bounded(waiting);
    let (done, rooms) = bounded(waiting);
    let thread = Builder::new()
        .name("layer-hash".to_owned())
        .spawn_scoped(scope, move || {
            run(&received, has_stream, Blob::new(done, waiting))
        })
        .map_err(WriteError::Thread)?;
    Ok(Thread { work, rooms, thread })
}

fn run(work: &Receiver<Work>, has_stream: bool, blob: Blob) -> (Hashed, Hasher) {
    let mut hashing = Hashing {
        stream: has_stream.then(Hasher::new),
        file: Hasher::new(),
        length: 0,
        blob,
    };
    for work in work {
        let batch = match work {
            Work::Batch(batch) => batch,
            Work::Blob(bytes) => {
                hashing.blob.push(bytes);
                continue;
            }
        };
        let digests = if has_stream {
            hashing.add(&batch)
        } else {
            hashing.add_files(&batch)
        };
        if let Some(answer) = &batch.digests {
            // Nobody waits for them when the intake has failed meanwhile.
            let _unwanted = answer.send(digests);
        }
    }
    let length = hashing.length;
    let hashed = hashing.stream.map(|stream| (stream, length));
    (hashed, hashing.blob.finish())
}

/// The blob, as far as it has come out.
struct Blob {
    hasher: Hasher,
    /// What is not hashed yet; of the first piece so many bytes are.
    pieces: VecDeque<Vec<u8>>,
    hashed: usize,
    /// Bytes that are not hashed yet.
    open: usize,
    /// Most pieces that wait for something else to be hashed with.
    waiting: usize,
    done: Sender<Vec<u8>>,
}

impl Blob {
    fn new(done: Sender<Vec<u8>>, waiting: usize) -> Self {
        Self {
            hasher: Hasher::new(),
            pieces: VecDeque::new(),
            hashed: 0,
            open: 0,
            waiting,
            done,
        }
    }

    fn push(&mut self, bytes: Vec<u8>) {
        self.open += bytes.len();
        self.pieces.push_back(bytes);
        while self.pieces.len() > self.waiting {
            self.step(&mut Hasher::new(), &[]);
        }
    }

    /// Hashes all of `data` for `other`, and meanwhile as much of the blob as there is.
    fn with(&mut self, other: &mut Hasher, mut data: &[u8]) {
        while !data.is_empty() {
            let taken = self.step(other, data);
            data = data.get(taken..).unwrap_or_default();
        }
    }

    /// Hashes the first bytes of `data` with as many of the first piece, all of either where the other has none; says how many
    /// bytes of `data` those are.
    fn step(&mut self, other: &mut Hasher, data: &[u8]) -> usize {
        let piece = self.pieces.front().map(Vec::as_slice).unwrap_or_default();
        let piece = piece.get(self.hashed..).unwrap_or_default();
        let (piece, data) = match (piece.len(), data.len()) {
            (0, _) | (_, 0) => (piece, data),
            // The end of a piece by itself: blocks of the other one stay whole.
            (1..BLOCK, _) => (piece, &[][..]),
            (one, two) if one < two => {
                let whole = one / BLOCK * BLOCK;
                (
                    piece.get(..whole).unwrap_or_default(),
                    data.get(..whole).unwrap_or_default(),
                )
            }
            (_, two) => (piece.get(..two).unwrap_or_default(), data),
        };
        Hasher::update_both((other, data), (&mut self.hasher, piece));
        self.hashed += piece.len();
        self.open -= piece.len();
        if let Some(mut done) = self.pieces.pop_front_if(|piece| piece.len() <= self.hashed) {
            self.hashed = 0;
            done.clear();
            if done.capacity() <= ROOM_MAX {
                // Enough of them are waiting already, or nobody wants them any more.
                let _unwanted = self.done.try_send(done);
            }
        }
        data.len()
    }

    fn finish(mut self) -> Hasher {
        while !self.pieces.is_empty() {
            self.step(&mut Hasher::new(), &[]);
        }
        self.hasher
    }
}

struct Hashing {
    stream: Option<Hasher>,
    file: Hasher,
    length: u64,
    blob: Blob,
}

impl Hashing {
    /// Takes the stream and the files; returns the digests of whole files.
    fn add(&mut self, batch: &Batch) -> Vec<Digest> {
        let mut digests = Vec::new();
        let mut left_out = batch.left_out.as_slice();
        let mut at = 0;
        for part in &batch.files {
            self.take(&batch.data, at..part.start, &mut &[][..], false);
            self.take(&batch.data, part.start..part.end, &mut left_out, true);
            at = part.end;
            match &part.extent {
                Extent::Open => {}
                Extent::Whole => digests.push(std::mem::take(&mut self.file).finish()),
                Extent::Last(answer) => self.end_file(answer),
            }
        }
        self.take(&batch.data, at..batch.data.len(), &mut &[][..], false);
        digests
    }

    /// The same where there is no stream to hash: two whole files at once.
    fn add_files(&mut self, batch: &Batch) -> Vec<Digest> {
        let mut left_out = batch.left_out.as_slice();
        let whole = |part: &&Part| matches!(part.extent, Extent::Whole);
        for part in batch.files.iter().filter(|part| !whole(part)) {
            self.take(&batch.data, part.start..part.end, &mut left_out, true);
            if let Extent::Last(answer) = &part.extent {
                self.end_file(answer);
            }
        }
        let whole = batch.files.iter().filter(whole);
        Digest::of_each(whole.map(|part| batch.data.get(part.start..part.end).unwrap_or_default()))
    }

    fn end_file(&mut self, answer: &Sender<Digest>) {
        let digest = std::mem::take(&mut self.file).finish();
        // Nobody waits for it when the intake has failed meanwhile.
        let _unwanted = answer.send(digest);
    }

    /// Takes a part of a batch, and the zeros that are left out there.
    fn take(&mut self, data: &[u8], part: Range<usize>, left_out: &mut &[(usize, u64)], is_file: bool) {
        let mut at = part.start;
        while let Some((&(place, zeros), rest)) = left_out.split_first()
            && place <= part.end
        {
            self.update(data.get(at..place).unwrap_or_default(), is_file);
            each_zeros(zeros, |zeros| self.update(zeros, is_file));
            at = place;
            *left_out = rest;
        }
        self.update(data.get(at..part.end).unwrap_or_default(), is_file);
    }

    fn update(&mut self, data: &[u8], is_file: bool) {
        self.length += data.len() as u64;
        match (&mut self.stream, is_file) {
            (Some(stream), true) => {
                // Both halves of what is left go with the blob.
                let alone = (self.blob.open / 2).min(data.len());
                let (both, alone) = data.split_at((data.len() - alone) / BLOCK * BLOCK);
                Hasher::update_both((stream, both), (&mut self.file, both));
                self.blob.with(stream, alone);
                self.blob.with(&mut self.file, alone);
            }
            (Some(stream), false) => self.blob.with(stream, data),
            (None, true) => self.file.update(data),
            (None, false) => {}
        }
    }
}
