//! registry.json: from `owner/name[@version]` to where a pack is and what it must hash to.
//!
//! The schema is the Hub document's (`docs/HUB.md`), with optional fields of our own that pin a pack's index. Whatever
//! is not known is kept and ignored. A registry is outside input: its size is capped, names are plain names, and a
//! registry fetched over HTTP cannot make forkd read local files. Used by commands; written by `hub::publish`.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use forkd_fs::digest::Digest;
use forkd_fs::format::is_plain_name;
use forkd_fs::source::HttpError;
use forkd_fs::store::{IndexPin, PackLocation};
use serde::{Deserialize, Serialize};

mod address;
mod copies;

pub use address::HubAddress;
pub use copies::{Copy, RegistryCopies};

/// File name of a registry in its folder.
pub const FILE_NAME: &str = "registry.json";
/// The `schema_version` read and written.
pub const SCHEMA_VERSION: u64 = 1;
/// The version every package has, which moves.
pub const LATEST: &str = "latest";
/// Largest registry read, in bytes: thousands of packages. Parsed, one can take forty times as much memory.
pub const MAX_LEN: u64 = 4 << 20;

/// A registry.json.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Registry {
    /// [`SCHEMA_VERSION`].
    pub schema_version: u64,
    /// By `owner/name`.
    #[serde(default)]
    pub packages: BTreeMap<String, Package>,
    /// Fields this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// One package.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Package {
    /// One line for people.
    #[serde(default)]
    pub description: String,
    /// By version: `latest`, `v1`, ...
    #[serde(default)]
    pub versions: BTreeMap<String, Version>,
    /// Fields this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// One version of a package. Everything but `url` is optional.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Version {
    /// Where the pack is; may be relative to the registry's own URL.
    pub url: String,
    /// Digest of the whole pack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<String>,
    /// Size of the pack in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_bytes: Option<u64>,
    /// Guest memory in MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_mib: Option<u64>,
    /// What the root disk was made from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_image: Option<String>,
    /// The recipe that produced it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recipe_path: Option<String>,
    /// When the snapshot was taken, ISO 8601.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created_at: Option<String>,
    /// Release the pack is attached to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub release_tag: Option<String>,
    /// Ours: `forkd_pack_version` of the pack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pack_format: Option<u32>,
    /// Ours: bytes at the start of the pack that hold what a copy needs before its first instruction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head_size: Option<u64>,
    /// Ours: offset of the index frame in the pack.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_offset: Option<u64>,
    /// Ours: length of the index frame in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_size: Option<u64>,
    /// Ours: digest of the index frame.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub index_sha256: Option<String>,
    /// Fields this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// `owner/name`, both plain names.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PackageName {
    /// Before the slash.
    pub owner: String,
    /// After it.
    pub name: String,
}

/// `owner/name[@version]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference {
    /// The package.
    pub package: PackageName,
    /// The version, `latest` when none was given.
    pub version: String,
}

/// A text that names no package.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("`{text}` is not a package name")]
pub struct InvalidReference {
    /// The text.
    pub text: String,
}

impl std::fmt::Display for PackageName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.owner, self.name)
    }
}

impl std::fmt::Display for Reference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}@{}", self.package, self.version)
    }
}

impl FromStr for PackageName {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        match text.split_once('/') {
            Some((owner, name)) if is_plain_name(owner) && is_plain_name(name) => {
                Ok(PackageName { owner: owner.to_owned(), name: name.to_owned() })
            }
            _ => Err(InvalidReference { text: text.to_owned() }),
        }
    }
}

impl FromStr for Reference {
    type Err = InvalidReference;

    fn from_str(text: &str) -> Result<Self, InvalidReference> {
        let invalid = || InvalidReference { text: text.to_owned() };
        let (package, version) = text.split_once('@').unwrap_or((text, LATEST));
        if !is_plain_name(version) {
            return Err(invalid());
        }
        Ok(Reference { package: package.parse().map_err(|_| invalid())?, version: version.to_owned() })
    }
}

