//! What a user may name, and what it leads to: an opened pack or a snapshot's directory.

use crate::hub::client;
use crate::hub::registry::{RegistryError, Resolved};
use crate::local::lineage::BasePack;
use crate::local::mounts;
use crate::local::paths::Paths;
use crate::local::snapshots::{self, LockedSnapshot, SnapshotError, file_error};
use crate::reference::{InvalidReference, Reference};
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::observe::Observer;
use forkd_fs::source::{HttpClient, redact_url};
use forkd_fs::store::{OpenError, PackLocation, PackSource, Store, StoreOptions};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// How long opening a pack may be retried.
const OPEN_DEADLINE: Duration = Duration::from_secs(10);

/// How long a machine waits for memory while the network is away.
pub const DEMAND_DEADLINE: Duration = Duration::from_secs(600);

/// What is fetched from the start of a pack together with its index: snapshot.json, vmstate, trace and the first hot pages lie
/// there, so they cost no round trip of their own. What follows them keeps the link busy until the next answer comes: 20 ms
/// at 50 MB/s.
const HEAD_BYTES: u64 = 1 << 20;
/// The most that a registry can make of it, with its `head_size`: 16 MiB of pages, and the longest trace.
const HEAD_BYTES_MAX: u64 = 24 << 20;

/// What a user may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// A snapshot of this machine, by its tag.
    Tag(String),
    /// The path of a pack, of a snapshot's directory, or of nothing.
    File {
        /// The path.
        path: PathBuf,
        /// The hub where a delta's bases are looked for, when one was named.
        hub: Option<String>,
    },
    /// The http(s) URL of a pack.
    Url {
        /// The URL.
        url: String,
        /// As of a file.
        hub: Option<String>,
    },
    /// A package of a hub.
    Package {
        /// The hub, when one was named.
        hub: Option<String>,
        /// The package and its version.
        reference: Reference,
    },
    /// A pack's folder in a mount of this user.
    MountFolder {
        /// The folder.
        path: PathBuf,
        /// The hub that is mounted.
        hub: String,
        /// The package that the folder shows.
        reference: Reference,
    },
}

/// Nothing that can be opened.
#[derive(Debug, thiserror::Error)]
pub enum TargetError {
    /// Neither a file nor a name.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// A path with nothing there.
    #[error("there is no pack or snapshot at {}", path.display())]
    NoSuchPath {
        /// The path.
        path: PathBuf,
    },
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The pack.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The local snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// Stages of opening a pack that take a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenStage {
    /// The registry is read.
    Registry,
    /// The index is verified.
    Index,
}

/// How to open a pack.
#[derive(Clone, Default)]
pub struct OpenOptions {
    /// The chunk cache's limits.
    pub cache: CacheOptions,
    /// Hears of the requests for the pack.
    pub observer: Option<Arc<dyn Observer>>,
}

/// What a target leads to.
pub struct OpenedTarget {
    /// What the target was when it was opened: owner/name@version for a package of the hub, otherwise as it was named.
    pub resolved: String,
    /// Where its files are.
    pub origin: Origin,
    /// The chunk cache it uses; to be flushed before the process exits.
    pub cache: Option<Arc<ChunkCache>>,
}

/// Where the files of a machine are.
pub enum Origin {
    /// In a pack, whose index is verified.
    Pack(Arc<Store>),
    /// In a snapshot's directory.
    Directory(LockedSnapshot),
}

/// Where a pack is.
#[derive(Debug, Clone)]
pub enum LocatedPack {
    /// At a path or URL that the user named.
    Direct(PackLocation),
    /// Where a hub's registry says.
    Registered(Box<Resolved>),
}

impl LocatedPack {
    /// Path or URL, and what is known of the pack.
    pub fn pack(&self) -> &PackLocation {
        match self {
            LocatedPack::Direct(location) => location,
            LocatedPack::Registered(resolved) => &resolved.location,
        }
    }
}

impl Target {
    /// What `text` names, on the hub `hub` where it names a package: a URL when it has a scheme, otherwise a folder of a
    /// mount or a path when it looks like one or a file is there, otherwise a package, and a path when it is none of these.
    pub fn parse(paths: &Paths, text: &str, hub: Option<&str>) -> Target {
        if text.starts_with("http://") || text.starts_with("https://") {
            return Target::Url { url: text.to_owned(), hub: hub.map(str::to_owned) };
        }
        let spelled_path = text.strip_prefix("file://");
        let path = PathBuf::from(spelled_path.unwrap_or(text));
        if spelled_path.is_none()
            && !is_explicit(&path)
            && !path.is_file()
            && let Ok(reference) = text.parse()
        {
            return Target::Package { hub: hub.map(str::to_owned), reference };
        }
        match path.is_dir().then(|| mounts::pack_behind(paths, &path)).flatten() {
            Some((hub, reference)) => Target::MountFolder { path, hub, reference },
            None => Target::File { path, hub: hub.map(str::to_owned) },
        }
    }

