//! forkd: starts copies of already-running Linux machines from packs it has not finished downloading.
//!
//! This crate is the command line: it parses what the user typed, calls `forkd-engine` and prints what came of it.
#![forbid(unsafe_code)]

pub mod cli;
pub mod commands;
pub mod detach;
pub mod early_zygote;
pub mod environment;
mod error;
pub mod failure;
pub mod interrupt;
pub mod output;
pub mod pass_on;
pub mod progress;
pub mod runtime;
pub mod terminal;
pub mod units;

use std::ffi::{OsStr, OsString};
use std::io::IsTerminal;
use std::process::ExitCode;

/// Parses `arguments` (the program's name first), runs the command and returns its exit code: 0 when it did what was
/// asked, 1 when it failed, 2 when the command line is not a valid one.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().collect();
    let early = early_zygote::EarlyZygote::of(&arguments);
    let invocation = match cli::parse(arguments) {
        Ok(invocation) => invocation,
        Err(stop) => return stop.print(),
    };
    start_logging(invocation.verbose);
    let output = output::Output::new(invocation.json);
    match commands::dispatch(invocation.verb, early, &output) {
        Ok(exit) => exit,
        Err(error) => error::report(&error, &output),
    }
}

/// Log lines go to stderr, filtered by `FORKD_LOG` (the syntax of `RUST_LOG`); warnings only unless asked. They are
/// coloured where stderr is a terminal, unless `NO_COLOR` says otherwise.
fn start_logging(verbose: u8) {
    let fallback = match verbose {
        0 => "warn",
        1 => "info",
        2 => "debug",
        _ => "trace",
    };
    let filter = tracing_subscriber::EnvFilter::try_from_env("FORKD_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(fallback));
    let colours = has_colours(std::io::stderr().is_terminal(), std::env::var_os("NO_COLOR").as_deref());
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_ansi(colours);
    // A second call in one process (tests) keeps the first subscriber: harmless.
    let _ = subscriber.with_writer(std::io::stderr).try_init();
}

/// Whether what is written to a terminal, or not, has colour codes, by the rule of no-color.org: an empty variable is
/// none.
fn has_colours(terminal: bool, no_color: Option<&OsStr>) -> bool {
    terminal && no_color.is_none_or(OsStr::is_empty)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_are_for_terminals_of_those_who_want_them() {
        for (terminal, no_color, colours) in [
            (true, None, true),
            (true, Some(""), true),
            (true, Some("0"), false),
            (false, None, false),
            (false, Some(""), false),
        ] {
            assert_eq!(has_colours(terminal, no_color.map(OsStr::new)), colours, "{terminal} {no_color:?}");
        }
    }
}
