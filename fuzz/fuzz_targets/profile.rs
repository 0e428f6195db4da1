//! Records of accesses: what is read is written so that it is read as the same, and merging keeps every path once.
#![no_main]

use std::collections::HashSet;

use libfuzzer_sys::fuzz_target;
use peel_image::profile::Profile;

fuzz_target!(|data: &[u8]| {
    let Ok(profile) = Profile::read(data) else {
        return;
    };
    let mut written = Vec::new();
    profile.write(&mut written).expect("memory");
    assert_eq!(Profile::read(written.as_slice()).expect("our own lines"), profile);
    let merged = Profile::merge(&[profile.clone(), profile.clone()]);
    let paths: HashSet<_> = profile.accesses.iter().map(|access| &access.path).collect();
    assert_eq!(merged.accesses.len(), paths.len());
});
