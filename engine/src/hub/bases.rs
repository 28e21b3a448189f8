//! The packs that a delta builds on, by the digests of their indexes, in the registries that this user reads.

use std::time::{Duration, Instant};

use forkd_fs::index::BasePack;
use forkd_fs::source::HttpClient;
use forkd_fs::store::{FindBase, PackLocation, Places};
use tokio::sync::Mutex;

use crate::chain::chain;
use crate::hub::registry::{Catalogue, HubAddress, RegistryCopies, RegistryError};
use crate::local::paths::Paths;

/// How long a registry is good for: the bases of one delta are looked for all at once.
const FRESH: Duration = Duration::from_secs(5);

/// Finds bases on one hub.
#[derive(Debug)]
pub struct HubBases {
    paths: Paths,
    hub: Option<String>,
    http: HttpClient,
    /// As it was last read; `None` without a hub, or when it cannot be read.
    read: Mutex<Option<(Instant, Option<Catalogue>)>>,
}

impl HubBases {
    /// Those of the hub that is named, or of the one that is meant when none is.
    pub fn new(paths: &Paths, hub: Option<&str>, http: &HttpClient) -> HubBases {
        HubBases {
            paths: paths.clone(),
            hub: hub.map(str::to_owned),
            http: http.clone(),
            read: Mutex::default(),
        }
    }

    async fn catalogue(&self) -> Result<Catalogue, RegistryError> {
        HubAddress::find(self.hub.as_deref())?.load(&self.http, &RegistryCopies::new(&self.paths)).await
    }

    async fn places(&self, base: &BasePack) -> Vec<PackLocation> {
        let mut read = self.read.lock().await;
        if read.as_ref().is_none_or(|(at, _)| at.elapsed() > FRESH) {
            // Its absence is no error: the base may be elsewhere.
            let catalogue = self.catalogue().await.inspect_err(
                |error| tracing::debug!(error = %chain(error), "no registry to look for bases in"),
            );
            *read = Some((Instant::now(), catalogue.ok()));
        }
        let catalogue = read.as_ref().and_then(|(_, catalogue)| catalogue.as_ref());
        catalogue.map_or_else(Vec::new, |catalogue| listed(catalogue, base))
    }
}

impl FindBase for HubBases {
    fn find<'a>(&'a self, base: &'a BasePack) -> Places<'a> {
        Box::pin(self.places(base))
    }
}

/// Where a registry has the pack, each place once. Versions of any package may be it.
fn listed(catalogue: &Catalogue, base: &BasePack) -> Vec<PackLocation> {
    let mut places: Vec<PackLocation> = Vec::new();
    for resolved in catalogue.entries().filter_map(Result::ok) {
        let is_base = resolved.location.index.is_some_and(|pin| pin.sha256 == base.index.sha256);
        if is_base && !places.contains(&resolved.location) {
            places.push(resolved.location);
        }
    }
    places
}
