//! x
use crate::cli::{RunArgs, Global};
pub(super) fn run(_global: &Global, _args: &RunArgs) -> anyhow::Result<std::process::ExitCode> { anyhow::bail!("not there yet") }
