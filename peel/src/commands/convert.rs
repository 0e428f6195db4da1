//! x
use crate::cli::{ConvertArgs, Global};
pub(super) fn run(_global: &Global, _args: &ConvertArgs) -> anyhow::Result<()> { anyhow::bail!("not there yet") }
