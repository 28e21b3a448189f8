//! What running forks leave in the file system: one directory a fork, held by a lock as long as its supervisor lives. A
//! command that builds machines or packs has one too, which answers nobody and which `forkd ps` does not show.
//!
//! ```text
//! <runtime>/forks/<fork>/lock            flock(2)ed by the supervisor
//!                        control.sock    answers Query with one line of JSON
//!                        <child>.vsock   the child's vsock (CONNECT port)
//!                        <child>.console its console
//!                        <child>.paused  there while the child is paused, to disk or not
//!                        labels.json     what whoever had it forked notes of it, where that is anything
//!                        cgroups         path of the directory with the children's cgroups, where they have any
//!                        workspace_parent path of the directory in which its workspace lies (`workspace.rs`)
//! ```

mod fork_dir;

pub use fork_dir::ForkDir;

use crate::local::branches::{BranchRequest, Branched, PausedToDisk, SnapshotRequest, TakenSnapshot};
use crate::local::lifetime::Lifetime;
use crate::local::paths::{Paths, PathsError};
use crate::network::wire::{GatewayStatus, NetworkStatus};
use forkd_vmm::cgroup::CgroupError;
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

const LOCK: &str = "lock";
const CONTROL: &str = "control.sock";
const PAUSED: &str = "paused";
const LABELS: &str = "labels.json";
const CGROUPS: &str = "cgroups";
const WORKSPACE_PARENT: &str = "workspace_parent";
/// Longest query or answer, bytes.
const MESSAGE_MAX: u64 = 4 << 20;
/// How long a supervisor may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// The same where branches are started, whose supervisor gives up before.
const BRANCH_TIMEOUT: Duration = Duration::from_secs(600);
/// How directories are named while they are made; forks have hexadecimal names.
const UNBORN_PREFIX: &str = ".new-";
/// Age from which on one that has no lock will never have one.
const UNBORN_AGE: Duration = Duration::from_secs(60);

/// Where a child stands. Ordered: a child only ever moves on. Stalled and paused are what is shown of one that is not over
/// for as long as that lasts; where it stands itself does not change by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ChildState {
    /// Its process is being set up.
    Starting,
    /// It has executed instructions.
    Running,
    /// It waits for memory that does not come.
    Stalled,
    /// It is unique and answers requests.
    Ready,
    /// Its process is stopped: `forkd pause`, or `--on-timeout pause`.
    Paused,
    /// Its guest ended.
    Ended,
    /// It could not go on.
    Failed,
    /// It was killed on request.
    Killed,
}

impl ChildState {
    /// Whether its process is gone, or about to be.
    pub fn is_over(self) -> bool {
        self >= ChildState::Ended
    }

    /// Name as shown.
    pub fn name(self) -> &'static str {
        match self {
            ChildState::Starting => "starting",
            ChildState::Running => "running",
            ChildState::Stalled => "stalled",
            ChildState::Ready => "ready",
            ChildState::Paused => "paused",
            ChildState::Ended => "ended",
            ChildState::Failed => "failed",
            ChildState::Killed => "killed",
        }
    }
}

/// One child, as `forkd ps` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildStatus {
    /// Its name.
    pub id: String,
    /// Process id of its machine; 0 while it has none.
    pub pid: i32,
    /// Where it stands.
    pub state: ChildState,
    /// Why it failed or stalls.
    pub error: Option<String>,
    /// Its network, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStatus>,
    /// Its ports that `--publish` made reachable.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
    /// Whether it is paused to disk, and has no process.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub on_disk: bool,
    /// The child that it was branched from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<String>,
    /// Milliseconds until its time (`--timeout`) is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_in_ms: Option<u64>,
}

/// A port of a child that its fork forwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PublishedPort {
    /// TCP port of its loopback.
    pub guest: u16,
    /// TCP port of the host's loopback that leads there.
    pub local: u16,
}

/// One fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkStatus {
    /// What was forked.
    pub pack: String,
    /// What that was then: owner/name@version for a package of the hub, otherwise the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub forked_from: Option<String>,
    /// Bytes fetched of the pack.
    pub bytes_fetched: u64,
    /// Size of the pack.
    pub bytes_total: u64,
    /// Its children. Of branches those that live, and those that such were branched from.
    pub children: Vec<ChildStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Query {
    Status,
    Kill(Option<String>),
    Pause(Option<String>),
    Resume(Option<String>),
    PauseToDisk(Option<String>),
    ResumeFromDisk(Option<String>),
    Gateway(String),
    Lifetime { child: Option<String>, lifetime: Option<Lifetime> },
    Branch(BranchRequest),
    Snapshot(SnapshotRequest),
}

/// The answer to a query of a later forkd.
const UNKNOWN_QUERY: &str = "\"unknown query\"";

