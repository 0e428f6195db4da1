//! Lists of files to move to the front: any text is an error or patterns, which match in bounded time.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_convert::patterns::parse;
use peel_image::path::EntryPath;

fuzz_target!(|input: (&[u8], &[u8])| {
    let (path, text) = input;
    let (Ok(path), Ok(patterns)) = (EntryPath::clean(path), parse(text)) else {
        return;
    };
    for pattern in patterns {
        let _ = pattern.matches(&path);
        if let Some(literal) = pattern.literal() {
            assert!(pattern.matches(&literal), "{pattern:?} does not match {literal}");
        }
    }
});
