//! What registries and token servers say in headers and answers: challenges, tokens, ranges. The first byte chooses.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_registry::fuzzing;

fuzz_target!(|data: &[u8]| {
    let Some((way, rest)) = data.split_first() else {
        return;
    };
    if way % 3 == 1 {
        return fuzzing::token(rest);
    }
    // Header values are bytes, but only text is looked at.
    let Ok(text) = std::str::from_utf8(rest) else {
        return;
    };
    if way % 3 == 0 {
        fuzzing::challenge(text);
    } else if let Some((first, last, total)) = fuzzing::content_range(text) {
        let total = total.map_or_else(|| "*".to_owned(), |total| total.to_string());
        let again = format!("bytes {first}-{last}/{total}");
        assert_eq!(
            fuzzing::content_range(&again),
            fuzzing::content_range(text),
            "{again}"
        );
    }
});
