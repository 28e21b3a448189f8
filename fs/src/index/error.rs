//! Why bytes are not an index.

use crate::format::{KNOWN_FLAGS, MAX_BASES, PACK_VERSION};

/// Why bytes are not an index this crate will use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// A magic, version or length field is not what it must be.
    #[error("the index is malformed: {what}")]
    Malformed {
        /// Which part.
        what: &'static str,
    },
    /// A newer layout, or one with features this version lacks.
    #[error(
        "the index has layout {version} with flags {flags:#x}, this forkd reads {PACK_VERSION} with {KNOWN_FLAGS:#x}"
    )]
    Unsupported {
        /// Layout version.
        version: u32,
        /// Feature flags.
        flags: u32,
    },
    /// A delta of none, or of more packs than there may be.
    #[error("the index names {count} bases, a delta has 1 to {MAX_BASES}")]
    Bases {
        /// How many.
        count: usize,
    },
    /// A base breaks a rule.
    #[error("base {position} of the index is refused: {what}")]
    Base {
        /// Which one.
        position: u32,
        /// Which rule.
        what: &'static str,
    },
    /// A file entry breaks a rule.
    #[error("file {position} of the index is refused: {what}")]
    File {
        /// Which entry.
        position: u32,
        /// Which rule.
        what: &'static str,
    },
    /// A chunk record breaks a rule.
    #[error("chunk record {position} of the index is refused: {what}")]
    Record {
        /// Which record.
        position: u32,
        /// Which rule.
        what: &'static str,
    },
}
