//! An image's configuration and manifest as `run` and `convert` take them apart.
#![no_main]

use libfuzzer_sys::fuzz_target;
use peel_convert::manifest;
use peel_registry::document::container_config;

fuzz_target!(|data: &[u8]| {
    let _ = container_config(data);
    if let Ok(config) = manifest::config(data, &[]) {
        let _ = container_config(&config);
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
