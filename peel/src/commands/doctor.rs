//! x
use crate::cli::Global;
pub(super) fn run(_global: &Global) -> anyhow::Result<std::process::ExitCode> { anyhow::bail!("not there yet") }
