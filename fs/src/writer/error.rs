//! Why a pack cannot be built.

use std::io;
use std::path::PathBuf;

use crate::store::ReadError;

/// Why a pack could not be built.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The chunk size is not one the format allows.
    #[error("{chunk_size} is not a chunk size: take a power of two from 65536 to 4194304")]
    ChunkSize {
        /// What was asked for.
        chunk_size: u32,
    },
    /// A file whose name a pack cannot hold, or too many files.
    #[error("{} cannot go into a pack: {reason}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: &'static str,
    },
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// A file changed between the passes.
    #[error("{} changed while it was being packed", path.display())]
    Changed {
        /// The file.
        path: PathBuf,
    },
    /// The pack cannot be written.
    #[error("cannot write the pack {}", path.display())]
    Write {
        /// The pack.
        path: PathBuf,
        /// The system's reason.
        #[source]
        source: io::Error,
    },
    /// More stored chunks than an index may hold: a larger chunk size helps.
    #[error(
        "the pack would hold {chunks} stored chunks, which is too many for its index; take a larger chunk size"
    )]
    TooManyChunks {
        /// How many.
        chunks: usize,
    },
    /// The base of a delta is cut in other pieces.
    #[error("the base has chunks of {base} bytes, and a delta of it cannot have any of {chunk_size}")]
    BaseChunkSize {
        /// What was asked for.
        chunk_size: u32,
        /// What the base has.
        base: u32,
    },
    /// The base of a delta cannot be read.
    #[error("cannot read the base")]
    Base(#[source] Box<ReadError>),
    /// The compressor refused its level or failed.
    #[error("cannot compress")]
    Compress(#[source] io::Error),
}
