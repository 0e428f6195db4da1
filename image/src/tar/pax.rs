//! PAX records, `LENGTH KEY=VALUE\n` where LENGTH counts the whole record (POSIX pax(1), "pax Extended Header").
//! Called by the reader and the writer.

use std::collections::BTreeMap;

use super::{TarProblem, XATTR_NAME_MAX, XATTR_VALUE_MAX};
use crate::layer::Xattrs;

/// Keys of extended attributes: `SCHILY.xattr.` and the full name (star's and GNU tar's convention).
pub(super) const XATTR: &[u8] = b"SCHILY.xattr.";

/// The records of one extended header; a later record of the same key replaces an earlier one.
#[derive(Debug, Clone, Default)]
pub(super) struct Records {
    pub(super) map: BTreeMap<Box<[u8]>, Box<[u8]>>,
    /// Values of `GNU.sparse.offset` and `GNU.sparse.numbytes`, which sparse format 0.0 repeats in turn.
    pub(super) sparse: Vec<u64>,
}

impl Records {
    /// Adds the records of one extended header.
    pub(super) fn parse(&mut self, mut data: &[u8]) -> Result<(), TarProblem> {
        // Some writers pad the records with NULs, and Go's reader accepts that.
        while data.first().is_some_and(|byte| *byte != 0) {
            let Record { key, value, rest } = split(data)?;
            data = rest;
            if matches!(key, b"GNU.sparse.offset" | b"GNU.sparse.numbytes") {
                let expected = if self.sparse.len().is_multiple_of(2) {
                    &b"GNU.sparse.offset"[..]
                } else {
                    b"GNU.sparse.numbytes"
                };
                if key != expected {
                    return Err(TarProblem::Sparse("offsets and lengths do not alternate"));
                }
                self.sparse
                    .push(decimal(value).ok_or(TarProblem::Sparse("not a number"))?);
                continue;
            }
            let text = matches!(
                key,
                b"path" | b"linkpath" | b"uname" | b"gname" | b"GNU.sparse.name"
            );
            if key.contains(&0) || (text && value.contains(&0)) {
                return Err(TarProblem::Pax("a NUL byte in a name"));
            }
            self.map.insert(key.into(), value.into());
        }
        Ok(())
    }

    pub(super) fn xattrs(&self, xattrs: &mut Xattrs) -> Result<(), TarProblem> {
        let start: Box<[u8]> = XATTR.into();
        for (key, value) in self.map.range(start..) {
            let Some(name) = key.strip_prefix(XATTR) else {
                break;
            };
            if name.is_empty() || name.len() > XATTR_NAME_MAX || name.contains(&0) {
                return Err(TarProblem::Text("the name of an extended attribute"));
            }
            if value.len() > XATTR_VALUE_MAX {
                return Err(TarProblem::Text("the value of an extended attribute"));
            }
            xattrs.insert(name.into(), value.clone());
        }
        Ok(())
    }
}

/// One record, and what follows it.
struct Record<'a> {
    key: &'a [u8],
    value: &'a [u8],
    rest: &'a [u8],
}

/// Takes the first record off `data`.
fn split(data: &[u8]) -> Result<Record<'_>, TarProblem> {
    /// Digits of a length within [`super::EXTENSION_MAX`], with room to spare.
    const DIGITS: usize = 10;
    let space = data
        .iter()
        .take(DIGITS + 1)
        .position(|byte| *byte == b' ')
        .ok_or(TarProblem::Pax("no length"))?;
    let length = data
        .get(..space)
        .and_then(decimal)
        .and_then(|length| usize::try_from(length).ok())
        .ok_or(TarProblem::Pax("no length"))?;
    let (record, rest) = data
        .split_at_checked(length)
        .ok_or(TarProblem::Pax("longer than its header"))?;
    let record = record
        .get(space + 1..)
        .and_then(|record| record.strip_suffix(b"\n"))
        .ok_or(TarProblem::Pax("it does not end where its length says"))?;
    let equals = record
        .iter()
        .position(|byte| *byte == b'=')
        .ok_or(TarProblem::Pax("no ="))?;
    let (key, value) = record.split_at_checked(equals).unwrap_or_default();
    if key.is_empty() {
        return Err(TarProblem::Pax("no key"));
    }
    Ok(Record {
        key,
        value: value.get(1..).unwrap_or_default(),
        rest,
    })
}

/// A number in decimal digits only.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0_u64, |value, byte| match byte {
        b'0'..=b'9' => value.checked_mul(10)?.checked_add(u64::from(byte - b'0')),
        _ => None,
    })
}

/// A number in decimal digits, with or without a sign before them.
pub(super) fn signed(text: &[u8]) -> Option<i64> {
    match text.strip_prefix(b"-") {
        None => i64::try_from(decimal(text)?).ok(),
        Some(text) => 0_i64.checked_sub_unsigned(decimal(text)?),
    }
}

