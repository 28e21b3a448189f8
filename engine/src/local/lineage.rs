//! Where a snapshot of a child comes from, and what it is stored as a difference from.
//!
//! Such a snapshot has beside the files of any other (`snapshots.rs`):
//!
//! | file | what |
//! |---|---|
//! | `.lineage.json` | [`Lineage`] |
//! | `.delta` | the memory that differs from the base's (`forkd_vmm::memory::Delta`), sparse; there is no `memory.bin` |
//! | `.base/memory.bin` | the base's memory, when the base is a local snapshot: the same file (a hard link) |
//!
//! `rootfs.erofs` is a hard link, too; a snapshot whose base is a pack has neither, and opens the pack by its index's
//! digest. So whatever becomes of a base's tag, its files are there as long as a snapshot needs them; a base pack that
//! was replaced is refused, and one that is gone is named.

use crate::local::snapshots::{MEMORY, SnapshotError, file_error, read_at_most};
use forkd_fs::digest::Digest;
use forkd_fs::source::redact_url;
use forkd_fs::store::{IndexPin, PackLocation, PackSource};
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

/// The file with the lineage.
pub const LINEAGE: &str = ".lineage.json";
/// What differs of the memory.
pub const DELTA: &str = ".delta";
/// The directory with the base's memory.
pub const BASE: &str = ".base";
/// Version of [`Lineage`].
const FORMAT: u32 = 1;
/// Longest lineage, bytes.
const LINEAGE_MAX: u64 = 64 << 10;

/// `.lineage.json`: where a snapshot of a child comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lineage {
    /// Version of this file's layout.
    format: u32,
    /// The child that it was taken of.
    pub child: String,
    /// What that child was forked from: a tag, owner/name@version, a path or a URL. It may itself be a snapshot with a
    /// base: then [`Lineage::base`] is that base, because deltas are flattened.
    pub forked_from: String,
    /// What it is stored as a difference from; `None`: all of its memory is in `memory.bin`.
    pub base: Option<Base>,
}

/// What a snapshot is stored as a difference from: always a whole snapshot or pack, never another difference.
///
/// Which moment of a machine that is, is told by [`Base::vmstate_sha256`]: a saved state has all registers and clocks, so
/// no two moments share one, and it stays the same in all forms (snapshot, pack, packs of it with another trace). A pack's
/// manifest lists it as the digest of its member `vmstate`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    /// What it was called: a tag, owner/name@version, a path or a URL. Another may have that name by now.
    pub name: String,
    /// Digest of its `vmstate`.
    pub vmstate_sha256: Digest,
    /// The pack, whose index's digest pins every byte; `None`: a local snapshot, whose files are linked.
    pub pack: Option<BasePack>,
}

/// A pack that is a base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BasePack {
    /// Its URL, or its absolute path. A URL may hold a password: show [`BasePack::shown`].
    location: String,
    /// Its size, bytes.
    pub size: u64,
    /// Where its index begins, bytes.
    pub index_offset: u64,
    /// The index's length, bytes.
    pub index_length: u64,
    /// The index's digest.
    pub index_sha256: Digest,
}

impl BasePack {
    /// An opened pack of `size` bytes.
    pub fn new(source: &PackSource, size: u64, index: IndexPin) -> io::Result<BasePack> {
        let location = match source {
            PackSource::Url(url) => url.clone(),
            PackSource::Path(path) => {
                let text = std::path::absolute(path)?.into_os_string().into_string();
                text.map_err(|_| io::Error::from(io::ErrorKind::InvalidFilename))?
            }
        };
        let IndexPin { offset, length, sha256 } = index;
        Ok(BasePack { location, size, index_offset: offset, index_length: length, index_sha256: sha256 })
    }

    /// Where it is, and what it must be.
    pub fn location(&self) -> PackLocation {
        let is_url = self.location.starts_with("http://") || self.location.starts_with("https://");
        let source = match is_url {
            true => PackSource::Url(self.location.clone()),
            false => PackSource::Path(PathBuf::from(&self.location)),
        };
        let index =
            IndexPin { offset: self.index_offset, length: self.index_length, sha256: self.index_sha256 };
        PackLocation { source, size: Some(self.size), index: Some(index) }
    }

    /// Its place, for people.
    pub fn shown(&self) -> String {
        if self.location.contains("://") { redact_url(&self.location) } else { self.location.clone() }
    }
}

