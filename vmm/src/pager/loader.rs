//! Loading the chunks that machines wait for.

use super::error::PagerError;
use super::shared::Shared;
use super::source::ImageChunk;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

impl Shared {
    /// What a worker does until the pager ends.
    pub(super) fn load_chunks(&self) {
        loop {
            let mut state = self.lock();
            let chunk = loop {
                if state.stopping {
                    return;
                }
                match state.queue.pop_front() {
                    Some(chunk) => break chunk,
                    None => state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner),
                }
            };
            drop(state);
            if !self.is_present(chunk) {
                self.load_chunk(chunk);
            } else {
                self.finish(chunk);
            }
        }
    }

    fn load_chunk(&self, chunk: ImageChunk) {
        // A worker that died of a panic would leave its chunk to nobody.
        let loaded = catch_unwind(AssertUnwindSafe(|| {
            self.source.load(chunk).and_then(|content| Ok(self.fill(chunk, &content)?))
        }));
        match loaded.unwrap_or_else(|_| Err(PagerError::Panic.into())) {
            Ok(()) => {
                self.counters.demand.fetch_add(1, Ordering::Relaxed);
                self.finish(chunk);
            }
            Err(failure) => {
                let waiters = self.lock().wanted.get_mut(&chunk).map_or_else(Vec::new, |wanted| {
                    wanted.failed = true;
                    wanted.waiters.clone()
                });
                self.source.unavailable(chunk, &waiters, failure);
            }
        }
    }
}
