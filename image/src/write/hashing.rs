//! The thread that hashes what has to be hashed in order: the stream as it will come out if no entry moves, and large files.
//! Both see nearly the same bytes, so they are hashed together. Called by the intake.

use std::ops::Range;
use std::sync::Arc;
use std::thread::{Builder, Scope, ScopedJoinHandle};

use crossbeam_channel::{Receiver, Sender, bounded};

use super::WriteError;
use super::pack::{Batch, each_zeros};
use crate::digest::{Digest, Hasher};

/// A part of a large file in a batch.
#[derive(Debug, Default)]
pub(super) struct Part {
    /// Its bytes in the batch, those that are left out lying between them or at either end.
    pub(super) start: usize,
    pub(super) end: usize,
    /// Who waits for the file's digest; only in its last part.
    pub(super) answer: Option<Sender<Digest>>,
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
        let mut left_out = batch.left_out.as_slice();
        let mut at = 0;
        for part in &batch.large {
            hashing.take(&batch.data, at..part.start, &mut &[][..], false);
            hashing.take(&batch.data, part.start..part.end, &mut left_out, true);
            at = part.end;
            if let Some(answer) = &part.answer {
                let digest = std::mem::take(&mut hashing.file).finish();
                // Nobody waits for it when the intake has failed meanwhile.
                let _unwanted = answer.send(digest);
            }
        }
        hashing.take(&batch.data, at..batch.data.len(), &mut &[][..], false);
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
