//! The JSON of a TOC: any text is an error or an index whose trees are sound, alone and above themselves. Read in parts, it says what it
//! says as a whole.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_fuzz::{check_index, check_merge};
use peel_image::estargz::index::parts_agree;
use peel_image::estargz::read_index;

const PAYLOAD: u64 = 8 << 20;

fuzz_target!(|data: &[u8]| {
    assert!(
        parts_agree(data, PAYLOAD),
        "parts of the TOC say something else than the whole"
    );
    if let Ok(index) = read_index(data, PAYLOAD) {
        check_index(&index, PAYLOAD);
        let layers = [index.clone(), index];
        check_merge(&layers[..1]);
        check_merge(&layers);
    }
});
