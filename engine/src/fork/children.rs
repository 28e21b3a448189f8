//! Children that run, as others than their fork see them: found through their forks' run directories, asked through
//! their agents' sockets.

use crate::fork::agent::{AgentClient, ClientError};
use crate::local::paths::Paths;
use crate::local::run_dir::{ForkDir, ForkStatus, RunDirError};
use crate::local::snapshots::{CONSOLE, LockedSnapshot, SnapshotError};
use forkd_abi::protocol::Answer;
use serde::Serialize;
use std::fs::File;
use std::io;
use std::time::Duration;

/// How long a child may take to accept a request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long code in a child may run; long enough for anything somebody waits for.
const EVAL_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

/// A child could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ChildrenError {
    /// Finding it.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Its agent.
    #[error("{id}")]
    Agent {
        /// The child.
        id: String,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// The code failed in the guest.
    #[error("{id}: the code failed: {error}")]
    Code {
        /// The child.
        id: String,
        /// What the worker says.
        error: String,
    },
    /// Its memory.
    #[error("the memory of {id} cannot be looked at")]
    Memory {
        /// The child.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing in its memory is an image as this forkd names them.
    #[error("no image is mapped in the memory of {id} (process {pid})")]
    NoImage {
        /// The child.
        id: String,
        /// Its process.
        pid: i32,
    },
    /// Its console, or that of a snapshot.
    #[error("the console of {id} cannot be shown")]
    Console {
        /// The child, or the tag.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A snapshot that has no console.
    #[error("no console is kept with the snapshot `{tag}`")]
    NoConsole {
        /// The tag.
        tag: String,
    },
    /// A snapshot whose console is asked for.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// One running fork, as `forkd ps --json` shows it.
#[derive(Debug, Serialize)]
pub struct RunningFork {
    /// Its name.
    pub fork: String,
    /// What it says of itself.
    #[serde(flatten)]
    pub status: ForkStatus,
}

/// All forks that run.
pub fn list(paths: &Paths) -> Result<Vec<RunningFork>, RunDirError> {
    let mut forks = Vec::new();
    for fork in ForkDir::all(paths)? {
        match fork.status() {
            Ok(status) => forks.push(RunningFork { fork: fork.id, status }),
            // It has just ended, or left its directory for a cleanup.
            Err(RunDirError::Dead { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(forks)
}

/// A connection to the agent of the child `id`, for one request.
pub fn connect(paths: &Paths, id: &str) -> Result<AgentClient, ChildrenError> {
    let fork = ForkDir::of_child(paths, id)?;
    AgentClient::connect(&fork.socket(id), CONNECT_TIMEOUT).map_err(agent_error(id))
}

/// The failure of a request to the child `id`.
pub fn agent_error(id: &str) -> impl FnOnce(ClientError) -> ChildrenError {
    let id = id.to_owned();
    move |source| ChildrenError::Agent { id, source }
}

/// Has the warm worker of the child `id` evaluate `code`.
pub fn eval(paths: &Paths, id: &str, code: &str) -> Result<Answer, ChildrenError> {
    let answer = connect(paths, id)?.eval(code, EVAL_TIMEOUT).map_err(agent_error(id))?;
    match &answer.error {
        Some(error) => Err(ChildrenError::Code { id: id.to_owned(), error: error.clone() }),
        None => Ok(answer),
    }
}

/// The console of the child `id`.
pub fn console(paths: &Paths, id: &str) -> Result<File, ChildrenError> {
    let fork = ForkDir::of_child(paths, id)?;
    File::open(fork.console(id)).map_err(|source| ChildrenError::Console { id: id.to_owned(), source })
}

/// What the machine of the snapshot `tag` printed before it was taken.
pub fn console_of_snapshot(paths: &Paths, tag: &str) -> Result<File, ChildrenError> {
    let snapshot = LockedSnapshot::find(paths, tag)?;
    File::open(snapshot.path().join(CONSOLE)).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ChildrenError::NoConsole { tag: tag.to_owned() },
        _ => ChildrenError::Console { id: tag.to_owned(), source },
    })
}

/// Ends all children of all forks. Returns how many lived.
pub fn kill_all(paths: &Paths) -> Result<usize, RunDirError> {
    let (mut killed, mut failure) = (0, None);
    for fork in ForkDir::all(paths)? {
        match fork.kill(None) {
            Ok(count) => killed += count,
            Err(RunDirError::Dead { .. }) => {}
            // The others are to be ended all the same.
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(killed), Err)
}

/// Ends the child `id`. Returns whether it lived.
pub fn kill(paths: &Paths, id: &str) -> Result<bool, RunDirError> {
    let fork = ForkDir::of_child(paths, id)?;
    let lives = fork.is_alive();
    match fork.kill(Some(id)) {
        // A fork ends with its last child, at times before it has said so.
        Err(RunDirError::Dead { .. }) if lives => Ok(true),
        answer => Ok(answer? > 0),
    }
}
