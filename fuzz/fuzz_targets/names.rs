//! What names things: images, digests, paths of entries. What is accepted is written back so that it is read as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_fuzz::check_path;
use peel_image::Digest;
use peel_image::path::EntryPath;
use peel_registry::ImageName;

fuzz_target!(|data: &[u8]| {
    if let Ok(path) = EntryPath::clean(data) {
        check_path(&path);
        assert_eq!(EntryPath::clean(path.as_bytes()).as_ref(), Ok(&path));
    }
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(name) = text.parse::<ImageName>() {
        let written = name.to_string();
        assert_eq!(written.parse::<ImageName>().expect(&written), name);
    }
    if let Ok(digest) = text.parse::<Digest>() {
        assert_eq!(digest.to_string().parse::<Digest>().expect("a digest"), digest);
    }
});
