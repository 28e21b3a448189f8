//! What running forks leave in the file system: one directory a fork, held by a lock as long as its supervisor lives. A
//! command that builds machines or packs has one too, which answers nobody and which `forkd ps` does not show.
//!
//! ```text
//! <runtime>/forks/<fork>/lock            flock(2)ed by the supervisor
//!                        control.sock    answers Query with one line of JSON
//!                        <child>.vsock   the child's vsock (CONNECT port)
//!                        <child>.console its console
//!                        cgroups         path of the directory with the children's cgroups, where they have any
//!                        workspace_parent path of the directory in which its workspace lies (`workspace.rs`)
//! ```

use crate::local::paths::{Paths, PathsError};
use crate::network::wire::NetworkStatus;
use forkd_vmm::cgroup::{self, CgroupError};
use rustix::fs::{CWD, FlockOperation, RenameFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

const LOCK: &str = "lock";
const CONTROL: &str = "control.sock";
const CGROUPS: &str = "cgroups";
const WORKSPACE_PARENT: &str = "workspace_parent";
/// Longest query or answer, bytes.
const MESSAGE_MAX: u64 = 4 << 20;
/// How long a supervisor may take to answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// How directories are named while they are made; forks have hexadecimal names.
const UNBORN_PREFIX: &str = ".new-";
/// Age from which on one that has no lock will never have one.
const UNBORN_AGE: Duration = Duration::from_secs(60);

/// Where a child stands. Ordered: a child only ever moves on.
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
    /// Process id of its machine.
    pub pid: i32,
    /// Where it stands.
    pub state: ChildState,
    /// Why it failed or stalls.
    pub error: Option<String>,
    /// Its network, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<NetworkStatus>,
}

