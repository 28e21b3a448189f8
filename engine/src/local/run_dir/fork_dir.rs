//! A fork's directory as others see it: what runs, and asking its supervisor.

use super::{
    ANSWER_TIMEOUT, BRANCH_TIMEOUT, CGROUPS, CONTROL, ForkStatus, LABELS, LOCK, MESSAGE_MAX, PAUSED, Query,
    RunDirError, UNBORN_AGE, UNBORN_PREFIX, UNKNOWN_QUERY, WORKSPACE_PARENT, file_error,
};
use crate::local::branches::{BranchRequest, Branched, PausedToDisk, SnapshotRequest, TakenSnapshot};
use crate::local::lifetime::Lifetime;
use crate::local::paths::Paths;
use crate::network::wire::GatewayStatus;
use forkd_vmm::cgroup;
use rustix::fs::FlockOperation;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long a supervisor may take to die once its connections are closed.
const DYING: Duration = Duration::from_millis(200);
/// Pause between two looks at whether it has.
const LOOK: Duration = Duration::from_millis(10);

/// A fork's directory, seen from another process.
#[derive(Debug, Clone)]
pub struct ForkDir {
    /// The fork's name.
    pub id: String,
    pub(super) path: PathBuf,
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

    /// A fork that lives.
    pub fn named(paths: &Paths, id: &str) -> Result<ForkDir, RunDirError> {
        let plain = !id.is_empty() && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        let dir = ForkDir { id: id.to_owned(), path: paths.runtime.join("forks").join(id) };
        if plain && dir.is_alive() { Ok(dir) } else { Err(RunDirError::UnknownFork { id: id.to_owned() }) }
    }

    /// Where a child's vsock is.
    pub fn socket(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.vsock"))
    }

    /// The file that is there while a child is paused.
    pub fn paused(&self, child: &str) -> PathBuf {
        self.path.join(format!("{child}.{PAUSED}"))
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

    /// What whoever had it forked noted of it.
    pub fn labels(&self) -> Result<BTreeMap<String, String>, RunDirError> {
        let path = self.path.join(LABELS);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(file_error("reading", &path)(error)),
        };
        serde_json::from_reader(BufReader::new(file.take(MESSAGE_MAX)))
            .map_err(|source| RunDirError::Malformed { fork: self.id.clone(), source })
    }

    /// Whether its supervisor lives.
    pub fn is_alive(&self) -> bool {
        match File::open(self.path.join(LOCK)) {
            Ok(lock) => rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared).is_err(),
            Err(_) => false,
        }
    }

    /// The same, where it may be dying: its connections are closed a moment before its lock.
    fn lives_on(&self) -> bool {
        let until = Instant::now() + DYING;
        while self.is_alive() {
            if Instant::now() > until {
                return true;
            }
            std::thread::sleep(LOOK);
        }
        false
    }

    /// Asks its supervisor how it is.
    pub fn status(&self) -> Result<ForkStatus, RunDirError> {
        self.ask(&Query::Status)
    }

    /// Has its supervisor end a child, or all. Returns how many were alive.
    pub fn kill(&self, child: Option<&str>) -> Result<usize, RunDirError> {
        self.ask(&Query::Kill(child.map(str::to_owned)))
    }

    /// Asks its supervisor about a child's way out; `None` when it has none.
    pub fn gateway(&self, child: &str) -> Result<Option<GatewayStatus>, RunDirError> {
        self.ask_new(&Query::Gateway(child.to_owned()))
    }

    /// Has its supervisor stop a child, or all. Returns how many live.
    pub fn pause(&self, child: Option<&str>) -> Result<usize, RunDirError> {
        self.ask_new(&Query::Pause(child.map(str::to_owned)))
    }

    /// Has its supervisor let a child go on, or all. Returns how many live.
    pub fn resume(&self, child: Option<&str>) -> Result<usize, RunDirError> {
        self.ask_new(&Query::Resume(child.map(str::to_owned)))
    }

    /// Has its supervisor pause a child to disk, or all.
    pub fn pause_to_disk(&self, child: Option<&str>) -> Result<PausedToDisk, RunDirError> {
        self.ask_long(&Query::PauseToDisk(child.map(str::to_owned)))
    }

    /// Has its supervisor let a child go on from disk, or all. Returns how many that are, when they are ready.
    pub fn resume_from_disk(&self, child: Option<&str>) -> Result<usize, RunDirError> {
        self.ask_long(&Query::ResumeFromDisk(child.map(str::to_owned)))
    }

    /// Has its supervisor give a child, or all, so much time from now on, or no end to it. Returns how many live.
    pub fn set_lifetime(
        &self,
        child: Option<&str>,
        lifetime: Option<Lifetime>,
    ) -> Result<usize, RunDirError> {
        self.ask_new(&Query::Lifetime { child: child.map(str::to_owned), lifetime })
    }

    /// Has its supervisor branch a child. Returns when the branches are ready.
    pub fn branch(&self, request: &BranchRequest) -> Result<Branched, RunDirError> {
        self.ask_long(&Query::Branch(request.clone()))
    }

    /// Has its supervisor take a snapshot of a child.
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<TakenSnapshot, RunDirError> {
        self.ask_long(&Query::Snapshot(request.clone()))
    }

    /// Asks for what takes its time and can be refused.
    fn ask_long<T: serde::de::DeserializeOwned>(&self, query: &Query) -> Result<T, RunDirError> {
        let answer: Result<T, String> = self.known(self.ask_within(query, BRANCH_TIMEOUT))?;
        answer.map_err(|error| RunDirError::Refused { error })
    }

    /// Asks what forkd has not always known: one that does not know it closes the connection.
    fn ask_new<T: serde::de::DeserializeOwned>(&self, query: &Query) -> Result<T, RunDirError> {
        self.known(self.ask(query))
    }

    fn known<T>(&self, answer: Result<T, RunDirError>) -> Result<T, RunDirError> {
        match answer {
            // What builds machines listens to nobody.
            Err(RunDirError::Dead { fork }) if self.path.join(CONTROL).exists() && self.lives_on() => {
                Err(RunDirError::OtherVersion { fork })
            }
            answer => answer,
        }
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
        self.ask_within(query, ANSWER_TIMEOUT)
    }

    fn ask_within<T: serde::de::DeserializeOwned>(
        &self,
        query: &Query,
        timeout: Duration,
    ) -> Result<T, RunDirError> {
        let dead = |_| RunDirError::Dead { fork: self.id.clone() };
        let malformed = |source| RunDirError::Malformed { fork: self.id.clone(), source };
        let stream = UnixStream::connect(self.path.join(CONTROL)).map_err(dead)?;
        stream.set_read_timeout(Some(timeout)).map_err(dead)?;
        let text = serde_json::to_string(query).map_err(malformed)?;
        writeln!(&stream, "{text}").map_err(dead)?;
        let mut answer = String::new();
        BufReader::new(stream.take(MESSAGE_MAX)).read_line(&mut answer).map_err(dead)?;
        if answer.is_empty() {
            return Err(RunDirError::Dead { fork: self.id.clone() });
        }
        if answer.trim() == UNKNOWN_QUERY {
            return Err(RunDirError::OtherVersion { fork: self.id.clone() });
        }
        serde_json::from_str(&answer).map_err(malformed)
    }
}
