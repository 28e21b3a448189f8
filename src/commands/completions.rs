//! `forkd completions`: a shell's completion script on stdout.

use std::process::ExitCode;

use serde::Serialize;

use crate::cli::{self, CompletionsArgs};
use crate::failure::CommandError;
use crate::output::Output;

#[derive(Serialize)]
struct Report {
    script: String,
}

/// Prints the script.
pub fn run(args: &CompletionsArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let script = String::from_utf8_lossy(&cli::completion_script(args)).into_owned();
    output.report(&Report { script }, |report| report.script.clone());
    Ok(ExitCode::SUCCESS)
}
