//! The directory beside `--out` in which a pack is put together, and taken apart before. It goes when the command ends,
//! fails or is interrupted; what a killed one left goes when the next one works in the same place, or with
//! `forkd cleanup`, which learns of the place from the command's run directory.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use tempfile::TempPath;

use crate::interrupt::Interrupt;
use crate::local::run_dir::{RunDir, RunDirError};
use crate::local::work_dir::{self, WorkDir};

/// How these directories are named.
const PREFIX: &str = ".forkd-repack-";
/// Longest time until an interruption is noticed.
const INTERRUPT_PAUSE: Duration = Duration::from_millis(100);

/// There is no workspace.
#[derive(Debug, thiserror::Error)]
pub enum WorkspaceError {
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// The directory itself, or the new pack's place.
    #[error("{}", path.display())]
    Place {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The directory; removed when dropped.
#[derive(Debug)]
pub struct Workspace {
    dir: WorkDir,
    run_dir: Arc<RunDir>,
}

impl Workspace {
    /// A new directory beside `out`, which `run_dir` knows of.
    pub fn create(out: &Path, run_dir: &Arc<RunDir>) -> Result<Workspace, WorkspaceError> {
        let parent = parent(out);
        let failed = |source| WorkspaceError::Place { path: out.to_owned(), source };
        // What cannot be removed is not ours to speak of.
        let _ = remove_dead(parent);
        run_dir.note_workspace_parent(&fs::canonicalize(parent).map_err(failed)?)?;
        let dir = WorkDir::create(parent, PREFIX).map_err(failed)?;
        for name in ["unpacked", "members"] {
            fs::create_dir(dir.path().join(name)).map_err(failed)?;
        }
        Ok(Workspace { dir, run_dir: Arc::clone(run_dir) })
    }

    /// The directory itself.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Where a predecessor's pack is unpacked.
    pub fn unpacked(&self) -> PathBuf {
        self.path().join("unpacked")
    }

    /// The new pack's members.
    pub fn members(&self) -> PathBuf {
        self.path().join("members")
    }

    /// The new pack.
    pub fn pack(&self) -> PathBuf {
        self.path().join("pack")
    }

    /// What has to go before the process ends by itself.
    pub fn remains(&self) -> WorkspaceRemains {
        WorkspaceRemains { workspace: self.path().to_owned(), run_dir: Arc::clone(&self.run_dir) }
    }

    /// Does something that does not look at `interrupt` itself: once that is set, the directory is removed, which makes
    /// the work fail, and the process ends if `interrupt` is the whole process's.
    pub fn until<T>(&self, interrupt: &Interrupt, step: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                while !done.load(SeqCst) {
                    if interrupt.is_set() {
                        self.remains().remove();
                        return interrupt.end_process();
                    }
                    std::thread::park_timeout(INTERRUPT_PAUSE);
                }
            });
            let result = step();
            done.store(true, SeqCst);
            watcher.thread().unpark();
            result
        })
    }

    /// Puts the new pack at `out`, at once and for good. Without `force` nothing may be there:
    /// [`io::ErrorKind::AlreadyExists`].
    pub fn publish(&self, out: &Path, force: bool) -> io::Result<()> {
        let pack = TempPath::try_from_path(self.pack())?;
        let placed = if force { pack.persist(out) } else { pack.persist_noclobber(out) };
        placed.map_err(|failed| failed.error)?;
        File::open(parent(out))?.sync_all()
    }
}

/// A workspace and its command's run directory.
#[derive(Debug)]
pub struct WorkspaceRemains {
    workspace: PathBuf,
    run_dir: Arc<RunDir>,
}

impl WorkspaceRemains {
    /// Removes both. Whoever still writes into the workspace fails once it is gone, and waits for the process's end.
    pub fn remove(&self) {
        let _ = work_dir::remove(&self.workspace);
        self.run_dir.remove();
    }
}

fn parent(out: &Path) -> &Path {
    out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes workspaces in `place` whose makers are dead; returns their paths.
pub fn remove_dead(place: &Path) -> io::Result<Vec<PathBuf>> {
    work_dir::remove_dead(place, PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::local::paths::Paths;
    use crate::local::run_dir::ForkDir;
    use rustix::fs::{FlockOperation, flock};

    #[test]
    fn nothing_is_left_and_only_the_dead_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let (out, names) = (dir.path().join("out"), || fs::read_dir(dir.path()).unwrap().count());
        let state = tempfile::tempdir().unwrap();
        let below = |name: &str| state.path().join(name);
        let paths = Paths { data: below("data"), cache: below("cache"), runtime: below("run") };
        let run_dir = Arc::new(RunDir::create(&paths).unwrap());
        for name in [".forkd-repack-dead", ".forkd-repack-living", "mine"] {
            fs::create_dir_all(dir.path().join(name).join("members")).unwrap();
        }
        let lock = File::open(dir.path().join(".forkd-repack-living")).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        let create = || Workspace::create(&out, &run_dir).unwrap();
        let (first, second) = (create(), create());
        assert_eq!(names(), 4, "two workspaces, one of somebody who lives, and what is not ours");
        for (workspace, text) in [(&first, "first"), (&second, "second")] {
            fs::write(workspace.pack(), text).unwrap();
        }
        first.publish(&out, false).unwrap();
        let refused = second.publish(&out, false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&out).unwrap(), "first");
        fs::write(second.pack(), "third").unwrap();
        second.publish(&out, true).unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "third");
        drop((first, second));
        assert_eq!(names(), 3, "the pack and two directories that are not ours to remove");
        let [fork] = &ForkDir::all(&paths).unwrap()[..] else { panic!("one run directory") };
        assert_eq!(fork.workspace_parent().unwrap(), dir.path().canonicalize().unwrap());
        drop(lock);
        assert_eq!(remove_dead(dir.path()).unwrap().len(), 1);
        let remains = create().remains();
        remains.remove();
        assert_eq!((names(), ForkDir::all(&paths).unwrap().len()), (2, 0));
    }
}
