//! Serves missing pages of images that many machines share, from a source that may be far away.
//!
//! One image is one memfd. Each machine maps it privately and has its own userfaultfd, so a fault arrives only while
//! the image lacks the page. The pager loads the chunk once, puts it into its own shared mapping of the image and
//! wakes everybody who waits; siblings then map the same page without a fault. Callers: the root crate's
//! `sandbox.rs` (which supplies the [`PageSource`]) and `supervisor.rs`.
//!
//! A machine is never shown a page that did not come from the source: when a chunk cannot be had, whoever needs it
//! stays asleep, and [`PageSource::unavailable`] tells the owner, who decides.

use crate::memory::{ImageId, Mapping, MemoryError, PAGE_BYTES, Sharing, create_image};
use crate::uffd::{Fault, Uffd, UffdError};
use bytes::Bytes;
use rustix::event::epoll;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use std::collections::{HashMap, VecDeque};
use std::error::Error;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// One chunk of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ChunkId {
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
    /// These bytes; the rest of the chunk, if any, is zero.
    Data(Bytes),
}

/// Why a source gave up on a chunk.
pub type SourceFailure = Box<dyn Error + Send + Sync>;

/// Where the content of images comes from. Called from the pager's worker threads; calls may block for long.
pub trait PageSource: Send + Sync {
    /// The content of one chunk. An error is final: retrying is the source's own business.
    fn load(&self, chunk: ChunkId) -> Result<ChunkContent, SourceFailure>;

    /// A chunk that machines wait for will not come. They stay asleep; the owner must end them.
    fn unavailable(&self, chunk: ChunkId, failure: SourceFailure);
}

/// Shape of one image.
#[derive(Debug, Clone, Copy)]
pub struct ImageShape {
    /// Length, bytes; a multiple of the page size.
    pub bytes: u64,
    /// Bytes filled at a time; a multiple of the page size.
    pub chunk_bytes: u64,
}

impl ImageShape {
    /// Number of chunks.
    pub fn chunks(&self) -> u64 {
        self.bytes.div_ceil(self.chunk_bytes)
    }
}

/// A pager could not be set up or could not fill an image.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Memory for an image.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// epoll or a pipe.
    #[error("{operation} for the pager failed")]
    Poll {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: Errno,
    },
    /// A source delivered more than a chunk.
    #[error("the source delivered {bytes} bytes for a chunk of {chunk_bytes}")]
    TooMuch {
        /// Delivered.
        bytes: u64,
        /// Expected at most.
        chunk_bytes: u64,
    },
}

/// A machine that the pager serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u64);

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

#[derive(Debug)]
struct Image {
    shape: ImageShape,
    file: OwnedFd,
    alias: Mapping,
    present: Vec<AtomicBool>,
}

struct Client {
    uffd: Arc<Uffd>,
    bases: Vec<u64>,
    /// Its process has ended. The descriptor stays open all the same: KVM resolves faults on a kernel worker that can
    /// outlive the process, and were the last descriptor closed while one waits, the kernel would give it a zero page
    /// of the *shared* image, for every sibling to read.
    ended: bool,
}

#[derive(Default)]
struct Wanted {
    waiters: Vec<ClientId>,
    since: Option<Instant>,
    failed: bool,
}

#[derive(Default)]
struct State {
    clients: HashMap<ClientId, Client>,
    wanted: HashMap<ChunkId, Wanted>,
    queue: VecDeque<ChunkId>,
    stopping: bool,
    complete: bool,
}

impl State {
    fn is_running(&self, client: ClientId) -> bool {
        self.clients.get(&client).is_some_and(|client| !client.ended)
    }
}

#[derive(Default)]
struct Counters {
    faults: AtomicU64,
    faults_on_present: AtomicU64,
    demand: AtomicU64,
    installed: AtomicU64,
    present: AtomicU64,
}

