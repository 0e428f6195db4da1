//! x
use crate::cli::{LsArgs, Global};
pub(super) fn run(_global: &Global, _args: &LsArgs) -> anyhow::Result<()> { anyhow::bail!("not there yet") }
