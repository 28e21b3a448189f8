//! From what the user typed (a file, a URL, a name of the hub) to a pack that can be opened. Used by every command that
//! reads packs.

use std::path::PathBuf;
use std::sync::Arc;

use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::source::{Credentials, HttpClient, HttpOptions};
use forkd_fs::store::{PackLocation, PackSource, StoreOptions};

use crate::cli::CacheArgs;
use crate::paths::Paths;
use crate::registry::{Catalogue, HubAddress, Reference, RegistryCopies, RegistryError, Resolved};

/// A pack the user named.
#[derive(Debug, Clone)]
pub enum Target {
    /// A file or a URL.
    Direct(PackLocation),
    /// A name of the hub.
    Hub(Box<Resolved>),
}

impl Target {
    /// Where it is.
    pub fn location(&self) -> &PackLocation {
        match self {
            Target::Direct(location) => location,
            Target::Hub(resolved) => &resolved.location,
        }
    }
}

/// Connections for one command: with the user's credentials, for the hosts the user names, and with the user's cache
/// directory for copies of packs whose host serves no byte ranges.
pub fn http_client() -> HttpClient {
    let download_dir = Paths::from_env().ok().map(|paths| paths.cache);
    HttpClient::new(HttpOptions {
        credentials: Credentials::from_env(),
        download_dir,
        ..HttpOptions::default()
    })
}

/// Finds what `text` names: a URL when it has a scheme, an existing file, a name of the hub, and otherwise a file that
/// does not exist, which opening it will say.
pub async fn find(
    text: &str,
    paths: &Paths,
    hub: Option<&str>,
    http: &HttpClient,
) -> Result<Target, RegistryError> {
    let direct = |source| Target::Direct(PackLocation { source, size: None, index: None });
    if text.starts_with("http://") || text.starts_with("https://") {
        http.authorize(text);
        return Ok(direct(PackSource::Url(text.to_owned())));
    }
    let path = PathBuf::from(text.strip_prefix("file://").unwrap_or(text));
    if path.is_file() {
        return Ok(direct(PackSource::Path(path)));
    }
    match text.parse::<Reference>() {
        Ok(reference) => {
            let resolved = catalogue(paths, hub, http).await?.resolve(&reference)?;
            Ok(Target::Hub(Box::new(resolved)))
        }
        Err(_) => Ok(direct(PackSource::Path(path))),
    }
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

/// The hub's registry; the copy kept of it while the hub is away.
pub async fn catalogue(
    paths: &Paths,
    hub: Option<&str>,
    http: &HttpClient,
) -> Result<Catalogue, RegistryError> {
    HubAddress::find(hub)?.load(http, &RegistryCopies::new(paths)).await
}

/// Options for reading packs through the chunk cache of this user.
pub fn store_options(paths: &Paths, cache: &CacheArgs, http: &HttpClient) -> StoreOptions {
    let cache = chunk_cache(paths, cache);
    StoreOptions { http: http.clone(), cache: Some(Arc::new(cache)), ..StoreOptions::default() }
}

/// The chunk cache of this user.
pub fn chunk_cache(paths: &Paths, args: &CacheArgs) -> ChunkCache {
    let options = CacheOptions { max_bytes: args.cache_size, min_free_bytes: args.cache_reserve };
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
