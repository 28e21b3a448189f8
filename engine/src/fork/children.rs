//! Children that run, as others than their fork see them: found through their forks' run directories, asked through
//! their agents' sockets.

use crate::fork::agent::{AgentClient, ClientError};
use crate::local::branches::PausedToDisk;
use crate::local::paths::Paths;
use crate::local::run_dir::{ForkDir, ForkStatus, RunDirError};
use crate::local::snapshots::{CONSOLE, LockedSnapshot, SnapshotError};
use crate::network::wire::GatewayStatus;
use forkd_abi::protocol::{Answer, ExecRequest};
use serde::Serialize;
use std::fs::File;
use std::io;
use std::ops::Add;
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
    /// It is paused, and answers nobody.
    #[error("{id} is paused")]
    Paused {
        /// The child.
        id: String,
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
    /// A child without a way out.
    #[error("{id} has no way out: it was not forked with --net nat")]
    NoGateway {
        /// The child.
        id: String,
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

/// All forks that run, with their children but for branches that are over.
pub fn list(paths: &Paths) -> Result<Vec<RunningFork>, RunDirError> {
    let mut forks = list_with_ancestors(paths)?;
    for fork in &mut forks {
        fork.status.children.retain(|child| child.parent.is_none() || !child.state.is_over());
    }
    Ok(forks)
}

/// All forks that run, with branches that are over, too, where others were branched from them.
pub fn list_with_ancestors(paths: &Paths) -> Result<Vec<RunningFork>, RunDirError> {
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

/// A child that lives.
#[derive(Debug)]
pub struct RunningChild {
    /// Its name.
    pub id: String,
    /// Process id of its machine.
    pub pid: i32,
    /// Its fork.
    pub fork: ForkDir,
}

/// The children that `name` means and that live: one, or all of a fork, of which there is one at least.
pub fn find(paths: &Paths, name: &str) -> Result<Vec<RunningChild>, ChildrenError> {
    let (fork, one) = fork_of(paths, name)?;
    let unknown = |_| match one {
        Some(id) => RunDirError::UnknownChild { id: id.to_owned() },
        None => RunDirError::UnknownFork { id: name.to_owned() },
    };
    let children = fork.status()?.children.into_iter();
    let meant = children.filter(|child| one.is_none_or(|id| id == child.id) && !child.state.is_over());
    let found = meant.map(|child| RunningChild { id: child.id, pid: child.pid, fork: fork.clone() });
    let found: Vec<_> = found.collect();
    if found.is_empty() { Err(unknown(()).into()) } else { Ok(found) }
}

/// The fork that `name` means, and the child of it, unless it means all.
fn fork_of<'a>(paths: &Paths, name: &'a str) -> Result<(ForkDir, Option<&'a str>), RunDirError> {
    match name.contains('-') {
        true => Ok((ForkDir::of_child(paths, name)?, Some(name))),
        false => Ok((ForkDir::named(paths, name)?, None)),
    }
}

/// Stops the child `name`, or all of a fork: they take no processor time until they are resumed. Returns how many live.
pub fn pause(paths: &Paths, name: &str) -> Result<usize, RunDirError> {
    let (fork, one) = fork_of(paths, name)?;
    some_live(fork.pause(one)?, name, one)
}

/// Lets the child `name` go on, or all of a fork. Returns how many live.
pub fn resume(paths: &Paths, name: &str) -> Result<usize, RunDirError> {
    let (fork, one) = fork_of(paths, name)?;
    some_live(let_go_on(&fork, one)?, name, one)
}

/// Those that are stopped go on first: they are not to wait for those that are read from disk.
fn let_go_on(fork: &ForkDir, one: Option<&str>) -> Result<usize, RunDirError> {
    let live = fork.resume(one)?;
    match fork.resume_from_disk(one) {
        // It can have put none there.
        Err(RunDirError::OtherVersion { .. }) => Ok(live),
        back => back.map(|_| live),
    }
}

/// Pauses the child `name`, or all of a fork, to disk: they take no memory of their own until they are resumed.
pub fn pause_to_disk(paths: &Paths, name: &str) -> Result<PausedToDisk, RunDirError> {
    let (fork, one) = fork_of(paths, name)?;
    let paused = fork.pause_to_disk(one)?;
    some_live(paused.children, name, one).map(|_| paused)
}

/// Pauses all children of all forks to disk.
pub fn pause_all_to_disk(paths: &Paths) -> Result<PausedToDisk, RunDirError> {
    of_all(paths, |fork| fork.pause_to_disk(None))
}

fn some_live(count: usize, name: &str, one: Option<&str>) -> Result<usize, RunDirError> {
    let id = name.to_owned();
    match (count, one) {
        (0, Some(_)) => Err(RunDirError::UnknownChild { id }),
        (0, None) => Err(RunDirError::UnknownFork { id }),
        (count, _) => Ok(count),
    }
}

/// Stops all children of all forks. Returns how many live.
pub fn pause_all(paths: &Paths) -> Result<usize, RunDirError> {
    of_all(paths, |fork| fork.pause(None))
}

/// Lets all children of all forks go on. Returns how many live.
pub fn resume_all(paths: &Paths) -> Result<usize, RunDirError> {
    of_all(paths, |fork| let_go_on(fork, None))
}

/// A connection to the agent of the child `id`, for one request.
pub fn connect(paths: &Paths, id: &str) -> Result<AgentClient, ChildrenError> {
    let fork = ForkDir::of_child(paths, id)?;
    // It would not answer before it goes on, which may be never.
    if fork.paused(id).exists() {
        return Err(ChildrenError::Paused { id: id.to_owned() });
    }
    AgentClient::connect(&fork.socket(id), CONNECT_TIMEOUT).map_err(agent_error(id))
}

/// The failure of a request to the child `id`.
pub fn agent_error(id: &str) -> impl FnOnce(ClientError) -> ChildrenError {
    let id = id.to_owned();
    move |source| ChildrenError::Agent { id, source }
}

/// Starts a program in the child `id` that nobody waits for, and returns its process id there.
pub fn start(paths: &Paths, id: &str, request: ExecRequest) -> Result<u32, ChildrenError> {
    connect(paths, id)?.start(request, CONNECT_TIMEOUT).map_err(agent_error(id))
}

/// Has the warm worker of the child `id` evaluate `code`.
pub fn eval(paths: &Paths, id: &str, code: &str) -> Result<Answer, ChildrenError> {
    let answer = connect(paths, id)?.eval(code, EVAL_TIMEOUT).map_err(agent_error(id))?;
    match &answer.error {
        Some(error) => Err(ChildrenError::Code { id: id.to_owned(), error: error.clone() }),
        None => Ok(answer),
    }
}

/// The way out of the child `id`.
pub fn gateway(paths: &Paths, id: &str) -> Result<GatewayStatus, ChildrenError> {
    let status = ForkDir::of_child(paths, id)?.gateway(id)?;
    status.ok_or_else(|| ChildrenError::NoGateway { id: id.to_owned() })
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
    of_all(paths, |fork| fork.kill(None))
}

/// Asks all forks the same, and sums up. The others are asked all the same where one fails.
fn of_all<T: Default + Add<Output = T>>(
    paths: &Paths,
    ask: impl Fn(&ForkDir) -> Result<T, RunDirError>,
) -> Result<T, RunDirError> {
    let (mut sum, mut failure) = (T::default(), None);
    for fork in ForkDir::all(paths)? {
        match ask(&fork) {
            Ok(count) => sum = sum + count,
            Err(RunDirError::Dead { .. }) => {}
            Err(error) => failure = Some(error),
        }
    }
    failure.map_or(Ok(sum), Err)
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
