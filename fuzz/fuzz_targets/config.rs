//! An image's configuration and manifest as `run` and `convert` take them apart.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_convert::manifest;
use peel_sandbox::image_config;

fuzz_target!(|data: &[u8]| {
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = image_config(text);
    }
    if let Ok(config) = manifest::config(data, &[]) {
        let _ = image_config(std::str::from_utf8(&config).expect("JSON is UTF-8"));
        assert!(
            !manifest::config(&config, &[])
                .expect("our own configuration")
                .is_empty()
        );
    }
    if let Ok(written) = manifest::manifest(data, b"{}", &[], None) {
        let again = manifest::manifest(&written, b"{}", &[], None).expect("our own manifest");
        assert_eq!(written, again);
    }
});
