//! Hashing: one stream piece by piece, two of them at once, or many pieces of data of which two are always under way.
//!
//! Blocks go through the `sha2` crate; only where two messages are there does [`super::sys`] take them together.
//! Called wherever bytes are verified or named; the layer writer, which hashes all bytes three times, is what needs the pairs.

use std::cmp::Reverse;
use std::fmt;

use sha2::block_api::compress256;

use super::Digest;
use super::sys::{BLOCK, State, compress_both};

/// FIPS 180-4, section 5.3.3.
const START: State = [
    0x6a09_e667,
    0xbb67_ae85,
    0x3c6e_f372,
    0xa54f_f53a,
    0x510e_527f,
    0x9b05_688c,
    0x1f83_d9ab,
    0x5be0_cd19,
];

/// Hashes a stream piece by piece.
#[derive(Clone)]
pub struct Hasher {
    state: State,
    /// The block that is not full; as many bytes of it count as `length` says.
    open: [u8; BLOCK],
    /// Bytes so far.
    length: u64,
}

impl Default for Hasher {
    fn default() -> Self {
        Self {
            state: START,
            open: [0; BLOCK],
            length: 0,
        }
    }
}

impl Hasher {
    /// A hasher that has seen no bytes.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds the next bytes of the stream.
    pub fn update(&mut self, data: &[u8]) {
        let blocks = self.begin(data);
        compress256(&mut self.state, blocks);
    }

    /// Adds the next bytes of two streams, in little more time than the longer piece takes alone where the processor can.
    pub fn update_both(first: (&mut Self, &[u8]), second: (&mut Self, &[u8])) {
        let (one, two) = (first.0.begin(first.1), second.0.begin(second.1));
        let count = compress_both((&mut first.0.state, one), (&mut second.0.state, two));
        compress256(&mut first.0.state, one.get(count..).unwrap_or_default());
        compress256(&mut second.0.state, two.get(count..).unwrap_or_default());
    }

    /// The digest of all bytes so far.
    pub fn finish(self) -> Digest {
        let mut state = self.state;
        let open = self.open.get(..self.open_length()).unwrap_or_default();
        let (last, count) = last_blocks(open, self.length);
        compress256(&mut state, last.get(..count).unwrap_or_default());
        digest(&state)
    }

    fn open_length(&self) -> usize {
        usize::try_from(self.length % BLOCK as u64).unwrap_or(0)
    }

    /// Completes the block that is open, keeps what does not fill the last one, and returns the full blocks in between, which
    /// the caller takes into the state.
    fn begin<'d>(&mut self, mut data: &'d [u8]) -> &'d [[u8; BLOCK]] {
        let at = self.open_length();
        self.length += data.len() as u64;
        if at > 0 {
            let (more, rest) = data.split_at(data.len().min(BLOCK - at));
            if let Some(room) = self.open.get_mut(at..at + more.len()) {
                room.copy_from_slice(more);
            }
            if at + more.len() < BLOCK {
                return &[];
            }
            compress256(&mut self.state, &[self.open]);
            data = rest;
        }
        let (blocks, rest) = data.as_chunks();
        if let Some(room) = self.open.get_mut(..rest.len()) {
            room.copy_from_slice(rest);
        }
        blocks
    }
}

impl fmt::Debug for Hasher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Hasher")
    }
}

impl std::io::Write for Hasher {
    fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
        self.update(data);
        Ok(data.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The end of a message of `length` bytes, of which `open` (less than a block) is not hashed yet, with its padding: one block
/// or two (FIPS 180-4, section 5.1.1).
fn last_blocks(open: &[u8], length: u64) -> ([[u8; BLOCK]; 2], usize) {
    let mut last = [[0; BLOCK]; 2];
    let bytes = last.as_flattened_mut();
    if let Some(room) = bytes.get_mut(..open.len()) {
        room.copy_from_slice(open);
    }
    if let Some(end) = bytes.get_mut(open.len()) {
        *end = 0x80;
    }
    let count = if open.len() < BLOCK - 8 { 1 } else { 2 };
    let bits = length.wrapping_mul(8).to_be_bytes();
    if let Some(room) = bytes.get_mut(count * BLOCK - bits.len()..count * BLOCK) {
        room.copy_from_slice(&bits);
    }
    (last, count)
}

fn digest(state: &State) -> Digest {
    let mut bytes = [0; 32];
    for (out, word) in bytes.as_chunks_mut().0.iter_mut().zip(state) {
        *out = word.to_be_bytes();
    }
    Digest::from_bytes(bytes)
}

/// A message of which two are hashed at once.
struct Message<'d> {
    /// Its place in the list.
    index: usize,
    /// Full blocks that are still to be hashed.
    blocks: &'d [[u8; BLOCK]],
    /// What comes after them.
    last: [[u8; BLOCK]; 2],
    /// How many blocks of `last` were hashed, and how many there are.
    at: usize,
    count: usize,
}

impl<'d> Message<'d> {
    fn new(index: usize, data: &'d [u8]) -> Self {
        let (blocks, open) = data.as_chunks();
        let (last, count) = last_blocks(open, data.len() as u64);
        Self {
            index,
            blocks,
            last,
            at: 0,
            count,
        }
    }