    /// As [`Target::parse`], unless `tag` names a local snapshot.
    pub fn of(paths: &Paths, tag: Option<&str>, text: Option<&str>, hub: Option<&str>) -> Target {
        match tag {
            Some(tag) => Target::Tag(tag.to_owned()),
            None => Target::parse(paths, text.unwrap_or_default(), hub),
        }
    }

    /// Says that a path is no name, where there is nothing and it does not look like a path.
    pub fn check_name(&self) -> Result<(), InvalidReference> {
        match self {
            Target::File { path, .. } if !is_explicit(path) && !path.exists() => {
                path.to_string_lossy().parse::<Reference>().map(drop)
            }
            _ => Ok(()),
        }
    }

    /// The hub that it names, or where the bases of a delta are looked for.
    pub fn hub(&self) -> Option<&str> {
        match self {
            Target::Tag(_) => None,
            Target::File { hub, .. } | Target::Url { hub, .. } | Target::Package { hub, .. } => {
                hub.as_deref()
            }
            Target::MountFolder { hub, .. } => Some(hub),
        }
    }

    /// Where to look for its pack. A local snapshot is none: it is looked for where packs of its name would be.
    fn pack_place(&self, http: &HttpClient) -> PackPlace<'_> {
        let source = match self {
            Target::Package { hub, reference } => return PackPlace::Hub(hub.as_deref(), reference),
            // The pack itself is read, without a detour through FUSE.
            Target::MountFolder { hub, reference, .. } => return PackPlace::Hub(Some(hub), reference),
            Target::Tag(tag) => PackSource::Path(tag.into()),
            Target::File { path, .. } => PackSource::Path(path.clone()),
            Target::Url { url, .. } => {
                http.authorize(url);
                PackSource::Url(url.clone())
            }
        };
        PackPlace::Direct(PackLocation { source, size: None, index: None })
    }

    /// Finds the pack that it names.
    pub async fn locate(&self, paths: &Paths, http: &HttpClient) -> Result<LocatedPack, RegistryError> {
        let (hub, reference) = match self.pack_place(http) {
            PackPlace::Direct(location) => return Ok(LocatedPack::Direct(location)),
            PackPlace::Hub(hub, reference) => (hub, reference),
        };
        let resolved = client::catalogue(paths, hub, http).await?.resolve(reference)?;
        Ok(LocatedPack::Registered(Box::new(resolved)))
    }

    /// Opens it to fork from it; `reached` is called as stages are done. `name` is what people call it.
    pub async fn open(
        &self,
        paths: &Paths,
        name: &str,
        options: OpenOptions,
        mut reached: impl FnMut(OpenStage),
    ) -> Result<OpenedTarget, TargetError> {
        let (mut resolved, mut head_bytes) = (name.to_owned(), HEAD_BYTES);
        if let Some(snapshot) = self.snapshot(paths)? {
            return Ok(OpenedTarget { resolved, origin: Origin::Directory(snapshot), cache: None });
        }
        let http = client::http_client(paths);
        let location = match self.pack_place(&http) {
            PackPlace::Direct(location) => location,
            PackPlace::Hub(hub, reference) => {
                client::preconnect(hub, &http);
                let catalogue = client::catalogue(paths, hub, &http).await?;
                reached(OpenStage::Registry);
                let found = client::warn_unpinned(catalogue.resolve(reference)?);
                resolved = catalogue.settled(&found).to_string();
                head_bytes = found.entry.head_size.unwrap_or(0).clamp(HEAD_BYTES, HEAD_BYTES_MAX);
                found.location
            }
        };
        let options = StoreOptions {
            demand_deadline: OPEN_DEADLINE,
            head_bytes,
            observer: options.observer,
            ..client::store_options(paths, options.cache, &http, self.hub())
        };
        let cache = options.cache.clone();
        let store = Store::open(location, options).await?;
        reached(OpenStage::Index);
        Ok(OpenedTarget { resolved, origin: Origin::Pack(store), cache })
    }

    /// The snapshot that it names; `None` where a pack may be.
    pub fn snapshot(&self, paths: &Paths) -> Result<Option<LockedSnapshot>, TargetError> {
        match self {
            Target::Tag(tag) => Ok(Some(LockedSnapshot::find(paths, tag)?)),
            Target::File { path, .. } => {
                self.check_name()?;
                snapshot_at(path)
            }
            Target::Url { .. } | Target::Package { .. } | Target::MountFolder { .. } => Ok(None),
        }
    }
}

