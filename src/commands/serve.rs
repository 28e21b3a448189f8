//! `forkd serve`: becomes the daemon, whose program lies beside this one. So commands do not carry it along.

use super::unit;
use crate::cli::DaemonArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::local::daemon::{self, Listen, PROGRAM, SERVE};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

/// Comes back only when the daemon cannot be started, or is not to be.
pub fn run(args: &DaemonArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let options = args.options(&paths);
    if let Some(directory) = &args.install_unit {
        let socket = match &options.listen {
            Listen::Unix(path) => path.clone(),
            Listen::Tcp(_) => daemon::socket(&paths),
        };
        return unit::install(directory.as_deref(), &socket, &own_arguments(), output);
    }
    let failed = |source| CommandError::Daemon { program: PROGRAM.to_owned(), source };
    let program = std::env::current_exe().map_err(failed)?.with_file_name(PROGRAM);
    let options = serde_json::to_string(&options).map_err(|error| failed(io::Error::other(error)))?;
    let source = Command::new(&program).args([SERVE, &options]).exec();
    Err(CommandError::Daemon { program: program.display().to_string(), source })
}

/// What stood behind `serve`, without what is only for now.
fn own_arguments() -> Vec<String> {
    let mut words = std::env::args().skip_while(|word| word != "serve").skip(1).peekable();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        match word.as_str() {
            "--install-unit" => drop(words.next_if(|next| !next.starts_with('-'))),
            text if text.starts_with("--install-unit=") => {}
            _ => kept.push(word),
        }
    }
    kept
}
