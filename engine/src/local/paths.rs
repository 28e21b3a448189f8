//! Where forkd keeps things: data, cache and run state, by the XDG base directory rules.
//!
//! | what | directory |
//! |---|---|
//! | snapshots, kernels | `$XDG_DATA_HOME/forkd`, default `~/.local/share/forkd` |
//! | verified chunks; scratch disks while their machines live | `$XDG_CACHE_HOME/forkd`, default `~/.cache/forkd` |
//! | sockets, locks, logs, records of mounts and children | `$XDG_RUNTIME_DIR/forkd`; without it `/run/forkd` as root, else a private directory in the temporary directory |

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Why a directory of forkd's cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    /// Neither the XDG variable nor HOME says where to put files.
    #[error("neither {variable} nor HOME is set to an absolute path")]
    NoHome {
        /// The variable that would decide.
        variable: &'static str,
    },
    /// Creating or reading the directory failed.
    #[error("{}", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Somebody else owns the run directory in a shared temporary directory.
    #[error("{} belongs to user {owner}, not to us", path.display())]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// Its owner's user id.
        owner: u32,
    },
    /// A tag that cannot be a directory's name.
    #[error("`{tag}` is not a tag: use 1 to 100 of a-z A-Z 0-9 . _ -, starting with a letter or digit")]
    Tag {
        /// What was given.
        tag: String,
    },
}

/// forkd's three directories. Nothing is created until something is to be written there.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Snapshots and kernels.
    pub data: PathBuf,
    /// Verified chunks.
    pub cache: PathBuf,
    /// Sockets, locks, logs, records of what runs.
    pub runtime: PathBuf,
}

impl Paths {
    /// By the XDG base directory specification. `variable` looks variables of the environment up, `user` is the
    /// effective user id.
    pub fn resolve(variable: impl Fn(&str) -> Option<PathBuf>, user: u32) -> Result<Paths, PathsError> {
        // The specification: relative paths in these variables are to be ignored.
        let absolute = |name: &str| variable(name).filter(|path| path.is_absolute());
        let under_home = |name: &'static str, below: &str| {
            absolute(name)
                .or_else(|| absolute("HOME").map(|home| home.join(below)))
                .map(|base| base.join("forkd"))
                .ok_or(PathsError::NoHome { variable: name })
        };
        let runtime = match absolute("XDG_RUNTIME_DIR") {
            Some(base) => base.join("forkd"),
            None if user == 0 => PathBuf::from("/run/forkd"),
            None => absolute("TMPDIR").unwrap_or_else(|| PathBuf::from("/tmp")).join(format!("forkd-{user}")),
        };
        Ok(Paths {
            data: under_home("XDG_DATA_HOME", ".local/share")?,
            cache: under_home("XDG_CACHE_HOME", ".cache")?,
            runtime,
        })
    }

    /// Where local snapshots live, one directory a tag.
    pub fn snapshots(&self) -> PathBuf {
        self.data.join("snapshots")
    }

    /// The directory of the snapshot `tag`, which may not exist yet.
    pub fn snapshot(&self, tag: &str) -> Result<PathBuf, PathsError> {
        Ok(self.snapshots().join(checked_tag(tag)?))
    }

    /// Where built kernels live.
    pub fn kernels(&self) -> PathBuf {
        self.data.join("kernels")
    }

    /// Records of running mounts.
    pub fn mounts(&self) -> PathBuf {
        self.runtime.join("mounts")
    }

    /// Creates the run directory (mode 0700) and `below` in it. Refuses one that another user owns: in a shared
    /// temporary directory somebody could have made it first to read our sockets.
    pub fn create_runtime(&self, below: &Path) -> Result<PathBuf, PathsError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| PathsError::Directory { path, source }
        };
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.runtime)
            .map_err(failed(&self.runtime))?;
        let owner = std::fs::symlink_metadata(&self.runtime).map_err(failed(&self.runtime))?.uid();
        if owner != rustix::process::geteuid().as_raw() {
            return Err(PathsError::Foreign { path: self.runtime.clone(), owner });
        }
        let path = self.runtime.join(below);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path).map_err(failed(&path))?;
        Ok(path)
    }
}

/// `tag`, when it is a plain name that can be a directory and a URL segment.
pub fn checked_tag(tag: &str) -> Result<&str, PathsError> {
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let starts = tag.starts_with(|c: char| c.is_ascii_alphanumeric());
    if starts && tag.len() <= 100 && tag.chars().all(plain) {
        Ok(tag)
    } else {
        Err(PathsError::Tag { tag: tag.to_owned() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(variables: &[(&str, &str)], user: u32) -> Result<Paths, PathsError> {
        Paths::resolve(
            |name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| PathBuf::from(value)),
            user,
        )
    }

    #[test]
    fn xdg_wins_over_home_and_relative_values_are_ignored() {
        let paths =
            resolve(&[("HOME", "/h"), ("XDG_DATA_HOME", "/d"), ("XDG_CACHE_HOME", "rel")], 0).unwrap();
        assert_eq!(paths.data, Path::new("/d/forkd"));
        assert_eq!(paths.cache, Path::new("/h/.cache/forkd"));
        assert_eq!(paths.runtime, Path::new("/run/forkd"));
        assert_eq!(resolve(&[("HOME", "/h")], 7).unwrap().runtime, Path::new("/tmp/forkd-7"));
    }

    #[test]
    fn without_a_home_the_variable_is_named() {
        assert!(matches!(resolve(&[], 0), Err(PathsError::NoHome { variable: "XDG_DATA_HOME" })));
    }

    #[test]
    fn tags_cannot_leave_their_directory() {
        for bad in ["", ".", "..", "a/b", "../x", "-x", ".hidden", "a b", "a\0", &"x".repeat(101)] {
            assert!(checked_tag(bad).is_err(), "{bad:?} was taken");
        }
        assert_eq!(checked_tag("python-numpy_3.12").unwrap(), "python-numpy_3.12");
    }
}
