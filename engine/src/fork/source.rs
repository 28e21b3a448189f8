//! What a command's REF, PATH or `--tag` leads to: an opened pack or a snapshot's directory. Callers: commands.

use crate::hub::packs;
use crate::hub::registry::{InvalidReference, RegistryError};
use crate::local::mounts;
use crate::local::paths::Paths;
use crate::local::snapshots::{self, Held, SnapshotError, file_error};
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::observe::Observer;
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

/// Nothing to fork from.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
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

/// Stages that take a round trip.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// The registry is read.
    Registry,
    /// The index is verified.
    Index,
}

/// Something to fork from.
pub struct OpenedSource {
    /// As people know it.
    pub name: String,
    /// What that was when it was opened: owner/name@version for a package of the hub, otherwise the same.
    pub resolved: String,
    /// Where it is.
    pub origin: Origin,
    /// The chunk cache it uses; to be flushed before the process exits.
    pub cache: Option<Arc<ChunkCache>>,
}

impl OpenedSource {
    fn local(name: &str, held: Held) -> OpenedSource {
        let (name, resolved) = (name.to_owned(), name.to_owned());
        OpenedSource { name, resolved, origin: Origin::Directory(held), cache: None }
    }
}

/// Where it is.
pub enum Origin {
    /// A pack, its index verified.
    Pack(Arc<Store>),
    /// A snapshot's directory.
    Directory(Held),
}

/// What a command names: a local snapshot's tag or a target.
#[derive(Debug, Clone, Copy)]
pub struct Wanted<'a> {
    /// A name of the hub, or a path.
    pub target: Option<&'a str>,
    /// A local snapshot.
    pub tag: Option<&'a str>,
    /// The hub, if one is named.
    pub hub: Option<&'a str>,
}

impl<'a> Wanted<'a> {
    /// As it was named.
    pub fn name(&self) -> &'a str {
        self.tag.or(self.target).unwrap_or_default()
    }
}

/// Opens what is wanted; `observer` hears of the requests for a pack. `reached` is called as stages are done.
pub async fn open(
    paths: &Paths,
    wanted: &Wanted<'_>,
    cache: CacheOptions,
    observer: Option<Arc<dyn Observer>>,
    mut reached: impl FnMut(Stage),
) -> Result<OpenedSource, SourceError> {
    let Some(target) = wanted.target else {
        let tag = wanted.tag.unwrap_or_default();
        let held = Held::find(paths, tag)?;
        return Ok(OpenedSource::local(tag, held));
    };
    let http = packs::http_client(paths);
    let hub = wanted.hub.map(str::to_owned);
    let named = match as_path(target)? {
        Some(path) if path.is_dir() => match mounts::pack_behind(paths, &path) {
            // The fork reads the pack itself, without a detour through FUSE.
            Some((hub, reference)) => Ok((Some(hub), reference)),
            None if path.join(snapshots::CONFIGURATION).exists() => {
                let held = Held::open(&path).map_err(file_error("opening", &path))?;
                return Ok(OpenedSource::local(target, held));
            }
            None => return Err(SourceError::NoSuchPath { path }),
        },
        Some(path) => Err(PackLocation { source: PackSource::Path(path), size: None, index: None }),
        None => Ok((hub, target.parse()?)),
    };
    let (mut resolved_name, mut head_bytes) = (target.to_owned(), HEAD_BYTES);
    let location = match named {
        Ok((hub, reference)) => {
            packs::preconnect(hub.as_deref(), &http);
            let catalogue = packs::catalogue(paths, hub.as_deref(), &http).await?;
            reached(Stage::Registry);
            let resolved = packs::warn_unpinned(catalogue.resolve(&reference)?);
            resolved_name = catalogue.settled(&resolved).to_string();
            head_bytes = resolved.entry.head_size.unwrap_or(0).clamp(HEAD_BYTES, HEAD_BYTES_MAX);
            resolved.location
        }
        Err(location) => location,
    };
    let options = StoreOptions {
        demand_deadline: OPEN_DEADLINE,
        head_bytes,
        observer,
        ..packs::store_options(paths, cache, &http)
    };
    let cache = options.cache.clone();
    let store = Store::open(location, options).await?;
    reached(Stage::Index);
    Ok(OpenedSource { name: target.to_owned(), resolved: resolved_name, origin: Origin::Pack(store), cache })
}

/// `target` as a path: when it looks like one it must exist, otherwise only when it does and is no name.
pub fn as_path(target: &str) -> Result<Option<PathBuf>, SourceError> {
    let path = Path::new(target);
    let explicit = path.is_absolute() || target.starts_with("./") || target.starts_with("../");
    match (path.exists(), explicit) {
        (true, true) => Ok(Some(path.to_owned())),
        (false, true) => Err(SourceError::NoSuchPath { path: path.to_owned() }),
        (true, false) if path.is_file() => Ok(Some(path.to_owned())),
        _ => Ok(None),
    }
}
