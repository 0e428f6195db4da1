//! The raw bytes of a tar stream beside what the tar reader makes of them: paddings, trailers and whatever else must come out
//! as it went in. Called by the writers that keep a stream byte for byte.

use std::cell::RefCell;
use std::io::{self, Read};
use std::rc::Rc;

/// Most bytes that are recorded and not taken: the longest headers of an entry, and what is read ahead.
const RECORDED_MAX: usize = 16 << 20;

/// What was read so far and not taken yet.
#[derive(Debug, Default)]
struct Recorded {
    data: Vec<u8>,
    /// Bytes at the start of `data` that were taken already.
    taken: usize,
    /// Offset in the stream of the first byte that was not taken.
    offset: u64,
    /// Up to this offset nobody wants the bytes that are still to be read.
    unwanted_end: u64,
    failed: bool,
}

/// A stream that records what is read from it.
#[derive(Debug)]
pub(super) struct Tape<R> {
    stream: R,
    recorded: Rc<RefCell<Recorded>>,
}

/// The other end of a [`Tape`].
#[derive(Debug)]
pub(super) struct Recording(Rc<RefCell<Recorded>>);

/// Records `stream`.
pub(super) fn record<R: Read>(stream: R) -> (Tape<R>, Recording) {
    let recorded = Rc::default();
    let tape = Tape {
        stream,
        recorded: Rc::clone(&recorded),
    };
    (tape, Recording(recorded))
}

impl<R: Read> Read for Tape<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut recorded = self.recorded.borrow_mut();
        let count = match self.stream.read(buffer) {
            Ok(count) => count,
            Err(error) => {
                recorded.failed |= error.kind() != io::ErrorKind::Interrupted;
                return Err(error);
            }
        };
        let unwanted = recorded.unwanted(count);
        recorded.offset += unwanted as u64;
        if recorded.data.len() - recorded.taken + count - unwanted > RECORDED_MAX {
            return Err(io::Error::other("too many bytes between two tar entries"));
        }
        recorded
            .data
            .extend_from_slice(buffer.get(unwanted..count).unwrap_or_default());
        Ok(count)
    }
}

impl Recorded {
    /// How many of the next `count` bytes nobody wants.
    fn unwanted(&self, count: usize) -> usize {
        if self.taken < self.data.len() {
            return 0;
        }
        let unwanted = self.unwanted_end.saturating_sub(self.offset);
        usize::try_from(unwanted).map_or(count, |unwanted| unwanted.min(count))
    }
}

impl Recording {
    /// Appends the bytes before `offset` of the stream, which must have been read, to `out`.
    pub(super) fn take(&mut self, offset: u64, out: &mut Vec<u8>) {
        self.with(offset, |data| out.extend_from_slice(data));
    }

    /// Forgets the bytes before `offset`, those that are still to be read too.
    pub(super) fn skip(&mut self, offset: u64) {
        self.with(offset, |_| ());
        let mut recorded = self.0.borrow_mut();
        recorded.unwanted_end = recorded.unwanted_end.max(offset);
    }

    /// Whether reading the stream itself failed.
    pub(super) fn failed(&self) -> bool {
        self.0.borrow().failed
    }

    fn with(&mut self, offset: u64, f: impl FnOnce(&[u8])) {
        let mut recorded = self.0.borrow_mut();
        let count = usize::try_from(offset.saturating_sub(recorded.offset)).unwrap_or(usize::MAX);
        let end = recorded.taken.saturating_add(count).min(recorded.data.len());
        f(recorded.data.get(recorded.taken..end).unwrap_or_default());
        recorded.offset += (end - recorded.taken) as u64;
        recorded.taken = end;
        if recorded.taken == recorded.data.len() {
            recorded.data.clear();
            recorded.taken = 0;
        } else if recorded.taken > recorded.data.len() / 2 {
            let taken = std::mem::take(&mut recorded.taken);
            recorded.data.drain(..taken);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::BufReader;

    use super::*;

    #[test]
    fn every_byte_is_taken_once() {
        let data: Vec<u8> = (0..200_000_u32)
            .map(|number| u8::try_from(number % 251).unwrap())
            .collect();
        let (tape, mut recording) = record(data.as_slice());
        let mut reader = BufReader::with_capacity(1000, tape);
        let (mut out, mut position) = (Vec::new(), 0);
        for length in [1, 10, 999, 70_000, 1, 1001] {
            let mut buffer = vec![0; length];
            reader.read_exact(&mut buffer).unwrap();
            position += length;
            recording.take(position as u64, &mut out);
            assert_eq!(out, data[..position]);
        }
        reader.read_exact(&mut [0; 5000]).unwrap();
        recording.skip(position as u64 + 3000);
        out.clear();
        recording.take(position as u64 + 5000, &mut out);
        assert_eq!(out, data[position + 3000..position + 5000]);
        position += 5000;
        recording.skip(position as u64 + 20_000);
        reader.read_exact(&mut [0; 20_100]).unwrap();
        out.clear();
        recording.take(position as u64 + 20_100, &mut out);
        assert_eq!(out, data[position + 20_000..position + 20_100]);
        assert!(!recording.failed());
    }
}
