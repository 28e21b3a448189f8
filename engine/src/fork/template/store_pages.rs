//! A pack's chunks as pages of a machine's images.

use super::quality::FaultCounts;
use crate::local::snapshots;
use crate::picture::timeline::EventRecorder;
use forkd_fs::index::{ChunkId as PackChunk, FileId};
use forkd_fs::store::{ChunkData, ReadError, Store};
use forkd_vmm::memory::ImageId;
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, SourceFailure};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;
use tokio::runtime::Handle;

/// A chunk that machines wait for and that will not come.
#[derive(Debug, Clone)]
pub struct UnavailableChunk {
    /// The chunk.
    pub chunk: ImageChunk,
    /// The machines that wait for it.
    pub waiters: Vec<ClientId>,
    /// Why, with causes.
    pub error: String,
}

/// The file of a pack behind each image.
pub(super) const IMAGE_FILES: [&str; 2] = [snapshots::MEMORY, snapshots::ROOT_DISK];

/// Supplies a pack's chunks to the pager.
pub(super) struct StorePages {
    pub(super) store: Arc<Store>,
    pub(super) runtime: Handle,
    pub(super) files: Vec<Option<FileId>>,
    pub(super) shapes: Vec<ImageShape>,
    pub(super) unavailable: Mutex<Vec<UnavailableChunk>>,
    pub(super) recorder: OnceLock<Arc<EventRecorder>>,
    pub(super) faults: FaultCounts,
}

impl StorePages {
    pub(super) fn pack_chunk(&self, chunk: ImageChunk) -> Option<PackChunk> {
        let file = self.files[chunk.image.index()]?;
        let number = u32::try_from(chunk.chunk).ok()?;
        // The image may be longer than the file: its rest is zero.
        (number < self.store.index().chunk_count(file)).then_some(PackChunk { file, chunk: number })
    }

    pub(super) fn is_zero(&self, chunk: ImageChunk) -> bool {
        self.pack_chunk(chunk).is_none_or(|chunk| self.store.index().is_zero(chunk))
    }

    /// A pack's chunk as the image has it. A file that ends in the middle of a chunk is followed by zeros: the image is
    /// as long as the device needs.
    pub(super) fn content(&self, chunk: ImageChunk, data: ChunkData) -> ChunkContent {
        let ChunkData::Data(bytes) = data else { return ChunkContent::Zero };
        let expected = self.shapes[chunk.image.index()].range(chunk.chunk);
        let expected = (expected.end - expected.start) as usize;
        let last = self
            .pack_chunk(chunk)
            .is_some_and(|chunk| chunk.chunk + 1 == self.store.index().chunk_count(chunk.file));
        if bytes.len() >= expected || !last {
            return ChunkContent::Data(bytes);
        }
        let mut whole = Vec::with_capacity(expected);
        whole.extend_from_slice(&bytes);
        whole.resize(expected, 0);
        ChunkContent::Data(whole.into())
    }

    pub(super) fn image_chunk(&self, chunk: PackChunk) -> Option<ImageChunk> {
        let position = self.files.iter().position(|file| *file == Some(chunk.file))?;
        Some(ImageChunk { image: ImageId::ALL[position], chunk: chunk.chunk.into() })
    }
}

impl PageSource for StorePages {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        let Some(wanted) = self.pack_chunk(chunk) else { return Ok(ChunkContent::Zero) };
        Ok(self.content(chunk, self.runtime.block_on(self.store.chunk(wanted))?))
    }

    fn unavailable(&self, chunk: ImageChunk, waiters: &[ClientId], failure: SourceFailure) {
        if matches!(failure.downcast_ref(), Some(ReadError::Stopped)) {
            // forkd is ending, and its machines with it.
            return;
        }
        let error = crate::chain::chain(&*failure);
        tracing::error!(?chunk, error, "a chunk that machines wait for cannot be had");
        let mut list = self.unavailable.lock().unwrap_or_else(PoisonError::into_inner);
        list.push(UnavailableChunk { chunk, waiters: waiters.to_vec(), error });
    }

    fn faulted(&self, _client: ClientId, image: ImageId, offset: u64) {
        self.faults.count(image, offset);
    }

    fn served(&self, chunk: ImageChunk, since: Instant, waiters: &[ClientId]) {
        if let Some(recorder) = self.recorder.get() {
            recorder.served(IMAGE_FILES[chunk.image.index()], chunk.chunk, since, waiters.len());
        }
    }
}
