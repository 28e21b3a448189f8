//! What a recipe's folder holds: single files and trees, their order and their digests.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::build::tools::{sha256_file, sha256_parts};

/// Most entries of one tree.
const ENTRIES_MAX: usize = 200_000;

/// Something in a tree.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// Where, seen from the tree's top.
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

/// What it is. Links are not followed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File { executable: bool },
    Link { to: PathBuf },
}

/// All that is below a directory, a directory before what is in it, sorted by name.
pub(super) fn walk(top: &Path) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    walk_into(top, Path::new(""), &mut entries)?;
    Ok(entries)
}

fn walk_into(top: &Path, below: &Path, entries: &mut Vec<Entry>) -> io::Result<()> {
    let mut names =
        fs::read_dir(top.join(below))?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    names.sort();
    for name in names {
        let path = below.join(name);
        let from = top.join(&path);
        let metadata = fs::symlink_metadata(&from)?;
        let kind = if metadata.is_dir() {
            Kind::Directory
        } else if metadata.is_file() {
            Kind::File { executable: is_executable(&metadata) }
        } else if metadata.is_symlink() {
            Kind::Link { to: fs::read_link(&from)? }
        } else {
            let why = format!("{} is neither a file, a directory nor a link", from.display());
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        };
        if entries.len() == ENTRIES_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("more than {ENTRIES_MAX} files"),
            ));
        }
        let directory = kind == Kind::Directory;
        entries.push(Entry { path: path.clone(), kind });
        if directory {
            walk_into(top, &path, entries)?;
        }
    }
    Ok(())
}

/// Whether its owner may execute it.
pub(super) fn is_executable(metadata: &fs::Metadata) -> bool {
    metadata.permissions().mode() & 0o100 != 0
}

/// The digest of a file, or of a tree with names, kinds and contents; not of times and places.
pub(super) fn digest(from: &Path) -> io::Result<String> {
    if !fs::metadata(from)?.is_dir() {
        return sha256_file(from);
    }
    let mut parts: Vec<Vec<u8>> = Vec::new();
    for entry in walk(from)? {
        parts.push(entry.path.as_os_str().as_bytes().to_vec());
        parts.push(match &entry.kind {
            Kind::Directory => b"directory".to_vec(),
            Kind::Link { to } => [b"link ", to.as_os_str().as_bytes()].concat(),
            Kind::File { executable } => {
                format!("file {executable} {}", sha256_file(&from.join(&entry.path))?).into_bytes()
            }
        });
    }
    Ok(sha256_parts(parts.iter().map(Vec::as_slice)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use tempfile::TempDir;

    #[test]
    fn a_tree_s_digest_is_of_names_kinds_and_contents() {
        let make = |text: &str, name: &str, link: &str| {
            let dir = TempDir::new().unwrap();
            fs::create_dir_all(dir.path().join("a/b")).unwrap();
            fs::write(dir.path().join("a/b").join(name), text).unwrap();
            symlink(link, dir.path().join("link")).unwrap();
            dir
        };
        let first = make("one", "file", "a");
        assert_eq!(digest(first.path()).unwrap(), digest(make("one", "file", "a").path()).unwrap());
        for other in [make("two", "file", "a"), make("one", "name", "a"), make("one", "file", "b")] {
            assert_ne!(digest(first.path()).unwrap(), digest(other.path()).unwrap());
        }
        let file = first.path().join("a/b/file");
        let before = digest(first.path()).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
        assert_ne!(digest(first.path()).unwrap(), before);
        assert_eq!(digest(&file).unwrap(), sha256_file(&file).unwrap());
        let paths: Vec<_> = walk(first.path()).unwrap().into_iter().map(|entry| entry.path).collect();
        assert_eq!(paths, ["a", "a/b", "a/b/file", "link"].map(PathBuf::from));
    }

    #[test]
    fn what_is_no_file_is_refused() {
        let dir = TempDir::new().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
        assert!(walk(dir.path()).unwrap_err().to_string().contains("socket"));
    }
}
