//! `forkd cleanup`: removes what dead processes left behind. What lives is not touched.

use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::cleanup::clean_up;
use std::process::ExitCode;

/// Runs the command.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let (removed, outcome) = clean_up(&environment::paths()?);
    output.report(&removed, |removed| {
        let count =
            |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
        format!(
            "removed {}, {}, {}, {}, {}, {} and {}\n",
            count(removed.forks.len(), "dead fork")
                + " or build"
                + if removed.forks.len() == 1 { "" } else { "s" },
            count(removed.mounts.len(), "dead mount"),
            count(removed.drafts.len(), "unfinished snapshot"),
            count(removed.work.len(), "temporary file"),
            count(removed.chunks as usize, "unfinished chunk"),
            count(removed.cgroups, "empty cgroup"),
            count(removed.warm, "socket") + " of dead warm images",
        )
    });
    outcome?;
    Ok(ExitCode::SUCCESS)
}
