//! `peel daemon`: the server of a store.

use std::io::Write;
use std::process::ExitCode;

use crate::cli::{DaemonArgs, Global};

/// Serves until idle or told to stop.
pub(super) fn run(global: &Global, args: &DaemonArgs) -> anyhow::Result<ExitCode> {
    match crate::server::run(global, args) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(error) if args.detached => {
            // Whoever started this process reads its standard output to learn why there is no server.
            let _ = writeln!(std::io::stdout(), "{}", crate::describe::describe(&error));
            Ok(ExitCode::FAILURE)
        }
        Err(error) => Err(error),
    }
}
