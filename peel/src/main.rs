//! The `peel` command: everything is in the library of the same name.

use std::process::ExitCode;

fn main() -> ExitCode {
    // A container's first process is this program again; it must not parse arguments or print anything.
    peel_sandbox::become_init_if_asked();
    peel::commands::main()
}