/// Why there is no registry to read, or none that can be used.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// No hub was named and none lies in the working directory.
    #[error("no hub was named and there is no ./{FILE_NAME}")]
    NoHub,
    /// The hub's address is none.
    #[error("`{address}` is neither an http, https or file URL nor a path")]
    Address {
        /// What was given.
        address: String,
    },
    /// The registry cannot be fetched.
    #[error(transparent)]
    Fetch(#[from] HttpError),
    /// The registry file cannot be read.
    #[error("{}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// It is larger than any registry should be.
    #[error("{location} is longer than the {MAX_LEN} bytes that are read of a registry")]
    TooLong {
        /// Path of the registry.
        location: String,
    },
    /// It is not the JSON expected.
    #[error("{location} is not a registry")]
    Syntax {
        /// URL or path of the registry.
        location: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Another schema.
    #[error("{location} has schema_version {found}, this forkd reads {SCHEMA_VERSION}")]
    Schema {
        /// URL or path of the registry.
        location: String,
        /// What it says.
        found: u64,
    },
    /// No such package.
    #[error("{location} lists no package {package}")]
    UnknownPackage {
        /// URL or path of the registry.
        location: String,
        /// What was asked for.
        package: PackageName,
        /// Names that look alike, best first.
        near: Vec<String>,
    },
    /// The package has no such version.
    #[error("{location} lists no version {version} of {package}")]
    UnknownVersion {
        /// URL or path of the registry.
        location: String,
        /// The package.
        package: PackageName,
        /// What was asked for.
        version: String,
        /// What there is.
        versions: Vec<String>,
    },
    /// The entry cannot be used.
    #[error("the entry of {reference} in {location} cannot be used: {what}")]
    Entry {
        /// URL or path of the registry.
        location: String,
        /// The package and version.
        reference: Reference,
        /// What is wrong with it.
        what: &'static str,
    },
}

/// Reads a registry file, refusing one that is too long before it is in memory.
pub fn read_capped(path: &Path) -> Result<Vec<u8>, RegistryError> {
    let failed = |source| RegistryError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(MAX_LEN + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_LEN {
        return Err(RegistryError::TooLong { location: path.display().to_string() });
    }
    Ok(bytes)
}

impl Registry {
    /// Reads and checks a registry; `location` is for messages.
    pub fn parse(bytes: &[u8], location: &str) -> Result<Registry, RegistryError> {
        let registry: Registry = serde_json::from_slice(bytes)
            .map_err(|source| RegistryError::Syntax { location: location.to_owned(), source })?;
        if registry.schema_version != SCHEMA_VERSION {
            return Err(RegistryError::Schema {
                location: location.to_owned(),
                found: registry.schema_version,
            });
        }
        Ok(registry)
    }
}

/// A registry and where it came from.
#[derive(Debug, Clone)]
pub struct Catalogue {
    registry: Registry,
    address: HubAddress,
}

/// What a reference leads to.
#[derive(Debug, Clone)]
pub struct Resolved {
    /// The package and the version asked for.
    pub reference: Reference,
    /// The registry's entry.
    pub entry: Version,
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

    /// Every usable entry, sorted by name and version. Names that are not plain are left out: nothing can refer to
    /// them, and they have no business in a directory listing.
    pub fn entries(&self) -> impl Iterator<Item = Result<Resolved, RegistryError>> {
        self.registry.packages.iter().flat_map(move |(name, package)| {
            let package_name: Option<PackageName> = name.parse().ok();
            package.versions.iter().filter_map(move |(version, entry)| {
                let package = package_name.clone().filter(|_| is_plain_name(version))?;
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
        let same = |(version, other): &(&String, &Version)| {
            let digest = entry.sha256.as_deref().filter(|digest| !digest.is_empty());
            let is_same = other.url == entry.url || (digest.is_some() && other.sha256.as_deref() == digest);
            *version != LATEST && is_plain_name(version) && is_same
        };
        let stays = known.into_iter().flat_map(|package| &package.versions).find(same);
        let version =
            stays.filter(|_| reference.version == LATEST).map_or(&reference.version, |(name, _)| name);
        Reference { package: reference.package.clone(), version: version.clone() }
    }

    fn located(&self, reference: Reference, entry: &Version) -> Result<Resolved, RegistryError> {
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
fn pin(entry: &Version) -> Result<Option<IndexPin>, &'static str> {
    match (entry.index_offset, entry.index_size, entry.index_sha256.as_deref()) {
        (None, None, None) => Ok(None),
        (Some(offset), Some(length), Some(sha256)) => {
            let sha256: Digest = sha256.parse().map_err(|_| "its index_sha256 is no sha256")?;
            Ok(Some(IndexPin { offset, length, sha256 }))
        }
        _ => Err("it has some of index_offset, index_size and index_sha256, but not all"),
    }
}

/// An entry's digest of the whole pack; an empty text means none, as in the Hub document's template.
pub fn whole_digest(entry: &Version) -> Option<Result<Digest, forkd_fs::digest::InvalidDigest>> {
    entry.sha256.as_deref().filter(|text| !text.is_empty()).map(str::parse)
}

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
