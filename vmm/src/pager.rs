//! Serves missing pages of images that many machines share, from a source that may be far away.
//!
//! One image is one memfd. Each machine maps it privately and has its own userfaultfd, so a fault arrives only while
//! the image lacks the page. The pager loads the chunk once, puts it into its own shared mapping of the image and
//! wakes everybody who waits; siblings then map the same page without a fault.
//!
//! A machine is never shown a page that did not come from the source: when a chunk cannot be had, whoever needs it
//! stays asleep, and [`PageSource::unavailable`] tells the owner, who decides. A machine's process is not trusted: one
//! that does what no honest one does is not served any more, and [`Pager::take_misconduct`] names it.

mod client;
mod error;
mod faults;
mod image;
mod loader;
mod shared;
mod source;

pub use error::{DamagedPage, Misconduct, PagerError, PagerFailure};
pub use image::ImageShape;
pub use source::{ChunkContent, ClientId, ImageChunk, PageSource, SourceFailure};

use crate::memory::ImageId;
use crate::uffd::{Uffd, UffdError, UffdReads};
use client::Client;
use faults::STOP_EVENT;
use image::Image;
use rustix::event::epoll;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use shared::{Counters, Shared};
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

/// Counters since the pager started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PagerStats {
    /// Faults received from machines.
    pub faults: u64,
    /// Faults whose chunk was there already when the event was read.
    pub faults_on_present: u64,
    /// Chunks loaded because a machine waited.
    pub demand_chunks: u64,
    /// Chunks put in ahead of need.
    pub installed_chunks: u64,
    /// Chunks that are there.
    pub present_chunks: u64,
    /// All chunks.
    pub chunks: u64,
    /// How long the longest waiting machine has waited, ms; 0 when nobody waits.
    pub longest_wait_ms: u64,
}

/// See the module's description.
pub struct Pager {
    shared: Arc<Shared>,
    stop: OwnedFd,
    threads: Vec<JoinHandle<()>>,
}

impl Pager {
    /// Makes the images and starts `workers` threads that load chunks, and one that reads faults.
    pub fn new(
        shapes: &[(ImageId, ImageShape)],
        source: Arc<dyn PageSource>,
        workers: usize,
    ) -> Result<Pager, PagerError> {
        Pager::with_reading(None, shapes, source, workers)
    }

