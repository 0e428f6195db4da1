//! CRC-64/GO-ISO, the checksum of contents in tar-split: the polynomial of ISO 3309 (x^64 + x^4 + x^3 + x + 1), bits
//! reflected, all ones before and after (Go's `hash/crc64` with the table `ISO`).
//!
//! Whole layers pass through it, so eight bytes are taken at a time ("slicing by 8").

/// The polynomial, reflected.
const POLYNOMIAL: u64 = 0xd800_0000_0000_0000;

/// `TABLES[k][b]` is the remainder of the byte `b` followed by `k` zero bytes.
static TABLES: [[u64; 256]; 8] = tables();

const fn tables() -> [[u64; 256]; 8] {
    let mut tables = [[0; 256]; 8];
    let mut byte = 0;
    while byte < 256 {
        let mut remainder = byte as u64;
        let mut bit = 0;
        while bit < 8 {
            remainder = if remainder & 1 == 1 {
                remainder >> 1 ^ POLYNOMIAL
            } else {
                remainder >> 1
            };
            bit += 1;
        }
        tables[0][byte] = remainder;
        byte += 1;
    }
    let mut table = 1;
    while table < 8 {
        let mut byte = 0;
        while byte < 256 {
            let before = tables[table - 1][byte];
            tables[table][byte] = before >> 8 ^ tables[0][(before & 0xff) as usize];
            byte += 1;
        }
        table += 1;
    }
    tables
}

/// The remainder of the lowest byte of `word`, followed by `zeros` zero bytes.
fn remainder(zeros: usize, word: u64) -> u64 {
    TABLES[zeros & 7][(word & 0xff) as usize]
}

/// A checksum that is being computed.
#[derive(Debug, Clone)]
pub struct Crc64(u64);

impl Default for Crc64 {
    fn default() -> Self {
        Self::new()
    }
}

impl Crc64 {
    /// The checksum of no bytes.
    pub fn new() -> Self {
        Self(u64::MAX)
    }

    /// The checksum of `data`.
    pub fn of(data: &[u8]) -> u64 {
        let mut crc = Self::new();
        crc.update(data);
        crc.finish()
    }

    /// Takes the next bytes.
    pub fn update(&mut self, data: &[u8]) {
        let (words, rest) = data.as_chunks::<8>();
        for word in words {
            let word = self.0 ^ u64::from_le_bytes(*word);
            self.0 = remainder(7, word)
                ^ remainder(6, word >> 8)
                ^ remainder(5, word >> 16)
                ^ remainder(4, word >> 24)
                ^ remainder(3, word >> 32)
                ^ remainder(2, word >> 40)
                ^ remainder(1, word >> 48)
                ^ remainder(0, word >> 56);
        }
        for byte in rest {
            self.0 = self.0 >> 8 ^ remainder(0, self.0 ^ u64::from(*byte));
        }
    }

    /// The checksum of all bytes so far.
    pub fn finish(&self) -> u64 {
        !self.0
    }
}
