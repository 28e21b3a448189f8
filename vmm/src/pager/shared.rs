//! What the pager's threads share: the images, and who waits for which chunk.

use super::client::Client;
use super::error::{Misconduct, PagerError, PagerFailure};
use super::image::Image;
use super::source::{ChunkContent, ClientId, ImageChunk, PageSource};
use crate::uffd::{Uffd, UffdReads};
use rustix::fd::OwnedFd;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

#[derive(Default)]
pub(super) struct ChunkWait {
    pub(super) waiters: Vec<ClientId>,
    pub(super) since: Option<Instant>,
    pub(super) failed: bool,
}

#[derive(Default)]
pub(super) struct State {
    pub(super) clients: HashMap<ClientId, Client>,
    pub(super) wanted: HashMap<ImageChunk, ChunkWait>,
    pub(super) queue: VecDeque<ImageChunk>,
    pub(super) misconduct: Vec<(ClientId, Misconduct)>,
    pub(super) failure: Option<PagerFailure>,
    pub(super) stopping: bool,
    pub(super) complete: bool,
}

impl State {
    pub(super) fn is_running(&self, client: ClientId) -> bool {
        self.clients.get(&client).is_some_and(|client| !client.ended)
    }
}

#[derive(Default)]
pub(super) struct Counters {
    pub(super) faults: AtomicU64,
    pub(super) faults_on_present: AtomicU64,
    pub(super) demand: AtomicU64,
    pub(super) installed: AtomicU64,
}

pub(super) struct Shared {
    pub(super) images: Vec<Image>,
    pub(super) uffd: Uffd,
    pub(super) source: Arc<dyn PageSource>,
    pub(super) epoll: OwnedFd,
    pub(super) reading: UffdReads,
    pub(super) state: Mutex<State>,
    pub(super) work: Condvar,
    pub(super) counters: Counters,
}

impl Shared {
    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        // A panicking worker leaves the tables consistent: each change is a single insert or remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn is_present(&self, chunk: ImageChunk) -> bool {
        self.images.get(chunk.image.index()).is_some_and(|image| image.is_present(chunk.chunk))
    }

    pub(super) fn unregister(&self, client: &Client) {
        for (image, base) in self.images.iter().zip(&client.bases) {
            // A machine that has just ended has nothing to unregister.
            if let Err(error) = client.uffd.unregister(*base, image.shape.bytes) {
                tracing::debug!(%error, "unregistering an ended machine");
            }
        }
    }

    pub(super) fn fail(&self, failure: PagerFailure) {
        self.lock().failure.get_or_insert(failure);
    }

    pub(super) fn note_damage(&self, filled: Result<(), PagerError>) -> Result<(), PagerError> {
        if let Err(PagerError::Damaged(damaged)) = &filled {
            self.fail(PagerFailure::Damaged(*damaged));
        }
        filled
    }

    pub(super) fn wake(&self, uffd: &Uffd, bases: &[u64], chunk: ImageChunk) {
        let image = &self.images[chunk.image.index()];
        let range = image.shape.range(chunk.chunk);
        if let Some(base) = bases.get(chunk.image.index())
            && let Err(error) = uffd.wake(base + range.start, range.end - range.start)
        {
            tracing::debug!(%error, "waking an ended machine");
        }
    }

    /// Puts content into the image. Does not wake.
    pub(super) fn fill(&self, chunk: ImageChunk, content: &ChunkContent) -> Result<(), PagerError> {
        self.note_damage(self.images[chunk.image.index()].fill(&self.uffd, chunk.chunk, content))
    }

    pub(super) fn finish(&self, chunk: ImageChunk) {
        let wanted = {
            let state = &mut *self.lock();
            let Some(wanted) = state.wanted.remove(&chunk) else { return };
            for client in wanted.waiters.iter().filter_map(|waiter| state.clients.get(waiter)) {
                self.wake(&client.uffd, &client.bases, chunk);
            }
            wanted
        };
        if let Some(since) = wanted.since {
            self.source.served(chunk, since, &wanted.waiters);
        }
    }
}
