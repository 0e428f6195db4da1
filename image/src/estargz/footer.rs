//! The last bytes of a blob, which say where its TOC is.
//!
//! A footer is an empty gzip member whose extra field (RFC 1952, section 2.3.1.1) carries the offset:
//!
//! ```text
//! eStargz 51     1f 8b 08 04 | 00*4 | 00 | ff | 1a 00 | 'S' 'G' 16 00 | %016x "STARGZ"      | 01 00 00 ff ff | 00*8
//! stargz 47      1f 8b 08 04 | 00*4 | 00 | ff | 16 00 |               | %016x "STARGZ"      | 01 00 00 ff ff | 00*8
//! external 46    1f 8b 08 04 | 00*4 | 00 | ff | 15 00 | 'S' 'G' 11 00 | "STARGZEXTERNALTOC" | 01 00 00 ff ff | 00*8
//! ```
//!
//! Header fields that tools may set differently (time, extra flags, operating system) are not looked at. The fetcher
//! calls [`locate`] with the tail of a blob, the writer calls [`encode`].

use super::TOC_MEMBER_MAX;

/// Length of an eStargz footer in bytes.
pub const ESTARGZ_FOOTER: usize = 51;
/// Length of a stargz (CRFS) footer in bytes.
pub const STARGZ_FOOTER: usize = 47;
/// Length of the footer of a blob whose TOC is in another image, in bytes.
pub const EXTERNAL_FOOTER: usize = 46;

const MAGIC: &[u8] = b"STARGZ";
const EXTERNAL_MAGIC: &[u8] = b"STARGZEXTERNALTOC";
/// gzip's magic, method deflate, flag FEXTRA.
const GZIP_WITH_EXTRA: [u8; 4] = [0x1f, 0x8b, 0x08, 0x04];
/// Bytes of the gzip header before the extra field's length.
const GZIP_HEADER: usize = 10;
/// One final stored block of no bytes, then the CRC and the length of nothing.
const EMPTY_BODY: [u8; 13] = [0x01, 0x00, 0x00, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0];

/// What the end of a blob says about its TOC.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Footer {
    /// eStargz: the TOC starts at this offset of the blob.
    Estargz {
        /// First byte of the TOC's gzip member.
        toc_offset: u64,
    },
    /// stargz, the older format of CRFS: the same with a shorter footer.
    Stargz {
        /// First byte of the TOC's gzip member.
        toc_offset: u64,
    },
    /// eStargz whose TOC is kept in an image beside this one.
    External,
}

/// Where the TOC of a blob is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TocLocation {
    /// The footer that was found.
    pub footer: Footer,
    /// End of the files' bytes: the offset of the TOC, or of the footer where the TOC is elsewhere.
    pub payload_end: u64,
    /// Length of the TOC's gzip member in bytes, which starts at `payload_end`; 0 where the TOC is elsewhere.
    pub toc_size: u64,
}

/// Why the end of a blob does not lead to a TOC.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FooterError {
    /// None of the footers is there: an ordinary layer, or a truncated one.
    #[error("the last bytes of the blob are not the footer of a stargz or eStargz layer")]
    NotEstargz,
    /// The tail and the blob size cannot belong together.
    #[error("{tail} bytes were given as the tail of a blob of {blob} bytes")]
    Tail {
        /// Length of what was given.
        tail: usize,
        /// Length of the blob.
        blob: u64,
    },
    /// The offset is not inside the blob.
    #[error("the footer puts the TOC at offset {offset}, but the blob's footer starts at {end}")]
    Offset {
        /// Offset in the footer.
        offset: u64,
        /// First byte of the footer.
        end: u64,
    },
    /// No reader would take a TOC of this size.
    #[error("the footer leaves {0} bytes for the compressed TOC; the limit is {TOC_MEMBER_MAX}")]
    TooLarge(u64),
}

impl Footer {
    /// Length of this footer in bytes.
    pub const fn size(self) -> usize {
        match self {
            Self::Estargz { .. } => ESTARGZ_FOOTER,
            Self::Stargz { .. } => STARGZ_FOOTER,
            Self::External => EXTERNAL_FOOTER,
        }
    }
}

