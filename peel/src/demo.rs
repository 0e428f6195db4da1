//! `peel demo`: the main job on one machine, offline. An image made here is pushed to an embedded [`registry`], optimized,
//! and started cold in three ways over a shaped [`link`].
//!
//! Called by the command. Registry and link are public because the end-to-end tests and the benchmarks stand on them too.
//!
//! ```text
//! image -> registry <- link <- full_pull, `peel run`      run drives all of them, report says what came out
//! ```

mod full_pull;
pub mod image;
pub mod link;
pub mod registry;
mod report;
mod run;

use std::process::ExitCode;

use crate::cli::{DemoArgs, Global};

/// Runs `peel demo`.
pub fn run(global: &Global, args: &DemoArgs) -> anyhow::Result<ExitCode> {
    run::run(global, args)
}
