//! Directories and files that a process works on and that end with it: each is locked (flock(2)) as long as its maker
//! lives, so that whoever comes next can tell what the dead have left, and remove it.

use crate::local::mounts;
use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::process::geteuid;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Attempts at removing a directory in which files still appear: what writes there is dying.
const REMOVALS: u32 = 200;
/// Time between them.
const REMOVAL_PAUSE: Duration = Duration::from_millis(5);

/// A locked directory; removed when dropped, without what is mounted in it.
#[derive(Debug)]
pub struct WorkDir {
    path: PathBuf,
    /// None once it is the caller's.
    lock: Option<File>,
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.lock.is_some()
            && let Err(error) = remove(&self.path)
        {
            let path = self.path.display();
            tracing::warn!(%path, %error, "a work directory is left for the next command");
        }
    }
}

impl WorkDir {
    /// A new, empty one in `parent`, whose name starts with `prefix`.
    pub fn create(parent: &Path, prefix: &str) -> io::Result<WorkDir> {
        loop {
            let dir = tempfile::Builder::new().prefix(prefix).tempdir_in(parent)?;
            let locked = File::open(dir.path()).and_then(|lock| {
                flock(&lock, FlockOperation::LockExclusive)?;
                Ok(lock)
            });
            match locked {
                Ok(lock) if dir.path().exists() => return Ok(WorkDir { path: dir.keep(), lock: Some(lock) }),
                // Somebody took it for a dead one's before it was locked.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Keeps it, for the caller to rename or remove. It is locked as long as the file is open.
    pub fn keep(mut self) -> (PathBuf, File) {
        let lock = self.lock.take().expect("only this takes it, with all of `self`");
        (mem::take(&mut self.path), lock)
    }
}

/// Removes what starts with `prefix` in `parent` and has been made by processes that are dead; returns its paths. An error
/// is that of the first that cannot be removed; the others are all the same.
pub fn remove_dead(parent: &Path, prefix: &str) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(parent) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let (mut removed, mut failed) = (Vec::new(), None);
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix)) {
        match remove_unless_held(&entry.path()) {
            Ok(true) => removed.push(entry.path()),
            Ok(false) => {}
            Err(error) => drop(failed.get_or_insert(error)),
        }
    }
    failed.map_or(Ok(removed), Err)
}

/// Removes a directory or file of this user that nobody has locked. Returns whether it did; a link is nobody's.
pub fn remove_unless_held(path: &Path) -> io::Result<bool> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let Ok(lock) = open(path, flags, Mode::empty()) else { return Ok(false) };
    let lock = File::from(lock);
    let metadata = lock.metadata()?;
    let known = (metadata.is_dir() || metadata.is_file()) && metadata.uid() == geteuid().as_raw();
    if !known || flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() || !is_at(&lock, path) {
        return Ok(false);
    }
    if metadata.is_dir() { remove(path) } else { fs::remove_file(path) }.map(|()| true)
}

/// Whether an open file is still the one of this name: before it was locked another may have taken its place.
pub fn is_at(file: &File, path: &Path) -> bool {
    let place = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let (Ok(file), Ok(path)) = (file.metadata(), path.symlink_metadata()) else { return false };
    place(file) == place(path)
}