/// One fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForkStatus {
    /// What was forked.
    pub pack: String,
    /// Bytes fetched of the pack.
    pub bytes_fetched: u64,
    /// Size of the pack.
    pub bytes_total: u64,
    /// Its children.
    pub children: Vec<ChildStatus>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Query {
    Status,
    Kill(Option<String>),
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
    pub fn answer(
        &self,
        mut stream: UnixStream,
        status: impl FnOnce() -> ForkStatus,
        kill: impl FnOnce(Option<&str>) -> usize,
    ) {
        let mut line = String::new();
        let timeout = Some(ANSWER_TIMEOUT);
        let read = stream
            .set_read_timeout(timeout)
            .and_then(|()| stream.set_write_timeout(timeout))
            .and_then(|()| BufReader::new((&stream).take(MESSAGE_MAX)).read_line(&mut line));
        let answer = match read.map(|_| serde_json::from_str(&line)) {
            Ok(Ok(Query::Status)) => serde_json::to_string(&status()),
            Ok(Ok(Query::Kill(id))) => serde_json::to_string(&kill(id.as_deref())),
            _ => return,
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

/// A fork's directory, seen from another process.
#[derive(Debug, Clone)]
pub struct ForkDir {
    /// The fork's name.
    pub id: String,
    path: PathBuf,
}

impl ForkDir {
    /// All forks of this user, running or dead.
    pub fn all(paths: &Paths) -> Result<Vec<ForkDir>, RunDirError> {
        let parent = paths.runtime.join("forks");
        let entries = match fs::read_dir(&parent) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(file_error("listing", &parent)(error)),
        };
        let mut forks: Vec<_> = entries
            .flatten()
            .filter_map(|entry| {
                Some(ForkDir { id: entry.file_name().into_string().ok()?, path: entry.path() })
            })
            .filter(|fork| !fork.id.starts_with(UNBORN_PREFIX))
            .collect();
        forks.sort_by(|a, b| a.id.cmp(&b.id));
        Ok(forks)
    }

    /// Removes directories that were being made when their maker died. Returns how many there were.
    pub fn remove_unborn(paths: &Paths) -> Result<usize, RunDirError> {
        let parent = paths.runtime.join("forks");
        let Ok(entries) = fs::read_dir(&parent) else { return Ok(0) };
        let mut removed = 0;
        for entry in
            entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(UNBORN_PREFIX))
        {
            let fork = ForkDir { id: UNBORN_PREFIX.to_owned(), path: entry.path() };
            let made = entry.metadata().and_then(|metadata| metadata.modified()).ok();
            let old = made.and_then(|made| made.elapsed().ok()).is_some_and(|age| age > UNBORN_AGE);
            // One without a lock yet may be about to get it.
            let abandoned = if fork.path.join(LOCK).exists() { !fork.is_alive() } else { old };
            if abandoned && fs::remove_dir_all(&fork.path).is_ok() {
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// The fork of a child, which exists.
    pub fn of_child(paths: &Paths, id: &str) -> Result<ForkDir, RunDirError> {
        let unknown = || RunDirError::UnknownChild { id: id.to_owned() };
        let (fork, number) = id.split_once('-').ok_or_else(unknown)?;
        let plain =
            fork.bytes().all(|byte| byte.is_ascii_hexdigit()) && number.bytes().all(|b| b.is_ascii_digit());
        let dir = ForkDir { id: fork.to_owned(), path: paths.runtime.join("forks").join(fork) };
        if plain && dir.socket(id).exists() && dir.is_alive() { Ok(dir) } else { Err(unknown()) }
    }

    /// Where a child's vsock is.
    pub fn socket(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.vsock"))
    }

    /// Where a child's console is.
    pub fn console(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.console"))
    }

    /// Where its workspace is, if it noted one.
    pub fn workspace_parent(&self) -> Option<PathBuf> {
        let path = fs::read(self.path.join(WORKSPACE_PARENT)).ok()?;
        Some(PathBuf::from(OsStr::from_bytes(&path)))
    }

    /// Whether its supervisor lives.
    pub fn is_alive(&self) -> bool {
        match File::open(self.path.join(LOCK)) {
            Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err(),
            Err(_) => false,
        }
    }

    /// Asks its supervisor how it is.
    pub fn status(&self) -> Result<ForkStatus, RunDirError> {
        self.ask(&Query::Status)
    }

    /// Has its supervisor end a child, or all. Returns how many were alive.
    pub fn kill(&self, child: Option<&str>) -> Result<usize, RunDirError> {
        self.ask(&Query::Kill(child.map(str::to_owned)))
    }

    /// Removes what a dead supervisor left. Returns whether there was something.
    pub fn remove_if_dead(&self) -> Result<bool, RunDirError> {
        if self.is_alive() {
            return Ok(false);
        }
        if let Ok(parent) = fs::read(self.path.join(CGROUPS)) {
            let parent = Path::new(OsStr::from_bytes(&parent));
            cgroup::remove_dead(parent, &self.id)?;
        }
        match fs::remove_dir_all(&self.path) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(file_error("removing", &self.path)(error)),
        }
    }

    fn ask<T: serde::de::DeserializeOwned>(&self, query: &Query) -> Result<T, RunDirError> {
        let dead = |_| RunDirError::Dead { fork: self.id.clone() };
        let malformed = |source| RunDirError::Malformed { fork: self.id.clone(), source };
        let stream = UnixStream::connect(self.path.join(CONTROL)).map_err(dead)?;
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).map_err(dead)?;
        let text = serde_json::to_string(query).map_err(malformed)?;
        writeln!(&stream, "{text}").map_err(dead)?;
        let mut answer = String::new();
        BufReader::new(stream.take(MESSAGE_MAX)).read_line(&mut answer).map_err(dead)?;
        if answer.is_empty() {
            return Err(RunDirError::Dead { fork: self.id.clone() });
        }
        serde_json::from_str(&answer).map_err(malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(dir: &Path) -> Paths {
        Paths { data: dir.join("data"), cache: dir.join("cache"), runtime: dir.join("run") }
    }

    #[test]
    fn a_fork_answers_while_it_lives_and_is_removed_when_dead() {
        let dir = tempfile::tempdir().unwrap();
        let paths = paths(dir.path());
        let run = RunDir::create(&paths).unwrap();
        let listener = run.listen().unwrap();
        let id = format!("{}-1", run.id());
        File::create(run.socket(&id)).unwrap();
        let fork = ForkDir::of_child(&paths, &id).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let status = ForkStatus {
                    pack: "p".to_owned(),
                    bytes_fetched: 1,
                    bytes_total: 2,
                    children: Vec::new(),
                };
                run.answer(listener.accept().unwrap().0, || status, |_| 0);
                run.answer(listener.accept().unwrap().0, || unreachable!(), |id| id.map_or(0, str::len));
            });
            assert_eq!(fork.status().unwrap().pack, "p");
            assert_eq!(fork.kill(Some("abc")).unwrap(), 3);
        });
        assert!(!fork.remove_if_dead().unwrap());
        drop((run, listener));
        assert!(ForkDir::all(&paths).unwrap().is_empty(), "a fork that ends removes its directory");
        // What a killed one leaves: a lock that nobody holds.
        fs::create_dir(&fork.path).unwrap();
        File::create(fork.path.join(LOCK)).unwrap();
        assert!(matches!(fork.status(), Err(RunDirError::Dead { .. })));
        assert!(fork.remove_if_dead().unwrap());
        assert!(ForkDir::all(&paths).unwrap().is_empty());
    }

    #[test]
    fn names_from_outside_cannot_leave_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        for id in ["", "-", "../..-1", "abc", "a/b-1", "abc-1/../.."] {
            assert!(matches!(
                ForkDir::of_child(&paths(dir.path()), id),
                Err(RunDirError::UnknownChild { .. })
            ));
        }
    }
}
