//! Where a copy goes and what it is called there: the rules of `docker cp`.
//!
//! | destination | a file | a directory | a directory named with `/.` |
//! |---|---|---|---|
//! | a directory | into it, by its own name | into it, by its own name | what is in it goes into it |
//! | a file | replaces it | refused | refused |
//! | nothing | becomes it; with a trailing `/` refused | becomes it | becomes it |

use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};

use std::os::unix::ffi::OsStrExt;
use thiserror::Error;

/// What is copied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The last part of its path.
    pub name: OsString,
    /// Whether it is a directory, where that is known beforehand.
    pub directory: Option<bool>,
    /// Whether its path asks for what is in it, and not for itself: it ends with `/.` or has no last part.
    pub contents: bool,
}

impl Source {
    /// What a path names.
    #[must_use]
    pub fn of(path: &Path, directory: Option<bool>) -> Source {
        let bytes = path.as_os_str().as_bytes();
        let dot = bytes == b"." || bytes.ends_with(b"/.");
        match path.file_name().filter(|_| !dot) {
            Some(name) => Source { name: name.to_owned(), directory, contents: false },
            None => Source { name: OsString::new(), directory, contents: true },
        }
    }
}

/// What is at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Destination {
    /// Nothing.
    Missing,
    /// Something that is no directory.
    File,
    /// A directory, or a link to one.
    Directory,
}

impl Destination {
    /// Looks.
    ///
    /// # Errors
    /// That of the operating system, if it does not say what is there.
    pub fn at(path: &Path) -> io::Result<Destination> {
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => Ok(Destination::Directory),
            Ok(_) => Ok(Destination::File),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                // A link that leads nowhere is replaced like a file.
                let link = path.symlink_metadata().is_ok_and(|metadata| metadata.is_symlink());
                Ok(if link { Destination::File } else { Destination::Missing })
            }
            Err(error) => Err(error),
        }
    }
}

/// Where a copy goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placement {
    /// The directory that it is made in.
    pub directory: PathBuf,
    /// What it is called there; `None` when what is in it goes there.
    pub name: Option<OsString>,
    /// It is refused unless it is a directory.
    pub only_directory: bool,
}

/// Why a copy cannot go where it was to.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum PlaceError {
    /// A directory cannot replace a file.
    #[error("{} is a file, and what is copied is a directory", path.display())]
    FileInTheWay {
        /// The destination.
        path: PathBuf,
    },
    /// A destination that must be a directory and is not there.
    #[error("there is no directory {}", path.display())]
    NoDirectory {
        /// The destination.
        path: PathBuf,
    },
}

/// Where a copy of `source` goes that is to go to `path`, and `there` is what is there.
///
/// # Errors
/// [`PlaceError`].
pub fn place(source: &Source, path: &Path, there: Destination) -> Result<Placement, PlaceError> {
    let slash = path.as_os_str().as_bytes().ends_with(b"/") || path.as_os_str().as_bytes().ends_with(b"/.");
    let into = |directory: &Path, name: Option<&OsStr>, only_directory| Placement {
        directory: directory.to_owned(),
        name: name.map(OsStr::to_owned),
        only_directory,
    };
    let only_directory = source.contents;
    match there {
        Destination::Directory if source.contents => Ok(into(path, None, only_directory)),
        Destination::Directory => Ok(into(path, Some(&source.name), only_directory)),
        Destination::File if source.directory == Some(true) || source.contents || slash => {
            Err(PlaceError::FileInTheWay { path: path.to_owned() })
        }
        Destination::Missing if slash && source.directory == Some(false) => {
            Err(PlaceError::NoDirectory { path: path.to_owned() })
        }
        Destination::File | Destination::Missing => {
            let name = path.file_name().ok_or_else(|| PlaceError::NoDirectory { path: path.to_owned() })?;
            let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
            Ok(into(parent.unwrap_or(Path::new(".")), Some(name), only_directory || slash))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn placed(
        source: &str,
        directory: bool,
        to: &str,
        there: Destination,
    ) -> Option<(String, Option<String>)> {
        let source = Source::of(Path::new(source), Some(directory));
        let placement = place(&source, Path::new(to), there).ok()?;
        let name = placement.name.map(|name| name.into_string().unwrap());
        Some((placement.directory.to_str().unwrap().to_owned(), name))
    }

    #[test]
    fn the_rules_are_those_of_docker_cp() {
        use Destination::{Directory, File, Missing};
        let into = |directory: &str, name: &str| Some((directory.to_owned(), Some(name.to_owned())));
        for (source, is_directory, to, there, expected) in [
            ("/a/f", false, "/d", Directory, into("/d", "f")),
            ("/a/f", false, "/d/g", Missing, into("/d", "g")),
            ("/a/f", false, "/d/g", File, into("/d", "g")),
            ("/a/f", false, "/d/g/", Missing, None),
            ("/a/f", false, "g", Missing, into(".", "g")),
            ("/a/s", true, "/d", Directory, into("/d", "s")),
            ("/a/s/", true, "/d", Directory, into("/d", "s")),
            ("/a/s", true, "/d/g", Missing, into("/d", "g")),
            ("/a/s", true, "/d/g/", Missing, into("/d", "g")),
            ("/a/s", true, "/d/g", File, None),
            ("/a/s/.", true, "/d", Directory, Some(("/d".to_owned(), None))),
            ("/a/s/.", true, "/d/g", Missing, into("/d", "g")),
            ("/a/s/.", true, "/d/g", File, None),
            ("/", true, "/d", Directory, Some(("/d".to_owned(), None))),
            (".", true, "/d", Directory, Some(("/d".to_owned(), None))),
            ("/a/..", true, "/d", Directory, Some(("/d".to_owned(), None))),
            ("/a/f", false, "/d/..", Missing, None),
        ] {
            assert_eq!(placed(source, is_directory, to, there), expected, "{source} to {to}, {there:?}");
        }
    }
}
