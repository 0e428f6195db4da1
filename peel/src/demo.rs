//! `peel demo`: the main job on one machine, offline. [`registry`] is an embedded OCI registry, [`link`] the shaped
//! link in front of it.
//!
//! Called by the command. The parts are public because the end-to-end tests and the benchmarks stand on the same
//! registry and link.

pub mod link;
pub mod registry;

use std::process::ExitCode;

use crate::cli::{DemoArgs, Global};

/// Runs `peel demo`.
pub fn run(_global: &Global, _args: &DemoArgs) -> anyhow::Result<ExitCode> {
    anyhow::bail!("the demo is not there yet")
}
