//! registry.json: from `owner/name[@version]` to where a pack is and what it must hash to.
//!
//! The schema is the Hub document's (`docs/HUB.md`), with optional fields of our own that pin a pack's index. Whatever
//! is not known is kept and ignored. A registry is outside input: its size is capped, names are plain names, and a
//! registry fetched over HTTP cannot make forkd read local files.

mod address;
mod catalogue;
mod copies;
mod format;
mod load;

pub use address::HubAddress;
pub use catalogue::{Catalogue, Resolved};
pub use copies::{RegistryCopies, RegistryCopy};
pub use format::{
    FILE_NAME, MAX_LEN, Package, PackageVersion, Registry, RegistryError, SCHEMA_VERSION, read_capped,
    whole_digest,
};

#[cfg(test)]
#[path = "registry_tests.rs"]
mod tests;
