//! Where a pack is, and what is known about it before it is opened.

use std::path::PathBuf;

use super::options::StoreOptions;
use crate::digest::Digest;
use crate::source::{FileSource, HttpSource, ReadDeadlines, Source, SourceError, redact_url};

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

    /// Its bytes, checked by nobody yet. Of a URL nothing is requested so far.
    pub fn source(&self, options: &StoreOptions) -> Result<Source, SourceError> {
        let deadlines =
            ReadDeadlines { demand: options.demand_deadline, prefetch: options.prefetch_deadline };
        match &self.source {
            PackSource::Url(url) => {
                let source = HttpSource::new(&options.http, url, self.size, deadlines)?;
                Ok(Source::Http(source.observed_by(options.observer.clone())))
            }
            PackSource::Path(path) => {
                Ok(Source::File(FileSource::open(path)?.observed_by(options.observer.clone())))
            }
        }
    }
}

/// The root of trust of a pack: its index frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexPin {
    /// Offset of the index frame in the pack.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its digest.
    pub sha256: Digest,
}