    /// The blocks that come next; none when all are hashed.
    fn next(&self) -> &[[u8; BLOCK]] {
        if self.blocks.is_empty() {
            self.last.get(self.at..self.count).unwrap_or_default()
        } else {
            self.blocks
        }
    }

    fn advance(&mut self, count: usize) {
        if self.blocks.is_empty() {
            self.at += count;
        } else {
            self.blocks = self.blocks.get(count..).unwrap_or_default();
        }
    }
}

/// The digest of each piece, in their order.
pub(super) fn of_each<'d>(pieces: impl IntoIterator<Item = &'d [u8]>) -> Vec<Digest> {
    let mut pieces: Vec<_> = pieces.into_iter().enumerate().collect();
    let mut digests = vec![Digest::EMPTY; pieces.len()];
    // The shortest ones last, so that the one that ends up alone is not alone for long.
    pieces.sort_by_key(|(_, data)| Reverse(data.len()));
    let mut waiting = pieces
        .into_iter()
        .map(|(index, data)| (START, Message::new(index, data)));
    let (mut first, mut second) = (waiting.next(), waiting.next());
    let mut keep = |state: &State, message: &Message<'_>| {
        if let Some(place) = digests.get_mut(message.index) {
            *place = digest(state);
        }
    };
    loop {
        match (&mut first, &mut second) {
            (Some((one, a)), Some((two, b))) => {
                let count = compress_both((one, a.next()), (two, b.next()));
                a.advance(count);
                b.advance(count);
            }
            (Some((state, message)), None) | (None, Some((state, message))) => {
                let count = message.next().len();
                compress256(state, message.next());
                message.advance(count);
            }
            (None, None) => return digests,
        }
        for lane in [&mut first, &mut second] {
            if let Some((state, message)) = lane.take_if(|(_, message)| message.next().is_empty()) {
                keep(&state, &message);
                *lane = waiting.next();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use sha2::Digest as _;

    use super::*;

    fn plainly(data: &[u8]) -> Digest {
        Digest::from_bytes(sha2::Sha256::digest(data).into())
    }

    fn bytes(length: usize, seed: usize) -> Vec<u8> {
        let byte = |index: usize| u8::try_from((index * 31 + index / 7 + seed) % 256).unwrap_or(0);
        (0..length).map(byte).collect()
    }

    #[test]
    fn every_length_around_a_block() {
        for length in (0..200).chain([4095, 4096, 100_000]) {
            let data = bytes(length, 1);
            let mut hasher = Hasher::new();
            hasher.update(&data);
            assert_eq!(hasher.finish(), plainly(&data), "{length} bytes");
            assert_eq!(of_each([data.as_slice()]), [plainly(&data)], "{length} bytes");
        }
        assert_eq!(of_each([]), []);
    }

    proptest! {
        #[test]
        fn many_at_once(lengths in proptest::collection::vec(0_usize..3000, 0..20)) {
            let pieces: Vec<_> = lengths.iter().enumerate().map(|(seed, length)| bytes(*length, seed)).collect();
            let expected: Vec<_> = pieces.iter().map(|piece| plainly(piece)).collect();
            prop_assert_eq!(of_each(pieces.iter().map(Vec::as_slice)), expected);
        }

        #[test]
        fn two_streams_at_once(steps in proptest::collection::vec((0_usize..500, 0_usize..500), 0..20)) {
            let (mut one, mut two) = (Hasher::new(), Hasher::new());
            let (mut all_one, mut all_two) = (Vec::new(), Vec::new());
            for (seed, (a, b)) in steps.into_iter().enumerate() {
                let (a, b) = (bytes(a, seed), bytes(b, seed + 1));
                Hasher::update_both((&mut one, &a), (&mut two, &b));
                all_one.extend_from_slice(&a);
                all_two.extend_from_slice(&b);
            }
            prop_assert_eq!(one.finish(), plainly(&all_one));
            prop_assert_eq!(two.finish(), plainly(&all_two));
        }
    }
}
