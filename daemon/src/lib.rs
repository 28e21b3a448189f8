//! forkd as a server: sandboxes over REST.
//!
//! One program with two roles. As *daemon* it listens, and answers by the engine. As *supervisor* it forks for one
//! request, and looks after those children until they are over: a process that forks may have only one thread when it
//! begins, and the daemon has many. `forkd serve` starts the daemon, and the daemon its supervisors.
#![forbid(unsafe_code)]

pub mod api;
pub mod audit;
pub mod blocking;
pub mod census;
pub mod daemon;
pub mod environment;
pub mod failure;
pub mod listener;
pub mod mark;
pub mod metrics;
pub mod order;
pub mod pool;
pub mod sandboxes;
pub mod server;
pub mod state;
pub mod streams;
pub mod supervise;
pub mod tokens;

use failure::ServeError;
use forkd_engine::chain::chain;
use forkd_engine::local::daemon::{DaemonOptions, SERVE};
use std::ffi::OsString;
use std::process::ExitCode;

/// Does what `arguments` (the program's name first) say. To be called by a process of one thread.
pub fn run(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let arguments: Vec<OsString> = arguments.into_iter().skip(1).collect();
    let words: Vec<&str> = arguments.iter().filter_map(|argument| argument.to_str()).collect();
    match words[..] {
        [supervise::ROLE] => supervise::run(),
        [SERVE, options] => {
            environment::start_logging("info");
            match serve(options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => {
                    eprintln!("forkd-daemon: cannot serve: {}", chain(&error));
                    ExitCode::FAILURE
                }
            }
        }
        _ => {
            eprintln!("forkd-daemon is started by `forkd serve`");
            ExitCode::from(2)
        }
    }
}

fn serve(options: &str) -> Result<(), ServeError> {
    let options: DaemonOptions = serde_json::from_str(options).map_err(ServeError::Options)?;
    daemon::run(environment::paths()?, options)
}