/// Recognizes the footer at the end of `tail`; what comes before it does not matter.
pub fn parse(tail: &[u8]) -> Option<Footer> {
    let extra = |length: usize| -> Option<&[u8]> {
        let footer = tail.get(tail.len().checked_sub(length)?..)?;
        let size = length.checked_sub(GZIP_HEADER + 2 + EMPTY_BODY.len())?;
        let start = footer.get(..GZIP_HEADER + 2)?;
        let stated = [*start.get(GZIP_HEADER)?, *start.get(GZIP_HEADER + 1)?];
        (start.starts_with(&GZIP_WITH_EXTRA)
            && usize::from(u16::from_le_bytes(stated)) == size
            && footer.ends_with(&EMPTY_BODY))
        .then_some(footer.get(GZIP_HEADER + 2..GZIP_HEADER + 2 + size)?)
    };
    let toc_offset = |subfield: &[u8]| -> Option<u64> {
        let digits = subfield.strip_suffix(MAGIC)?;
        let well_formed = digits.len() == 16 && digits.iter().all(u8::is_ascii_hexdigit);
        let text = std::str::from_utf8(digits).ok().filter(|_| well_formed)?;
        u64::from_str_radix(text, 16).ok()
    };
    let estargz = || {
        let subfield = extra(ESTARGZ_FOOTER)?.strip_prefix(&[b'S', b'G', 22, 0])?;
        Some(Footer::Estargz {
            toc_offset: toc_offset(subfield)?,
        })
    };
    let stargz = || {
        Some(Footer::Stargz {
            toc_offset: toc_offset(extra(STARGZ_FOOTER)?)?,
        })
    };
    let external = || {
        let subfield = extra(EXTERNAL_FOOTER)?.strip_prefix(&[b'S', b'G', 17, 0])?;
        (subfield == EXTERNAL_MAGIC).then_some(Footer::External)
    };
    estargz().or_else(stargz).or_else(external)
}

/// Finds the TOC of a blob of `blob_size` bytes from its last bytes: at least [`ESTARGZ_FOOTER`] of them, or all there
/// are. More bytes do no harm, so that one request can bring the footer and the TOC.
pub fn locate(tail: &[u8], blob_size: u64) -> Result<TocLocation, FooterError> {
    let given = u64::try_from(tail.len()).unwrap_or(u64::MAX);
    if given > blob_size {
        return Err(FooterError::Tail {
            tail: tail.len(),
            blob: blob_size,
        });
    }
    let footer = parse(tail).ok_or(FooterError::NotEstargz)?;
    let end = blob_size.saturating_sub(footer.size() as u64);
    let offset = match footer {
        Footer::Estargz { toc_offset } | Footer::Stargz { toc_offset } => toc_offset,
        Footer::External => {
            return Ok(TocLocation {
                footer,
                payload_end: end,
                toc_size: 0,
            });
        }
    };
    match end.checked_sub(offset) {
        None | Some(0) => Err(FooterError::Offset { offset, end }),
        Some(size) if size > TOC_MEMBER_MAX => Err(FooterError::TooLarge(size)),
        Some(toc_size) => Ok(TocLocation {
            footer,
            payload_end: offset,
            toc_size,
        }),
    }
}

/// The footer of an eStargz blob whose TOC starts at `toc_offset`.
pub fn encode(toc_offset: u64) -> [u8; ESTARGZ_FOOTER] {
    let digits = format!("{toc_offset:016x}");
    let parts: [&[u8]; 6] = [
        &GZIP_WITH_EXTRA,
        &[0, 0, 0, 0, 0, 0xff],
        &[26, 0, b'S', b'G', 22, 0],
        digits.as_bytes(),
        MAGIC,
        &EMPTY_BODY,
    ];
    let mut footer = [0; ESTARGZ_FOOTER];
    for (to, from) in footer.iter_mut().zip(parts.concat()) {
        *to = from;
    }
    footer
}

