//! What the end-to-end tests stand on: [`world`] runs the built program on a store of its own and checks what it leaves,
//! [`image`] makes images entry by entry (hostile ones too), [`service`] runs other people's registries and runtimes,
//! [`namespace`] gives their programs a mount namespace, [`podman`] is one of them.
//!
//! Each file below `tests/` has one topic. All of them need root, since they mount file systems; a test that cannot run
//! fails and says what is missing, it never passes silently.
#![expect(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test that cannot go on fails where it is"
)]

pub mod image;
pub mod namespace;
pub mod podman;
pub mod service;
pub mod world;
