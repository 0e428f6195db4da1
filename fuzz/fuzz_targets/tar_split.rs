//! tar-split: any bytes are an error or lines that, written and read again, are the same lines, and that rebuild to a stream of
//! the length that they say.
#![no_main]

use std::io::{self, Read};

use libfuzzer_sys::fuzz_target;
use peel_image::tar_split::{Item, Reader, Writer, rebuild};

/// Longest content that is made up.
const CONTENT_MAX: u64 = 1 << 20;

fuzz_target!(|data: &[u8]| {
    let Ok(items) = Reader::new(data).collect::<Result<Vec<Item>, _>>() else {
        return;
    };
    let mut writer = Writer::new(Vec::new());
    let mut expected = 0_u64;
    let mut kept = Vec::new();
    for item in items {
        match &item {
            Item::Segment(bytes) => {
                writer.segment(bytes).expect("memory");
                expected += bytes.len() as u64;
                // Nothing is written for no bytes.
                if bytes.is_empty() {
                    continue;
                }
            }
            Item::File { name, size, crc64 } => {
                writer.file(name, *size, *crc64).expect("memory");
                expected = expected.saturating_add(*size);
            }
        }
        kept.push(item);
    }
    let lines = writer.finish().expect("memory");
    let again: Vec<Item> = Reader::new(lines.as_slice())
        .collect::<Result<_, _>>()
        .expect("our own lines");
    assert_eq!(again, kept);

    let zeros = |_: &[u8], size: u64| {
        if size > CONTENT_MAX {
            return Err(io::Error::from(io::ErrorKind::QuotaExceeded));
        }
        Ok(io::repeat(0).take(size))
    };
    if let Ok(length) = rebuild(Reader::new(data), zeros, &mut io::sink()) {
        assert_eq!(length, expected);
    }
});
