//! The file registry.json: what is in it, and reading it.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use forkd_fs::digest::Digest;
use forkd_fs::source::HttpError;
use serde::{Deserialize, Serialize};

use crate::reference::{LATEST, PackageName, Reference};

/// File name of a registry in its folder.
pub const FILE_NAME: &str = "registry.json";
/// The `schema_version` read and written.
pub const SCHEMA_VERSION: u64 = 1;
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
    pub versions: BTreeMap<String, PackageVersion>,
    /// Fields this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

/// One version of a package. Without a `url` it is hosted nowhere, and has to be built from its recipe.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct PackageVersion {
    /// Where the pack is; may be relative to the registry's own URL. Empty while it is hosted nowhere.
    #[serde(default, skip_serializing_if = "String::is_empty")]
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
    /// Ours: digests of the indexes of the packs without which a delta is not whole, its base first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub bases: Vec<String>,
    /// Fields this version does not know.
    #[serde(flatten)]
    pub other: BTreeMap<String, serde_json::Value>,
}

impl Package {
    /// What [`LATEST`] is, or else the last version by name.
    pub fn newest(&self) -> Option<&PackageVersion> {
        self.versions.get(LATEST).or(self.versions.values().next_back())
    }
}

impl PackageVersion {
    /// Whether its pack can be had; otherwise it has to be built from its recipe.
    pub fn is_hosted(&self) -> bool {
        !self.url.is_empty()
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
    /// The pack is hosted nowhere.
    #[error("{location} lists {reference}, but its pack is hosted nowhere")]
    NotHosted {
        /// URL or path of the registry.
        location: String,
        /// The package and version.
        reference: Box<Reference>,
        /// The recipe it is built from, as the registry spells it.
        recipe: Option<String>,
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

/// An entry's digest of the whole pack; an empty text means none, as in the Hub document's template.
pub fn whole_digest(entry: &PackageVersion) -> Option<Result<Digest, forkd_fs::digest::InvalidDigest>> {
    entry.sha256.as_deref().filter(|text| !text.is_empty()).map(str::parse)
}
