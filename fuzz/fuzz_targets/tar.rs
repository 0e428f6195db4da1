//! A plain layer: any bytes are an error or an index whose trees are sound, alone and above themselves.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_fuzz::{SmallSink, check_index, check_merge, with_checksums};
use peel_image::tar::index::index_tar;

fn check(tar: &[u8]) {
    if let Ok((index, _)) = index_tar(tar, &mut SmallSink::default()) {
        check_index(&index, 0);
        let layers = [index.clone(), index];
        check_merge(&layers[..1]);
        check_merge(&layers);
    }
}

fuzz_target!(|data: &[u8]| {
    check(data);
    check(&with_checksums(data));
});
