//! Where a pack is, and what is known about it before it is opened.

use std::path::PathBuf;

use crate::index::IndexPin;
use crate::source::redact_url;

/// Where a pack is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PackSource {
    /// An http(s) URL.
    Url(String),
    /// A local file.
    Path(PathBuf),
}

/// A pack and what is known about it before it is opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PackLocation {
    /// Where it is.
    pub source: PackSource,
    /// Its size in bytes, from a registry.
    pub size: Option<u64>,
    /// Where its index is and what it must hash to, from a registry. Saves requests and anchors trust.
    pub index: Option<IndexPin>,
}

impl PackLocation {
    /// What messages call it: the path, or the URL without what may be secret in it.
    pub fn describe(&self) -> String {
        match &self.source {
            PackSource::Url(url) => redact_url(url),
            PackSource::Path(path) => path.display().to_string(),
        }
    }
}
