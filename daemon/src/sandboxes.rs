//! The daemon's sandboxes, as they are found: in the run directories that have its mark. Nothing of them is kept in
//! memory, so a daemon that was started anew knows as much as the one before.

use crate::mark::Mark;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::run_dir::{ChildStatus, ForkDir, ForkStatus, RunDirError};

/// A fork of the daemon, with what its supervisor says of it.
#[derive(Debug, Clone)]
pub struct MarkedFork {
    /// Its run directory.
    pub dir: ForkDir,
    /// What the daemon noted.
    pub mark: Mark,
    /// What its supervisor says.
    pub status: ForkStatus,
}

/// One sandbox.
#[derive(Debug, Clone)]
pub struct FoundSandbox {
    /// Its fork.
    pub fork: MarkedFork,
    /// It.
    pub child: ChildStatus,
}

/// Whose sandboxes are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    /// All of this user's.
    User,
    /// Those of one tenant.
    Tenant(String),
}

impl Owner {
    /// Whether the fork of that mark is one of its own.
    pub fn has(&self, mark: &Mark) -> bool {
        match self {
            Owner::User => true,
            Owner::Tenant(name) => mark.tenant.as_ref() == Some(name),
        }
    }

    /// The tenant, if it is one.
    pub fn tenant(&self) -> Option<String> {
        match self {
            Owner::User => None,
            Owner::Tenant(name) => Some(name.clone()),
        }
    }
}

/// The forks of an owner that run, by name.
pub fn forks(paths: &Paths, owner: &Owner) -> Result<impl Iterator<Item = MarkedFork>, RunDirError> {
    let owner = owner.clone();
    let marked = move |dir: ForkDir| {
        let mark = mark(&dir)?;
        Some((dir, mark)).filter(|(_, mark)| owner.has(mark))
    };
    let known = ForkDir::all(paths)?.into_iter().filter_map(marked);
    Ok(known.filter_map(|(dir, mark)| {
        // It may have ended just now, or its supervisor hang: then nothing can be said of it.
        let status = dir.status().inspect_err(|error| log_unless_dead(&dir, error)).ok()?;
        Some(MarkedFork { dir, mark, status })
    }))
}

fn log_unless_dead(dir: &ForkDir, error: &RunDirError) {
    if !matches!(error, RunDirError::Dead { .. }) {
        tracing::warn!(fork = dir.id, %error, "a fork says nothing of itself");
    }
}

fn mark(dir: &ForkDir) -> Option<Mark> {
    Mark::of(dir.labels().ok()?)
}

/// An owner's sandbox, as far as it lives.
pub fn find(paths: &Paths, owner: &Owner, id: &str) -> Result<FoundSandbox, RunDirError> {
    let unknown = || RunDirError::UnknownChild { id: id.to_owned() };
    let dir = ForkDir::of_child(paths, id)?;
    let mark = mark(&dir).filter(|mark| owner.has(mark)).ok_or_else(unknown)?;
    let status = dir.status()?;
    let child = status.children.iter().find(|child| child.id == id && !child.state.is_over());
    let child = child.cloned().ok_or_else(unknown)?;
    Ok(FoundSandbox { fork: MarkedFork { dir, mark, status }, child })
}

/// The fork that an owner's key made, if it lives.
pub fn of_key(paths: &Paths, owner: &Owner, key: &str) -> Result<Option<MarkedFork>, RunDirError> {
    let tenant = owner.tenant();
    let meant = |fork: &MarkedFork| {
        fork.mark.tenant == tenant && fork.mark.idempotency.as_ref().is_some_and(|(known, _)| known == key)
    };
    Ok(forks(paths, owner)?.find(meant))
}

/// Ends all. Returns how many lived.
pub fn end_all(paths: &Paths) -> Result<usize, RunDirError> {
    let ended = forks(paths, &Owner::User)?.map(|fork| fork.dir.kill(None).unwrap_or(0));
    Ok(ended.sum())
}

/// What the supervisor of a fork says of it.
pub fn of_fork(paths: &Paths, name: &str) -> Result<(ForkDir, ForkStatus), RunDirError> {
    let dir = ForkDir::named(paths, name)?;
    let status = dir.status()?;
    Ok((dir, status))
}
