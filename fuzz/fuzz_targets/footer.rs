//! The last bytes of a blob: what is found lies inside the blob, and our own footer is found again.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_image::estargz::footer::{encode, locate};

fuzz_target!(|input: (u64, &[u8])| {
    let (size, tail) = input;
    for blob_size in [size, tail.len() as u64] {
        if let Ok(location) = locate(tail, blob_size) {
            let end = location.payload_end + location.toc_size + location.footer.size() as u64;
            assert_eq!(end, blob_size);
        }
    }
    let footer = encode(size);
    let length = footer.len() as u64;
    if let Some(blob_size) = size.checked_add(1 + length) {
        let location = locate(&footer, blob_size).expect("our own footer");
        assert_eq!((location.payload_end, location.toc_size), (size, 1));
    }
});
