//! A root tree under construction: puts files into it and takes files out of it without ever leaving it.
//!
//! Paths are resolved by the kernel with the tree as their root (`RESOLVE_IN_ROOT`): a link in the tree to `/etc` is
//! the tree's `/etc`, never ours.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{
    AtFlags, CWD, Gid, Mode, OFlags, ResolveFlags, Uid, chownat, fchmod, fchown, mkdirat, openat, openat2,
    readlinkat, symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::source::{self, Entry, Kind};

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
    pub fn put(&self, to: &Path, contents: &mut dyn io::Read, mode: u32) -> io::Result<()> {
        self.put_for(to, contents, mode, None)
    }

    /// [`RootDiskTree::put`] for another owner than root.
    pub fn put_for(
        &self,
        to: &Path,
        contents: &mut dyn io::Read,
        mode: u32,
        owner: Option<(u32, u32)>,
    ) -> io::Result<()> {
        let (directory, name) = self.make_room(to)?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let mut file = File::from(openat(&directory, name, flags, Mode::RUSR | Mode::WUSR)?);
        io::copy(contents, &mut file)?;
        file.flush()?;
        if let Some((uid, gid)) = owner {
            fchown(&file, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
        }
        // Afterwards, so that neither the umask has a say nor a change of owner.
        fchmod(&file, Mode::from_raw_mode(mode))?;
        Ok(())
    }

    /// Makes a link at an absolute path of the tree, in place of a file that is there.
    pub fn link(&self, at: &Path, to: &Path) -> io::Result<()> {
        let (directory, name) = self.make_room(at)?;
        Ok(symlinkat(to, &directory, name)?)
    }

    /// Copies what is below a directory of this machine to an absolute path of the tree, for `owner`. Links stay links.
    pub fn put_tree(&self, from: &Path, to: &Path, owner: (u32, u32)) -> io::Result<()> {
        self.make_directory(to)?;
        self.set_owner(to, owner)?;
        for Entry { path, kind } in source::walk(from)? {
            let at = to.join(&path);
            match kind {
                Kind::Directory => drop(self.make_directory(&at)?),
                Kind::Link { to } => self.link(&at, &to)?,
                Kind::File { executable } => {
                    let mode = if executable { 0o755 } else { 0o644 };
                    self.put_for(&at, &mut File::open(from.join(&path))?, mode, Some(owner))?;
                    continue;
                }
            }
            self.set_owner(&at, owner)?;
        }
        Ok(())
    }

    /// Gives something to a user and a group; a link itself, not what it leads to. Permissions stay.
    pub fn set_owner(&self, path: &Path, (uid, gid): (u32, u32)) -> io::Result<()> {
        let (directory, name) = self.open_parent(path)?;
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        Ok(chownat(&directory, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// Opens a file of the tree for reading.
    pub fn read(&self, path: &Path) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        Ok(openat2(&self.root, path, flags, Mode::empty(), resolve)?.into())
    }

    /// Where a link of the tree leads.
    pub fn read_link(&self, path: &Path) -> io::Result<PathBuf> {
        let (directory, name) = self.open_parent(path)?;
        let target = readlinkat(&directory, name, Vec::new())?;
        Ok(PathBuf::from(OsStr::from_bytes(target.as_bytes())))
    }

    /// The directory that something goes to, made, and its name there, free.
    fn make_room<'a>(&self, at: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        let name = at.file_name().ok_or(io::ErrorKind::InvalidInput)?;
        let directory = self.make_directory(at.parent().unwrap_or(Path::new("/")))?;
        match unlinkat(&directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok((directory, name)),
            Err(errno) => Err(errno.into()),
        }
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
        let removed = self.open_parent(path);
        match removed.and_then(|(directory, name)| unlinkat(directory, name, AtFlags::empty())) {
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

    /// The directory that something of the tree is in, and its name there.
    fn open_parent<'a>(&self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr), Errno> {
        let name = path.file_name().ok_or(Errno::INVAL)?;
        Ok((self.open_inside(path.parent().unwrap_or(Path::new("/")), OFlags::DIRECTORY)?, name))
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
        tree.put(Path::new(to), &mut text.as_bytes(), if to.ends_with(".sh") { 0o755 } else { 0o600 })
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
        assert_eq!((mode("a"), mode("a/b/c.sh"), mode("a/d")), (0o755, 0o755, 0o600));
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
    fn trees_keep_links_and_the_right_to_execute() {
        let source = TempDir::new().unwrap();
        fs::create_dir_all(source.path().join("bin/empty")).unwrap();
        fs::write(source.path().join("bin/run"), "#!").unwrap();
        fs::set_permissions(source.path().join("bin/run"), fs::Permissions::from_mode(0o700)).unwrap();
        symlink("bin/run", source.path().join("link")).unwrap();
        symlink("/etc/passwd", source.path().join("away")).unwrap();
        let dir = TempDir::new().unwrap();
        let tree = RootDiskTree::open(dir.path()).unwrap();
        let ours = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        for _ in 0..2 {
            tree.put_tree(source.path(), Path::new("/opt/it"), ours).unwrap();
        }
        let at = |path: &str| dir.path().join("opt/it").join(path);
        assert_eq!(fs::metadata(at("bin/run")).unwrap().permissions().mode() & 0o7777, 0o755);
        assert!(at("bin/empty").is_dir());
        assert_eq!(tree.read_link(Path::new("/opt/it/link")).unwrap(), Path::new("bin/run"));
        assert_eq!(fs::read_link(at("away")).unwrap(), Path::new("/etc/passwd"));
        // Inside the tree it leads nowhere.
        assert!(
            tree.read(Path::new("/opt/it/away")).is_err() && tree.read(Path::new("/opt/it/link")).is_ok()
        );
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
