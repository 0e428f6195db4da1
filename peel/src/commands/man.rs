//! `peel man`: the manual pages, one per command.

use std::fs;
use std::path::Path;

use anyhow::Context;
use clap::CommandFactory;

use crate::cli::{Cli, ManArgs};

/// Writes them.
pub(super) fn run(args: &ManArgs) -> anyhow::Result<()> {
    fs::create_dir_all(&args.dir).with_context(|| format!("{}: cannot be made", args.dir.display()))?;
    write(&args.dir).with_context(|| format!("{}: cannot be written", args.dir.display()))
}

fn write(dir: &Path) -> std::io::Result<()> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    for sub in command.get_subcommands() {
        let name = format!("peel-{}", sub.get_name());
        // The synopsis shows the command as it is typed, the page carries the name that man(1) looks for.
        let page = sub.clone().display_name(name.clone());
        let mut text = Vec::new();
        clap_mangen::Man::new(page)
            .title(name.to_uppercase())
            .render(&mut text)?;
        fs::write(dir.join(format!("{name}.1")), text)?;
    }
    let mut text = Vec::new();
    clap_mangen::Man::new(command).render(&mut text)?;
    fs::write(dir.join("peel.1"), text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_a_page_per_command() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path()).unwrap();
        let main = fs::read_to_string(dir.path().join("peel.1")).unwrap();
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            assert!(main.contains(name), "{name} is not in peel.1");
            let page = fs::read_to_string(dir.path().join(format!("peel-{name}.1"))).unwrap();
            for arg in command.get_arguments().filter(|arg| !arg.is_hide_set()) {
                let long = arg.get_long().unwrap_or_default().replace('-', "\\-");
                assert!(page.contains(&long), "--{long} is not in peel-{name}.1");
            }
        }
    }
}
