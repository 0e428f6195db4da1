//! x
use crate::cli::{InspectArgs, Global};
pub(super) fn run(_global: &Global, _args: &InspectArgs) -> anyhow::Result<()> { anyhow::bail!("not there yet") }
