//! Entries as nearly all of them are, read faster than serde reads: a flat object with known keys, texts without escapes, whole
//! numbers. Called by [`super::parts`].
//!
//! What is read here is what serde makes of the same bytes. Whatever is not plain, and whatever is wrong, is `None`: then serde
//! has to look at it. A property test and a fuzz target compare the two.

use std::borrow::Cow;

use super::super::toc::TocEntry;

/// Digits of a number that fits into 64 bits whatever they are.
const DIGITS_MAX: usize = 18;
/// Every byte of a word.
const ONES: u64 = 0x0101_0101_0101_0101;
/// The highest bit of every byte of a word.
const HIGH: u64 = 0x8080_8080_8080_8080;

/// Reads the entry at the start of `json`, if it is plain, and returns its length in bytes. `entry` must be the default one; it
/// comes from the caller because it is large.
pub(super) fn entry<'a>(json: &'a [u8], entry: &mut TocEntry<'a>) -> Option<usize> {
    let mut scanner = Scanner { json, at: 0 };
    // The keys that were there, one bit each.
    let mut seen = 0_u32;
    scanner.take(b'{')?;
    loop {
        scanner.skip_space();
        let key = scanner.text()?;
        scanner.skip_space();
        scanner.take(b':')?;
        scanner.skip_space();
        let value = match key {
            "name" => Value::Text(0, &mut entry.name),
            "type" => Value::Text(1, &mut entry.kind),
            "size" => Value::Number(2, &mut entry.size),
            "modtime" => Value::Text(3, &mut entry.modtime),
            "linkName" => Value::Text(4, &mut entry.link_name),
            "mode" => Value::Number(5, &mut entry.mode),
            "uid" => Value::Number(6, &mut entry.uid),
            "gid" => Value::Number(7, &mut entry.gid),
            "userName" => Value::Text(8, &mut entry.user_name),
            "groupName" => Value::Text(9, &mut entry.group_name),
            "offset" => Value::Number(10, &mut entry.offset),
            "innerOffset" => Value::Number(11, &mut entry.inner_offset),
            "devMajor" => Value::Number(12, &mut entry.dev_major),
            "devMinor" => Value::Number(13, &mut entry.dev_minor),
            "digest" => Value::Text(14, &mut entry.digest),
            "chunkOffset" => Value::Number(15, &mut entry.chunk_offset),
            "chunkSize" => Value::Number(16, &mut entry.chunk_size),
            "chunkDigest" => Value::Text(17, &mut entry.chunk_digest),
            "chunkType" => Value::Text(18, &mut entry.chunk_type),
            "endOffset" => Value::Number(19, &mut entry.end_offset),
            // Made of more than texts and numbers.
            "xattrs" => return None,
            _ => Value::Unknown,
        };
        let bit = match value {
            Value::Text(bit, to) => {
                *to = Cow::Borrowed(scanner.text()?);
                1 << bit
            }
            Value::Number(bit, to) => {
                *to = scanner.number()?;
                1 << bit
            }
            Value::Unknown => {
                scanner.skip_value()?;
                0
            }
        };
        if seen & bit != 0 {
            return None;
        }
        seen |= bit;
        scanner.skip_space();
        match scanner.next()? {
            b',' => {}
            b'}' => break,
            _ => return None,
        }
    }
    // The two keys that every entry has.
    (seen & 0b11 == 0b11).then_some(scanner.at)
}

/// Where the value of a key goes, and the bit of the key.
enum Value<'v, 'a> {
    Text(u32, &'v mut Cow<'a, str>),
    Number(u32, &'v mut i64),
    Unknown,
}

/// Where the list of entries begins in a TOC, behind its bracket, if only texts and numbers come before it.
pub(super) fn opening(json: &[u8]) -> Option<usize> {
    let mut scanner = Scanner { json, at: 0 };
    scanner.skip_space();
    scanner.take(b'{')?;
    loop {
        scanner.skip_space();
        let key = scanner.text()?;
        scanner.skip_space();
        scanner.take(b':')?;
        scanner.skip_space();
        if key == "entries" {
            scanner.take(b'[')?;
            return Some(scanner.at);
        }
        scanner.skip_value()?;
        scanner.skip_space();
        scanner.take(b',')?;
    }
}

struct Scanner<'a> {
    json: &'a [u8],
    at: usize,
}

impl<'a> Scanner<'a> {
    fn peek(&self) -> Option<u8> {
        self.json.get(self.at).copied()
    }

    fn next(&mut self) -> Option<u8> {
        let byte = self.peek()?;
        self.at += 1;
        Some(byte)
    }

    fn take(&mut self, expected: u8) -> Option<()> {
        (self.next()? == expected).then_some(())
    }

    fn skip_space(&mut self) {
        self.at += space(self.json.get(self.at..).unwrap_or_default());
    }

    /// A text in quotation marks without escapes.
    fn text(&mut self) -> Option<&'a str> {
        self.take(b'"')?;
        let rest = self.json.get(self.at..)?;
        let length = plain_length(rest);
        if rest.get(length) != Some(&b'"') {
            return None;
        }
        self.at += length + 1;
        std::str::from_utf8(rest.get(..length)?).ok()
    }

    /// A whole number of few digits that is not negative, as JSON wants it.
    fn number(&mut self) -> Option<i64> {
        let start = self.at;
        let mut number = 0;
        while let Some(digit) = self.peek().filter(u8::is_ascii_digit) {
            if self.at - start == DIGITS_MAX {
                return None;
            }
            number = number * 10 + i64::from(digit - b'0');
            self.at += 1;
        }
        let digits = self.at - start;
        let leading_zero = digits > 1 && self.json.get(start) == Some(&b'0');
        // What follows tells a fraction or an exponent.
        let ends = matches!(self.peek()?, b',' | b'}' | b' ' | b'\t' | b'\n' | b'\r');
        (digits > 0 && !leading_zero && ends).then_some(number)
    }

    /// A value that nobody asked for.
    fn skip_value(&mut self) -> Option<()> {
        match self.peek()? {
            b'"' => self.text().map(drop),
            _ => self.number().map(drop),
        }
    }
}

/// How many bytes there are before the first quotation mark, backslash or control character, which no text has as they are. Looks
/// at eight of them at once.
fn plain_length(json: &[u8]) -> usize {
    let (words, rest) = json.as_chunks::<8>();
    let mut length = 0;
    for word in words {
        let word = u64::from_le_bytes(*word);
        // The lowest bit of these is right; a borrow can only set wrong ones above it.
        let zero_bytes = |word: u64| word.wrapping_sub(ONES) & !word & HIGH;
        let controls = word.wrapping_sub(ONES * 0x20) & !word & HIGH;
        let found = zero_bytes(word ^ (ONES * 0x22)) | zero_bytes(word ^ (ONES * 0x5c)) | controls;
        if found != 0 {
            return length + found.trailing_zeros() as usize / 8;
        }
        length += 8;
    }
    let special = |byte: &u8| matches!(byte, b'"' | b'\\' | ..0x20);
    length + rest.iter().position(special).unwrap_or(rest.len())
}

/// Length of the white space at the start of `json`.
pub(super) fn space(json: &[u8]) -> usize {
    let is_space = |byte: &u8| matches!(byte, b' ' | b'\t' | b'\n' | b'\r');
    json.iter().position(|byte| !is_space(byte)).unwrap_or(json.len())
}

#[cfg(test)]
mod tests;
