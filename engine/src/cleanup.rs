//! Removing what dead processes left behind, in every room. What lives is not touched.

use crate::build::kernel;
use crate::build::recipe;
use crate::fork::warm::WarmSocket;
use crate::hub::download;
use crate::hub::registry::RegistryCopies;
use crate::local::mounts::{self, MountsError};
use crate::local::paths::{Paths, PathsError};
use crate::local::run_dir::{ForkDir, RunDirError};
use crate::local::snapshots::{self, SnapshotError};
use crate::local::workspace;
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_vmm::cgroup::Groups;
use serde::Serialize;
use std::io;
use std::path::{Path, PathBuf};

/// What was removed, as `forkd cleanup --json` shows it.
#[derive(Debug, Serialize)]
pub struct Removed {
    /// Run directories of forks, and of commands that built machines or packs.
    pub forks: Vec<String>,
    /// Where dead mounts were.
    pub mounts: Vec<PathBuf>,
    /// Snapshots in the making.
    pub drafts: Vec<PathBuf>,
    /// Directories and files of builds, of packs in the making and of downloads that cannot go on.
    pub work: Vec<PathBuf>,
    /// Chunks that were being written to the cache.
    pub chunks: u64,
    /// Empty cgroups.
    pub cgroups: usize,
    /// Sockets of dead daemons of warm images.
    pub warm: usize,
}

/// Something cannot be removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// In one of forkd's directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// A run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A mount.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// A snapshot in the making.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// Removes all that can be removed; returns what, and the first failure.
pub fn clean_up(paths: &Paths) -> (Removed, Result<(), CleanupError>) {
    let (mut forks, mut work, mut sweep) = (Vec::new(), Vec::new(), Sweep::default());
    sweep.part(ForkDir::remove_unborn(paths));
    for fork in sweep.part(ForkDir::all(paths)) {
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
    let copies = RegistryCopies::new(paths);
    for removed in [
        recipe::remove_dead(paths),
        kernel::remove_dead(paths),
        download::remove_dead(paths),
        copies.remove_dead(),
    ] {
        work.extend(sweep.part(removed.map_err(failed(&paths.cache))));
    }
    let removed = Removed {
        cgroups,
        warm: WarmSocket::all(paths).iter().filter(|address| address.remove_if_dead()).count(),
        forks,
        mounts: sweep.part(mounts::clear_dead(paths)),
        drafts: sweep.part(snapshots::remove_dead_drafts(paths)),
        work,
        chunks: sweep.part(unfinished_chunks(paths)),
    };
    (removed, sweep.failed.map_or(Ok(()), Err))
}

/// Keeps the first failure: what cannot be removed is in nobody else's way.
#[derive(Default)]
struct Sweep {
    failed: Option<CleanupError>,
}

impl Sweep {
    /// What a part of the work removed; nothing, when it failed.
    fn part<T: Default>(&mut self, removed: Result<T, impl Into<CleanupError>>) -> T {
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
