//! `forkd cleanup`: removes what dead processes left behind. What lives is not touched.

use crate::commands::mount::MountCommandError;
use crate::error::CommandError;
use crate::mounts;
use crate::output::Output;
use crate::paths::Paths;
use crate::run_dir::ForkDir;
use crate::snapshot;
use crate::warm::Address;
use forkd_vmm::cgroup::Groups;
use serde::Serialize;
use std::path::PathBuf;
use std::process::ExitCode;

/// What was removed.
#[derive(Debug, Serialize)]
struct Cleaned {
    forks: Vec<String>,
    mounts: Vec<PathBuf>,
    drafts: Vec<PathBuf>,
    cgroups: usize,
    /// Sockets of dead `forkd warm`.
    warm: usize,
}

/// Runs the command.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let mut forks = Vec::new();
    ForkDir::remove_unborn(&paths)?;
    for fork in ForkDir::all(&paths)? {
        if fork.remove_if_dead()? {
            forks.push(fork.id);
        }
    }
    // Those of forks whose directory is gone, and of builds, are known by their emptiness only.
    let cgroups = Groups::find().ok().and_then(|groups| groups.remove_empty().ok()).unwrap_or(0);
    let cleaned = Cleaned {
        cgroups,
        warm: Address::all(&paths).iter().filter(|address| address.remove_if_dead()).count(),
        forks,
        mounts: mounts::clear_dead(&paths).map_err(MountCommandError::from)?,
        drafts: snapshot::remove_dead_drafts(&paths)?,
    };
    output.report(&cleaned, |cleaned| {
        let count =
            |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
        format!(
            "removed {}, {}, {}, {} and {}\n",
            count(cleaned.forks.len(), "dead fork"),
            count(cleaned.mounts.len(), "dead mount"),
            count(cleaned.drafts.len(), "unfinished snapshot"),
            count(cleaned.cgroups, "empty cgroup"),
            count(cleaned.warm, "socket") + " of dead warm images",
        )
    });
    Ok(ExitCode::SUCCESS)
}
