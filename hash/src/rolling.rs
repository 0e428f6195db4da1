//! Where Podman cuts a file into chunks: at content-defined places, so that files that differ in one spot share their other
//! chunks, and around runs of zeros. Called by the layer writer for the Podman dialect.
//!
//! The parameters are those of containers/storage (`pkg/chunked/compressor`, its rolling checksum is that of bup and perkeep),
//! so that images made by either tool share chunks. A run of at least [`HOLE_MIN`] zeros is a chunk of its own. Elsewhere a
//! chunk ends after a byte where the low 16 bits of the checksum's second sum are all ones: every 64 KiB on average.
//! Both sums depend on the last 64 bytes only, and a hole leaves nothing but zeros there, so they start anew after each.

mod sys;

/// Zeros from which on a run of them is a hole.
pub const HOLE_MIN: u64 = 1024;
/// Longest chunk of data. Podman has no limit, but a reader holds a chunk in memory; random data never comes near.
pub const DATA_MAX: usize = 32 << 20;

const WINDOW: usize = 64;
const CHARACTER_OFFSET: u16 = 31;
/// The sums over a window of zeros.
const FIRST_START: u16 = 64 * CHARACTER_OFFSET;
// The sums are taken modulo 2^16: only these bits decide, and higher ones never reach them.
const SECOND_START: u16 = FIRST_START.wrapping_mul(63);
const SPLIT: u16 = u16::MAX;
/// Bytes that are summed at once.
const LANES: usize = 8;

/// A piece of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// A chunk of so many bytes ends here.
    Data(usize),
    /// A chunk of so many zeros ends here.
    Hole(u64),
}

/// Finds the chunks of one file, block by block.
#[derive(Debug)]
pub struct Splitter {
    sums: Sums,
    /// Bytes of the current chunk of data, pending zeros left out.
    length: usize,
    /// Zeros up to now that may become a hole.
    zeros: u64,
    /// Those of them that the caller does not keep.
    forgotten: u64,
}

impl Default for Splitter {
    fn default() -> Self {
        Self::new()
    }
}

impl Splitter {
    /// A file of which nothing was seen yet.
    pub fn new() -> Self {
        Self {
            sums: Sums::new(),
            length: 0,
            zeros: 0,
            forgotten: 0,
        }
    }

    /// Takes the next bytes of the file and reports the chunks that are complete.
    pub fn push(&mut self, mut block: &[u8], cut: &mut impl FnMut(Cut)) {
        if self.zeros > 0 {
            let more = leading_zeros(block);
            self.zeros += more as u64;
            block = block.get(more..).unwrap_or_default();
            if block.is_empty() {
                return;
            }
            self.end_zeros(cut);
        }
        while !block.is_empty() {
            let (start, end) = next_zeros(block);
            self.data(block.get(..start).unwrap_or_default(), cut);
            self.zeros = (end - start) as u64;
            block = block.get(end..).unwrap_or_default();
            if !block.is_empty() {
                self.end_zeros(cut);
            }
        }
    }

    /// How many of the last bytes are zeros that a hole will take in, and that were not forgotten yet.
    pub fn pending_hole(&self) -> Option<usize> {
        let there = self.zeros - self.forgotten;
        usize::try_from(there)
            .ok()
            .filter(|there| *there > 0 && self.zeros >= HOLE_MIN)
    }

    /// Notes that the caller keeps those zeros no longer.
    pub fn forget_pending(&mut self) {
        self.forgotten = self.zeros;
    }

    /// Ends the file.
    pub fn finish(mut self, cut: &mut impl FnMut(Cut)) {
        self.end_zeros(cut);
        self.end_data(cut);
    }

    /// Something else follows the zeros, or nothing does.
    fn end_zeros(&mut self, cut: &mut impl FnMut(Cut)) {
        let zeros = std::mem::take(&mut self.zeros);
        self.forgotten = 0;
        if zeros >= HOLE_MIN {
            self.end_data(cut);
            cut(Cut::Hole(zeros));
            self.sums = Sums::new();
            return;
        }
        const ZEROS: [u8; 1024] = [0; 1024];
        let zeros = usize::try_from(zeros).ok().and_then(|zeros| ZEROS.get(..zeros));
        self.data(zeros.unwrap_or_default(), cut);
    }

    fn end_data(&mut self, cut: &mut impl FnMut(Cut)) {
        if self.length > 0 {
            cut(Cut::Data(std::mem::take(&mut self.length)));
        }
    }

