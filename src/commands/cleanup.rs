//! `forkd cleanup`: removes what dead processes left behind. What lives is not touched.

use crate::commands::mount::MountCommandError;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_engine::build::kernel;
use forkd_engine::build::recipe;
use forkd_engine::fork::warm::WarmSocket;
use forkd_engine::hub::download;
use forkd_engine::hub::registry::RegistryCopies;
use forkd_engine::local::mounts;
use forkd_engine::local::paths::{Paths, PathsError};
use forkd_engine::local::run_dir::ForkDir;
use forkd_engine::local::snapshots;
use forkd_engine::local::workspace;
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_vmm::cgroup::Groups;
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

/// What was removed.
#[derive(Debug, Serialize)]
struct Cleaned {
    /// Run directories of forks, and of commands that built machines or packs.
    forks: Vec<String>,
    mounts: Vec<PathBuf>,
    drafts: Vec<PathBuf>,
    /// Directories and files of builds, of packs in the making and of downloads that cannot go on.
    work: Vec<PathBuf>,
    /// Chunks that were being written to the cache.
    chunks: u64,
    cgroups: usize,
    /// Sockets of dead `forkd warm`.
    warm: usize,
}

/// Runs the command.
pub fn run(output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let (mut forks, mut work, mut sweep) = (Vec::new(), Vec::new(), Sweep::default());
    sweep.part(ForkDir::remove_unborn(&paths));
    for fork in sweep.part(ForkDir::all(&paths)) {
        // Its run directory, which knows the place, has to go last.
        if let Some(place) = fork.workspace_parent().filter(|_| !fork.is_alive()) {
            let removed = workspace::remove_dead(&place).map_err(failed(&place));
            if removed.is_err() {
                sweep.part(removed);
                continue;
            }
            work.extend(sweep.part(removed));
        }
        if sweep.part(fork.remove_if_dead()) {
            forks.push(fork.id);
        }
    }
    // Those of forks whose directory is gone are known by their emptiness only.
    let cgroups = Groups::find().ok().and_then(|groups| groups.remove_empty().ok()).unwrap_or(0);
    let copies = RegistryCopies::new(&paths);
    for removed in [
        recipe::remove_dead(&paths),
        kernel::remove_dead(&paths),
        download::remove_dead(&paths),
        copies.remove_dead(),
    ] {
        work.extend(sweep.part(removed.map_err(failed(&paths.cache))));
    }
    let cleaned = Cleaned {
        cgroups,
        warm: WarmSocket::all(&paths).iter().filter(|address| address.remove_if_dead()).count(),
        forks,
        mounts: sweep.part(mounts::clear_dead(&paths).map_err(MountCommandError::from)),
        drafts: sweep.part(snapshots::remove_dead_drafts(&paths)),
        work,
        chunks: sweep.part(unfinished_chunks(&paths)),
    };
    output.report(&cleaned, |cleaned| {
        let count =
            |number: usize, what: &str| format!("{number} {what}{}", if number == 1 { "" } else { "s" });
        format!(
            "removed {}, {}, {}, {}, {}, {} and {}\n",
            count(cleaned.forks.len(), "dead fork")
                + " or build"
                + if cleaned.forks.len() == 1 { "" } else { "s" },
            count(cleaned.mounts.len(), "dead mount"),
            count(cleaned.drafts.len(), "unfinished snapshot"),
            count(cleaned.work.len(), "temporary file"),
            count(cleaned.chunks as usize, "unfinished chunk"),
            count(cleaned.cgroups, "empty cgroup"),
            count(cleaned.warm, "socket") + " of dead warm images",
        )
    });
    sweep.failed.map_or(Ok(ExitCode::SUCCESS), Err)
}

/// Keeps the first failure: what cannot be removed is in nobody else's way.
#[derive(Default)]
struct Sweep {
    failed: Option<CommandError>,
}

impl Sweep {
    /// What a part of the work removed; nothing, when it failed.
    fn part<T: Default>(&mut self, removed: Result<T, impl Into<CommandError>>) -> T {
        removed.unwrap_or_else(|error| {
            self.failed.get_or_insert(error.into());
            T::default()
        })
    }
}

fn failed(path: &Path) -> impl FnOnce(io::Error) -> PathsError {
    let path = path.to_owned();
    move |source| PathsError::Directory { path, source }
}

/// Removes those that the cache, if there is one, was given by processes that died meanwhile. Returns how many.
fn unfinished_chunks(paths: &Paths) -> Result<u64, PathsError> {
    if !paths.cache.join("chunks").exists() {
        return Ok(0);
    }
    let cache = ChunkCache::open(&paths.cache, CacheOptions::default());
    Ok(cache.remove_abandoned().map_err(failed(&paths.cache))?.files)
}