/// The pack that a child's snapshot is a difference from cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("its base {name}, the pack {location}, cannot be opened")]
pub struct BaseUnavailable {
    /// What it was called.
    pub name: String,
    /// Where it was.
    pub location: String,
    /// Why not.
    #[source]
    pub source: Box<OpenError>,
}

/// Opens the pack that a child's snapshot is a difference from, which was called `name`: the one whose index has this
/// digest, or none.
pub async fn open_base(
    paths: &Paths,
    name: &str,
    pack: &BasePack,
    options: OpenOptions,
) -> Result<(Arc<Store>, Option<Arc<ChunkCache>>), BaseUnavailable> {
    let http = client::http_client(paths);
    client::authorize_hub(&http);
    let options = StoreOptions {
        demand_deadline: OPEN_DEADLINE,
        head_bytes: HEAD_BYTES,
        observer: options.observer,
        ..client::store_options(paths, options.cache, &http, None)
    };
    let cache = options.cache.clone();
    let store = Store::open(pack.location(), options).await.map_err(|error| BaseUnavailable {
        name: name.to_owned(),
        location: pack.shown(),
        source: error.into(),
    })?;
    Ok((store, cache))
}

/// Where to look for a pack.
enum PackPlace<'a> {
    /// On the hub, or the one that is meant when none is named.
    Hub(Option<&'a str>, &'a Reference),
    /// At a path or URL.
    Direct(PackLocation),
}

/// What people call what `text` names: without the password of a URL.
pub fn shown_name(text: &str) -> String {
    // A path may look like half a URL.
    if text.contains("://") { redact_url(text) } else { text.to_owned() }
}

/// Whether it says that it is a path.
fn is_explicit(path: &Path) -> bool {
    path.is_absolute() || path.starts_with(".") || path.starts_with("..")
}

/// The snapshot in the directory at `path`; `None` where a file is, which may be a pack.
fn snapshot_at(path: &Path) -> Result<Option<LockedSnapshot>, TargetError> {
    if path.is_file() {
        return Ok(None);
    }
    if path.join(snapshots::CONFIGURATION).exists() {
        return Ok(Some(LockedSnapshot::open(path).map_err(file_error("opening", path))?));
    }
    Err(TargetError::NoSuchPath { path: path.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_one_kind_of_target() {
        let dir = tempfile::tempdir().unwrap();
        let below = |name: &str| dir.path().join(name);
        let paths = Paths { data: below("data"), cache: below("cache"), runtime: below("run") };
        let parse = |text: &str| Target::parse(&paths, text, Some("hub"));
        let reference: Reference = "o/n@v1".parse().unwrap();
        let package = Target::Package { hub: Some("hub".to_owned()), reference: reference.clone() };
        assert_eq!(parse("o/n@v1"), package);
        let hub = Some("hub".to_owned());
        let file = |path: &str| Target::File { path: path.into(), hub: hub.clone() };
        assert_eq!(parse("http://h/o/n"), Target::Url { url: "http://h/o/n".to_owned(), hub: hub.clone() });
        for path in ["/nowhere", "./o/n", "../x", ".", "not a name"] {
            assert_eq!(parse(path), file(path), "{path}");
        }
        assert_eq!(parse("file:///a/b"), file("/a/b"));
        // A file hides the package of its name, a directory does not.
        assert_eq!(parse("src/target.rs"), file("src/target.rs"));
        assert!(matches!(parse("src/fork"), Target::Package { .. }));
        assert_eq!(Target::of(&paths, Some("t"), Some("o/n"), None), Target::Tag("t".to_owned()));
        assert!(parse("not a name").check_name().is_err() && parse("/nowhere").check_name().is_ok());

        let (mountpoint, folder) = (below("mount"), below("mount/o/n/v1"));
        std::fs::create_dir_all(&folder).unwrap();
        let (pid, hub) = (std::process::id(), "http://h/".to_owned());
        mounts::write_record(&paths, &mounts::MountRecord { mountpoint, pid, hub: hub.clone() }).unwrap();
        let expected = Target::MountFolder { path: folder.clone(), hub, reference };
        assert_eq!(parse(folder.to_str().unwrap()), expected);
    }
}