    fn data(&mut self, mut data: &[u8], cut: &mut impl FnMut(Cut)) {
        while !data.is_empty() {
            let room = DATA_MAX - self.length;
            let part = data.get(..room).unwrap_or(data);
            let (taken, split) = self.sums.roll(part);
            self.length += taken;
            data = data.get(taken..).unwrap_or_default();
            if split || self.length >= DATA_MAX {
                self.end_data(cut);
            }
        }
    }
}

fn leading_zeros(block: &[u8]) -> usize {
    block.iter().position(|byte| *byte != 0).unwrap_or(block.len())
}

/// The first run of zeros that is a hole, or the one that ends the block, whatever its length.
fn next_zeros(block: &[u8]) -> (usize, usize) {
    const STEP: usize = 1024;
    // Every hole holds one of these positions.
    let mut at = STEP - 1;
    while let Some(byte) = block.get(at) {
        if *byte != 0 {
            at += STEP;
            continue;
        }
        let before = block.get(..at).unwrap_or_default();
        let start = before
            .iter()
            .rposition(|byte| *byte != 0)
            .map_or(0, |last| last + 1);
        let end = at + leading_zeros(block.get(at..).unwrap_or_default());
        if end - start >= STEP || end == block.len() {
            return (start, end);
        }
        at = end + STEP - 1;
    }
    let start = block
        .iter()
        .rposition(|byte| *byte != 0)
        .map_or(0, |last| last + 1);
    (start, block.len())
}

/// The rolling checksum.
#[derive(Debug)]
struct Sums {
    first: u16,
    second: u16,
    window: [u8; WINDOW],
    at: usize,
}

impl Sums {
    fn new() -> Self {
        Self {
            first: FIRST_START,
            second: SECOND_START,
            window: [0; WINDOW],
            at: 0,
        }
    }

    /// Takes bytes up to and including the first one after which a chunk ends; returns how many, and whether one does.
    fn roll(&mut self, data: &[u8]) -> (usize, bool) {
        let mut taken = 0;
        for byte in data.iter().take(WINDOW) {
            let old = std::mem::replace(&mut self.window[self.at % WINDOW], *byte);
            self.at = (self.at + 1) % WINDOW;
            taken += 1;
            if self.step(*byte, old) {
                return (taken, true);
            }
        }
        let Some(rest) = data.get(WINDOW..).filter(|rest| !rest.is_empty()) else {
            return (taken, false);
        };
        // From here on the byte that leaves the window is in the data itself.
        let (blocks, last) = rest.as_chunks::<LANES>();
        let (leaving, _) = data.as_chunks::<LANES>();
        let scanned = sys::scan(self.first, self.second, blocks, leaving);
        (self.first, self.second) = (scanned.first, scanned.second);
        taken += scanned.blocks * LANES;
        let is_found = scanned.blocks < blocks.len();
        let mut split = false;
        if is_found || !last.is_empty() {
            let rest = data.get(taken..).unwrap_or_default().iter();
            let leaving = data.get(taken - WINDOW..).unwrap_or_default();
            for (byte, old) in rest.zip(leaving) {
                taken += 1;
                if self.step(*byte, *old) {
                    split = true;
                    break;
                }
            }
        }
        if let Some(last) = data
            .get(taken - WINDOW..taken)
            .and_then(|last| last.try_into().ok())
        {
            self.window = last;
            self.at = 0;
        }
        (taken, split)
    }

    fn step(&mut self, byte: u8, old: u8) -> bool {
        (self.first, self.second) = next(self.first, self.second, byte, old);
        self.second == SPLIT
    }
}

/// What a scan found.
struct Scanned {
    /// Blocks before the one in which a chunk ends.
    blocks: usize,
    /// The sums after them.
    first: u16,
    second: u16,
}

