//! `peel demo`: hands the arguments to the crate `demo`, which runs this program for everything that it measures.

use std::path::Path;
use std::process::ExitCode;

use peel_demo::{Args, Host};

use crate::cli::Global;
use crate::client::Client;

/// Runs the command.
pub(super) fn run(global: &Global, args: &Args) -> anyhow::Result<ExitCode> {
    let host = Host {
        json: global.json,
        plain_http: global.plain_http,
        tls_ca: global.tls_ca.as_deref(),
        authfile: global.authfile.as_deref(),
        server_pid: &server_pid,
    };
    peel_demo::run(&host, args)
}

fn server_pid(store: &Path) -> anyhow::Result<Option<u32>> {
    let client = Client::connect_if_running(store)?;
    Ok(client.map(|client| client.server_pid()))
}
