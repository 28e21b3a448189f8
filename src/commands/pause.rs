//! `forkd pause` and `forkd resume`: stops children, and lets them go on.

use crate::cli::{ChildrenArgs, PauseArgs};
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::units::show_size;
use forkd_engine::fork::children::{self, ChildrenError};
use forkd_engine::local::branches::PausedToDisk;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::run_dir::RunDirError;
use serde::Serialize;
use std::ops::Add;
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
    if args.to_disk {
        return pause_to_disk(&args.which, output);
    }
    let paused = of_each(&args.which, children::pause, children::pause_all)?;
    output.report(&Paused { paused }, |report| format!("paused {}\n", report.paused));
    Ok(ExitCode::SUCCESS)
}

fn pause_to_disk(which: &ChildrenArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paused = of_each(which, children::pause_to_disk, children::pause_all_to_disk)?;
    output.report(&paused, |PausedToDisk { children, bytes }| {
        format!("paused {children}, {} on disk\n", show_size(*bytes))
    });
    Ok(ExitCode::SUCCESS)
}

/// `forkd resume`.
pub fn resume(args: &ChildrenArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let resumed = of_each(args, children::resume, children::resume_all)?;
    output.report(&Resumed { resumed }, |report| format!("resumed {}\n", report.resumed));
    Ok(ExitCode::SUCCESS)
}

/// What it came to for all children that it concerned.
fn of_each<T: Default + Add<Output = T>>(
    args: &ChildrenArgs,
    one: fn(&Paths, &str) -> Result<T, RunDirError>,
    all: fn(&Paths) -> Result<T, RunDirError>,
) -> Result<T, CommandError> {
    let paths = environment::paths()?;
    let count = match args.all {
        true => all(&paths),
        false => args.names.iter().try_fold(T::default(), |sum, name| Ok(sum + one(&paths, name)?)),
    };
    Ok(count.map_err(ChildrenError::from)?)
}