    /// The same, with a way of reading that this kernel may be too new for. On kernels where reads may block every
    /// machine has a thread of its own, so that a hostile one can hang nobody but itself.
    pub fn with_reading(
        reading: Option<UffdReads>,
        shapes: &[(ImageId, ImageShape)],
        source: Arc<dyn PageSource>,
        workers: usize,
    ) -> Result<Pager, PagerError> {
        let uffd = Uffd::new()?;
        let reading = reading.unwrap_or_else(|| uffd.reading());
        let mut images = Vec::new();
        for (id, shape) in shapes {
            assert_eq!(id.index(), images.len(), "images come in order");
            images.push(Image::new(*id, *shape, &uffd)?);
        }
        let poll = |operation| move |source| PagerError::Poll { operation, source };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(poll("epoll_create"))?;
        let (stop_read, stop) =
            rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).map_err(poll("pipe"))?;
        epoll::add(&epoll, &stop_read, epoll::EventData::new_u64(STOP_EVENT), epoll::EventFlags::IN)
            .map_err(poll("epoll_ctl"))?;
        let shared = Arc::new(Shared {
            images,
            uffd,
            source,
            epoll,
            reading,
            state: Mutex::default(),
            work: Condvar::new(),
            counters: Counters::default(),
        });
        let mut threads = Vec::new();
        let events = Arc::clone(&shared);
        threads.push(std::thread::spawn(move || events.serve_faults(&stop_read)));
        for _ in 0..workers.max(1) {
            let worker = Arc::clone(&shared);
            threads.push(std::thread::spawn(move || worker.load_chunks()));
        }
        Ok(Pager { shared, stop, threads })
    }

    /// The memfd of an image, to be mapped by machines.
    pub fn image_file(&self, image: ImageId) -> Option<BorrowedFd<'_>> {
        self.shared.images.get(image.index()).map(|image| image.file.as_fd())
    }

    /// Serves a machine from now on: its userfaultfd, and where it mapped each image (in order). Both come from its
    /// process and are checked. A machine is attached once. Returns the userfaultfd.
    pub fn attach(&self, id: ClientId, uffd: OwnedFd, bases: Vec<u64>) -> Result<Arc<Uffd>, PagerError> {
        let client = Client::new(uffd, bases, &self.shared.images)?;
        let uffd = Arc::clone(&client.uffd);
        let mut state = self.shared.lock();
        if state.complete {
            // Nothing can be missing: leave the machine without any watch.
            self.shared.unregister(&client);
            return Ok(uffd);
        }
        if state.clients.contains_key(&id) {
            // The one that is known keeps its descriptor: closing it could end a watch.
            return Err(Misconduct::Twice.into());
        }
        self.shared.watch(id, &client.uffd)?;
        state.clients.insert(id, client);
        Ok(uffd)
    }

    /// Has the kernel note from now on which pages of a machine's memory are written to: ranges (address and bytes) where it
    /// has images mapped. `uffd` is the one that it is attached with.
    pub fn track_writes(&self, uffd: &Uffd, images: &[(u64, u64)]) -> Result<(), UffdError> {
        // Were the watch ended at the same time, it would be taken up again, and nobody would serve it.
        let state = self.shared.lock();
        images.iter().try_for_each(|(address, bytes)| uffd.track_writes(*address, *bytes, !state.complete))
    }

    /// Notes that a machine's process has ended. What it waits for is still loaded.
    pub fn detach(&self, client: ClientId) {
        if let Some(client) = self.shared.lock().clients.get_mut(&client) {
            client.ended = true;
        }
    }

    /// Puts a chunk in ahead of need; a chunk that is there already stays.
    pub fn install(&self, chunk: ImageChunk, content: &ChunkContent) -> Result<(), PagerError> {
        if self.is_present(chunk) {
            return Ok(());
        }
        self.shared.fill(chunk, content)?;
        self.shared.counters.installed.fetch_add(1, Ordering::Relaxed);
        self.shared.finish(chunk);
        Ok(())
    }

    /// Puts single pages in ahead of need: `offset` and length are multiples of the page size. Their chunks stay to be
    /// loaded; call [`Pager::wake_waiters`] for them afterwards.
    pub fn install_pages(&self, image: ImageId, offset: u64, bytes: &[u8]) -> Result<(), PagerError> {
        let put = self.shared.images[image.index()].put(&self.shared.uffd, offset, bytes);
        self.shared.note_damage(put)
    }

    /// Has everybody who waits for a chunk look again: the page they need may have come by itself.
    pub fn wake_waiters(&self, chunk: ImageChunk) {
        let state = self.shared.lock();
        let waiters = state.wanted.get(&chunk).map(|wanted| wanted.waiters.clone()).unwrap_or_default();
        for client in waiters.iter().filter_map(|waiter| state.clients.get(waiter)) {
            self.shared.wake(&client.uffd, &client.bases, chunk);
        }
    }

    /// Machines whose processes have done what no honest one does, since the last call. They are not served any more
    /// and are to be ended.
    pub fn take_misconduct(&self) -> Vec<(ClientId, Misconduct)> {
        std::mem::take(&mut self.shared.lock().misconduct)
    }

    /// Why no machine of this pager can go on, if so.
    pub fn failure(&self) -> Option<PagerFailure> {
        self.shared.lock().failure
    }

    /// Whether a chunk is in its image.
    pub fn is_present(&self, chunk: ImageChunk) -> bool {
        self.shared.is_present(chunk)
    }

    /// Ends all watching once every chunk of every image is present, zero chunks aside, which `zero` names: from then
    /// on machines run without any overhead. Returns whether that was so.
    pub fn complete(&self, is_zero: impl Fn(ImageChunk) -> bool) -> bool {
        for (position, image) in self.shared.images.iter().enumerate() {
            let id = ImageId::ALL[position];
            let missing = (0..image.shape.chunks()).map(|chunk| ImageChunk { image: id, chunk });
            if !missing.into_iter().all(|chunk| self.is_present(chunk) || is_zero(chunk)) {
                return false;
            }
        }
        let mut state = self.shared.lock();
        state.complete = true;
        for (_, client) in state.clients.drain() {
            let _ = epoll::delete(&self.shared.epoll, &*client.uffd);
            self.shared.unregister(&client);
        }
        true
    }

    /// Current counters.
    pub fn stats(&self) -> PagerStats {
        let counters = &self.shared.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let longest = self.waits().into_values().max().unwrap_or(Duration::ZERO);
        PagerStats {
            faults: load(&counters.faults),
            faults_on_present: load(&counters.faults_on_present),
            demand_chunks: load(&counters.demand),
            installed_chunks: load(&counters.installed),
            present_chunks: self.shared.images.iter().map(Image::present_chunks).sum(),
            chunks: self.shared.images.iter().map(|image| image.shape.chunks()).sum(),
            longest_wait_ms: longest.as_millis() as u64,
        }
    }

    /// Machines that wait right now, and how long ago the chunk was asked for that each has waited for longest.
    pub fn waits(&self) -> BTreeMap<ClientId, Duration> {
        let state = self.shared.lock();
        let mut waits = BTreeMap::new();
        for wanted in state.wanted.values() {
            let since = wanted.since.map_or(Duration::ZERO, |since| since.elapsed());
            for id in wanted.waiters.iter().filter(|id| state.is_running(**id)) {
                let longest = waits.entry(*id).or_insert(since);
                *longest = since.max(*longest);
            }
        }
        waits
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.shared.lock().stopping = true;
        self.shared.work.notify_all();
        // A full pipe cannot be: this is its only byte. If the write fails the thread ends with the process.
        let _ = rustix::io::write(&self.stop, &[1]);
        // Workers may hang in the source for as long as its deadline; only the fault reader is waited for.
        if !self.threads.is_empty() {
            let _ = self.threads.remove(0).join();
        }
    }
}
