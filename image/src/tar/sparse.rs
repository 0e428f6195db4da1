//! Sparse files as GNU tar writes them: the data regions stand one after the other, and a map says where each belongs
//! (GNU tar manual, "Storing Sparse Files"). Called by the reader, which fills the holes with zeros.

use super::TarProblem;
use super::header::{Block, Field};
use super::pax::{Records, decimal};

/// Where the real size stands in an old GNU sparse header.
const OLD_REAL_SIZE: Field = Field {
    start: 483,
    length: 12,
    name: "sparse real size",
};
const OLD_EXTENDED: usize = 482;
const OLD_FIRST: usize = 386;
const OLD_FIRST_COUNT: usize = 4;
/// An extension block holds 21 pairs, then a flag that says whether another one follows.
const OLD_NEXT_COUNT: usize = 21;
const OLD_NEXT_EXTENDED: usize = 504;
const OLD_NUMBER: usize = 12;

/// One run of data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// The expanded view of a sparse file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Map {
    pub(super) regions: Vec<Region>,
    pub(super) real_size: u64,
}

impl Map {
    /// A map whose regions are in order, apart, within the file, and fill the `stored` bytes of the stream.
    pub(super) fn new(numbers: &[u64], real_size: u64, stored: u64) -> Result<Self, TarProblem> {
        if !numbers.len().is_multiple_of(2) {
            return Err(TarProblem::Sparse("an offset without a length"));
        }
        let (mut end, mut sum) = (0_u64, 0_u64);
        let mut regions = Vec::with_capacity(numbers.len() / 2);
        for pair in numbers.chunks_exact(2) {
            let [offset, size] = *pair else { continue };
            if offset < end {
                return Err(TarProblem::Sparse("regions overlap or are out of order"));
            }
            end = offset
                .checked_add(size)
                .ok_or(TarProblem::Sparse("a region beyond the end"))?;
            sum = sum.saturating_add(size);
            if size > 0 {
                regions.push(Region { offset, size });
            }
        }
        if end > real_size {
            return Err(TarProblem::Sparse("a region beyond the end"));
        }
        if sum != stored {
            return Err(TarProblem::Sparse("the regions do not add up to what is stored"));
        }
        Ok(Self { regions, real_size })
    }

    /// Bytes that are not stored.
    pub(super) fn holes(&self) -> u64 {
        let data: u64 = self.regions.iter().map(|region| region.size).sum();
        self.real_size.saturating_sub(data)
    }
}

/// The real size, the first pairs, and whether an extension block follows an old GNU header (type `S`).
pub(super) fn old_header(block: &Block) -> Result<(u64, Vec<u64>, bool), TarProblem> {
    let real_size = block.unsigned(OLD_REAL_SIZE)?;
    let mut numbers = Vec::new();
    old_pairs(block, OLD_FIRST, OLD_FIRST_COUNT, &mut numbers)?;
    Ok((real_size, numbers, block.0[OLD_EXTENDED] != 0))
}

/// Adds the pairs of an extension block and says whether another one follows.
pub(super) fn old_extension(block: &Block, numbers: &mut Vec<u64>) -> Result<bool, TarProblem> {
    old_pairs(block, 0, OLD_NEXT_COUNT, numbers)?;
    Ok(block.0[OLD_NEXT_EXTENDED] != 0)
}

fn old_pairs(block: &Block, start: usize, count: usize, numbers: &mut Vec<u64>) -> Result<(), TarProblem> {
    for pair in 0..count {
        let start = start + pair * 2 * OLD_NUMBER;
        let number = |start| Field {
            start,
            length: OLD_NUMBER,
            name: "sparse map",
        };
        // An empty offset ends the list.
        if block.bytes(number(start)).first() == Some(&0) {
            break;
        }
        numbers.push(block.unsigned(number(start))?);
        numbers.push(block.unsigned(number(start + OLD_NUMBER))?);
    }
    Ok(())
}

/// What the PAX records of a file say of holes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Pax {
    /// Nothing: an ordinary file.
    None,
    /// Formats 0.0 and 0.1: the map is in the records.
    Records {
        /// Length of the expanded file.
        real_size: u64,
        /// Offsets and lengths in turn.
        numbers: Vec<u64>,
    },
    /// Format 1.0: the map stands before the data.
    InData {
        /// Length of the expanded file.
        real_size: u64,
    },
}

/// Looks for a sparse file among the records of one extended header.
pub(super) fn pax(records: &Records) -> Result<Pax, TarProblem> {
    let get = |key: &[u8]| records.map.get(key).map(AsRef::as_ref);
    let number = |key: &[u8]| match get(key) {
        None => Ok(None),
        Some(text) => decimal(text).map(Some).ok_or(TarProblem::Sparse("not a number")),
    };
    let size = number(b"GNU.sparse.realsize")?.or(number(b"GNU.sparse.size")?);
    let need = || size.ok_or(TarProblem::Sparse("no real size"));
    match (get(b"GNU.sparse.major"), get(b"GNU.sparse.minor")) {
        (Some(b"1"), Some(b"0")) => return Ok(Pax::InData { real_size: need()? }),
        (None, None) | (Some(b"0"), Some(b"0" | b"1")) => {}
        _ => return Err(TarProblem::Sparse("unknown version")),
    }
    if let Some(map) = get(b"GNU.sparse.map") {
        let numbers = map
            .split(|byte| *byte == b',')
            .filter(|text| !text.is_empty())
            .map(|text| decimal(text).ok_or(TarProblem::Sparse("not a number")))
            .collect::<Result<_, _>>()?;
        return Ok(Pax::Records {
            real_size: need()?,
            numbers,
        });
    }
    if !records.sparse.is_empty() || size.is_some() {
        return Ok(Pax::Records {
            real_size: need()?,
            numbers: records.sparse.clone(),
        });
    }
    Ok(Pax::None)
}

/// Collects the numbers of a format 1.0 map: decimal, one per line, the count of pairs first.
#[derive(Debug, Default)]
pub(super) struct DataMap {
    expected: Option<u64>,
    numbers: Vec<u64>,
    digits: Vec<u8>,
}

impl DataMap {
    /// Takes the next block of the map; `true` when the map is complete.
    pub(super) fn push(&mut self, block: &[u8]) -> Result<bool, TarProblem> {
        for byte in block {
            if *byte != b'\n' {
                // A number has at most 20 digits; more would only grow the buffer.
                if self.digits.len() > 20 {
                    return Err(TarProblem::Sparse("not a number"));
                }
                self.digits.push(*byte);
                continue;
            }
            let number = decimal(&self.digits).ok_or(TarProblem::Sparse("not a number"))?;
            self.digits.clear();
            match self.expected {
                None => {
                    self.expected = Some(number.checked_mul(2).ok_or(TarProblem::Sparse("not a number"))?);
                }
                Some(_) => self.numbers.push(number),
            }
            if self.is_complete() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    fn is_complete(&self) -> bool {
        self.expected
            .is_some_and(|expected| u64::try_from(self.numbers.len()).is_ok_and(|have| have >= expected))
    }

    pub(super) fn finish(self) -> Vec<u64> {
        self.numbers
    }
}
