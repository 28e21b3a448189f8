//! What the pager asks for: the content of images, chunk by chunk.

use crate::memory::ImageId;
use bytes::Bytes;
use std::error::Error;
use std::time::Instant;

/// One chunk of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ImageChunk {
    /// The image.
    pub image: ImageId,
    /// Chunk number: offset divided by the image's chunk size.
    pub chunk: u64,
}

/// What a chunk holds.
#[derive(Debug, Clone)]
pub enum ChunkContent {
    /// Nothing but zeros.
    Zero,
    /// These bytes: exactly as many as the chunk has, or it counts as not loaded.
    Data(Bytes),
}

/// Why a source gave up on a chunk.
pub type SourceFailure = Box<dyn Error + Send + Sync>;

/// Where the content of images comes from. Called from the pager's worker threads; calls may block for long.
pub trait PageSource: Send + Sync {
    /// The content of one chunk. An error is final: retrying is the source's own business.
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure>;

    /// A chunk that these machines wait for will not come. They stay asleep; the owner must end them. Whoever asks
    /// for the chunk later has it tried again.
    fn unavailable(&self, chunk: ImageChunk, waiters: &[ClientId], failure: SourceFailure);

    /// A machine needs the page at `offset` of an image, whose chunk is not there. For whoever counts; called by the
    /// thread that reads faults, so it must be quick.
    fn faulted(&self, _client: ClientId, _image: ImageId, _offset: u64) {}

    /// A chunk has come that these machines have waited for since the first of them asked. For whoever measures.
    fn served(&self, _chunk: ImageChunk, _since: Instant, _waiters: &[ClientId]) {}
}

/// A machine that the pager serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u64);