/// A base, as `forkd snapshots --json` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct BaseDescription {
    /// What it was called.
    pub name: String,
    /// Digest of its `vmstate`.
    pub vmstate_sha256: Digest,
    /// Digest of its index, when it is a pack.
    pub index_sha256: Option<Digest>,
    /// Where it was, when it is a pack.
    pub location: Option<String>,
}

impl From<&Base> for BaseDescription {
    fn from(Base { name, vmstate_sha256, pack }: &Base) -> BaseDescription {
        BaseDescription {
            name: name.clone(),
            vmstate_sha256: *vmstate_sha256,
            index_sha256: pack.as_ref().map(|pack| pack.index_sha256),
            location: pack.as_ref().map(BasePack::shown),
        }
    }
}

impl Lineage {
    /// Of a snapshot of `child`, which was forked from `forked_from`.
    pub fn new(child: &str, forked_from: &str, base: Option<Base>) -> Lineage {
        let (child, forked_from) = (child.to_owned(), forked_from.to_owned());
        Lineage { format: FORMAT, child, forked_from, base }
    }

    /// Of the snapshot in `dir`; `None` for one that was built or unpacked.
    pub fn read(dir: &Path) -> Result<Option<Lineage>, SnapshotError> {
        #[derive(Deserialize)]
        struct Probe {
            format: u32,
        }
        let path = dir.join(LINEAGE);
        let bytes = match read_at_most(&path, LINEAGE_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(file_error("reading", &path)(error)),
        };
        let malformed = |source| SnapshotError::Lineage { path: path.clone(), source };
        let Probe { format } = serde_json::from_slice(&bytes).map_err(malformed)?;
        if format != FORMAT {
            return Err(SnapshotError::LineageFormat { path: path.clone(), found: format });
        }
        Ok(Some(serde_json::from_slice(&bytes).map_err(malformed)?))
    }

    /// Writes it into `dir`, for nobody else to read: a base's URL may hold a password.
    pub fn write(&self, dir: &Path) -> Result<(), SnapshotError> {
        let path = dir.join(LINEAGE);
        let malformed = |source| SnapshotError::Lineage { path: path.clone(), source };
        let text = serde_json::to_vec_pretty(self).map_err(malformed)?;
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        file.and_then(|mut file: File| file.write_all(&text)).map_err(file_error("writing", &path))
    }
}

/// The directory with a snapshot's memory image: its base's memory, where `dir` is stored as a difference from it.
pub fn image_dir(dir: &Path) -> PathBuf {
    let base = dir.join(BASE);
    if base.join(MEMORY).exists() { base } else { dir.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pack(source: &PackSource) -> BasePack {
        let index = IndexPin { offset: 100, length: 20, sha256: Digest::of(b"index") };
        BasePack::new(source, 1000, index).unwrap()
    }

    #[test]
    fn a_lineage_is_read_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Lineage::read(dir.path()).unwrap(), None);
        let url = PackSource::Url("https://u:secret@h/p.tar.zst".to_owned());
        let base =
            Base { name: "o/n@v1".to_owned(), vmstate_sha256: Digest::of(b"state"), pack: Some(pack(&url)) };
        let lineage = Lineage::new("a1b2c3-1", "t", Some(base));
        lineage.write(dir.path()).unwrap();
        assert_eq!(Lineage::read(dir.path()).unwrap().as_ref(), Some(&lineage));
        let found = lineage.base.unwrap().pack.unwrap();
        assert_eq!(found.location().source, url);
        assert_eq!(found.location().index.unwrap().sha256, Digest::of(b"index"));
        assert!(!found.shown().contains("secret"), "{}", found.shown());
    }

    #[test]
    fn what_is_no_lineage_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let read = |text: &str| {
            std::fs::write(dir.path().join(LINEAGE), text).unwrap();
            Lineage::read(dir.path())
        };
        assert!(matches!(read("{"), Err(SnapshotError::Lineage { .. })));
        assert!(matches!(read(r#"{"format":2}"#), Err(SnapshotError::LineageFormat { found: 2, .. })));
        assert!(matches!(read(r#"{"format":1}"#), Err(SnapshotError::Lineage { .. })));
    }

    #[test]
    fn the_path_of_a_pack_does_not_depend_on_where_one_stands() {
        let found = pack(&PackSource::Path("p.tar.zst".into())).location();
        assert_eq!(found.source, PackSource::Path(std::env::current_dir().unwrap().join("p.tar.zst")));
    }
}
