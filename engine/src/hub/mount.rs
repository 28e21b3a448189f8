//! A hub's packs as a FUSE mount: from its registry to the tree, kept current until the mount ends.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::fuse::{MountError, MountedTree};
use forkd_fs::source::HttpClient;
use forkd_fs::tree::{PackListing, Tree};
use tokio::runtime::Handle;

use crate::chain::chain;
use crate::hub::client;
use crate::hub::registry::{Catalogue, RegistryCopies, RegistryError, Resolved, whole_digest};
use crate::local::mounts::{self, MountRecord, MountsError, SOURCE_PREFIX};
use crate::local::paths::Paths;

/// Why a hub cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum MountHubError {
    /// Its registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The mountpoint, or what is mounted there.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// FUSE.
    #[error(transparent)]
    Fuse(#[from] MountError),
}

/// How a hub is mounted.
#[derive(Debug, Clone)]
pub struct MountOptions {
    /// The hub, when one is named.
    pub hub: Option<String>,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
    /// How long a read may wait for the hub.
    pub deadline: Duration,
}

/// A hub that was read and can be mounted.
pub struct Hub {
    catalogue: Catalogue,
    http: HttpClient,
    tree: Arc<Tree>,
    cache: Option<Arc<ChunkCache>>,
}

impl Hub {
    /// Reads the registry.
    pub async fn open(paths: &Paths, options: &MountOptions) -> Result<Hub, MountHubError> {
        let http = client::http_client(paths);
        let catalogue = client::catalogue(paths, options.hub.as_deref(), &http).await?;
        let mut store = client::store_options(paths, options.cache, &http, options.hub.as_deref());
        store.demand_deadline = options.deadline;
        let cache = store.cache.clone();
        let tree = Arc::new(Tree::new(listings(&catalogue), store));
        Ok(Hub { catalogue, http, tree, cache })
    }

    /// Its URL or path, for people.
    pub fn location(&self) -> String {
        self.catalogue.location()
    }

    /// Mounts it, on threads of `runtime`, and records that this process did.
    pub fn mount(
        self,
        paths: &Paths,
        mountpoint: &Path,
        runtime: Handle,
    ) -> Result<ServedMount, MountHubError> {
        let source = format!("{SOURCE_PREFIX}{}", self.location());
        let mounted = MountedTree::new(self.tree.clone(), mountpoint, &source, runtime)?;
        let record = MountRecord {
            mountpoint: mountpoint.to_owned(),
            pid: std::process::id(),
            hub: self.catalogue.address().spelled_out(),
        };
        mounts::write_record(paths, &record)?;
        Ok(ServedMount { hub: self, mounted, paths: paths.clone(), mountpoint: mountpoint.to_owned() })
    }
}

/// A mounted hub.
pub struct ServedMount {
    hub: Hub,
    mounted: MountedTree,
    paths: Paths,
    mountpoint: PathBuf,
}

impl ServedMount {
    /// Serves the mount until somebody unmounts it or `stop` completes, and then takes it away. The registry is read anew
    /// every `refresh` (0: never).
    pub async fn serve(self, refresh: Duration, stop: impl Future<Output = ()>) -> Result<(), MountsError> {
        let ServedMount { hub, mounted, paths, mountpoint } = self;
        let unmounted_by_other = tokio::select! {
            () = stop => false,
            () = mounted.ended() => true,
            () = keep_current(refresh, &hub.catalogue, (&paths, &hub.http), (&hub.tree, &mounted)) => true,
        };
        let ours = mounts::is_ours(&paths, &mountpoint, std::process::id());
        if ours && !unmounted_by_other {
            // Busy or not, the mount goes: a daemon that is told to stop leaves no dead mount behind.
            mounts::detach(&mountpoint)?;
        }
        if ours {
            mounts::remove_record(&paths, &mountpoint);
            drop(mounted);
        } else {
            // Dropped, it would unmount whatever is there now; its own mount ends with this process.
            std::mem::forget(mounted);
        }
        // What was read is not to be fetched again.
        if let Some(cache) = hub.cache {
            cache.flush();
        }
        Ok(())
    }
}

/// Reads the registry anew every `interval` (0: never), and shows what it lists from then on. Never ends.
async fn keep_current(
    interval: Duration,
    catalogue: &Catalogue,
    (paths, http): (&Paths, &HttpClient),
    (tree, mounted): (&Tree, &MountedTree),
) {
    if interval.is_zero() {
        return std::future::pending().await;
    }
    let copies = RegistryCopies::new(paths);
    let mut away = false;
    loop {
        tokio::time::sleep(interval).await;
        match catalogue.address().fetch(http, &copies).await {
            Ok(catalogue) => {
                mounted.forget(tree.refresh(&listings(&catalogue)));
                away = false;
            }
            // Said once: what was listed before stays.
            Err(error) if !std::mem::replace(&mut away, true) => {
                tracing::warn!(error = %chain(&error), "the registry cannot be read anew");
            }
            Err(_) => {}
        }
    }
}

/// The registry as the tree wants it. An entry that cannot be used is left out, with a warning.
fn listings(catalogue: &Catalogue) -> Vec<PackListing> {
    let listing = |resolved: Resolved| {
        let sha256 = match whole_digest(&resolved.entry).transpose() {
            Ok(sha256) => sha256,
            // The index is pinned: nobody needs the other.
            Err(_) if resolved.location.index.is_some() => None,
            Err(error) => {
                tracing::warn!(pack = %resolved.reference, %error, "an entry with a malformed sha256 is left out");
                return None;
            }
        };
        let created_at = resolved.entry.created_at.as_deref();
        Some(PackListing {
            owner: resolved.reference.package.owner,
            name: resolved.reference.package.name,
            version: resolved.reference.version,
            location: resolved.location,
            sha256,
            modified: created_at
                .and_then(|text| humantime::parse_rfc3339_weak(text).ok())
                .unwrap_or(SystemTime::UNIX_EPOCH),
        })
    };
    let usable = |entry: Result<Resolved, _>| {
        entry.map_err(|error| tracing::warn!(%error, "an entry is left out")).ok()
    };
    catalogue.entries().filter_map(usable).map(client::warn_unpinned).filter_map(listing).collect()
}
