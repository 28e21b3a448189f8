//! Decoded chunks kept in memory.

use std::num::NonZeroUsize;
use std::sync::Mutex;

use bytes::Bytes;
use lru::LruCache;

/// Plain chunks kept in memory by record number, the longest unused going first.
#[derive(Debug)]
pub(super) struct Decoded {
    budget: usize,
    kept: Mutex<(LruCache<u32, Bytes>, usize)>,
}

impl Decoded {
    pub(super) fn new(budget: usize) -> Self {
        Self { budget, kept: Mutex::new((LruCache::sparse(NonZeroUsize::MAX), 0)) }
    }

    pub(super) fn clear(&self) {
        let (kept, bytes) = &mut *self.kept.lock().expect("no panics while held");
        kept.clear();
        *bytes = 0;
    }

    pub(super) fn get(&self, record: u32) -> Option<Bytes> {
        self.kept.lock().expect("no panics while held").0.get(&record).cloned()
    }

    pub(super) fn put(&self, record: u32, plain: &Bytes) {
        let (kept, bytes) = &mut *self.kept.lock().expect("no panics while held");
        *bytes += plain.len();
        *bytes -= kept.put(record, plain.clone()).map_or(0, |old| old.len());
        while *bytes > self.budget
            && let Some((_, old)) = kept.pop_lru()
        {
            *bytes -= old.len();
        }
    }
}
