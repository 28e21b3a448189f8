//! A root tree under construction: puts files into it and takes files out of it without ever leaving it.
//!
//! Paths are resolved by the kernel with the tree as their root (`RESOLVE_IN_ROOT`): a link in the tree to `/etc` is
//! the tree's `/etc`, never ours.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, fchmod, mkdirat, openat, openat2, unlinkat};
use rustix::io::Errno;

/// A directory that will be a machine's root.
pub struct RootDiskTree {
    root: OwnedFd,
    path: PathBuf,
}

impl RootDiskTree {
    /// Opens an existing directory as a tree.
    pub fn open(path: &Path) -> io::Result<Self> {
        let root = openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { root, path: path.to_owned() })
    }

    /// Where it is on this machine.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes a file at an absolute path of the tree, in place of what is there, making its directories. It belongs to
    /// root.
    pub fn put(&self, to: &Path, contents: &mut dyn io::Read, executable: bool) -> io::Result<()> {
        let name = to.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = self.make_directory(to.parent().unwrap_or(Path::new("/")))?;
        match unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno.into()),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(&directory, name, flags, Mode::RUSR | Mode::WUSR)?);
        io::copy(contents, &mut file)?;
        file.flush()?;
        // Afterwards, so that the umask has no say.
        fchmod(&file, Mode::from_raw_mode(if executable { 0o755 } else { 0o644 }))?;
        Ok(())
    }

    /// Whether something is at an absolute path of the tree.
    pub fn has(&self, path: &Path) -> bool {
        self.open_inside(path, OFlags::empty()).is_ok()
    }

    /// Opens a directory of the tree, making it and those above it.
    pub fn make_directory(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut done = PathBuf::from("/");
        let mut directory = self.open_inside(&done, OFlags::DIRECTORY)?;
        for part in path.iter().skip(1) {
            done.push(part);
            directory = match self.open_inside(&done, OFlags::DIRECTORY) {
                Err(Errno::NOENT) => {
                    mkdirat(&directory, part, Mode::from_raw_mode(0o755))?;
                    let made = self.open_inside(&done, OFlags::DIRECTORY)?;
                    fs::set_permissions(by_fd(&made), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
                    made
                }
                result => result?,
            };
        }
        Ok(directory)
    }

    /// Removes a file of the tree; one that is not there is fine.
    pub fn remove(&self, path: &Path) -> io::Result<()> {
        let Some(name) = path.file_name() else { return Err(io::ErrorKind::InvalidInput.into()) };
        let removed = self
            .open_inside(path.parent().unwrap_or(Path::new("/")), OFlags::DIRECTORY)
            .and_then(|directory| unlinkat(directory, name, AtFlags::empty()));
        match removed {
            Ok(()) | Err(Errno::NOENT | Errno::NOTDIR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Empties a directory of the tree; one that is not there is fine.
    pub fn clear(&self, path: &Path) -> io::Result<()> {
        let directory = match self.open_inside(path, OFlags::DIRECTORY) {
            Err(Errno::NOENT | Errno::NOTDIR) => return Ok(()),
            result => result?,
        };
        for entry in fs::read_dir(by_fd(&directory))? {
            let entry = entry?;
            // Neither follows links.
            if entry.file_type()?.is_dir() {
                fs::remove_dir_all(entry.path())?;
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }

    /// The newest modification time, in seconds since 1970, of a regular file that is older than `before`.
    pub fn newest_file(&self, before: SystemTime) -> io::Result<u64> {
        let mut newest = 0;
        let mut pending = vec![self.path.clone()];
        while let Some(directory) = pending.pop() {
            for entry in fs::read_dir(directory)? {
                let entry = entry?;
                let metadata = entry.metadata()?;
                if metadata.is_dir() {
                    pending.push(entry.path());
                } else if metadata.is_file() {
                    let modified = metadata.modified()?;
                    if let Some(age) = modified.duration_since(UNIX_EPOCH).ok().filter(|_| modified < before)
                    {
                        newest = newest.max(age.as_secs());
                    }
                }
            }
        }
        Ok(newest)
    }

    fn open_inside(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::PATH | OFlags::CLOEXEC;
        openat2(&self.root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
    }
}

/// A path that leads to an open directory itself.
fn by_fd(fd: &OwnedFd) -> PathBuf {
    format!("/proc/self/fd/{}/.", fd.as_raw_fd()).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::time::Duration;
    use tempfile::TempDir;

    fn put(tree: &RootDiskTree, to: &str, text: &str) -> io::Result<()> {
        tree.put(Path::new(to), &mut text.as_bytes(), to.ends_with(".sh"))
    }

    #[test]
    fn files_get_directories_and_modes() {
        let dir = TempDir::new().unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        put(&tree, "/a/b/c.sh", "one").unwrap();
        put(&tree, "/a/b/c.sh", "two").unwrap();
        put(&tree, "/a/d", "").unwrap();
        let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().permissions().mode() & 0o7777;
        assert_eq!(fs::read_to_string(dir.path().join("a/b/c.sh")).unwrap(), "two");
        assert_eq!((mode("a"), mode("a/b/c.sh"), mode("a/d")), (0o755, 0o755, 0o644));
        assert!(tree.has(Path::new("/a/d")) && !tree.has(Path::new("/a/e")));
        assert!(put(&tree, "/a/b", "is a directory").is_err());
        assert!(put(&tree, "/a/d/e", "below a file").is_err());
    }

    #[test]
    fn links_do_not_lead_out() {
        let outside = TempDir::new().unwrap();
        fs::write(outside.path().join("kept"), "kept").unwrap();
        let dir = TempDir::new().unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        symlink(outside.path(), dir.path().join("absolute")).unwrap();
        symlink("../../../../../../..", dir.path().join("up")).unwrap();
        symlink(outside.path().join("kept"), dir.path().join("file")).unwrap();
        // Inside the tree these lead to places that do not exist, or to the tree's own root.
        assert!(put(&tree, "/absolute/new", "x").is_err());
        put(&tree, "/up/new", "x").unwrap();
        assert!(dir.path().join("new").is_file());
        put(&tree, "/file", "x").unwrap();
        tree.clear(Path::new("/absolute")).unwrap();
        tree.remove(Path::new("/absolute/kept")).unwrap();
        assert_eq!(fs::read_to_string(outside.path().join("kept")).unwrap(), "kept");
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn directories_are_emptied_and_stay() {
        let outside = TempDir::new().unwrap();
        fs::write(outside.path().join("kept"), "").unwrap();
        let dir = TempDir::new().unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        put(&tree, "/var/log/apt/history.log", "x").unwrap();
        symlink(outside.path(), dir.path().join("var/log/link")).unwrap();
        tree.clear(Path::new("/var/log")).unwrap();
        tree.clear(Path::new("/var/absent")).unwrap();
        tree.remove(Path::new("/var/absent/file")).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("var/log")).unwrap().count(), 0);
        assert!(outside.path().join("kept").exists());
    }

    #[test]
    fn the_newest_file_before_the_build_is_found() {
        let dir = TempDir::new().unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        for (name, second) in [("/old", 1000), ("/d/packaged", 5000), ("/d/made", 9000)] {
            put(&tree, name, "").unwrap();
            let file = File::options().write(true).open(dir.path().join(&name[1..])).unwrap();
            file.set_modified(UNIX_EPOCH + Duration::from_secs(second)).unwrap();
        }
        assert_eq!(tree.newest_file(UNIX_EPOCH + Duration::from_secs(8000)).unwrap(), 5000);
        assert_eq!(tree.newest_file(UNIX_EPOCH).unwrap(), 0);
    }
}