struct Shared {
    images: Vec<Image>,
    uffd: Uffd,
    source: Arc<dyn PageSource>,
    epoll: OwnedFd,
    state: Mutex<State>,
    work: Condvar,
    counters: Counters,
}

/// See the module's description.
pub struct Pager {
    shared: Arc<Shared>,
    stop: OwnedFd,
    threads: Vec<JoinHandle<()>>,
}

const STOP_EVENT: u64 = u64::MAX;

impl Pager {
    /// Makes the images and starts `workers` threads that load chunks, and one that reads faults.
    pub fn new(
        shapes: &[(ImageId, ImageShape)],
        source: Arc<dyn PageSource>,
        workers: usize,
    ) -> Result<Pager, PagerError> {
        let uffd = Uffd::new()?;
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

    /// Serves a machine from now on: its userfaultfd, and where it mapped each image (in order).
    pub fn attach(&self, client: ClientId, uffd: OwnedFd, bases: Vec<u64>) -> Result<(), PagerError> {
        let uffd = Arc::new(Uffd::from_fd(uffd));
        let mut state = self.shared.lock();
        if state.complete {
            // Nothing can be missing: leave the machine without any watch.
            self.shared.unregister(&uffd, &bases);
            return Ok(());
        }
        epoll::add(&self.shared.epoll, &*uffd, epoll::EventData::new_u64(client.0), epoll::EventFlags::IN)
            .map_err(|source| PagerError::Poll { operation: "epoll_ctl", source })?;
        state.clients.insert(client, Client { uffd, bases, ended: false });
        Ok(())
    }

    /// Notes that a machine's process has ended. What it waits for is still loaded.
    pub fn detach(&self, client: ClientId) {
        if let Some(client) = self.shared.lock().clients.get_mut(&client) {
            client.ended = true;
        }
    }

    /// Puts a chunk in ahead of need; a chunk that is there already stays.
    pub fn install(&self, chunk: ChunkId, content: &ChunkContent) -> Result<(), PagerError> {
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
        let image = &self.shared.images[image.index()];
        Ok(self.shared.uffd.copy(&image.alias, offset, bytes)?)
    }

    /// Has everybody who waits for a chunk look again: the page they need may have come by itself.
    pub fn wake_waiters(&self, chunk: ChunkId) {
        let state = self.shared.lock();
        let waiters = state.wanted.get(&chunk).map(|wanted| wanted.waiters.clone()).unwrap_or_default();
        for client in waiters.iter().filter_map(|waiter| state.clients.get(waiter)) {
            self.shared.wake(&client.uffd, &client.bases, chunk);
        }
    }

    /// Whether a chunk is in its image.
    pub fn is_present(&self, chunk: ChunkId) -> bool {
        self.shared.is_present(chunk)
    }

    /// Ends all watching once every chunk of every image is present, zero chunks aside, which `zero` names: from then on
    /// machines run without any overhead. Returns whether that was so.
    pub fn complete(&self, is_zero: impl Fn(ChunkId) -> bool) -> bool {
        for (position, image) in self.shared.images.iter().enumerate() {
            let id = ImageId::ALL[position];
            let missing = (0..image.shape.chunks()).map(|chunk| ChunkId { image: id, chunk });
            if !missing.into_iter().all(|chunk| self.is_present(chunk) || is_zero(chunk)) {
                return false;
            }
        }
        let mut state = self.shared.lock();
        state.complete = true;
        for (_, client) in state.clients.drain() {
            let _ = epoll::delete(&self.shared.epoll, &*client.uffd);
            self.shared.unregister(&client.uffd, &client.bases);
        }
        true
    }

    /// Current counters.
    pub fn stats(&self) -> PagerStats {
        let counters = &self.shared.counters;
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let state = self.shared.lock();
        let running = |wanted: &&Wanted| wanted.waiters.iter().any(|id| state.is_running(*id));
        let oldest = state.wanted.values().filter(running).filter_map(|wanted| wanted.since);
        let longest = oldest.map(|since| since.elapsed()).max().unwrap_or(Duration::ZERO);
        PagerStats {
            faults: load(&counters.faults),
            faults_on_present: load(&counters.faults_on_present),
            demand_chunks: load(&counters.demand),
            installed_chunks: load(&counters.installed),
            present_chunks: load(&counters.present),
            chunks: self.shared.images.iter().map(|image| image.shape.chunks()).sum(),
            longest_wait_ms: longest.as_millis() as u64,
        }
    }

    /// Machines that wait for a chunk right now: this one, or any.
    pub fn waiting_clients(&self, chunk: Option<ChunkId>) -> Vec<ClientId> {
        let state = self.shared.lock();
        let wanted = state.wanted.iter().filter(|(id, _)| chunk.is_none_or(|chunk| chunk == **id));
        let mut clients: Vec<_> = wanted
            .flat_map(|(_, wanted)| &wanted.waiters)
            .copied()
            .filter(|id| state.is_running(*id))
            .collect();
        clients.sort();
        clients.dedup();
        clients
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

impl Image {
    fn new(id: ImageId, shape: ImageShape, uffd: &Uffd) -> Result<Image, PagerError> {
        assert!(
            shape.bytes.is_multiple_of(PAGE_BYTES) && shape.chunk_bytes.is_multiple_of(PAGE_BYTES),
            "whole pages only"
        );
        let file = create_image(&format!("forkd-{id:?}"), shape.bytes)?;
        let alias = Mapping::of_file(&file, shape.bytes, Sharing::Shared)?;
        uffd.register(&alias)?;
        let present = (0..shape.chunks()).map(|_| AtomicBool::new(false)).collect();
        Ok(Image { shape, file, alias, present })
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        // A panicking worker leaves the tables consistent: each change is a single insert or remove.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_present(&self, chunk: ChunkId) -> bool {
        self.images
            .get(chunk.image.index())
            .and_then(|image| image.present.get(chunk.chunk as usize))
            .is_some_and(|present| present.load(Ordering::Acquire))
    }

    fn unregister(&self, uffd: &Uffd, bases: &[u64]) {
        for (image, base) in self.images.iter().zip(bases) {
            // A machine that has just ended has nothing to unregister.
            if let Err(error) = uffd.unregister(*base, image.shape.bytes) {
                tracing::debug!(%error, "unregistering an ended machine");
            }
        }
    }

    fn serve_faults(&self, _stop: &OwnedFd) {
        let mut events = Vec::with_capacity(64);
        let mut faults = Vec::new();
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "the pager cannot wait for faults any more");
                    return;
                }
            }
            for event in &events {
                match event.data.u64() {
                    STOP_EVENT => return,
                    client => self.read_faults(ClientId(client), &mut faults),
                }
            }
        }
    }

    fn read_faults(&self, id: ClientId, faults: &mut Vec<Fault>) {
        let Some((uffd, bases)) =
            self.lock().clients.get(&id).map(|client| (Arc::clone(&client.uffd), client.bases.clone()))
        else {
            return;
        };
        faults.clear();
        if let Err(error) = uffd.faults(faults) {
            tracing::debug!(?id, %error, "a machine's userfaultfd ended");
            let _ = epoll::delete(&self.epoll, &*uffd);
            return;
        }
        for fault in &*faults {
            self.counters.faults.fetch_add(1, Ordering::Relaxed);
            match self.locate(&bases, fault.address) {
                Some(chunk) => self.want(id, chunk, &uffd, &bases),
                // Only reachable when a hostile child lies about its addresses; it then waits forever.
                None => tracing::warn!(?id, address = fault.address, "fault outside of every image"),
            }
        }
    }

    fn locate(&self, bases: &[u64], address: u64) -> Option<ChunkId> {
        let inside = |(position, (image, base)): (usize, (&Image, &u64))| {
            let offset = address.checked_sub(*base).filter(|offset| *offset < image.shape.bytes)?;
            Some(ChunkId { image: ImageId::ALL[position], chunk: offset / image.shape.chunk_bytes })
        };
        self.images.iter().zip(bases).enumerate().find_map(inside)
    }

    fn want(&self, id: ClientId, chunk: ChunkId, uffd: &Uffd, bases: &[u64]) {
        let mut state = self.lock();
        if self.is_present(chunk) {
            drop(state);
            self.counters.faults_on_present.fetch_add(1, Ordering::Relaxed);
            self.wake(uffd, bases, chunk);
            return;
        }
        let wanted = state.wanted.entry(chunk).or_default();
        if !wanted.waiters.contains(&id) {
            wanted.waiters.push(id);
        }
        // A chunk that failed is tried again for whoever comes next: nobody may wait without somebody loading.
        if wanted.since.is_none() || std::mem::take(&mut wanted.failed) {
            wanted.since = Some(Instant::now());
            state.queue.push_back(chunk);
            self.work.notify_one();
        }
    }

    fn wake(&self, uffd: &Uffd, bases: &[u64], chunk: ChunkId) {
        let image = &self.images[chunk.image.index()];
        let offset = chunk.chunk * image.shape.chunk_bytes;
        let bytes = image.shape.chunk_bytes.min(image.shape.bytes - offset);
        if let Some(base) = bases.get(chunk.image.index())
            && let Err(error) = uffd.wake(base + offset, bytes)
        {
            tracing::debug!(%error, "waking an ended machine");
        }
    }

    fn load_chunks(&self) {
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

    fn load_chunk(&self, chunk: ChunkId) {
        let loaded = self.source.load(chunk).and_then(|content| Ok(self.fill(chunk, &content)?));
        match loaded {
            Ok(()) => {
                self.counters.demand.fetch_add(1, Ordering::Relaxed);
                self.finish(chunk);
            }
            Err(failure) => {
                if let Some(wanted) = self.lock().wanted.get_mut(&chunk) {
                    wanted.failed = true;
                }
                self.source.unavailable(chunk, failure);
            }
        }
    }

    /// Puts content into the image. Does not wake.
    fn fill(&self, chunk: ChunkId, content: &ChunkContent) -> Result<(), PagerError> {
        let image = &self.images[chunk.image.index()];
        let offset = chunk.chunk * image.shape.chunk_bytes;
        let bytes = image.shape.chunk_bytes.min(image.shape.bytes - offset);
        match content {
            ChunkContent::Zero => self.uffd.zero(&image.alias, offset, bytes)?,
            ChunkContent::Data(data) => {
                let whole = data.len() as u64 / PAGE_BYTES * PAGE_BYTES;
                let rest = data.len() as u64 - whole;
                if data.len() as u64 > bytes {
                    return Err(PagerError::TooMuch { bytes: data.len() as u64, chunk_bytes: bytes });
                }
                self.uffd.copy(&image.alias, offset, &data[..whole as usize])?;
                let mut zero_from = whole;
                if rest > 0 {
                    let mut page = [0; PAGE_BYTES as usize];
                    page[..rest as usize].copy_from_slice(&data[whole as usize..]);
                    self.uffd.copy(&image.alias, offset + whole, &page)?;
                    zero_from += PAGE_BYTES;
                }
                self.uffd.zero(&image.alias, offset + zero_from, bytes - zero_from)?;
            }
        }
        if !image.present[chunk.chunk as usize].swap(true, Ordering::AcqRel) {
            self.counters.present.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    fn finish(&self, chunk: ChunkId) {
        let state = &mut *self.lock();
        let Some(wanted) = state.wanted.remove(&chunk) else { return };
        for waiter in wanted.waiters {
            if let Some(client) = state.clients.get(&waiter) {
                self.wake(&client.uffd, &client.bases, chunk);
            }
        }
    }
}
