//! One version of one package, as a registry lists it.

use std::time::SystemTime;

use crate::digest::Digest;
use crate::store::PackLocation;

/// One version of one package, as a registry lists it.
#[derive(Debug, Clone)]
pub struct PackListing {
    /// First path component; a plain name.
    pub owner: String,
    /// Second path component; a plain name.
    pub name: String,
    /// Third path component; a plain name.
    pub version: String,
    /// Where the pack is.
    pub location: PackLocation,
    /// What the whole pack hashes to, from a registry. A pack of the predecessor has no other anchor of trust.
    pub sha256: Option<Digest>,
    /// Time shown for everything in it.
    pub modified: SystemTime,
}
