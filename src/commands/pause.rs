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
use std::cell::Cell;
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
    let add = |sum: &Cell<PausedToDisk>, more: PausedToDisk| {
        let PausedToDisk { children, bytes } = sum.get();
        sum.set(PausedToDisk { children: children + more.children, bytes: bytes + more.bytes });
        more.children
    };
    let paused = Cell::new(PausedToDisk::default());
    of_each(
        which,
        |paths, name| Ok(add(&paused, children::pause_to_disk(paths, name)?)),
        |paths| Ok(add(&paused, children::pause_all_to_disk(paths)?)),
    )?;
    let paused = paused.into_inner();
    output.report(&paused, |report| {
        format!("paused {}, {} on disk\n", report.children, show_size(report.bytes))
    });
    Ok(ExitCode::SUCCESS)
}

/// `forkd resume`.
pub fn resume(args: &ChildrenArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let resumed = of_each(args, children::resume, children::resume_all)?;
    output.report(&Resumed { resumed }, |report| format!("resumed {}\n", report.resumed));
    Ok(ExitCode::SUCCESS)
}

/// How many children it concerned.
fn of_each(
    args: &ChildrenArgs,
    mut one: impl FnMut(&Paths, &str) -> Result<usize, RunDirError>,
    all: impl FnOnce(&Paths) -> Result<usize, RunDirError>,
) -> Result<usize, CommandError> {
    let paths = environment::paths()?;
    let count = match args.all {
        true => all(&paths),
        false => args.names.iter().try_fold(0, |count, name| Ok(count + one(&paths, name)?)),
    };
    Ok(count.map_err(ChildrenError::from)?)
}
