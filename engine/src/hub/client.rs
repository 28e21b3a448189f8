//! A user's connections, registry and chunk cache, as everything that reads packs takes them.

use std::sync::Arc;

use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::source::{Credentials, HttpClient, HttpOptions};
use forkd_fs::store::StoreOptions;

use crate::hub::bases::HubBases;
use crate::hub::registry::{Catalogue, HubAddress, RegistryCopies, RegistryError, Resolved};
use crate::local::paths::Paths;

/// Connections for one command: with the user's credentials, for the hosts the user names, and with the user's cache
/// directory for copies of packs whose host serves no byte ranges.
pub fn http_client(paths: &Paths) -> HttpClient {
    let download_dir = Some(paths.cache.clone());
    HttpClient::new(HttpOptions {
        credentials: Credentials::from_env(),
        download_dir,
        ..HttpOptions::default()
    })
}

/// Connections opened beside the registry's. Index and head come through two of the five; the working set, in four
/// parts at most (`forkd_fs::store`), goes on with these and two more; and one is left for a page that the trace lacks.
/// A guest waits for that: two round trips instead of one when it has no connection.
const PRECONNECTED: usize = 4;

/// Opens connections to the hub while its registry is asked for, most often the pack's host too.
pub fn preconnect(hub: Option<&str>, http: &HttpClient) {
    if let Ok(HubAddress::Url(url)) = HubAddress::find(hub) {
        http.authorize(url.as_str());
        (0..PRECONNECTED).for_each(|_| http.preconnect(url.as_str()));
    }
}

/// The hub that is meant when none is named may learn who we are.
pub fn authorize_hub(http: &HttpClient) {
    if let Ok(HubAddress::Url(url)) = HubAddress::find(None) {
        http.authorize(url.as_str());
    }
}

/// The hub's registry; the copy kept of it while the hub is away.
pub async fn catalogue(
    paths: &Paths,
    hub: Option<&str>,
    http: &HttpClient,
) -> Result<Catalogue, RegistryError> {
    HubAddress::find(hub)?.load(http, &RegistryCopies::new(paths)).await
}

/// Options for reading packs through the chunk cache of this user. The bases of deltas are looked for on `hub` too.
pub fn store_options(
    paths: &Paths,
    cache: CacheOptions,
    http: &HttpClient,
    hub: Option<&str>,
) -> StoreOptions {
    let cache = chunk_cache(paths, cache);
    let bases = HubBases::new(paths, hub, http);
    StoreOptions {
        http: http.clone(),
        cache: Some(Arc::new(cache)),
        bases: Some(Arc::new(bases)),
        ..StoreOptions::default()
    }
}

/// The chunk cache of this user.
pub fn chunk_cache(paths: &Paths, options: CacheOptions) -> ChunkCache {
    ChunkCache::open(&paths.cache, options)
}

/// Says that a pack which is read in parts can only be checked as far as its own index goes: `forkd pull` checks the
/// digest of the whole.
pub fn warn_unpinned(resolved: Resolved) -> Resolved {
    if resolved.location.index.is_none() {
        tracing::warn!(
            pack = %resolved.reference,
            "the registry pins no index of this pack: it is taken as its host sends it"
        );
    }
    resolved
}
