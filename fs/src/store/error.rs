//! Why a pack cannot be opened or read.

use std::sync::Arc;

use crate::digest::Digest;
use crate::index::IndexError;
use crate::manifest::ManifestError;
use crate::source::SourceError;

/// Why a pack could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The bytes could not be had.
    #[error("cannot open the pack {location}")]
    Source {
        /// URL or path.
        location: String,
        /// Why.
        #[source]
        source: SourceError,
    },
    /// The predecessor's layout: readable as a whole only.
    #[error("{location} is a pack of layout {version}, which cannot be read in part")]
    Legacy {
        /// URL or path.
        location: String,
        /// Its forkd_pack_version.
        version: u32,
    },
    /// A v3 pack without its end.
    #[error("the pack {location} is cut short: it has {size} bytes and no index at its end")]
    Truncated {
        /// URL or path.
        location: String,
        /// The size it has.
        size: u64,
    },
    /// Not a pack at all.
    #[error("{location} is not a forkd pack")]
    NotAPack {
        /// URL or path.
        location: String,
    },
    /// The index is not the one that was pinned.
    #[error("the index of {location} has sha256 {found}, the registry says {expected}")]
    IndexDigest {
        /// URL or path.
        location: String,
        /// What the registry says.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
    },
    /// The pack is a delta, and what it builds on is nowhere.
    #[error(
        "{location} is a delta of a pack that is nowhere to be found: index sha256 {base}{}",
        told(tried)
    )]
    NoBase {
        /// URL or path of the delta.
        location: String,
        /// Digest of the missing pack's index.
        base: Digest,
        /// Where the missing pack was when the delta was made: a URL, a file's name, or nothing. The delta says so.
        hint: String,
        /// Where it was looked for, and why it was not had there.
        tried: Vec<String>,
    },
    /// The pack is a delta, and where its base was is another pack.
    #[error(
        "{location} is a delta of the pack with index sha256 {base}; {place} is another one (index sha256 {found})"
    )]
    BaseReplaced {
        /// URL or path of the delta.
        location: String,
        /// Digest of the missing pack's index.
        base: Digest,
        /// URL or path of the other pack.
        place: String,
        /// What hashes to where the index should be.
        found: Digest,
    },
    /// The index breaks the format's rules.
    #[error("the index of {location} cannot be used")]
    Index {
        /// URL or path.
        location: String,
        /// Which rule.
        #[source]
        source: IndexError,
    },
}

fn told(tried: &[String]) -> String {
    if tried.is_empty() { String::new() } else { format!(" (tried {})", tried.join("; ")) }
}

/// Why a read failed. Cheap to clone: everyone waiting for the same chunk gets it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The bytes could not be had.
    #[error("cannot read chunk {chunk} of {file}")]
    Source {
        /// The file.
        file: String,
        /// Which chunk.
        chunk: u32,
        /// Why.
        #[source]
        source: Arc<SourceError>,
    },
    /// The chunk lies in a base that is nowhere, and is no longer in the disk cache.
    #[error("chunk {chunk} of {file} is in a pack that is nowhere to be found: index sha256 {base}")]
    NoBase {
        /// The file.
        file: String,
        /// Which chunk.
        chunk: u32,
        /// Digest of the missing pack's index.
        base: Digest,
    },
    /// The bytes were had twice and are not the ones the index vouches for.
    #[error("chunk {chunk} of {file} from {location} is corrupt: sha256 {found}, the index says {expected}")]
    Corrupt {
        /// The file.
        file: String,
        /// Which chunk.
        chunk: u32,
        /// What the index says.
        expected: Digest,
        /// What the bytes hash to.
        found: Digest,
        /// URL or path of the pack.
        location: String,
    },
    /// The frame is the one the index vouches for, yet does not decode to the chunk's length: the pack was built wrong.
    #[error("chunk {chunk} of {file} from {location} does not decode to {plain_len} bytes")]
    Decode {
        /// The file.
        file: String,
        /// Which chunk.
        chunk: u32,
        /// URL or path of the pack.
        location: String,
        /// What it should decode to.
        plain_len: u32,
    },
    /// No such file in the pack.
    #[error("the pack has no file {name}")]
    NoSuchFile {
        /// Its name.
        name: String,
    },
    /// A chunk past the end of its file, or an id of another pack.
    #[error("the pack has no chunk {chunk} in file {file}")]
    NoSuchChunk {
        /// Position of the file.
        file: u32,
        /// Which chunk.
        chunk: u32,
    },
    /// A file too large to be read whole.
    #[error("{name} has {size} bytes, at most {limit} are read at once")]
    TooLarge {
        /// The file.
        name: String,
        /// Its size.
        size: u64,
        /// The caller's limit.
        limit: u64,
    },
    /// The manifest cannot be used.
    #[error("the pack's manifest cannot be used")]
    Manifest(#[source] Arc<ManifestError>),
    /// The runtime is shutting down.
    #[error("the read was abandoned because forkd is stopping")]
    Stopped,
}
