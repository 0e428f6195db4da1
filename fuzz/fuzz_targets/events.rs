//! A buffer of fanotify events: no more events than fit into it, and nothing after a malformed one.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_analyzer::event::{METADATA_LEN, events};

fuzz_target!(|data: &[u8]| {
    let all: Vec<_> = events(data).collect();
    let good = all.iter().filter(|event| event.is_ok()).count();
    assert!(good * METADATA_LEN <= data.len());
    assert!(all.iter().rev().skip(1).all(Result::is_ok));
});
