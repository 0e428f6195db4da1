//! x
use crate::cli::{OptimizeArgs, Global};
pub(super) fn run(_global: &Global, _args: &OptimizeArgs) -> anyhow::Result<()> { anyhow::bail!("not there yet") }
