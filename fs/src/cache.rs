//! Verified frames on disk, named by their digests, so that versions of a pack and processes share them.
//!
//! Layout: `DIR/chunks/ab/abcdef...`, each file one frame exactly as in the pack. Entries are written to a temporary
//! name and renamed, without fsync: whatever a crash leaves behind fails its digest when read, is moved to
//! `DIR/damaged/` for the curious and counts as absent. The cache never fails: a full or unwritable disk makes it
//! keep nothing, with one warning.

use std::io;
use std::path::Path;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;

use bytes::Bytes;

use crate::digest::Digest;
use crate::index::Index;

mod disk;

use disk::Disk;
pub use disk::{CacheCheck, CacheContents, CacheOptions, RemovedFiles};

/// Frames waiting to be written; more are written by whoever has them.
const QUEUE: usize = 256;

/// Verified frames on disk. Reads happen on the calling thread, writes on a thread of its own.
#[derive(Debug)]
pub struct ChunkCache {
    /// `None` when the directory is unusable.
    disk: Option<Arc<Disk>>,
    writer: OnceLock<Writer>,
}

#[derive(Debug)]
struct Writer {
    jobs: Mutex<Option<SyncSender<Job>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
enum Job {
    Put(Digest, Bytes),
    Flush(SyncSender<()>),
}

impl ChunkCache {
    /// Opens, or makes, the cache in `dir`. Never fails: an unusable directory gives a cache that keeps nothing.
    pub fn open(dir: &Path, options: CacheOptions) -> Self {
        let disk = Disk::open(dir, options);
        Self { disk: disk.map(Arc::new), writer: OnceLock::new() }
    }

    /// The frame with that digest and length, if it is here and intact. A damaged entry is put aside.
    pub fn get(&self, digest: Digest, len: u64) -> Option<Bytes> {
        self.disk.as_ref()?.get(digest, len)
    }

    /// Whether there is an entry for that digest; whether it is intact only [`ChunkCache::get`] tells.
    pub fn contains(&self, digest: Digest) -> bool {
        self.disk.as_ref().is_some_and(|disk| disk.contains(digest))
    }

    /// Keeps a frame that hashes to `digest`. Returns at once; the frame is written behind the caller's back.
    pub fn put(&self, digest: Digest, frame: Bytes) {
        let Some(disk) = &self.disk else { return };
        match self.sender(disk).map(|jobs| jobs.try_send(Job::Put(digest, frame))) {
            Some(Err(TrySendError::Full(job) | TrySendError::Disconnected(job))) => job.run(disk),
            Some(Ok(())) | None => {}
        }
    }

    /// Waits until everything put before is written. For the end of a command; dropping the cache does it too.
    pub fn flush(&self) {
        let Some(jobs) = self.writer.get().and_then(Writer::jobs) else { return };
        let (done, written) = sync_channel(1);
        if jobs.send(Job::Flush(done)).is_ok() {
            let _ = written.recv();
        }
    }

    /// How many of a pack's stored chunks are here, and their bytes.
    pub fn coverage(&self, index: &Index) -> (u32, u64) {
        let stored = index.files().flat_map(|(file, _)| index.stored_chunks(file));
        let here = stored.filter(|(_, record)| self.contains(record.digest));
        here.fold((0, 0), |(chunks, bytes), (_, record)| (chunks + 1, bytes + u64::from(record.length)))
    }

    /// Counts what is there.
    pub fn contents(&self) -> CacheContents {
        self.disk.as_ref().map_or_else(CacheContents::default, |disk| disk.contents())
    }

    /// Reads every frame and puts aside those that fail their digest. `on_progress` gets the bytes read so far.
    pub fn verify(&self, on_progress: &dyn Fn(u64)) -> CacheCheck {
        self.disk.as_ref().map_or_else(CacheCheck::default, |disk| disk.verify(on_progress))
    }

    /// Removes what was put aside or left unfinished, and the longest unused frames until the limits hold; with
    /// `everything`, all frames. An error is that of a file that cannot be removed.
    pub fn collect(&self, everything: bool) -> io::Result<RemovedFiles> {
        self.disk.as_ref().map_or(Ok(RemovedFiles::default()), |disk| disk.collect(everything))
    }

    /// Removes files that processes were writing when they died. An error is that of a file that cannot be removed.
    pub fn remove_abandoned(&self) -> io::Result<RemovedFiles> {
        self.disk.as_ref().map_or(Ok(RemovedFiles::default()), |disk| disk.remove_abandoned())
    }

    fn sender(&self, disk: &Arc<Disk>) -> Option<SyncSender<Job>> {
        self.writer.get_or_init(|| Writer::start(disk.clone())).jobs()
    }
}

impl Job {
    fn run(self, disk: &Disk) {
        match self {
            Job::Flush(done) => drop(done.send(())),
            Job::Put(digest, frame) => disk.put(digest, &frame),
        }
    }
}

impl Drop for ChunkCache {
    fn drop(&mut self) {
        let Some(writer) = self.writer.get() else { return };
        // Without senders the thread ends after its last job.
        drop(writer.jobs.lock().expect("no panics while held").take());
        if let Some(thread) = writer.thread.lock().expect("no panics while held").take() {
            let _ = thread.join();
        }
    }
}

impl Writer {
    fn start(disk: Arc<Disk>) -> Self {
        let (jobs, queue): (_, Receiver<Job>) = sync_channel(QUEUE);
        let work = move || queue.into_iter().for_each(|job: Job| job.run(&disk));
        // Without a thread the queue is disconnected and callers write by themselves.
        let thread = std::thread::Builder::new().name("forkd-cache".into()).spawn(work).ok();
        Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(thread) }
    }

    fn jobs(&self) -> Option<SyncSender<Job>> {
        self.jobs.lock().expect("no panics while held").clone()
    }
}

#[cfg(test)]
mod tests;
