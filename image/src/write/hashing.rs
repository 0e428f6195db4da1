//! The thread that hashes what consists of several chunks: the stream as it will come out if no entry moves, and the files.
//! Both see nearly the same bytes, so they are hashed together. Called by the intake.

use std::ops::Range;
use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::WriteError;
use super::pack::{Batch, each_zeros};
use crate::digest::{Digest, Hasher};

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

/// Hash and length of the stream; `None` if it was not to be hashed.
pub(super) type Hashed = Option<(Hasher, u64)>;

/// Starts the thread; it ends when the sender is gone. So many batches may wait for it.
pub(super) fn start<'scope>(
    scope: &'scope Scope<'scope, '_>,
    has_stream: bool,
    waiting: usize,
) -> Result<(Sender<Arc<Batch>>, ScopedJoinHandle<'scope, Hashed>), WriteError> {
    let (sender, batches) = bounded(waiting);
    let thread = Builder::new()
        .name("layer-hash".to_owned())
        .spawn_scoped(scope, move || run(&batches, has_stream))
        .map_err(WriteError::Thread)?;
    Ok((sender, thread))
}

fn run(batches: &Receiver<Arc<Batch>>, has_stream: bool) -> Hashed {
    let mut hashing = Hashing {
        stream: has_stream.then(Hasher::new),
        file: Hasher::new(),
        length: 0,
    };
    for batch in batches {
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
    hashing.stream.map(|stream| (stream, length))
}

struct Hashing {
    stream: Option<Hasher>,
    file: Hasher,
    length: u64,
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
            (Some(stream), true) => Hasher::update_both((stream, data), (&mut self.file, data)),
            (Some(stream), false) => stream.update(data),
            (None, true) => self.file.update(data),
            (None, false) => {}
        }
    }
}
