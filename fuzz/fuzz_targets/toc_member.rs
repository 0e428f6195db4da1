//! The member that holds a TOC: as it is, and as the tar stream inside a well-formed member.
#![no_main]

use std::io::Write;

use flate2::Compression;
use flate2::write::GzEncoder;
use libfuzzer_sys::fuzz_target;
use peel_fuzz::{check_index, with_checksums};
use peel_image::Digest;
use peel_image::estargz::{extract_toc, read_index};

const PAYLOAD: u64 = 1 << 40;

fn check(member: &[u8]) {
    if let Ok(toc) = extract_toc(member) {
        assert_eq!(toc.digest, Digest::of(&toc.json));
        if let Ok(index) = read_index(&toc.json, PAYLOAD) {
            check_index(&index, PAYLOAD);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    check(data);
    let mut member = GzEncoder::new(Vec::new(), Compression::none());
    member.write_all(&with_checksums(data)).expect("memory");
    check(&member.finish().expect("memory"));
});
