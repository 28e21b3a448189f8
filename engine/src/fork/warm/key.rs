//! From what a command names to the socket of the daemon that holds it.

use super::{Address, directory};
use crate::fork::source::{SourceError, Wanted, as_path};
use crate::hub::registry::{HubAddress, Reference};
use crate::local::paths::Paths;
use crate::local::snapshots::{SnapshotError, file_error};
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
pub enum AddressError {
    /// There is nothing of the name.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// A path that may be another image the next time.
    #[error("{} cannot be kept in memory: name a pack's file, a package of the hub or, with --tag, a snapshot", path.display())]
    NotFixed {
        /// What was named.
        path: PathBuf,
    },
}

/// What a command names, before it is known whether it is there.
enum Named {
    Tag { tag: String, path: PathBuf },
    File(PathBuf),
    Package { hub: String, reference: Reference },
}

impl Named {
    fn by(paths: &Paths, wanted: &Wanted<'_>) -> Result<Named, SourceError> {
        if let Some(tag) = wanted.tag {
            let path = paths.snapshot(tag).map_err(SnapshotError::from)?;
            return Ok(Named::Tag { tag: tag.to_owned(), path });
        }
        let target = wanted.target.unwrap_or_default();
        match as_path(target) {
            Ok(Some(path)) | Err(SourceError::NoSuchPath { path }) => Ok(Named::File(path)),
            Ok(None) => Ok(Named::Package {
                reference: target.parse()?,
                // A relative path is another hub in another directory.
                hub: HubAddress::find(wanted.hub)?.spelled_out(),
            }),
            Err(error) => Err(error),
        }
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
            Named::Package { hub, reference } => {
                key.add(b"hub").add(hub.as_bytes()).add(reference.to_string().as_bytes())
            }
        };
    }

    /// A file or a snapshot that is replaced is another image.
    fn add_state_to(&self, key: &mut Key) -> Result<(), AddressError> {
        let (path, missing) = match self {
            Named::Package { .. } => return Ok(()),
            Named::Tag { tag, path } => (path, SnapshotError::Unknown { tag: tag.clone() }.into()),
            Named::File(path) => (path, SourceError::NoSuchPath { path: path.clone() }),
        };
        let found = fs::metadata(path).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => missing,
            _ => file_error("reading", path)(error).into(),
        })?;
        if matches!(self, Named::File(_)) && !found.is_file() {
            return Err(AddressError::NotFixed { path: path.clone() });
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

impl Address {
    /// Of what a command names, as it is now.
    pub fn of(paths: &Paths, wanted: &Wanted<'_>) -> Result<Address, AddressError> {
        let named = Named::by(paths, wanted)?;
        let mut key = Key::default();
        named.add_to(&mut key);
        named.add_state_to(&mut key)?;
        let (family, key) = (named.family(), key.hex(KEY_DIGITS));
        Ok(Address(directory(paths).join(format!("{family}{key}{SUFFIX}"))))
    }

    /// Of all that hold what a command names as it is now or as it was: it may have been replaced or be gone.
    pub fn family_of(paths: &Paths, wanted: &Wanted<'_>) -> Result<Vec<Address>, SourceError> {
        let family = Named::by(paths, wanted)?.family();
        Ok(Address::all(paths).into_iter().filter(|address| address.is_of(&family)).collect())
    }

    /// All that hold what this one holds, as it is now or as it was.
    pub(super) fn family(&self, paths: &Paths) -> Vec<Address> {
        let name = self.0.file_name().and_then(OsStr::to_str).unwrap_or_default();
        let family = &name[..name.find('-').map_or(name.len(), |dash| dash + 1)];
        Address::all(paths).into_iter().filter(|address| address.is_of(family)).collect()
    }

    fn is_of(&self, family: &str) -> bool {
        // One that is being made has no suffix yet.
        let name = self.0.file_name().and_then(OsStr::to_str);
        name.is_some_and(|name| name.starts_with(family) && name.ends_with(SUFFIX))
    }
}