/// The footer of a blob whose TOC is in another image.
pub fn encode_external() -> [u8; EXTERNAL_FOOTER] {
    let parts: [&[u8]; 5] = [
        &GZIP_WITH_EXTRA,
        &[0, 0, 0, 0, 0, 0xff],
        &[21, 0, b'S', b'G', 17, 0],
        EXTERNAL_MAGIC,
        &EMPTY_BODY,
    ];
    let mut footer = [0; EXTERNAL_FOOTER];
    for (to, from) in footer.iter_mut().zip(parts.concat()) {
        *to = from;
    }
    footer
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// alpine 3.10.2 as eStargz, from a public registry.
    const ALPINE: &str = "1f8b08040000000000ff1a005347160030303030303030303030326161633336\
                          53544152475a010000ffff0000000000000000";
    const ALPINE_SIZE: u64 = 2_803_987;

    fn unhex(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex
            .chars()
            .map(|digit| u8::try_from(digit.to_digit(16).unwrap()).unwrap())
            .collect();
        digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
    }

    fn legacy(toc_offset: u64) -> Vec<u8> {
        let modern = encode(toc_offset);
        [&modern[..10], &[22, 0], &modern[16..]].concat()
    }

    fn external() -> Vec<u8> {
        let modern = encode(0);
        [
            &modern[..10],
            &[21, 0, b'S', b'G', 17, 0],
            EXTERNAL_MAGIC,
            &EMPTY_BODY,
        ]
        .concat()
    }

    #[test]
    fn a_published_footer_is_read_and_written() {
        let footer = unhex(ALPINE);
        assert_eq!(footer.len(), ESTARGZ_FOOTER);
        let located = locate(&footer, ALPINE_SIZE).unwrap();
        assert_eq!(
            located,
            TocLocation {
                footer: Footer::Estargz {
                    toc_offset: 2_796_598
                },
                payload_end: 2_796_598,
                toc_size: ALPINE_SIZE - 51 - 2_796_598,
            }
        );
        assert_eq!(encode(2_796_598).as_slice(), footer);
    }

    #[test]
    fn every_kind_is_told_apart() {
        assert_eq!(legacy(7).len(), STARGZ_FOOTER);
        assert_eq!(external().len(), EXTERNAL_FOOTER);
        for (footer, kind) in [
            (encode(7).to_vec(), Footer::Estargz { toc_offset: 7 }),
            (legacy(7), Footer::Stargz { toc_offset: 7 }),
            (external(), Footer::External),
        ] {
            assert_eq!(parse(&footer), Some(kind));
            assert_eq!(
                parse(&[b"whatever came before".as_slice(), &footer].concat()),
                Some(kind)
            );
            assert_eq!(parse(footer.get(1..).unwrap()), None, "{kind:?} cut short");
            assert_eq!(
                parse(&[footer.as_slice(), b"0"].concat()),
                None,
                "{kind:?} with a tail"
            );
        }
        assert_eq!(
            locate(&external(), 1000),
            Ok(TocLocation {
                footer: Footer::External,
                payload_end: 954,
                toc_size: 0
            })
        );
    }

    #[test]
    fn impossible_places_are_errors() {
        let footer = |offset| encode(offset).to_vec();
        for (tail, size, error) in [
            (Vec::new(), 0, FooterError::NotEstargz),
            (vec![0; 51], 51, FooterError::NotEstargz),
            (footer(1), 50, FooterError::Tail { tail: 51, blob: 50 }),
            (footer(49), 100, FooterError::Offset { offset: 49, end: 49 }),
            (
                footer(u64::MAX),
                100,
                FooterError::Offset {
                    offset: u64::MAX,
                    end: 49,
                },
            ),
            (footer(0), u64::MAX, FooterError::TooLarge(u64::MAX - 51)),
        ] {
            assert_eq!(locate(&tail, size), Err(error));
        }
    }

    #[test]
    fn an_offset_with_a_sign_is_no_footer() {
        let mut footer = encode(0x123);
        footer[16] = b'+';
        assert_eq!(parse(&footer), None);
    }

    proptest! {
        #[test]
        fn footers_round_trip(toc_offset in any::<u64>()) {
            prop_assert_eq!(parse(&encode(toc_offset)), Some(Footer::Estargz { toc_offset }));
            prop_assert_eq!(parse(&legacy(toc_offset)), Some(Footer::Stargz { toc_offset }));
        }

        #[test]
        fn noise_never_panics(tail in proptest::collection::vec(any::<u8>(), 0..200), size in any::<u64>()) {
            let _outcome = locate(&tail, size);
        }
    }
}
