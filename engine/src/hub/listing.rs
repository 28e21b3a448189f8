//! What a hub has, as people and programs are shown it.

use super::client;
use super::registry::{PackageVersion, RegistryError};
use crate::local::paths::Paths;
use serde::Serialize;

/// The packages of a hub. Its JSON form is a contract of `forkd images --hub --json`.
#[derive(Debug, Serialize)]
pub struct HubListing {
    /// Where the hub is.
    pub hub: String,
    /// Its packages, by name.
    pub packages: Vec<ListedPackage>,
}

/// One package.
#[derive(Debug, Serialize)]
pub struct ListedPackage {
    /// `owner/name`.
    pub name: String,
    /// What its publisher says of it.
    pub description: String,
    /// Its versions, `latest` among them.
    pub versions: Vec<String>,
    /// Memory of its newest version's machine.
    pub memory_mib: Option<u64>,
    /// Size of its newest version's pack.
    pub size_bytes: Option<u64>,
    /// When that was made, RFC 3339.
    pub created_at: Option<String>,
    /// Whether its pack can be had; otherwise it has to be built from its recipe.
    pub hosted: bool,
    /// Where that recipe is.
    pub recipe_path: Option<String>,
}

/// What is at `hub`, or at the hub that is meant when none is named.
///
/// # Errors
/// [`RegistryError`] as its variants say.
pub async fn packages(paths: &Paths, hub: Option<&str>) -> Result<HubListing, RegistryError> {
    let catalogue = client::catalogue(paths, hub, &client::http_client(paths)).await?;
    let packages = catalogue.registry().packages.iter().map(|(name, package)| {
        let latest = package.newest();
        ListedPackage {
            name: name.clone(),
            description: package.description.clone(),
            versions: package.versions.keys().cloned().collect(),
            memory_mib: latest.and_then(|version| version.memory_mib),
            size_bytes: latest.and_then(|version| version.size_bytes),
            created_at: latest.and_then(|version| version.created_at.clone()),
            hosted: latest.is_some_and(PackageVersion::is_hosted),
            recipe_path: latest.and_then(|version| version.recipe_path.clone()),
        }
    });
    Ok(HubListing { hub: catalogue.location(), packages: packages.collect() })
}
