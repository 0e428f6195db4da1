//! Compressed streams: whole layers, single members and chunks never give more bytes than they may, or other ones than asked.
#![no_main]

use std::io::{Cursor, Read};

use libfuzzer_sys::fuzz_target;
use peel_image::compression::{Guard, decode_chunk, decoder, inflate_member};
use peel_image::layer::Encoding;

const LIMIT: u64 = 1 << 20;

fuzz_target!(|input: (u16, u16, &[u8])| {
    let (offset, size, data) = input;
    let guard = Guard {
        output_max: LIMIT,
        ratio_max: 100,
        free: 1 << 16,
    };
    let mut whole = Vec::new();
    if let Ok((_, mut stream)) = decoder(Cursor::new(data.to_vec()), guard) {
        let complete = stream.read_to_end(&mut whole).is_ok();
        assert!(!complete || whole.len() as u64 <= LIMIT);
    }
    for hint in [None, Some(u64::from(size))] {
        if let Ok(output) = inflate_member(data, hint, LIMIT) {
            assert!(output.len() as u64 <= LIMIT);
            assert!(whole.len() < output.len() || whole.starts_with(&output));
        }
    }
    let (offset, size) = (u64::from(offset), u64::from(size));
    for encoding in [Encoding::Gzip, Encoding::Zstd, Encoding::Plain] {
        if let Ok(chunk) = decode_chunk(encoding, data, offset, size, LIMIT) {
            assert_eq!(chunk.len() as u64, size);
        }
    }
});
