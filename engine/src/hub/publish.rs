//! Adding a pack to a hub's folder: the file first, then registry.json, both by rename, under the folder's lock.
//!
//! A published version is never rewritten: its file and its entry stay as they are; only `latest` moves. A crash
//! leaves at most a file no entry names, which the next publication of that name replaces.
//!
//! For a release of GitHub the pack stays where it is: the entry names the address it will have once the release has been
//! made, by the command that [`Release`] has.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use forkd_fs::digest::{Digest, Hasher};
use forkd_fs::format::TRACE;
use forkd_fs::index::BasePack;
use forkd_fs::manifest::Manifest;
use forkd_fs::prefetch;
use forkd_fs::store::{IndexPin, OpenError, PackLocation, PackSource, ReadError, Store, StoreOptions};
use forkd_fs::trace::{MAX_TRACE_LEN, Trace};
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::hub::registry::{self, PackageVersion, Registry, RegistryError, SCHEMA_VERSION};
use crate::hub::release::{Release, ReleaseError, Repository};
use crate::reference::{LATEST, PackageName};

/// The file whose lock orders publications into one folder.
const LOCK: &str = ".registry.lock";

/// What to publish.
#[derive(Debug)]
pub struct PublishRequest<'a> {
    /// The pack.
    pub pack: &'a Path,
    /// The hub's folder.
    pub hub: &'a Path,
    /// The package.
    pub package: PackageName,
    /// The version; `None` for the next `vN`.
    pub version: Option<String>,
    /// The recipe that produced it.
    pub recipe_path: Option<String>,
    /// The repository of GitHub whose release will hold the pack, which is then not copied into the folder.
    pub github: Option<Repository>,
}

/// What is inside the pack, as far as a registry tells.
#[derive(Debug, Clone)]
pub enum PackContents {
    /// A v3 pack, read lazily.
    Indexed {
        /// Its index.
        pin: IndexPin,
        /// Its manifest.
        manifest: Box<Manifest>,
        /// How many bytes at its start a copy needs before its first instruction, where it has a trace.
        head_size: Option<u64>,
        /// The packs without which a delta is not whole, its base first.
        bases: Vec<BasePack>,
    },
    /// A pack of the predecessor.
    Legacy {
        /// `forkd_pack_version`.
        version: u32,
    },
}

impl PackContents {
    /// Of the pack at `path`. Opening it checks the index; a broken pack is not published.
    pub async fn read(path: &Path) -> Result<PackContents, PublishError> {
        let location = PackLocation { source: PackSource::Path(path.to_owned()), size: None, index: None };
        let options = StoreOptions { open_without_bases: true, ..StoreOptions::default() };
        let store = match Store::open(location, options).await {
            Ok(store) => store,
            Err(OpenError::Legacy { version, .. }) => return Ok(PackContents::Legacy { version }),
            Err(error) => return Err(error.into()),
        };
        let manifest = Box::new((*store.manifest().await?).clone());
        let (pin, bases) = (store.index_pin(), store.index().bases().to_vec());
        Ok(PackContents::Indexed { pin, manifest, head_size: head_size(&store).await?, bases })
    }

    fn bases(&self) -> &[BasePack] {
        match self {
            PackContents::Indexed { bases, .. } => bases,
            PackContents::Legacy { .. } => &[],
        }
    }

    /// What its manifest says of it to people, if anything.
    fn description(&self) -> Option<&str> {
        match self {
            PackContents::Indexed { manifest, .. } => {
                Some(manifest.description.as_str()).filter(|text| !text.is_empty())
            }
            PackContents::Legacy { .. } => None,
        }
    }
}

/// `None` of a pack whose trace nobody could use: it may be of another monitor's machine.
async fn head_size(store: &Arc<Store>) -> Result<Option<u64>, ReadError> {
    let index = store.index();
    let entry = index.file(TRACE).and_then(|file| index.entry(file));
    if entry.is_none_or(|entry| entry.size > MAX_TRACE_LEN) {
        return Ok(None);
    }
    let trace = store.read_files(&[TRACE], MAX_TRACE_LEN).await?;
    Ok(Trace::decode(&trace[0]).ok().map(|trace| prefetch::head_len(index, &trace)))
}

/// What was published.
#[derive(Debug, Serialize)]
pub struct Published {
    /// The package.
    pub package: String,
    /// The version it got.
    pub version: String,
    /// The file in the folder, or the one to be attached to the release.
    pub file: PathBuf,
    /// Its size.
    pub size_bytes: u64,
    /// Its digest.
    pub sha256: Digest,
    /// The packs without which a delta is not whole, its base first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<PublishedBase>,
    /// The release to be made, without which the entry leads nowhere.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub release: Option<Release>,
}