/// A time as seconds, which may be negative, and nanoseconds after them; digits beyond nanoseconds are cut off.
pub(super) fn parse_time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |byte| *byte == b'.');
    let seconds = i64::try_from(decimal(parts.next()?)?).ok()?;
    let mut nanoseconds = 0;
    if let Some(fraction) = parts.next() {
        let mut scale = 100_000_000;
        for byte in fraction {
            if !byte.is_ascii_digit() {
                return None;
            }
            nanoseconds += u32::from(byte - b'0') * scale;
            scale /= 10;
        }
    }
    Some(match (negative, nanoseconds) {
        (false, _) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, _) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}

/// The text that [`parse_time`] reads.
pub(super) fn format_time(seconds: i64, nanoseconds: u32) -> String {
    let (sign, seconds, nanoseconds) = if seconds < 0 && nanoseconds > 0 {
        (
            "-",
            (seconds + 1).unsigned_abs(),
            1_000_000_000_u32.saturating_sub(nanoseconds),
        )
    } else {
        (
            if seconds < 0 { "-" } else { "" },
            seconds.unsigned_abs(),
            nanoseconds,
        )
    };
    if nanoseconds == 0 {
        return format!("{sign}{seconds}");
    }
    let fraction = format!("{nanoseconds:09}");
    format!("{sign}{seconds}.{}", fraction.trim_end_matches('0'))
}

/// Appends one record.
pub(super) fn push(records: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    // Space, equals sign and newline; the length's own digits count too.
    let fixed = key.len() + value.len() + 3;
    let mut length = fixed + fixed.to_string().len();
    length = fixed + length.to_string().len();
    records.extend_from_slice(format!("{length} ").as_bytes());
    records.extend_from_slice(key);
    records.push(b'=');
    records.extend_from_slice(value);
    records.push(b'\n');
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_count_their_own_digits() {
        for size in (0..1100).chain([9_990, 9_991, 9_992, 9_993, 99_980, 99_990]) {
            let (mut data, value) = (Vec::new(), vec![b'v'; size]);
            push(&mut data, b"key", &value);
            let mut records = Records::default();
            records.parse(&data).unwrap();
            assert_eq!(records.map.get(&b"key"[..]).unwrap().as_ref(), value);
        }
    }

    #[test]
    fn malformed_records_are_errors() {
        for data in [
            &b"x"[..],
            b"7 a=b\n",
            b"6 a=bc\n",
            b"99 a=b\n",
            b"6 abc\n",
            b"5 =b\n",
            b"-6 a=b\n",
            b"00000000006 a=b\n",
            b"11 path=\0x\n",
        ] {
            assert!(
                Records::default().parse(data).is_err(),
                "{:?} parsed",
                String::from_utf8_lossy(data)
            );
        }
    }

    #[test]
    fn values_may_hold_anything() {
        let mut records = Records::default();
        records.parse(b"25 SCHILY.xattr.a=\n=\0\xff b\n").unwrap();
        let mut xattrs = Xattrs::new();
        records.xattrs(&mut xattrs).unwrap();
        assert_eq!(xattrs.get(&b"a"[..]).unwrap().as_ref(), b"\n=\0\xff b");
    }

    #[test]
    fn signed_numbers() {
        for (text, number) in [
            ("0", Some(0)),
            ("-1", Some(-1)),
            ("9223372036854775807", Some(i64::MAX)),
            ("-9223372036854775808", Some(i64::MIN)),
            ("9223372036854775808", None),
            ("-9223372036854775809", None),
            ("", None),
            ("-", None),
            ("--1", None),
            ("+1", None),
            (" 1", None),
        ] {
            assert_eq!(signed(text.as_bytes()), number, "{text}");
        }
    }

    #[test]
    fn times() {
        for (text, time) in [
            ("0", Some((0, 0))),
            ("1.5", Some((1, 500_000_000))),
            ("-1.5", Some((-2, 500_000_000))),
            ("-1", Some((-1, 0))),
            ("-0.000000001", Some((-1, 999_999_999))),
            ("1.1234567899", Some((1, 123_456_789))),
            ("1.", Some((1, 0))),
            ("", None),
            ("-", None),
            (".5", None),
            ("1.x", None),
            ("9223372036854775807", Some((i64::MAX, 0))),
            ("9223372036854775808", None),
        ] {
            assert_eq!(parse_time(text.as_bytes()), time, "{text}");
        }
        for (seconds, nanoseconds) in [
            (0, 0),
            (1, 500),
            (-2, 500_000_000),
            (-1, 1),
            (-5, 0),
            (i64::MIN + 1, 0),
        ] {
            let text = format_time(seconds, nanoseconds);
            assert_eq!(
                parse_time(text.as_bytes()),
                Some((seconds, nanoseconds)),
                "{text}"
            );
        }
    }
}
