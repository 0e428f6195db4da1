//! The `peel` command as a library: the program in `main.rs`, the end-to-end tests and the fuzz targets stand on it.
//!
//! * [`cli`]: what can be written on a command line; help, completions and man pages come from it.
//! * [`commands`]: one module per command.
//! * [`server`]: the one process per store that loads images and keeps mounts; [`client`] finds or starts it;
//!   [`protocol`] and [`wire`] are what the two say to each other.
//! * [`store_dir`]: the store's directory, checked before anything of it is trusted.

pub mod cli;
pub mod client;
pub mod commands;
pub mod describe;
pub mod logging;
pub mod mount_records;
pub mod mountinfo;
pub mod panics;
pub mod progress;
pub mod protocol;
pub mod run_config;
pub mod server;
pub mod signals;
pub mod store_dir;
pub mod sys;
pub mod wire;
