//! A registry with its address: what its references lead to.

use forkd_fs::digest::Digest;
use forkd_fs::format::is_plain_name;
use forkd_fs::store::{IndexPin, PackLocation};

use super::address::HubAddress;
use super::format::{PackageVersion, Registry, RegistryError};
use crate::reference::{LATEST, PackageName, Reference};

/// A registry and where it came from.
#[derive(Debug, Clone)]
pub struct Catalogue {
    pub(super) registry: Registry,
    pub(super) address: HubAddress,
}

/// What a reference leads to.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The package and the version asked for.
    pub reference: Reference,
    /// The registry's entry.
    pub entry: PackageVersion,
    /// Where the pack is, with the pin of its index when the registry has one.
    pub location: PackLocation,
}

impl Catalogue {
    /// Its URL or path, for messages.
    pub fn location(&self) -> String {
        self.address.to_string()
    }

    /// Where it is.
    pub fn address(&self) -> &HubAddress {
        &self.address
    }

    /// The registry as read.
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Every usable entry, sorted by name and version. Left out are names that are not plain, because nothing can refer to
    /// them and they have no business in a directory listing, and packs that are hosted nowhere.
    pub fn entries(&self) -> impl Iterator<Item = Result<Resolved, RegistryError>> {
        self.registry.packages.iter().flat_map(move |(name, package)| {
            let package_name: Option<PackageName> = name.parse().ok();
            package.versions.iter().filter_map(move |(version, entry)| {
                let package = package_name.clone().filter(|_| is_plain_name(version) && entry.is_hosted())?;
                Some(self.located(Reference { package, version: version.clone() }, entry))
            })
        })
    }

    /// What `reference` leads to.
    pub fn resolve(&self, reference: &Reference) -> Result<Resolved, RegistryError> {
        let (package, location) = (&reference.package, self.location());
        let Some(found) = self.registry.packages.get(&package.to_string()) else {
            let near = self.near(package);
            return Err(RegistryError::UnknownPackage { location, package: package.clone(), near });
        };
        let Some(entry) = found.versions.get(&reference.version) else {
            let versions = found.versions.keys().cloned().collect();
            let (package, version) = (package.clone(), reference.version.clone());
            return Err(RegistryError::UnknownVersion { location, package, version, versions });
        };
        self.located(reference.clone(), entry)
    }

    /// The reference of a pack by a version that stays, where [`LATEST`], which moves, is the same pack as one.
    pub fn settled(&self, resolved: &Resolved) -> Reference {
        let Resolved { reference, entry, .. } = resolved;
        let known = self.registry.packages.get(&reference.package.to_string());
        let same = |(version, other): &(&String, &PackageVersion)| {
            let digest = entry.sha256.as_deref().filter(|digest| !digest.is_empty());
            let is_same = other.url == entry.url || (digest.is_some() && other.sha256.as_deref() == digest);
            *version != LATEST && is_plain_name(version) && is_same
        };
        let stays = known.into_iter().flat_map(|package| &package.versions).find(same);
        let version =
            stays.filter(|_| reference.version == LATEST).map_or(&reference.version, |(name, _)| name);
        Reference { package: reference.package.clone(), version: version.clone() }
    }

    fn located(&self, reference: Reference, entry: &PackageVersion) -> Result<Resolved, RegistryError> {
        if !entry.is_hosted() {
            let (location, recipe) = (self.location(), entry.recipe_path.clone());
            return Err(RegistryError::NotHosted { location, reference: Box::new(reference), recipe });
        }
        let location = pin(entry).and_then(|index| {
            let source = self.address.join(&entry.url)?;
            Ok(PackLocation { source, size: entry.size_bytes, index })
        });
        match location {
            Ok(location) => Ok(Resolved { reference, entry: entry.clone(), location }),
            Err(what) => Err(RegistryError::Entry { location: self.location(), reference, what }),
        }
    }

    /// Up to three packages whose names look like `wanted`.
    fn near(&self, wanted: &PackageName) -> Vec<String> {
        let full = wanted.to_string();
        let mut scored: Vec<(f64, &String)> = (self.registry.packages.keys())
            .filter_map(|key| {
                let name = key.split_once('/')?.1;
                // The right name under another owner is the likeliest slip.
                let score = strsim::jaro_winkler(key, &full).max(strsim::jaro_winkler(name, &wanted.name));
                (score > 0.8).then_some((score, key))
            })
            .collect();
        scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
        scored.into_iter().take(3).map(|(_, key)| key.clone()).collect()
    }
}

/// The pin of an entry's index: all three fields, or none.
fn pin(entry: &PackageVersion) -> Result<Option<IndexPin>, &'static str> {
    match (entry.index_offset, entry.index_size, entry.index_sha256.as_deref()) {
        (None, None, None) => Ok(None),
        (Some(offset), Some(length), Some(sha256)) => {
            let sha256: Digest = sha256.parse().map_err(|_| "its index_sha256 is no sha256")?;
            Ok(Some(IndexPin { offset, length, sha256 }))
        }
        _ => Err("it has some of index_offset, index_size and index_sha256, but not all"),
    }
}
