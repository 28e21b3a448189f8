//! From what a command names to the socket of the daemon that holds it.

use super::{WarmSocket, directory};
use crate::hub::registry::HubAddress;
use crate::local::paths::Paths;
use crate::local::snapshots::{SnapshotError, file_error};
use crate::target::{Target, TargetError};
use forkd_fs::digest::Hasher;
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

const SUFFIX: &str = ".sock";
/// A socket's path has a hundred bytes or so.
const FAMILY_DIGITS: usize = 10;
const KEY_DIGITS: usize = 22;

/// What is named cannot be kept in memory.
#[derive(Debug, thiserror::Error)]
pub enum WarmKeyError {
    /// There is nothing of the name.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// A path that may be another image the next time.
    #[error("{} cannot be kept in memory: name a pack's file, a package of the hub or, with --tag, a snapshot", path.display())]
    NotFixed {
        /// What was named.
        path: PathBuf,
    },
}

/// What makes a target's key, before it is known whether it is there.
enum Named {
    Tag { tag: String, path: PathBuf },
    File(PathBuf),
    Url(String),
    Package { hub: String, reference: String },
}

impl Named {
    fn by(paths: &Paths, target: &Target) -> Result<Named, TargetError> {
        Ok(match target {
            Target::Tag(tag) => {
                Named::Tag { tag: tag.clone(), path: paths.snapshot(tag).map_err(SnapshotError::from)? }
            }
            Target::File { path, .. } => {
                target.check_name()?;
                Named::File(path.clone())
            }
            // Another image may be mounted there the next time.
            Target::MountFolder { path, .. } => Named::File(path.clone()),
            Target::Url { url, .. } => Named::Url(url.clone()),
            // A relative path is another hub in another directory.
            Target::Package { hub, reference } => Named::Package {
                reference: reference.to_string(),
                hub: HubAddress::find(hub.as_deref())?.spelled_out(),
            },
        })
    }

    /// How the names of all sockets begin that had this name when they were made.
    fn family(&self) -> String {
        let mut key = Key::default();
        self.add_to(&mut key);
        key.hex(FAMILY_DIGITS) + "-"
    }

    fn add_to(&self, key: &mut Key) {
        match self {
            Named::Tag { path, .. } => key.add(b"tag").add(path.as_os_str().as_encoded_bytes()),
            Named::File(path) => {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                key.add(b"file").add(path.as_os_str().as_encoded_bytes())
            }
            Named::Url(url) => key.add(b"url").add(url.as_bytes()),
            Named::Package { hub, reference } => {
                key.add(b"hub").add(hub.as_bytes()).add(reference.as_bytes())
            }
        };
    }

    /// A file or a snapshot that is replaced is another image.
    fn add_state_to(&self, key: &mut Key) -> Result<(), WarmKeyError> {
        let (path, missing) = match self {
            Named::Url(_) | Named::Package { .. } => return Ok(()),
            Named::Tag { tag, path } => (path, SnapshotError::Unknown { tag: tag.clone() }.into()),
            Named::File(path) => (path, TargetError::NoSuchPath { path: path.clone() }),
        };
        let found = fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => missing,
            _ => file_error("reading", path)(error).into(),
        })?;
        if matches!(self, Named::File(_)) && !found.is_file() {
            return Err(WarmKeyError::NotFixed { path: path.clone() });
        }
        for number in
            [found.dev(), found.ino(), found.size(), found.mtime() as u64, found.mtime_nsec() as u64]
        {
            key.add(&number.to_le_bytes());
        }
        Ok(())
    }
}

/// A hash over parts that cannot run into each other.
#[derive(Default)]
struct Key(Hasher);

impl Key {
    fn add(&mut self, part: &[u8]) -> &mut Key {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    fn hex(self, digits: usize) -> String {
        let mut text = self.0.finish().to_string();
        text.truncate(digits);
        text
    }
}

impl WarmSocket {
    /// Of what a command names, as it is now.
    pub fn of(paths: &Paths, target: &Target) -> Result<WarmSocket, WarmKeyError> {
        let named = Named::by(paths, target)?;
        let mut key = Key::default();
        named.add_to(&mut key);
        named.add_state_to(&mut key)?;
        let (family, key) = (named.family(), key.hex(KEY_DIGITS));
        Ok(WarmSocket(directory(paths).join(format!("{family}{key}{SUFFIX}"))))
    }

    /// Of all that hold what a command names as it is now or as it was: it may have been replaced or be gone.
    pub fn family_of(paths: &Paths, target: &Target) -> Result<Vec<WarmSocket>, TargetError> {
        let family = Named::by(paths, target)?.family();
        Ok(WarmSocket::all(paths).into_iter().filter(|address| address.is_of(&family)).collect())
    }

    /// All that hold what this one holds, as it is now or as it was.
    pub(super) fn family(&self, paths: &Paths) -> Vec<WarmSocket> {
        let name = self.0.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let family = &name[..name.find('-').map_or(name.len(), |dash| dash + 1)];
        WarmSocket::all(paths).into_iter().filter(|address| address.is_of(family)).collect()
    }

    fn is_of(&self, family: &str) -> bool {
        // One that is being made has no suffix yet.
        let name = self.0.file_name().and_then(OsStr::to_str);
        name.is_some_and(|name| name.starts_with(family) && name.ends_with(SUFFIX))
    }
}