/// Both sums after another byte.
#[inline(always)]
fn next(first: u16, second: u16, byte: u8, old: u8) -> (u16, u16) {
    let old = u16::from(old);
    let first = first.wrapping_add(u16::from(byte)).wrapping_sub(old);
    let leaving = (old + CHARACTER_OFFSET).wrapping_mul(64);
    (first, second.wrapping_add(first).wrapping_sub(leaving))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::digest::Digest;

    fn cuts(data: &[u8], block: usize) -> Vec<Cut> {
        let (mut splitter, mut cuts) = (Splitter::new(), Vec::new());
        for block in data.chunks(block) {
            splitter.push(block, &mut |cut| cuts.push(cut));
        }
        splitter.finish(&mut |cut| cuts.push(cut));
        cuts
    }

    /// The sha256 digests of 0, 1, 2, ... as 64-bit numbers, one after the other.
    fn stream(length: usize) -> Vec<u8> {
        let mut data = Vec::new();
        for number in 0_u64.. {
            if data.len() >= length {
                break;
            }
            data.extend_from_slice(Digest::of(&number.to_le_bytes()).as_bytes());
        }
        data.truncate(length);
        data
    }

    #[test]
    fn chunks_end_where_podman_ends_them() {
        let data = stream(1 << 20);
        assert_eq!(
            Digest::of(&data).hex(),
            "8936491f7e7dd3ca297960ec425e8375f1b9db51278d5fff5481205c0992a132"
        );
        let lengths = [
            35912, 8506, 5307, 8724, 209_930, 19432, 104_909, 286_951, 54015, 43804, 25357, 76788, 4288,
            33209, 29943, 35611, 38756, 27134,
        ];
        for block in [1, 63, 64, 65, 4096, 100_000, 1 << 20] {
            assert_eq!(cuts(&data, block), lengths.map(Cut::Data), "blocks of {block}");
        }
    }

    #[test]
    fn long_runs_of_zeros_are_holes() {
        let data = stream(300_000);
        let mut parts = data[..100_000].to_vec();
        parts.resize(parts.len() + 1023, 0);
        parts.extend_from_slice(&data[100_000..200_000]);
        parts.resize(parts.len() + 1024, 0);
        parts.extend_from_slice(&data[200_000..]);
        parts.resize(parts.len() + 5000, 0);
        assert_eq!(
            Digest::of(&parts).hex(),
            "b0bc97526774043450b6c31c80fe09764e3a7ffcbcff6402d21bcebbd9523038"
        );
        let expected = [
            Cut::Data(35912),
            Cut::Data(8506),
            Cut::Data(5307),
            Cut::Data(8724),
            Cut::Data(142_574),
            Cut::Hole(1024),
            Cut::Data(68379),
            Cut::Data(19432),
            Cut::Data(12189),
            Cut::Hole(5000),
        ];
        for block in [1, 7, 1000, 1023, 1024, 65536, parts.len()] {
            assert_eq!(cuts(&parts, block), expected, "blocks of {block}");
        }
    }

    #[test]
    fn zeros_alone_and_nothing() {
        assert_eq!(cuts(&[], 1), []);
        assert_eq!(cuts(&[0; 1023], 100), [Cut::Data(1023)]);
        assert_eq!(cuts(&[0; 1024], 100), [Cut::Hole(1024)]);
        assert_eq!(cuts(&[0; 100_000], 333), [Cut::Hole(100_000)]);
    }

    #[test]
    fn data_without_a_place_to_cut_is_cut_at_the_limit() {
        let data = vec![1; DATA_MAX + 5];
        assert_eq!(cuts(&data, 1 << 20), [Cut::Data(DATA_MAX), Cut::Data(5)]);
    }

    /// The same, as the reference describes it: byte by byte, runs of zeros held back.
    fn plainly(data: &[u8]) -> Vec<Cut> {
        let (mut sums, mut cuts) = (Sums::new(), Vec::new());
        let (mut length, mut at) = (0, 0);
        while at < data.len() {
            let zeros = leading_zeros(&data[at..]);
            if zeros as u64 >= HOLE_MIN {
                if length > 0 {
                    cuts.push(Cut::Data(length));
                }
                length = 0;
                cuts.push(Cut::Hole(zeros as u64));
                for _ in 0..zeros {
                    sums.roll(&[0]);
                }
                at += zeros;
                continue;
            }
            for _ in 0..zeros.max(1) {
                length += 1;
                if sums.roll(&data[at..=at]).1 {
                    cuts.push(Cut::Data(length));
                    length = 0;
                }
                at += 1;
            }
        }
        if length > 0 {
            cuts.push(Cut::Data(length));
        }
        cuts
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn blocks_do_not_matter(
            runs in proptest::collection::vec((any::<bool>(), 0usize..3000), 0..12),
            block in 1usize..5000,
        ) {
            let noise = stream(3000);
            let mut data = Vec::new();
            for (zeros, length) in runs {
                if zeros {
                    data.resize(data.len() + length, 0);
                } else {
                    data.extend_from_slice(&noise[..length]);
                }
            }
            let expected = plainly(&data);
            prop_assert_eq!(cuts(&data, block), expected);
        }
    }
}
