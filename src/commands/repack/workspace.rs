//! The directory beside `--out` in which a pack is taken apart and put together again. It goes when the command ends,
//! fails or is interrupted; what a killed one left goes when the next one works in the same place.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use tempfile::{TempDir, TempPath};
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::tools::Interrupt;

/// How these directories are named.
const PREFIX: &str = ".forkd-repack-";
/// Age from which a directory that nobody has locked is garbage: its maker locks it right after creating it.
const STALE_AFTER: Duration = Duration::from_secs(60);
/// Attempts at removing a directory in which files still appear.
const REMOVALS: u32 = 200;
/// Time between them.
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);
/// Longest time until an interruption is noticed.
const INTERRUPT_PAUSE: Duration = Duration::from_millis(100);

/// The directory; removed when dropped.
#[derive(Debug)]
pub struct Workspace {
    dir: TempDir,
    _lock: File,
}

impl Workspace {
    /// A new directory beside `out`.
    pub fn create(out: &Path) -> io::Result<Workspace> {
        let parent = parent(out);
        remove_stale(parent);
        let dir = tempfile::Builder::new().prefix(PREFIX).tempdir_in(parent)?;
        let lock = File::open(dir.path())?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
        fs::create_dir(dir.path().join("unpacked"))?;
        fs::create_dir(dir.path().join("members"))?;
        Ok(Workspace { dir, _lock: lock })
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

    /// Does something that does not look at `interrupt` itself: once that is set, the directory is removed and the process
    /// ends, exit status 130.
    pub fn until<T>(&self, interrupt: &Interrupt, step: impl FnOnce() -> T) -> T {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let watcher = scope.spawn(|| {
                while !done.load(SeqCst) {
                    if interrupt.is_set() {
                        remove(self.path());
                        std::process::exit(130);
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

/// Removes a directory before the process ends. Whoever still writes into it fails once it is gone, and waits for the end.
fn remove(workspace: &Path) {
    for _ in 0..REMOVALS {
        match fs::remove_dir_all(workspace) {
            Ok(()) => return,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return,
            Err(_) => std::thread::sleep(REMOVAL_PAUSE),
        }
    }
}

fn parent(out: &Path) -> &Path {
    out.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Removes directories whose makers are dead. What cannot be removed is not ours to speak of.
fn remove_stale(parent: &Path) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        // Of the entry itself, should it be a link.
        let Ok(metadata) = entry.metadata() else { continue };
        let ours = metadata.is_dir() && entry.file_name().to_string_lossy().starts_with(PREFIX);
        let old = || metadata.modified().is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE_AFTER));
        if !ours || !old() {
            continue;
        }
        let Ok(dir) = File::open(entry.path()) else { continue };
        if flock(&dir, FlockOperation::NonBlockingLockExclusive).is_ok() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Ctrl-C, SIGTERM and SIGHUP, which from here on end the process only after the workspace is gone.
pub struct Signals {
    interrupt: Signal,
    terminate: Signal,
    hangup: Signal,
    seen: Arc<AtomicBool>,
}

impl Signals {
    /// Takes the signals over; inside a runtime.
    pub fn take() -> io::Result<Signals> {
        let [interrupt, terminate, hangup] =
            [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()].map(signal);
        Ok(Signals { interrupt: interrupt?, terminate: terminate?, hangup: hangup?, seen: Arc::default() })
    }

    /// Set as soon as one has come.
    pub fn seen(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.seen)
    }

    /// Waits for one, removes `workspace` and ends the process.
    pub async fn remove_and_exit(mut self, workspace: PathBuf) {
        let code = tokio::select! {
            _ = self.interrupt.recv() => 130,
            _ = self.terminate.recv() => 143,
            _ = self.hangup.recv() => 129,
        };
        self.seen.store(true, SeqCst);
        remove(&workspace);
        std::process::exit(code);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> usize {
        fs::read_dir(dir).unwrap().count()
    }

    #[test]
    fn nothing_is_left_and_only_the_dead_are_removed() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("out");
        let old = |name: &str| {
            let path = dir.path().join(name);
            fs::create_dir_all(path.join("members")).unwrap();
            let long_ago = std::time::SystemTime::now() - Duration::from_secs(3600);
            File::open(&path).unwrap().set_modified(long_ago).unwrap();
            path
        };
        let (dead, foreign, living) = (old(".forkd-repack-dead"), old("mine"), old(".forkd-repack-living"));
        let lock = File::open(&living).unwrap();
        flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
        let young = dir.path().join(".forkd-repack-young");
        fs::create_dir(&young).unwrap();
        let (first, second) = (Workspace::create(&out).unwrap(), Workspace::create(&out).unwrap());
        assert!(!dead.exists() && foreign.exists() && living.exists() && young.exists());
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
        assert_eq!(names(dir.path()), 4, "the pack and three directories that are not ours to remove");
    }
}
