//! `forkd kill`: ends children.

use crate::cli::KillArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::fork::children::{self, ChildrenError};
use serde::Serialize;
use std::process::ExitCode;

#[derive(Debug, Serialize)]
struct Killed {
    killed: usize,
}

/// `forkd kill`.
pub fn run(args: &KillArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let killed = match args.all {
        true => children::kill_all(&paths),
        false => {
            args.ids.iter().try_fold(0, |killed, id| Ok(killed + usize::from(children::kill(&paths, id)?)))
        }
    };
    let killed = killed.map_err(ChildrenError::from)?;
    output.report(&Killed { killed }, |report| format!("ended {}\n", report.killed));
    Ok(ExitCode::SUCCESS)
}