/// Removes a directory in which others may still write, and nothing that is mounted in it.
pub fn remove(dir: &Path) -> io::Result<()> {
    let mut attempts = 0;
    loop {
        match mounts::detach_below(dir).and_then(|()| fs::remove_dir_all(dir)) {
            Ok(()) => return Ok(()),
            Err(_) if !dir.exists() => return Ok(()),
            Err(error) if attempts == REMOVALS => return Err(error),
            Err(_) => std::thread::sleep(REMOVAL_PAUSE),
        }
        attempts += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn only_what_the_dead_have_left_is_removed() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        let living = WorkDir::create(place.path(), "work-").unwrap();
        let (dead, lock) = WorkDir::create(place.path(), "work-").unwrap().keep();
        fs::create_dir_all(dead.join("below/it")).unwrap();
        fs::write(path("work-file"), "").unwrap();
        fs::create_dir(path("mine")).unwrap();
        symlink(path("mine"), path("work-link")).unwrap();
        let removed = remove_dead(place.path(), "work-").unwrap();
        assert_eq!(removed, [path("work-file")], "their makers live");
        drop(lock);
        assert_eq!(remove_dead(place.path(), "work-").unwrap(), [dead]);
        assert!(living.path().exists() && path("mine").exists() && path("work-link").is_symlink());
        let gone = living.path().to_owned();
        drop(living);
        assert!(!gone.exists());
        assert!(remove_dead(&path("nowhere"), "work-").unwrap().is_empty());
    }

    #[test]
    fn makers_and_those_who_clean_up_do_not_meet() {
        let place = tempfile::tempdir().unwrap();
        std::thread::scope(|scope| {
            let makers: Vec<_> = (0..2)
                .map(|_| {
                    scope.spawn(|| {
                        for _ in 0..500 {
                            let made = WorkDir::create(place.path(), "work-").unwrap();
                            fs::write(made.path().join("file"), "").unwrap();
                        }
                    })
                })
                .collect();
            while makers.iter().any(|maker| !maker.is_finished()) {
                // One that goes by itself at this moment cannot be removed, or is gone.
                let _ = remove_dead(place.path(), "work-");
            }
        });
        assert_eq!(fs::read_dir(place.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_is_mounted_in_a_directory_is_not_removed_with_it() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: this takes root");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let (precious, dir) = (place.path().join("precious"), place.path().join("work"));
        let point = dir.join("below");
        fs::create_dir(&precious).unwrap();
        fs::create_dir_all(&point).unwrap();
        fs::write(precious.join("file"), "kept").unwrap();
        rustix::mount::mount_bind(&precious, &point).unwrap();
        assert!(point.join("file").exists());
        remove(&dir).unwrap();
        assert!(!dir.exists());
        assert_eq!(fs::read_to_string(precious.join("file")).unwrap(), "kept");
    }

    #[test]
    fn what_took_the_place_of_a_locked_directory_is_not_removed() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        fs::create_dir(path("work-old")).unwrap();
        let lock = File::open(path("work-old")).unwrap();
        fs::rename(path("work-old"), path("published")).unwrap();
        fs::create_dir(path("work-old")).unwrap();
        assert!(!is_at(&lock, &path("work-old")) && is_at(&lock, &path("published")));
    }

    #[test]
    fn a_link_in_the_place_of_a_directory_leads_to_nobody_s_mounts() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: this takes root");
            return;
        }
        let place = tempfile::tempdir().unwrap();
        let (source, theirs, link) =
            (place.path().join("source"), place.path().join("theirs"), place.path().join("work"));
        fs::create_dir(&source).unwrap();
        fs::create_dir_all(theirs.join("point")).unwrap();
        fs::write(source.join("file"), "").unwrap();
        rustix::mount::mount_bind(&source, theirs.join("point")).unwrap();
        symlink(&theirs, &link).unwrap();
        let detached = mounts::detach_below(&link);
        let mounted = theirs.join("point/file").exists();
        rustix::mount::unmount(theirs.join("point"), rustix::mount::UnmountFlags::DETACH).unwrap();
        assert!(detached.is_err() && mounted, "{detached:?}");
    }

    #[test]
    fn a_directory_in_which_files_appear_goes_when_their_writer_does() {
        let place = tempfile::tempdir().unwrap();
        let dir = place.path().join("busy");
        fs::create_dir(&dir).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for number in 0..2000 {
                    let _ = fs::write(dir.join(number.to_string()), "");
                }
            });
            remove(&dir).unwrap();
        });
        assert!(!dir.exists());
    }
}
