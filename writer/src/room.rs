//! A buffer for batches that is used again and again. What a [`Vec`] has behind its length must be set before it can be read
//! into, each time; here it stays as it was.

use std::ops::{Deref, Range};

/// Bytes that can be added to, taken away, and read as a slice.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// All of it has been set once.
    bytes: Vec<u8>,
    length: usize,
}

impl Room {
    /// An empty one in which `capacity` bytes have room.
    pub(super) fn with_capacity(capacity: usize) -> Self {
        Self {
            bytes: Vec::with_capacity(capacity),
            length: 0,
        }
    }

    /// Bytes of memory that it has.
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// Makes it longer by `count` bytes of any value, and returns those.
    pub(super) fn grow(&mut self, count: usize) -> &mut [u8] {
        let start = self.length;
        self.length += count;
        if self.bytes.len() < self.length {
            self.bytes.resize(self.length, 0);
        }
        self.bytes.get_mut(start..self.length).unwrap_or_default()
    }

    pub(super) fn extend_from_slice(&mut self, bytes: &[u8]) {
        let start = self.length;
        self.length += bytes.len();
        match self.bytes.get_mut(start..self.length) {
            Some(room) => room.copy_from_slice(bytes),
            None => {
                self.bytes.truncate(start);
                self.bytes.extend_from_slice(bytes);
            }
        }
    }

    /// Makes it no longer than `length` bytes.
    pub(super) fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
    }

    /// Takes the bytes of `range` out, as far as they are there.
    pub(super) fn remove(&mut self, range: Range<usize>) {
        let end = range.end.min(self.length);
        if range.start < end {
            self.bytes.copy_within(end..self.length, range.start);
            self.length -= end - range.start;
        }
    }
}

impl Deref for Room {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_like_a_vector() {
        let (mut room, mut vector) = (Room::with_capacity(10), Vec::new());
        for step in 0..200_u8 {
            let count = usize::from(step % 7);
            match step % 5 {
                0 | 1 => {
                    room.extend_from_slice(&[step; 9][..count]);
                    vector.extend_from_slice(&[step; 9][..count]);
                }
                2 => {
                    room.grow(count).fill(step);
                    vector.resize(vector.len() + count, step);
                }
                3 => {
                    room.remove(1..count);
                    let end = count.min(vector.len());
                    vector.drain(1.min(end)..end);
                }
                _ => {
                    room.truncate(vector.len().saturating_sub(count));
                    vector.truncate(vector.len().saturating_sub(count));
                }
            }
            assert_eq!(*room, *vector, "step {step}");
        }
    }
}
