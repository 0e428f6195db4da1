//! The 512-byte header block: fields, numbers and checksum (POSIX pax(1), "ustar Interchange Format"; GNU tar manual,
//! "Basic Tar Format"). Called by the reader and the writer.

use super::TarProblem;

/// Size of a tar block in bytes: headers fill one, contents are padded to a multiple of it.
pub const BLOCK: usize = 512;

/// Where a field lies in the block, and its name in error messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Field {
    pub(super) start: usize,
    pub(super) length: usize,
    pub(super) name: &'static str,
}

const fn field(start: usize, length: usize, name: &'static str) -> Field {
    Field { start, length, name }
}

pub(super) const NAME: Field = field(0, 100, "name");
pub(super) const MODE: Field = field(100, 8, "mode");
pub(super) const UID: Field = field(108, 8, "uid");
pub(super) const GID: Field = field(116, 8, "gid");
pub(super) const SIZE: Field = field(124, 12, "size");
pub(super) const MTIME: Field = field(136, 12, "mtime");
pub(super) const CHECKSUM: Field = field(148, 8, "checksum");
pub(super) const TYPE: usize = 156;
pub(super) const LINK: Field = field(157, 100, "link name");
pub(super) const MAGIC: Field = field(257, 8, "magic");
pub(super) const USER: Field = field(265, 32, "user name");
pub(super) const GROUP: Field = field(297, 32, "group name");
pub(super) const DEVICE_MAJOR: Field = field(329, 8, "device major");
pub(super) const DEVICE_MINOR: Field = field(337, 8, "device minor");
pub(super) const PREFIX: Field = field(345, 155, "prefix");
/// Where GNU tar has times instead of a prefix.
pub(super) const GNU_ACCESS_TIME: Field = field(345, 12, "access time");
pub(super) const GNU_CHANGE_TIME: Field = field(357, 12, "change time");
/// The prefix of Schilling's old star, told by [`STAR_TRAILER`]: access and change time follow it.
const STAR_PREFIX: Field = field(345, 131, "prefix");
const STAR_TRAILER: Field = field(508, 4, "trailer");

/// `magic` and `version` of USTAR and PAX.
pub(super) const MAGIC_USTAR: &[u8; 8] = b"ustar\x0000";
/// `magic` and `version` of GNU tar: no prefix field.
const MAGIC_GNU: &[u8; 8] = b"ustar  \0";

/// One header block.
#[derive(Clone)]
pub(super) struct Block(pub(super) [u8; BLOCK]);

impl Block {
    pub(super) fn bytes(&self, field: Field) -> &[u8] {
        self.0
            .get(field.start..field.start + field.length)
            .unwrap_or_default()
    }

    pub(super) fn bytes_mut(&mut self, field: Field) -> &mut [u8] {
        self.0
            .get_mut(field.start..field.start + field.length)
            .unwrap_or_default()
    }

    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[TYPE]
    }

    /// The field up to its first NUL.
    pub(super) fn text(&self, field: Field) -> &[u8] {
        until_nul(self.bytes(field))
    }

    /// Whether user and group names and device numbers are there at all (V7 headers end with the link name).
    pub(super) fn is_v7(&self) -> bool {
        !self.bytes(MAGIC).starts_with(b"ustar")
    }

    pub(super) fn is_gnu(&self) -> bool {
        self.bytes(MAGIC) == MAGIC_GNU
    }

    /// The name with its prefix.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = self.text(NAME);
        let prefix = if self.is_v7() || self.is_gnu() {
            b""
        } else if self.bytes(STAR_TRAILER) == b"tar\0" {
            self.text(STAR_PREFIX)
        } else {
            self.text(PREFIX)
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    /// A signed number.
    pub(super) fn number(&self, field: Field) -> Result<i64, TarProblem> {
        parse_number(self.bytes(field)).ok_or(TarProblem::Number(field.name))
    }

    /// A number that must not be negative nor larger than `T`.
    pub(super) fn unsigned<T: TryFrom<i64>>(&self, field: Field) -> Result<T, TarProblem> {
        T::try_from(self.number(field)?).map_err(|_| TarProblem::Number(field.name))
    }

    /// Checks the checksum. Some old writers summed signed bytes; both sums are accepted, as everywhere.
    pub(super) fn verify(&self) -> Result<(), TarProblem> {
        let stored = parse_number(self.bytes(CHECKSUM)).ok_or(TarProblem::Checksum)?;
        let (mut unsigned, mut signed) = (0_i64, 0_i64);
        for (position, byte) in self.0.iter().enumerate() {
            let inside = (CHECKSUM.start..CHECKSUM.start + CHECKSUM.length).contains(&position);
            let byte = if inside { b' ' } else { *byte };
            unsigned += i64::from(byte);
            signed += i64::from(byte.cast_signed());
        }
        if stored == unsigned || stored == signed {
            Ok(())
        } else {
            Err(TarProblem::Checksum)
        }
    }

    /// Writes the checksum; every other field must be there.
    pub(super) fn seal(&mut self) {
        self.bytes_mut(CHECKSUM).fill(b' ');
        let sum: u32 = self.0.iter().map(|byte| u32::from(*byte)).sum();
        // 512 * 255 has six octal digits; NUL and space end the field by tradition.
        self.put(CHECKSUM, format!("{sum:06o}\0 ").as_bytes());
    }

    /// Writes a text; what does not fit is cut off.
    pub(super) fn put(&mut self, field: Field, text: &[u8]) {
        for (to, from) in self.bytes_mut(field).iter_mut().zip(text) {
            *to = *from;
        }
    }

    /// Writes a number in octal where it fits, with a NUL at its end. Returns whether it fitted.
    pub(super) fn put_octal(&mut self, field: Field, value: u64) -> bool {
        let digits = field.length - 1;
        let text = format!("{value:0digits$o}");
        if text.len() > digits {
            return false;
        }
        self.put(field, text.as_bytes());
        true
    }

    /// Writes a number in octal, else in base 256 (GNU tar manual, "Basic Tar Format").
    pub(super) fn put_number(&mut self, field: Field, value: u64) {
        if self.put_octal(field, value) {
            return;
        }
        let bytes = self.bytes_mut(field);
        bytes.fill(0);
        for (to, from) in bytes.iter_mut().rev().zip(value.to_le_bytes()) {
            *to = from;
        }
        if let Some(first) = bytes.first_mut() {
            *first |= 0x80;
        }
    }
}

