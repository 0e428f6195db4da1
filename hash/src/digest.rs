//! Content addresses: the sha256 digests that name blobs, chunks and objects.
//!
//! The OCI image specification (descriptor.md, "Digests") also registers sha512; no builder of lazy layers writes it,
//! so a digest of another algorithm is an error that names the algorithm.

mod hasher;
mod sys;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

pub use hasher::Hasher;

/// A sha256 digest: 32 bytes, written `sha256:<64 lower-case hex digits>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

/// Why a text is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// The algorithm before the colon is not sha256.
    #[error("digest {0:?}: only sha256 is supported")]
    Algorithm(String),
    /// The part after the colon is not 64 lower-case hexadecimal digits.
    #[error("digest {0:?}: expected 64 lower-case hexadecimal digits")]
    Hex(String),
}

impl Digest {
    /// The digest of no bytes at all.
    pub const EMPTY: Self = Self([
        0xe3, 0xb0, 0xc4, 0x42, 0x98, 0xfc, 0x1c, 0x14, 0x9a, 0xfb, 0xf4, 0xc8, 0x99, 0x6f, 0xb9, 0x24, 0x27,
        0xae, 0x41, 0xe4, 0x64, 0x9b, 0x93, 0x4c, 0xa4, 0x95, 0x99, 0x1b, 0x78, 0x52, 0xb8, 0x55,
    ]);

    /// The digest with these raw bytes.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Hashes `data`.
    pub fn of(data: &[u8]) -> Self {
        let mut hasher = Hasher::new();
        hasher.update(data);
        hasher.finish()
    }

    /// Hashes `size` zeros: half a second or so for each GiB.
    pub fn of_zeros(size: u64) -> Self {
        let (zeros, mut hasher, mut left) = ([0; 1 << 16], Hasher::new(), size);
        while left > 0 {
            let piece = usize::try_from(left).ok().and_then(|left| zeros.get(..left));
            let piece = piece.unwrap_or(&zeros);
            hasher.update(piece);
            left -= piece.len() as u64;
        }
        hasher.finish()
    }

    /// Hashes each of `pieces`, two at a time, which takes half as long where the processor has the instructions for it.
    pub fn of_each<'d>(pieces: impl IntoIterator<Item = &'d [u8]>) -> Vec<Self> {
        hasher::of_each(pieces)
    }

    /// The raw 32 bytes.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 hexadecimal digits without the algorithm.
    pub fn hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble & 0xf)]);
        self.0
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(*byte)])
            .collect()
    }

    /// Parses 64 lower-case hexadecimal digits without an algorithm.
    pub fn from_hex(hex: &str) -> Result<Self, DigestError> {
        let error = || DigestError::Hex(shorten(hex));
        let digits: &[u8; 64] = hex.as_bytes().try_into().map_err(|_| error())?;
        // A table of contents has two digests per file, so this is written for compilers that can do many digits at once: no
        // branch depends on a digit, and the one on all of them comes last.
        let mut nibbles = [0; 64];
        for (nibble, digit) in nibbles.iter_mut().zip(digits) {
            let (decimal, letter) = (digit.wrapping_sub(b'0'), digit.wrapping_sub(b'a'));
            let of_letter = if letter < 6 { letter + 10 } else { NO_DIGIT };
            *nibble = if decimal < 10 { decimal } else { of_letter };
        }
        if nibbles.iter().fold(0, |all, nibble| all | nibble) >= NO_DIGIT {
            return Err(error());
        }
        let mut bytes = [0; 32];
        for (byte, pair) in bytes.iter_mut().zip(nibbles.chunks_exact(2)) {
            *byte = pair[0] << 4 | pair[1];
        }
        Ok(Self(bytes))
    }
}

/// Stands for what is no hexadecimal digit; no value of a digit has this bit.
const NO_DIGIT: u8 = 0x10;

/// Keeps an error message readable when the text is hostile.
fn shorten(text: &str) -> String {
    text.chars().take(100).collect()
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(hex) = text.strip_prefix("sha256:") {
            return Self::from_hex(hex);
        }
        match text.split_once(':') {
            Some((algorithm, _)) => Err(DigestError::Algorithm(shorten(algorithm))),
            None => Err(DigestError::Hex(shorten(text))),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.0.serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
            text.parse().map_err(serde::de::Error::custom)
        } else {
            <[u8; 32]>::deserialize(deserializer).map(Self)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_round_trips() {
        let digest = Digest::of(b"");
        assert_eq!(digest, Digest::EMPTY);
        assert_eq!(digest.to_string().parse(), Ok(digest));
        assert_eq!(
            serde_json::from_str::<Digest>(&serde_json::to_string(&digest).unwrap()).unwrap(),
            digest
        );
    }

    #[test]
    fn every_byte_is_a_digit_or_an_error() {
        for at in [0, 1, 31, 62, 63] {
            for digit in '\0'..='\u{ff}' {
                let mut text: Vec<char> = "5".repeat(64).chars().collect();
                text[at] = digit;
                let text: String = text.into_iter().collect();
                let expected = digit.to_digit(16).filter(|_| !digit.is_ascii_uppercase());
                let parsed = Digest::from_hex(&text);
                match expected {
                    Some(value) => {
                        let byte = u32::from(parsed.unwrap().as_bytes()[at / 2]);
                        let shift = if at % 2 == 0 { 4 } else { 0 };
                        assert_eq!(byte >> shift & 0xf, value, "{text}");
                    }
                    None => assert!(matches!(parsed, Err(DigestError::Hex(_))), "{text}"),
                }
            }
        }
    }

    #[test]
    fn malformed_texts_are_errors() {
        let long = "0".repeat(63);
        for text in [
            "",
            "sha256:",
            "sha512:00",
            "md5",
            &format!("sha256:{long}G"),
            &format!("sha256:{long}"),
        ] {
            assert!(text.parse::<Digest>().is_err(), "{text:?} parsed");
        }
        assert!(
            format!("sha256:{}", "A".repeat(64)).parse::<Digest>().is_err(),
            "upper case parsed"
        );
    }
}
