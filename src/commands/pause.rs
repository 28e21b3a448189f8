//! `forkd pause` and `forkd resume`: stops children, and lets them go on.

use crate::cli::PauseArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::fork::children::{self, ChildrenError};
use forkd_engine::local::paths::Paths;
use forkd_engine::local::run_dir::RunDirError;
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct Paused {
    paused: usize,
}

#[derive(Debug, Serialize)]
struct Resumed {
    resumed: usize,
}

/// `forkd pause`.
pub fn pause(args: &PauseArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paused = of_each(args, children::pause, children::pause_all)?;
    output.report(&Paused { paused }, |report| format!("paused {}\n", report.paused));
    Ok(ExitCode::SUCCESS)
}

/// `forkd resume`.
pub fn resume(args: &PauseArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let resumed = of_each(args, children::resume, children::resume_all)?;
    output.report(&Resumed { resumed }, |report| format!("resumed {}\n", report.resumed));
    Ok(ExitCode::SUCCESS)
}

/// How many children it concerned.
fn of_each(
    args: &PauseArgs,
    one: fn(&Paths, &str) -> Result<usize, RunDirError>,
    all: fn(&Paths) -> Result<usize, RunDirError>,
) -> Result<usize, CommandError> {
    let paths = environment::paths()?;
    let count = match args.all {
        true => all(&paths),
        false => args.names.iter().try_fold(0, |count, name| Ok(count + one(&paths, name)?)),
    };
    Ok(count.map_err(ChildrenError::from)?)
}
