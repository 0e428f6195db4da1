//! The JSON of a TOC: any text is an error or an index whose trees are sound, alone and above themselves.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_fuzz::{check_index, check_merge};
use peel_image::estargz::read_index;

const PAYLOAD: u64 = 8 << 20;

fuzz_target!(|data: &[u8]| {
    if let Ok(index) = read_index(data, PAYLOAD) {
        check_index(&index, PAYLOAD);
        let layers = [index.clone(), index];
        check_merge(&layers[..1]);
        check_merge(&layers);
    }
});
