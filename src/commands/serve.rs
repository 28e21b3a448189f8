//! `forkd serve`: becomes the daemon, whose program lies beside this one. So commands do not carry it along.

use crate::cli::DaemonArgs;
use crate::environment;
use crate::failure::CommandError;
use forkd_engine::local::daemon::{PROGRAM, SERVE};
use std::convert::Infallible;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// Comes back only when the daemon cannot be started.
pub fn run(args: &DaemonArgs) -> Result<Infallible, CommandError> {
    let options = args.options(&environment::paths()?);
    let failed = |source| CommandError::Daemon { program: PROGRAM.to_owned(), source };
    let program = std::env::current_exe().map_err(failed)?.with_file_name(PROGRAM);
    let options = serde_json::to_string(&options).map_err(|error| failed(io::Error::other(error)))?;
    let source = Command::new(&program).args([SERVE, &options]).exec();
    Err(CommandError::Daemon { program: program.display().to_string(), source })
}
