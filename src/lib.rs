//! forkd: starts copies of already-running Linux machines from packs it has not finished downloading.
//!
//! This crate is the command line and the joints between `forkd-fs` (packs and the mount), `forkd-vmm` (the
//! monitor) and `forkd-guest` (the agent's protocol). Imports go one way: [`commands`] use everything here,
//! nothing here uses [`commands`] but [`error`], which tabulates their errors.
#![forbid(unsafe_code)]

pub mod cli;
pub mod commands;
pub mod detach;
pub mod download;
pub mod error;
pub mod heatmap;
pub mod host;
pub mod hub;
pub mod identity;
pub mod kernel;
pub mod machine_build;
pub mod mounts;
pub mod network;
pub mod output;
pub mod packs;
pub mod pagemap;
pub mod paths;
pub mod picture;
pub mod progress;
pub mod recipe;
pub mod registry;
pub mod run_dir;
pub mod sandbox;
pub mod scratch;
pub mod snapshot;
pub mod source;
pub mod supervisor;
pub mod timeline;
pub mod tools;
pub mod turns;
pub mod units;
pub mod variables;
pub mod warm;

use std::ffi::OsString;
use std::process::ExitCode;

/// Parses `arguments` (the program's name first), runs the command and returns the exit code of DESIGN section 9:
/// 0 done, 1 failed, 2 usage.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let ahead = commands::fork::Ahead::of(&arguments);
    let invocation = match cli::parse(arguments) {
        Ok(invocation) => invocation,
        Err(stop) => return stop.print(),
    };
    start_logging(invocation.verbose);
    let output = output::Output::new(invocation.json);
    match commands::dispatch(invocation.verb, ahead, &output) {
        Ok(exit) => exit,
        Err(error) => error::report(&error, &output),
    }
}

/// Log lines go to stderr, filtered by `FORKD_LOG` (the syntax of `RUST_LOG`); warnings only unless asked.
fn start_logging(verbose: u8) {
    let fallback = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORKD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(fallback));
    // A second call in one process (tests) keeps the first subscriber: harmless.
    let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
}
