//! Pulling: a pack of the hub, whole, into a local snapshot.
//!
//! A v3 pack whose index the registry pins is fetched chunk by chunk through the chunk cache, each chunk checked: a pull
//! that was interrupted goes on where it stopped. Any other pack has to lead back to the registry by the digest of the
//! whole file, so it is downloaded into a file of its own ([`crate::hub::download`]) and checked before anything is unpacked.

use forkd_fs::store::{OpenError, Store, StoreOptions};

use crate::build::unpack::{UnpackPackError, Unpacked, from_store, unpack_file};
use crate::hub::client;
use crate::hub::download::{Download, DownloadError, registered_digest};
use crate::hub::registry::{RegistryError, Resolved};
use crate::local::paths::Paths;
use crate::local::snapshots::SnapshotError;
use crate::progress::Progress;
use crate::reference::Reference;
use forkd_fs::cache::CacheOptions;

/// Why a pack cannot be pulled.
#[derive(Debug, thiserror::Error)]
pub enum PullError {
    /// The registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The pack cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It cannot be unpacked.
    #[error(transparent)]
    Unpack(#[from] UnpackPackError),
    /// The snapshot's place.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Downloading failed.
    #[error(transparent)]
    Download(#[from] DownloadError),
}

/// What is to be pulled.
#[derive(Debug)]
pub struct PullRequest {
    /// The package and its version.
    pub reference: Reference,
    /// The hub, when one is named.
    pub hub: Option<String>,
    /// The snapshot's name; the package's when there is none.
    pub tag: Option<String>,
    /// Replace a snapshot of that name.
    pub force: bool,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
}

/// Pulls.
pub async fn pull(
    paths: &Paths,
    request: &PullRequest,
    progress: &dyn Progress,
) -> Result<Unpacked, PullError> {
    let PullRequest { reference, force, .. } = request;
    let tag = request.tag.as_deref().unwrap_or(&reference.package.name);
    // Before anything is downloaded.
    if !force && paths.snapshot(tag).map_err(SnapshotError::from)?.exists() {
        return Err(SnapshotError::Exists { tag: tag.to_owned() }.into());
    }
    let http = client::http_client(paths);
    let catalogue = client::catalogue(paths, request.hub.as_deref(), &http).await?;
    let resolved = catalogue.resolve(reference)?;
    let options = client::store_options(paths, request.cache, &http, request.hub.as_deref());
    let whole = registered_digest(&resolved)?;
    if resolved.location.index.is_none() && (whole.is_some() || is_legacy(&resolved, &options).await) {
        let download = Download::fetch(&resolved, whole, paths, &http, progress).await?;
        return Ok(unpack_file(paths, download.path(), options, Some(tag), *force, progress).await?);
    }
    let store = Store::open(resolved.location.clone(), options).await?;
    if resolved.location.index.is_none() {
        progress.note(&format!("the registry has no digest of {reference}: it is taken as it comes"));
    }
    Ok(from_store(&store, paths, Some(tag), *force, progress).await?)
}

/// Whether the pack is one of the predecessor's, which have to be read from start to end.
async fn is_legacy(resolved: &Resolved, options: &StoreOptions) -> bool {
    let opened = Store::open(resolved.location.clone(), options.clone()).await;
    matches!(opened, Err(OpenError::Legacy { .. }))
}
