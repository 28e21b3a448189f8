//! Root disks and layers that earlier builds have left in the cache: when they were last used, and removing the old ones.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use forkd_fs::cache::RemovedFiles;
use rustix::fs::{FlockOperation, Timestamps, flock};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::local::paths::Paths;

/// Where root disks are kept, in forkd's cache directory.
pub(super) const CACHE: &str = "root-disks";
/// Locked while something is built there.
pub(super) const BUILD_LOCK: &str = "build.lock";
/// What no build has used for so long is removed.
const STALE_AFTER: Duration = Duration::from_secs(30 * 24 * 3600);
/// The ends of the names of what builds keep.
const KEPT: [&str; 2] = [".erofs", ".tar"];

/// Notes that a build has used a file now. One that cannot be noted is only removed too early.
pub(super) fn note_use(path: &Path) {
    let now = Timespec { tv_sec: 0, tv_nsec: rustix::fs::UTIME_NOW };
    let times = Timestamps { last_access: now, last_modification: now };
    let _ = rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty());
}

/// Removes root disks and layers that no build has used for 30 days, or `all`. Nothing while something is being built.
///
/// # Errors
/// That of the first file that cannot be removed.
pub fn collect(paths: &Paths, all: bool) -> io::Result<RemovedFiles> {
    let cache = paths.cache.join(CACHE);
    let mut removed = RemovedFiles::default();
    let lock = match File::open(cache.join(BUILD_LOCK)) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(removed),
        opened => opened?,
    };
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => return Ok(removed),
        locked => locked?,
    }
    let now = SystemTime::now();
    for entry in fs::read_dir(&cache)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let name = entry.file_name();
        let kept = name.to_str().is_some_and(|name| KEPT.iter().any(|end| name.ends_with(end)));
        let old = now.duration_since(metadata.modified()?).is_ok_and(|age| age > STALE_AFTER);
        if kept && metadata.is_file() && (old || all) {
            fs::remove_file(entry.path())?;
            removed.files += 1;
            removed.bytes += metadata.len();
        }
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use tempfile::TempDir;

    fn cache(files: &[&str]) -> (TempDir, Paths, PathBuf) {
        let dir = TempDir::new().unwrap();
        let paths = Paths { data: dir.path().into(), cache: dir.path().into(), runtime: dir.path().into() };
        let cache = dir.path().join(CACHE);
        fs::create_dir_all(cache.join("build-1.tar")).unwrap();
        for name in files {
            fs::write(cache.join(name), "four").unwrap();
            let long_ago = SystemTime::now() - STALE_AFTER - Duration::from_secs(60);
            File::options().write(true).open(cache.join(name)).unwrap().set_modified(long_ago).unwrap();
        }
        (dir, paths, cache)
    }

    #[test]
    fn what_is_not_used_goes() {
        let (_dir, paths, cache) = cache(&["a.erofs", "b.layer.tar", "c.base.tar", "notes", BUILD_LOCK]);
        note_use(&cache.join("a.erofs"));
        assert_eq!(collect(&paths, false).unwrap(), RemovedFiles { files: 2, bytes: 8 });
        assert!(cache.join("a.erofs").exists() && cache.join("notes").exists());
        assert_eq!(collect(&paths, true).unwrap(), RemovedFiles { files: 1, bytes: 4 });
        assert!(cache.join("notes").exists() && cache.join("build-1.tar").is_dir());
    }

    #[test]
    fn nothing_goes_beside_a_build_or_without_one() {
        let (_dir, paths, cache) = cache(&["a.erofs", BUILD_LOCK]);
        let lock = File::open(cache.join(BUILD_LOCK)).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        assert_eq!(collect(&paths, true).unwrap(), RemovedFiles::default());
        drop(lock);
        assert_eq!(collect(&paths, true).unwrap().files, 1);
        fs::remove_dir_all(&cache).unwrap();
        assert_eq!(collect(&paths, true).unwrap(), RemovedFiles::default());
    }
}
