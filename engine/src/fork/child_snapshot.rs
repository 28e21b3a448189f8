//! A snapshot of a child that runs, from the child that the user named to the tag. The fork's supervisor freezes the child
//! and writes the files; here they get their name.

use crate::fork::children::ChildrenError;
use crate::interrupt::{Interrupt, Interrupted};
use crate::local::branches::{SnapshotRequest, TakenSnapshot};
use crate::local::lineage::BaseDescription;
use crate::local::paths::Paths;
use crate::local::run_dir::{ForkDir, RunDirError};
use crate::local::snapshot_list::own_bytes;
use crate::local::snapshots::{SnapshotDraft, SnapshotError, file_error};
use crate::progress::{Amount, Progress};
use serde::Serialize;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// Pause between two looks at whether the user wants it to end.
const LOOK: Duration = Duration::from_millis(50);

/// What is to be taken.
#[derive(Debug)]
pub struct ChildSnapshotRequest {
    /// The child.
    pub child: String,
    /// The snapshot's name.
    pub tag: String,
    /// Replace a snapshot of that name.
    pub force: bool,
}

/// A new snapshot of a child. Its JSON form is a contract of `forkd snapshot --child --json`.
#[derive(Debug, Serialize)]
pub struct ChildSnapshot {
    /// Its name.
    pub tag: String,
    /// Its directory.
    pub path: PathBuf,
    /// The child.
    pub child: String,
    /// How long the child stood still, ms.
    pub pause_ms: f64,
    /// Memory that it has in place of what its base has, bytes.
    pub copied_bytes: u64,
    /// In how many ranges that lies.
    pub ranges: u64,
    /// What it takes on disk beyond what it shares with its base, bytes.
    pub disk_bytes: u64,
    /// What it is stored as a difference from; null where all of it is stored.
    pub base: Option<BaseDescription>,
    /// How long it took.
    pub seconds: f64,
}

/// A snapshot of a child could not be taken.
#[derive(Debug, thiserror::Error)]
pub enum ChildSnapshotError {
    /// The child, or its supervisor.
    #[error(transparent)]
    Children(#[from] ChildrenError),
    /// The snapshot's place.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Ctrl-C.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

/// Takes it.
pub fn snapshot_child(
    paths: &Paths,
    request: &ChildSnapshotRequest,
    interrupt: &Interrupt,
    progress: &dyn Progress,
) -> Result<ChildSnapshot, ChildSnapshotError> {
    let started = Instant::now();
    let ChildSnapshotRequest { child, tag, force } = request;
    let fork = ForkDir::of_child(paths, child).map_err(ChildrenError::from)?;
    let draft = SnapshotDraft::create(paths, tag, *force)?;
    // What is in a child's memory is nobody else's to read.
    let private = fs::set_permissions(draft.path(), Permissions::from_mode(0o700));
    private.map_err(file_error("protecting", draft.path()))?;
    let _task = progress.begin("snapshot", Amount::Unknown);
    let asked = SnapshotRequest { child: child.clone(), tag: tag.clone(), into: draft.path().to_owned() };
    let taken = match ask(fork, asked, interrupt) {
        Ok(taken) => taken?,
        Err(interrupted) => {
            drop(draft);
            interrupt.end_process();
            return Err(interrupted.into());
        }
    };
    let TakenSnapshot { pause_ms, copied_bytes, ranges, base } = taken;
    let disk_bytes = own_bytes(draft.path());
    let path = draft.publish(*force)?;
    Ok(ChildSnapshot {
        tag: tag.clone(),
        path,
        child: child.clone(),
        pause_ms,
        copied_bytes,
        ranges,
        disk_bytes,
        base: base.as_ref().map(BaseDescription::from),
        seconds: started.elapsed().as_secs_f64(),
    })
}

/// Waits for the supervisor, as long as the user does.
fn ask(
    fork: ForkDir,
    request: SnapshotRequest,
    interrupt: &Interrupt,
) -> Result<Result<TakenSnapshot, ChildrenError>, Interrupted> {
    let (tell, told) = mpsc::channel();
    let name = fork.id.clone();
    std::thread::spawn(move || drop(tell.send(fork.snapshot(&request))));
    loop {
        interrupt.check()?;
        match told.recv_timeout(LOOK) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Ok(Err(RunDirError::Dead { fork: name }.into())),
            Ok(answer) => return Ok(answer.map_err(ChildrenError::from)),
        }
    }
}
