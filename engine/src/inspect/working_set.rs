//! What a pack's recorded working set is and what it weighs.

use std::ops::Range;
use std::sync::Arc;

use forkd_fs::format::{HOTSET, TRACE};
use forkd_fs::index::ChunkId;
use forkd_fs::prefetch;
use forkd_fs::store::{ReadError, Store};
use forkd_fs::trace::{MAX_TRACE_LEN, Trace, bucket_name};
use serde::Serialize;

/// A recorded working set, and the chunks it lies in.
pub(super) struct WorkingSet {
    trace: Trace,
    /// By bucket; each chunk in the first one that touches it.
    pub(super) chunks: Vec<Vec<ChunkId>>,
}

/// What `--json` says of it.
#[derive(Debug, Serialize)]
pub struct WorkingSetWeight {
    /// Pages of 4 KiB.
    pub pages: u64,
    /// The same in bytes.
    pub page_bytes: u64,
    /// Stored chunks they lie in.
    pub chunks: u64,
    /// Stored bytes of these chunks.
    pub chunk_bytes: u64,
    /// Their share of the pack.
    pub chunk_share: f64,
    /// Stored bytes of the pages by themselves (`hotset`); null in a pack without.
    pub hotset_bytes: Option<u64>,
    /// Their share of the pack.
    pub hotset_share: Option<f64>,
    /// By the part of a fork's life in which they are touched first.
    pub buckets: Vec<WorkingSetBucket>,
}

/// One bucket: what is touched first in that part of a fork's life.
#[derive(Debug, Serialize)]
pub struct WorkingSetBucket {
    /// Which part.
    pub name: String,
    /// Pages of 4 KiB.
    pub pages: u64,
    /// Chunks that no bucket before touches.
    pub chunks: u64,
    /// Their stored bytes.
    pub chunk_bytes: u64,
    /// Their share of the pack.
    pub chunk_share: f64,
}

impl WorkingSet {
    /// Reads it. A trace that is missing, empty or cannot be read leaves nothing to tell: it is a hint, and forks do without.
    pub(super) async fn read(store: &Arc<Store>) -> Result<Option<WorkingSet>, ReadError> {
        let index = store.index();
        let size = index.file(TRACE).and_then(|file| index.entry(file)).map_or(0, |entry| entry.size);
        if size == 0 || size > MAX_TRACE_LEN {
            return Ok(None);
        }
        let bytes = store.read_files(&[TRACE], MAX_TRACE_LEN).await?.remove(0);
        let Ok(trace) = Trace::decode(&bytes) else { return Ok(None) };
        let chunks = prefetch::plan(index, &trace);
        Ok(Some(WorkingSet { trace, chunks }))
    }

    /// Weighs it.
    pub(super) fn report(&self, store: &Store) -> WorkingSetWeight {
        let index = store.index();
        let weigh = |chunks: &[ChunkId]| {
            let records = chunks.iter().filter_map(|chunk| index.record(*chunk));
            records.map(|record| u64::from(record.length)).sum::<u64>()
        };
        let pack = index.pack_size();
        let bucket = |(at, chunks): (usize, &Vec<ChunkId>)| WorkingSetBucket {
            name: bucket_name(at),
            pages: self.pages(at..at + 1),
            chunks: chunks.len() as u64,
            chunk_bytes: weigh(chunks),
            chunk_share: share(weigh(chunks), pack),
        };
        let buckets: Vec<_> = self.chunks.iter().enumerate().map(bucket).collect();
        let pages = self.pages(0..self.chunks.len());
        let hotset = index.file(HOTSET).map(|file| index.stats(file).stored_bytes);
        let chunk_bytes = buckets.iter().map(|bucket| bucket.chunk_bytes).sum();
        WorkingSetWeight {
            pages,
            page_bytes: pages * forkd_fs::trace::PAGE_SIZE,
            chunks: buckets.iter().map(|bucket| bucket.chunks).sum(),
            chunk_bytes,
            chunk_share: share(chunk_bytes, pack),
            hotset_bytes: hotset,
            hotset_share: hotset.map(|bytes| share(bytes, pack)),
            buckets,
        }
    }

    /// Different pages that some of the buckets name.
    fn pages(&self, buckets: Range<usize>) -> u64 {
        let ranges = self.trace.regions.iter().flat_map(|region| region.page_ranges(buckets.clone()));
        ranges.map(|range| u64::from(range.end - range.start)).sum()
    }
}

/// What part of `whole` is; 0 when there is no whole.
pub(super) fn share(part: u64, whole: u64) -> f64 {
    if whole == 0 { 0.0 } else { part as f64 / whole as f64 }
}