/// What a fork does for those who ask.
pub trait ForkControl {
    /// How it is.
    fn status(&self) -> ForkStatus;
    /// Ends a child, or all. Returns how many were alive.
    fn kill(&self, child: Option<&str>) -> usize;
    /// Stops a child, or all. Returns how many live.
    fn pause(&self, child: Option<&str>) -> usize;
    /// Lets a child go on, or all. Returns how many live.
    fn resume(&self, child: Option<&str>) -> usize;
    /// Pauses a child to disk, or all, or says why not.
    fn pause_to_disk(&self, child: Option<&str>) -> Result<PausedToDisk, String>;
    /// Lets a child, or all, go on from disk, or says why not. Returns how many that are.
    fn resume_from_disk(&self, child: Option<&str>) -> Result<usize, String>;
    /// The way out of a child, if it has one.
    fn gateway(&self, child: &str) -> Option<GatewayStatus>;
    /// Gives a child, or all, so much time from now on, or no end to it. Returns how many live.
    fn set_lifetime(&self, child: Option<&str>, lifetime: Option<Lifetime>) -> usize;
    /// Branches a child, or says why not.
    fn branch(&self, request: &BranchRequest) -> Result<Branched, String>;
    /// Takes a snapshot of a child, or says why not.
    fn snapshot(&self, request: &SnapshotRequest) -> Result<TakenSnapshot, String>;
}

/// A run directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RunDirError {
    /// forkd's directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The cgroups of its children.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A file in it.
    #[error("{operation} {} failed", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The supervisor is gone.
    #[error("the supervisor of fork `{fork}` is gone")]
    Dead {
        /// The fork.
        fork: String,
    },
    /// The supervisor answers nonsense.
    #[error("the supervisor of fork `{fork}` cannot be understood")]
    Malformed {
        /// The fork.
        fork: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// The supervisor does not know what it is asked.
    #[error("the supervisor of fork `{fork}` is of another version of forkd and cannot do that")]
    OtherVersion {
        /// The fork.
        fork: String,
    },
    /// The supervisor cannot do what it is asked.
    #[error("{error}")]
    Refused {
        /// Why, with causes.
        error: String,
    },
    /// No such fork.
    #[error("there is no running fork `{id}`")]
    UnknownFork {
        /// Its name.
        id: String,
    },
    /// No such child.
    #[error("there is no running child `{id}`")]
    UnknownChild {
        /// Its name.
        id: String,
    },
}

fn file_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> RunDirError {
    let path = path.to_owned();
    move |source| RunDirError::File { operation, path, source }
}

/// The directory of this process's own fork.
#[derive(Debug)]
pub struct RunDir {
    id: String,
    path: PathBuf,
    _lock: File,
}

impl RunDir {
    /// A new, locked directory with a random name.
    pub fn create(paths: &Paths) -> Result<RunDir, RunDirError> {
        let parent = paths.create_runtime(Path::new("forks"))?;
        loop {
            let mut random = [0; 3];
            let source = Path::new("/dev/urandom");
            File::open(source)
                .and_then(|mut file| file.read_exact(&mut random))
                .map_err(file_error("reading", source))?;
            let id = random.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
            // It gets its name once it is locked: what has a name and no lock is dead.
            let unborn = tempfile::Builder::new()
                .prefix(UNBORN_PREFIX)
                .tempdir_in(&parent)
                .map_err(file_error("creating a directory in", &parent))?;
            let lock_path = unborn.path().join(LOCK);
            let lock = File::create(&lock_path).map_err(file_error("creating", &lock_path))?;
            rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
                .map_err(|errno| file_error("locking", &lock_path)(errno.into()))?;
            let path = parent.join(&id);
            match rustix::fs::renameat_with(CWD, unborn.path(), CWD, &path, RenameFlags::NOREPLACE) {
                Ok(()) => {
                    let _ = unborn.keep();
                    return Ok(RunDir { id, path, _lock: lock });
                }
                Err(Errno::EXIST) => {}
                Err(errno) => return Err(file_error("creating", &path)(errno.into())),
            }
        }
    }

    /// The fork's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where a child's vsock is.
    pub fn socket(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.vsock"))
    }

    /// Where a child's console goes.
    pub fn console(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.console"))
    }

    /// The file that is there while a child is paused.
    pub fn paused(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.{PAUSED}"))
    }