/// `bytes` up to the first NUL.
pub(super) fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A numeric field: octal digits between spaces and NULs (all blank is 0), or base 256 in two's complement when the first
/// bit is set. `None` for other characters and for numbers beyond 63 bits.
pub(super) fn parse_number(bytes: &[u8]) -> Option<i64> {
    let first = *bytes.first()?;
    if first & 0x80 != 0 {
        let negative = first & 0x40 != 0;
        let mut value = if negative { -1_i64 } else { 0 };
        for (position, byte) in bytes.iter().enumerate() {
            // The flag bit counts as one more sign bit.
            let byte = match (position, negative) {
                (0, false) => byte & 0x7f,
                _ => *byte,
            };
            value = value.checked_mul(256)?.checked_add(i64::from(byte))?;
        }
        return Some(value);
    }
    let blank = |byte: &u8| matches!(byte, b' ' | 0);
    let start = bytes.iter().position(|byte| !blank(byte)).unwrap_or(bytes.len());
    let digits = bytes.get(start..)?;
    let end = digits.iter().position(blank).unwrap_or(digits.len());
    let mut value = 0_i64;
    for byte in digits.get(..end)? {
        let digit = match byte {
            b'0'..=b'7' => i64::from(byte - b'0'),
            _ => return None,
        };
        value = value.checked_mul(8)?.checked_add(digit)?;
    }
    Some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], Some(0o644)),
            (b"   644 \0", Some(0o644)),
            (b"77777777", Some(0o7777_7777)),
            (b"\0\0\0\0\0\0\0\0", Some(0)),
            (b"        ", Some(0)),
            (b"0000644\0junk", Some(0o644)),
            (b"00006x4\0", None),
            (b"-0000644", None),
            (b"\x80\0\0\0\0\0\x01\0", Some(256)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", Some(-1)),
            (b"\xff\xff\xff\xff\xff\xff\xff\xfe", Some(-2)),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", Some(i64::MAX)),
            (b"\x80\0\0\0\x80\0\0\0\0\0\0\0", None),
            (b"\xff\xff\xff\xff\x80\0\0\0\0\0\0\0", Some(i64::MIN)),
            (b"\xff\xff\xff\xff\x7f\0\0\0\0\0\0\0", None),
        ] {
            assert_eq!(parse_number(field), value, "{field:02x?}");
        }
    }

    #[test]
    fn large_numbers_go_to_base_256() {
        for value in [0, 0o777_7777, 0o1000_0000, u64::from(u32::MAX)] {
            let mut block = Block([0; BLOCK]);
            block.put_number(UID, value);
            assert_eq!(block.unsigned::<u64>(UID).unwrap(), value);
        }
    }
}
