//! The registry last read from each hub on the web, kept so that packs which are complete in the cache mount and fork
//! while the hub is away. Read by `HubAddress::load`.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use forkd_fs::digest::Digest;
use rustix::fs::{FlockOperation, flock};

use super::address::HubAddress;
use super::catalogue::Catalogue;
use super::format::{Registry, read_capped};
use crate::local::paths::Paths;
use crate::local::work_dir;

/// How copies are named while they are written.
const UNFINISHED_PREFIX: &str = ".tmp-";

/// Copies of registries, by the digest of their URL.
#[derive(Debug, Clone)]
pub struct RegistryCopies {
    dir: PathBuf,
}

/// One of them.
#[derive(Debug)]
pub struct RegistryCopy {
    /// The registry.json.
    pub bytes: Vec<u8>,
    /// How long ago it was read from the hub.
    pub age: Duration,
}

impl RegistryCopies {
    /// Those of this user.
    pub fn new(paths: &Paths) -> RegistryCopies {
        RegistryCopies { dir: paths.cache.join("registries") }
    }

    fn path(&self, hub: &HubAddress) -> Option<PathBuf> {
        let HubAddress::Url(url) = hub else { return None };
        let name = Digest::of(url.as_str().as_bytes()).to_string();
        Some(self.dir.join(format!("{}.json", &name[..32])))
    }

    /// Keeps what was just read. A disk that refuses costs the copy, nothing else.
    pub(super) fn keep(&self, hub: &HubAddress, bytes: &[u8]) {
        let Some(path) = self.path(hub) else { return };
        if let Err(error) = self.write(&path, bytes) {
            tracing::debug!(%error, path = %path.display(), "no copy of the registry is kept");
        }
    }

    fn write(&self, path: &Path, bytes: &[u8]) -> io::Result<()> {
        if fs::read(path).is_ok_and(|kept| kept == bytes) {
            return fs::File::options().append(true).open(path)?.set_modified(SystemTime::now());
        }
        fs::create_dir_all(&self.dir)?;
        let mut file = tempfile::Builder::new().prefix(UNFINISHED_PREFIX).tempfile_in(&self.dir)?;
        flock(file.as_file(), FlockOperation::LockExclusive)?;
        file.write_all(bytes)?;
        file.persist(path).map_err(|failed| failed.error)?;
        Ok(())
    }

    /// Removes copies that processes were writing when they died; returns their paths.
    pub fn remove_dead(&self) -> io::Result<Vec<PathBuf>> {
        work_dir::remove_dead(&self.dir, UNFINISHED_PREFIX)
    }

    /// The copy of a hub's registry.
    pub fn find(&self, hub: &HubAddress) -> Option<RegistryCopy> {
        let path = self.path(hub)?;
        let bytes = read_capped(&path).ok()?;
        let read = fs::metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
        Some(RegistryCopy { bytes, age: read.elapsed().unwrap_or_default() })
    }

    /// Every copy that can be read. Which hubs they came from is not known any more: their packs' names, sizes and pins
    /// are good, their URLs are not.
    pub fn all(&self) -> Vec<Catalogue> {
        let files = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|entry| entry.path());
        files
            .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
            .filter_map(|path| {
                let registry = Registry::parse(&read_capped(&path).ok()?, "").ok()?;
                Some(Catalogue { registry, address: HubAddress::Path(path) })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_kept_replaced_and_found_by_its_hub_alone() {
        let dir = tempfile::tempdir().unwrap();
        let copies = RegistryCopies { dir: dir.path().join("registries") };
        let hub = |url| HubAddress::find(Some(url)).unwrap();
        assert!(copies.find(&hub("http://h/")).is_none() && copies.all().is_empty());
        for text in [r#"{"schema_version":1}"#, r#"{"schema_version":1,"packages":{}}"#] {
            copies.keep(&hub("http://h/"), text.as_bytes());
            copies.keep(&hub("http://h/"), text.as_bytes());
            assert_eq!(copies.find(&hub("http://h/registry.json")).unwrap().bytes, text.as_bytes());
        }
        assert!(copies.find(&hub("http://other/")).is_none());
        copies.keep(&hub("http://other/"), b"not a registry");
        assert_eq!(copies.all().len(), 1);
        copies.keep(&hub("/some/registry.json"), b"{}");
        assert_eq!(fs::read_dir(&copies.dir).unwrap().count(), 2, "what is local needs no copy");
    }

    #[test]
    fn a_disk_that_refuses_is_survived() {
        let dir = tempfile::tempdir().unwrap();
        let in_the_way = dir.path().join("file");
        fs::write(&in_the_way, b"").unwrap();
        let copies = RegistryCopies { dir: in_the_way };
        let hub = HubAddress::find(Some("http://h/")).unwrap();
        copies.keep(&hub, b"{}");
        assert!(copies.find(&hub).is_none());
    }
}