    /// Notes that a child is paused, for whoever is about to ask it something; or that it no longer is.
    pub fn note_paused(&self, child: &str, paused: bool) {
        let path = self.paused(child);
        let noted = if paused { File::create(&path).map(drop) } else { fs::remove_file(&path) };
        match noted {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(path = %path.display(), %error, "it cannot be noted whether a child is paused");
            }
            _ => {}
        }
    }

    /// Removes what is kept of a branch that is over. The console stays of one that failed.
    pub fn forget(&self, branch: &str, failed: bool) {
        self.note_paused(branch, false);
        let console = (!failed).then(|| self.console(branch));
        for path in std::iter::once(self.socket(branch)).chain(console) {
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(path = %path.display(), %error, "what a branch leaves is left");
                }
                _ => {}
            }
        }
    }

    /// Notes what whoever has it forked wants to find again.
    pub fn note_labels(&self, labels: &BTreeMap<String, String>) -> Result<(), RunDirError> {
        if labels.is_empty() {
            return Ok(());
        }
        let path = self.path.join(LABELS);
        let text = serde_json::to_vec(labels)
            .map_err(|source| RunDirError::Malformed { fork: self.id.clone(), source })?;
        fs::write(&path, text).map_err(file_error("writing", &path))
    }

    /// Notes where the children's cgroups are, for whoever cleans up after a killed fork.
    pub fn note_cgroups(&self, parent: &Path) -> Result<(), RunDirError> {
        let path = self.path.join(CGROUPS);
        fs::write(&path, parent.as_os_str().as_bytes()).map_err(file_error("writing", &path))
    }

    /// Notes in which directory this command's workspace will be, for whoever cleans up after it.
    pub fn note_workspace_parent(&self, directory: &Path) -> Result<(), RunDirError> {
        let path = self.path.join(WORKSPACE_PARENT);
        fs::write(&path, directory.as_os_str().as_bytes()).map_err(file_error("writing", &path))
    }

    /// The control socket.
    pub fn listen(&self) -> Result<UnixListener, RunDirError> {
        let path = self.path.join(CONTROL);
        UnixListener::bind(&path).map_err(file_error("binding", &path))
    }

    /// Answers one query.
    pub fn answer<F: ForkControl + Send + Sync + 'static>(&self, mut stream: UnixStream, fork: &Arc<F>) {
        let mut line = String::new();
        let timeout = Some(ANSWER_TIMEOUT);
        let read = stream
            .set_read_timeout(timeout)
            .and_then(|()| stream.set_write_timeout(timeout))
            .and_then(|()| BufReader::new((&stream).take(MESSAGE_MAX)).read_line(&mut line));
        let answer = match read.map(|_| serde_json::from_str(&line)) {
            Ok(Ok(Query::Status)) => serde_json::to_string(&fork.status()),
            Ok(Ok(Query::Kill(id))) => serde_json::to_string(&fork.kill(id.as_deref())),
            Ok(Ok(Query::Pause(id))) => serde_json::to_string(&fork.pause(id.as_deref())),
            Ok(Ok(Query::Resume(id))) => serde_json::to_string(&fork.resume(id.as_deref())),
            Ok(Ok(Query::Gateway(id))) => serde_json::to_string(&fork.gateway(&id)),
            Ok(Ok(Query::Lifetime { child, lifetime })) => {
                serde_json::to_string(&fork.set_lifetime(child.as_deref(), lifetime))
            }
            Ok(Ok(Query::Branch(request))) => {
                return answer_later(fork, move |fork| answer_branch(&mut stream, fork, &request));
            }
            // Whoever asked publishes it, or nobody does.
            Ok(Ok(Query::Snapshot(request))) => {
                return answer_later(fork, move |fork| tell(&mut stream, &fork.snapshot(&request)));
            }
            Ok(Ok(Query::PauseToDisk(id))) => {
                return answer_later(fork, move |fork| tell(&mut stream, &fork.pause_to_disk(id.as_deref())));
            }
            Ok(Ok(Query::ResumeFromDisk(id))) => {
                return answer_later(fork, move |fork| {
                    tell(&mut stream, &fork.resume_from_disk(id.as_deref()))
                });
            }
            Ok(Err(_)) => Ok(UNKNOWN_QUERY.to_owned()),
            Err(_) => return,
        };
        if let Ok(answer) = answer {
            // Whoever asked may be gone.
            let _ = writeln!(stream, "{answer}");
        }
    }

    /// Removes the directory.
    pub fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.path.display(), %error, "a run directory could not be removed");
        }
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Answers what takes its time, in which others have to be answered.
fn answer_later<F: ForkControl + Send + Sync + 'static>(
    fork: &Arc<F>,
    answer: impl FnOnce(&F) + Send + 'static,
) {
    let fork = Arc::clone(fork);
    if let Err(error) = std::thread::Builder::new().spawn(move || answer(&fork)) {
        tracing::warn!(%error, "there is no thread to answer in");
    }
}

/// Tells whoever asked, who may be gone.
fn tell(stream: &mut UnixStream, answer: &impl Serialize) {
    let _ = serde_json::to_string(answer).map(|answer| writeln!(stream, "{answer}"));
}

/// Branches that whoever asked for them does not hear of are nobody's.
fn answer_branch(stream: &mut UnixStream, fork: &impl ForkControl, request: &BranchRequest) {
    let branched = fork.branch(request);
    let told = serde_json::to_string(&branched).is_ok_and(|answer| writeln!(stream, "{answer}").is_ok());
    if let Ok(branched) = branched
        && !told
    {
        for branch in branched.branches {
            fork.kill(Some(&branch.id));
        }
    }
}

#[cfg(test)]
#[path = "run_dir_tests.rs"]
mod tests;
