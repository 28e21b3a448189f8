//! The working set's pages that a pack stores by themselves, and how they get into images.

use super::store_pages::{IMAGE_FILES, StorePages};
use crate::local::snapshots;
use forkd_fs::index::{ChunkId as PackChunk, FileId};
use forkd_fs::prefetch;
use forkd_fs::store::{ChunkData, Store};
use forkd_fs::trace::Trace;
use forkd_vmm::memory::{ImageId, PAGE_BYTES};
use forkd_vmm::pager::{ImageChunk, Pager};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Largest `hotset` that is used as a whole, bytes: a working set beyond that is better fetched by chunks.
const HOTSET_MAX: u64 = 256 << 20;
/// Bytes of the `hotset` that are asked for before the trace says how many are needed first.
const GUESSED_BYTES: u64 = 1 << 20;

/// Asks for the first hot pages together with the small members, when they do not come with the index. What is asked for now
/// is not asked for again.
pub(super) fn ask_early(store: &Arc<Store>) {
    let Some(file) = store.index().file(snapshots::HOTSET) else { return };
    if !store.is_in_head(PackChunk { file, chunk: 0 }) {
        let store = Arc::clone(store);
        // Whoever needs them sees the error.
        tokio::spawn(async move { drop(store.read(file, 0, GUESSED_BYTES).await) });
    }
}

/// The pages that a fork touches up to its first answer, stored together in the pack's `hotset`: installed one by one, they
/// cost a tenth of the chunks they lie in.
pub(super) struct HotPages {
    pub(super) file: FileId,
    /// Otherwise only its first chunks are.
    used_whole: bool,
    /// Chunks that are used.
    chunks: u32,
    /// Those of them with the pages that are touched before the first instruction.
    first_chunks: u32,
    pages_per_chunk: usize,
    pages: Vec<(ImageId, u32)>,
    /// Which chunks have come.
    installed: Vec<AtomicBool>,
}

impl HotPages {
    /// The hot pages, if the pack has them and they fit its trace and images.
    pub(super) fn of_pack(pages: &StorePages, trace: &Trace) -> Option<HotPages> {
        let index = pages.store.index();
        let file = index.file(snapshots::HOTSET)?;
        let size = index.entry(file)?.size;
        let first_chunks = prefetch::first_hot_chunks(index, trace);
        if first_chunks == 0 {
            return None;
        }
        let used_whole = size <= HOTSET_MAX;
        let chunks = if used_whole { index.chunk_count(file) } else { first_chunks };
        let image_of =
            |name: &str| IMAGE_FILES.iter().position(|file| *file == name).map(|at| ImageId::ALL[at]);
        let images: Vec<_> =
            trace.regions.iter().map(|region| image_of(&region.file)).collect::<Option<_>>()?;
        let listed = trace.pages().map(|(region, page)| (images[region], page));
        let in_image = |(image, page): (ImageId, u32)| {
            let file = pages.files.get(image.index()).copied().flatten()?;
            (u64::from(page) < index.entry(file)?.size / PAGE_BYTES).then_some((image, page))
        };
        let pages_per_chunk = index.chunk_size() as usize / PAGE_BYTES as usize;
        let used = chunks as usize * pages_per_chunk;
        Some(HotPages {
            file,
            used_whole,
            chunks,
            first_chunks,
            pages_per_chunk,
            pages: listed.take(used).map(in_image).collect::<Option<_>>()?,
            installed: (0..chunks).map(|_| AtomicBool::new(false)).collect(),
        })
    }

    /// The chunks that children wait for before they start.
    pub(super) fn first(&self) -> Vec<PackChunk> {
        self.chunks_in(0..self.first_chunks)
    }

    /// What is left to fetch: neighbours, which come in one stream. `None` where the rest of the working set is to come by
    /// chunks.
    pub(super) fn rest(&self) -> Option<Vec<PackChunk>> {
        self.used_whole.then(|| self.chunks_in(self.first_chunks..self.chunks))
    }

    fn chunks_in(&self, range: Range<u32>) -> Vec<PackChunk> {
        range.map(|chunk| PackChunk { file: self.file, chunk }).collect()
    }

    pub(super) fn install_chunk(&self, pager: &Pager, pages: &StorePages, chunk: u32, data: &ChunkData) {
        let ChunkData::Data(bytes) = data else { return };
        if let Some(installed) = self.installed.get(chunk as usize) {
            installed.store(true, Ordering::Relaxed);
        }
        let chunk_bytes = self.pages_per_chunk as u64 * PAGE_BYTES;
        let listed = self.pages.iter().skip(chunk as usize * self.pages_per_chunk);
        let mut touched = Vec::new();
        for ((image, page), bytes) in listed.zip(bytes.chunks_exact(PAGE_BYTES as usize)) {
            let offset = u64::from(*page) * PAGE_BYTES;
            let id = ImageChunk { image: *image, chunk: offset / chunk_bytes };
            // Children have their own zeros there.
            if pages.is_zero(id) || pager.is_present(id) {
                continue;
            }
            if let Err(error) = pager.install_pages(*image, offset, bytes) {
                tracing::error!(?id, %error, "a page could not be put in place; it is loaded when it is needed");
            }
            touched.push(id);
        }
        touched.dedup();
        touched.into_iter().for_each(|id| pager.wake_waiters(id));
    }

    /// The pages that have been fetched.
    pub(super) fn fetched(&self) -> Vec<(ImageId, u32)> {
        let chunks = self.pages.chunks(self.pages_per_chunk).zip(&self.installed);
        let fetched = chunks.filter(|(_, installed)| installed.load(Ordering::Relaxed));
        fetched.flat_map(|(pages, _)| pages).copied().collect()
    }
}