/// A pack that holds chunks of a delta.
#[derive(Debug, Serialize)]
pub struct PublishedBase {
    /// The digest of its index, by which it is known.
    pub index_sha256: Digest,
    /// owner/name@version in the same registry; null when it is not there.
    pub reference: Option<String>,
    /// Where it is looked for otherwise: a URL, a file's name beside the delta, or nowhere.
    pub hint: String,
}

/// Why a pack cannot be published.
#[derive(Debug, thiserror::Error)]
pub enum PublishError {
    /// A version that is no plain name, or `latest`, which moves by itself.
    #[error("`{version}` cannot be a version's name")]
    Version {
        /// What was given.
        version: String,
    },
    /// The version exists.
    #[error("{package} has a version {version} already, and published versions are never rewritten")]
    Exists {
        /// The package.
        package: PackageName,
        /// The version.
        version: String,
    },
    /// The pack cannot be a release's.
    #[error(transparent)]
    Release(#[from] ReleaseError),
    /// The pack cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The folder's registry cannot be used.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// A file cannot be read or written.
    #[error("{}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The registry would not be readable any more.
    #[error("{} would have {len} bytes, more than a registry may have", path.display())]
    TooLong {
        /// The registry.
        path: PathBuf,
        /// Its length.
        len: u64,
    },
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PublishError {
    let path = path.to_owned();
    move |source| PublishError::Io { path, source }
}

/// Publishes the pack. `contents` was read from it by the caller. Blocks for as long as copying and hashing take.
pub fn publish(publication: &PublishRequest<'_>, contents: &PackContents) -> Result<Published, PublishError> {
    let hub = publication.hub;
    std::fs::create_dir_all(hub).map_err(at(hub))?;
    // Copied and hashed before the lock is taken: publications of large packs do not wait for each other.
    let (copy, sha256, size_bytes) = if publication.github.is_some() {
        let (sha256, size_bytes) = digest_of(publication.pack).map_err(at(publication.pack))?;
        (None, sha256, size_bytes)
    } else {
        let (copy, sha256, size_bytes) = copy_in(publication.pack, hub)?;
        (Some(copy), sha256, size_bytes)
    };
    let _lock = lock(hub)?;
    let path = hub.join(registry::FILE_NAME);
    let mut registry = read_or_new(&path)?;
    let PublishRequest { package, pack, .. } = publication;
    let version = choose_version(&registry, package, publication.version.as_deref())?;
    let release = publication.github.as_ref().map(|repository| {
        let description = contents.description().unwrap_or_default();
        Release::of(&registry, repository, package, &version, pack, size_bytes, description)
    });
    let release = release.transpose()?;
    let mut entry = entry(publication, contents, sha256, size_bytes);
    let file = match copy {
        Some(copy) => {
            entry.url = choose_file_name(&registry, package, &version);
            let file = hub.join(&entry.url);
            copy.persist(&file).map_err(|error| at(&file)(error.error))?;
            file
        }
        None => pack.to_path_buf(),
    };
    if let Some(release) = &release {
        entry.url.clone_from(&release.url);
        entry.release_tag = Some(release.tag.clone());
    }
    let listed = registry.packages.entry(package.to_string()).or_default();
    if let Some(description) = contents.description() {
        description.clone_into(&mut listed.description);
    }
    listed.versions.insert(version.clone(), entry.clone());
    listed.versions.insert(LATEST.to_owned(), entry);
    write_registry(&path, &registry)?;
    let bases = contents.bases().iter().map(|base| published_base(&registry, base)).collect();
    Ok(Published { package: package.to_string(), version, file, size_bytes, sha256, bases, release })
}

/// Where the registry has a delta's base: its newest version by name that is not [`LATEST`], which moves.
fn published_base(registry: &Registry, base: &BasePack) -> PublishedBase {
    let sha256 = base.index.sha256.to_string();
    let is_it = |entry: &PackageVersion| entry.index_sha256.as_ref() == Some(&sha256);
    let listed = registry.packages.iter().flat_map(|(name, package)| {
        let versions = package.versions.iter().filter(|(version, entry)| *version != LATEST && is_it(entry));
        versions.map(move |(version, _)| format!("{name}@{version}"))
    });
    PublishedBase { index_sha256: base.index.sha256, reference: listed.last(), hint: base.hint.clone() }
}

fn lock(hub: &Path) -> Result<File, PublishError> {
    let path = hub.join(LOCK);
    let file = File::options().create(true).append(true).open(&path).map_err(at(&path))?;
    flock(&file, FlockOperation::LockExclusive).map_err(|error| at(&path)(error.into()))?;
    Ok(file)
}

fn read_or_new(path: &Path) -> Result<Registry, PublishError> {
    if !path.try_exists().map_err(at(path))? {
        return Ok(Registry { schema_version: SCHEMA_VERSION, ..Registry::default() });
    }
    Ok(Registry::parse(&registry::read_capped(path)?, &path.display().to_string())?)
}

fn choose_version(
    registry: &Registry,
    package: &PackageName,
    wanted: Option<&str>,
) -> Result<String, PublishError> {
    let versions = registry.packages.get(&package.to_string()).map(|found| &found.versions);
    if let Some(version) = wanted {
        if version == LATEST || !forkd_fs::format::is_plain_name(version) {
            return Err(PublishError::Version { version: version.to_owned() });
        }
        if versions.is_some_and(|versions| versions.contains_key(version)) {
            return Err(PublishError::Exists { package: package.clone(), version: version.to_owned() });
        }
        return Ok(version.to_owned());
    }
    let numbers = versions.into_iter().flat_map(|versions| versions.keys());
    let highest = numbers.filter_map(|version| version.strip_prefix('v')?.parse::<u32>().ok()).max();
    Ok(format!("v{}", highest.unwrap_or(0).saturating_add(1)))
}

/// `OWNER-NAME-VERSION.forkd-snapshot.tar.zst`. Two packages can come to the same file name (`a-b/c`, `a/b-c`); a
/// name that an entry uses is passed over, one that no entry uses was left by a crash and is replaced.
fn choose_file_name(registry: &Registry, package: &PackageName, version: &str) -> String {
    let used: Vec<&str> = (registry.packages.values())
        .flat_map(|package| package.versions.values())
        .map(|entry| entry.url.as_str())
        .collect();
    let stem = format!("{}-{}-{version}", package.owner, package.name);
    let mut name = format!("{stem}.forkd-snapshot.tar.zst");
    let mut number = 1;
    while used.contains(&name.as_str()) {
        number += 1;
        name = format!("{stem}-{number}.forkd-snapshot.tar.zst");
    }
    name
}

fn entry(
    publication: &PublishRequest<'_>,
    contents: &PackContents,
    sha256: Digest,
    size_bytes: u64,
) -> PackageVersion {
    let mut entry = PackageVersion {
        sha256: Some(sha256.to_string()),
        size_bytes: Some(size_bytes),
        recipe_path: publication.recipe_path.clone(),
        ..PackageVersion::default()
    };
    match contents {
        PackContents::Indexed { pin, manifest, head_size, bases } => {
            entry.bases = bases.iter().map(|base| base.index.sha256.to_string()).collect();
            entry.head_size = *head_size;
            entry.pack_format = Some(manifest.forkd_pack_version);
            entry.memory_mib = Some(manifest.requires.memory_mib);
            entry.base_image = Some(manifest.base_image.clone()).filter(|text| !text.is_empty());
            entry.created_at = Some(manifest.created_at.clone());
            entry.index_offset = Some(pin.offset);
            entry.index_size = Some(pin.length);
            entry.index_sha256 = Some(pin.sha256.to_string());
        }
        PackContents::Legacy { version } => entry.pack_format = Some(*version),
    }
    entry
}

/// Copies the pack beside the registry: as a reflink where the file system has them, so that it costs no space, byte
/// by byte elsewhere. Never as a hard link: writing to the original would change what was published.
fn copy_in(pack: &Path, hub: &Path) -> Result<(NamedTempFile, Digest, u64), PublishError> {
    let mut source = File::open(pack).map_err(at(pack))?;
    let mut copy = tempfile::Builder::new().prefix(".publishing-").tempfile_in(hub).map_err(at(hub))?;
    if rustix::fs::ioctl_ficlone(copy.as_file(), &source).is_err() {
        io::copy(&mut source, copy.as_file_mut()).map_err(at(copy.path()))?;
    }
    let readable = std::fs::Permissions::from_mode(0o644);
    copy.as_file().set_permissions(readable).map_err(at(copy.path()))?;
    copy.as_file().sync_all().map_err(at(copy.path()))?;
    // The copy is what gets published, so the copy is what gets hashed.
    let (digest, size) = digest_of(copy.path()).map_err(at(copy.path()))?;
    Ok((copy, digest, size))
}

fn digest_of(path: &Path) -> io::Result<(Digest, u64)> {
    let (mut file, mut hasher, mut size) = (File::open(path)?, Hasher::new(), 0);
    let mut block = vec![0; 1 << 20];
    loop {
        match file.read(&mut block)? {
            0 => return Ok((hasher.finish(), size)),
            len => {
                hasher.update(&block[..len]);
                size += len as u64;
            }
        }
    }
}

fn write_registry(path: &Path, registry: &Registry) -> Result<(), PublishError> {
    let mut text = serde_json::to_vec_pretty(registry).map_err(|error| at(path)(error.into()))?;
    text.push(b'\n');
    if text.len() as u64 > registry::MAX_LEN {
        return Err(PublishError::TooLong { path: path.to_owned(), len: text.len() as u64 });
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".registry-").tempfile_in(folder).map_err(at(path))?;
    file.write_all(&text).map_err(at(path))?;
    file.as_file().set_permissions(std::fs::Permissions::from_mode(0o644)).map_err(at(path))?;
    file.as_file().sync_all().map_err(at(path))?;
    file.persist(path).map_err(|error| at(path)(error.error))?;
    // Makes both renames last.
    File::open(folder).and_then(|folder| folder.sync_all()).map_err(at(folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn publication<'a>(
        pack: &'a Path,
        hub: &'a Path,
        package: &str,
        version: Option<&str>,
    ) -> PublishRequest<'a> {
        let (package, version) = (package.parse().unwrap(), version.map(str::to_owned));
        PublishRequest { pack, hub, package, version, recipe_path: None, github: None }
    }

    fn registry_of(hub: &Path) -> Registry {
        Registry::parse(&std::fs::read(hub.join("registry.json")).unwrap(), "test").unwrap()
    }

    #[test]
    fn versions_count_up_latest_moves_and_nothing_is_rewritten() {
        let dir = tempfile::tempdir().unwrap();
        let (pack, hub) = (dir.path().join("p"), dir.path().join("hub"));
        for (bytes, version) in [(b"one", "v1"), (b"two", "v2")] {
            std::fs::write(&pack, bytes).unwrap();
            let published =
                publish(&publication(&pack, &hub, "o/n", None), &PackContents::Legacy { version: 1 })
                    .unwrap();
            assert_eq!(published.version, version);
            assert_eq!(published.sha256, Digest::of(bytes));
        }
        assert!(matches!(
            publish(&publication(&pack, &hub, "o/n", Some("v1")), &PackContents::Legacy { version: 1 }),
            Err(PublishError::Exists { .. })
        ));
        for bad in ["latest", "../x", "a b"] {
            assert!(matches!(
                publish(&publication(&pack, &hub, "o/n", Some(bad)), &PackContents::Legacy { version: 1 }),
                Err(PublishError::Version { .. })
            ));
        }
        let versions = &registry_of(&hub).packages["o/n"].versions;
        assert_eq!(versions[LATEST], versions["v2"]);
        assert_eq!(std::fs::read(hub.join(&versions["v1"].url)).unwrap(), b"one");
        let left: Vec<_> = std::fs::read_dir(&hub)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with('.') && name != LOCK)
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }

    #[test]
    fn packages_whose_names_run_together_keep_their_own_files() {
        let dir = tempfile::tempdir().unwrap();
        let (pack, hub) = (dir.path().join("p"), dir.path().join("hub"));
        for package in ["a-b/c", "a/b-c"] {
            std::fs::write(&pack, package).unwrap();
            publish(&publication(&pack, &hub, package, None), &PackContents::Legacy { version: 1 }).unwrap();
        }
        for package in ["a-b/c", "a/b-c"] {
            let url = &registry_of(&hub).packages[package].versions["v1"].url;
            assert_eq!(std::fs::read_to_string(hub.join(url)).unwrap(), package);
        }
    }

    #[test]
    fn many_at_once_lose_no_entry() {
        let dir = tempfile::tempdir().unwrap();
        let (pack, hub) = (dir.path().join("p"), dir.path().join("hub"));
        std::fs::write(&pack, b"pack").unwrap();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    publish(&publication(&pack, &hub, "o/n", None), &PackContents::Legacy { version: 1 })
                        .unwrap()
                });
            }
        });
        let versions = &registry_of(&hub).packages["o/n"].versions;
        let expected: Vec<String> = (1..=8).map(|n| format!("v{n}")).collect();
        assert!(expected.iter().all(|version| versions.contains_key(version)), "{:?}", versions.keys());
        let files: std::collections::BTreeSet<_> = versions.values().map(|entry| &entry.url).collect();
        assert_eq!(files.len(), 8);
    }

    #[test]
    fn a_broken_registry_is_not_overwritten() {
        let dir = tempfile::tempdir().unwrap();
        let pack = dir.path().join("p");
        std::fs::write(&pack, b"x").unwrap();
        std::fs::write(dir.path().join("registry.json"), b"{broken").unwrap();
        let published =
            publish(&publication(&pack, dir.path(), "o/n", None), &PackContents::Legacy { version: 1 });
        assert!(matches!(published, Err(PublishError::Registry(RegistryError::Syntax { .. }))));
        assert_eq!(std::fs::read(dir.path().join("registry.json")).unwrap(), b"{broken");
    }
}
