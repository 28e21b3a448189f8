//! Verified frames on disk, named by their digests, so that versions of a pack and processes share them. Used by
//! [`crate::store`]; `forkd` opens one per process.
//!
//! Layout: `DIR/chunks/ab/abcdef...`, each file one frame exactly as in the pack. Entries are written to a temporary name and
//! renamed, without fsync: whatever a crash leaves behind fails its digest when read and counts as absent. The cache
//! never fails: a full or unwritable disk makes it keep nothing, with one warning.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustix::fs::{FlockOperation, flock};

use crate::digest::Digest;

/// Frames waiting to be written; more are written by whoever has them.
const QUEUE: usize = 256;
/// An entry's time of last use is this exact, to spare a write on every read.
const USE_RESOLUTION: Duration = Duration::from_secs(600);
/// Temporary files older than this were left by a process that died.
const STALE_AFTER: Duration = Duration::from_secs(3600);

/// How large a cache may grow.
#[derive(Debug, Clone, Copy)]
pub struct CacheOptions {
    /// Bytes of frames kept at most; the longest unused go first. One process may exceed it by a sixteenth before it looks.
    pub max_bytes: u64,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { max_bytes: 20 << 30 }
    }
}

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

#[derive(Debug)]
struct Disk {
    dir: PathBuf,
    max_bytes: u64,
    /// Bytes written since the size was last looked at.
    unchecked: AtomicU64,
    warned: AtomicBool,
}

impl ChunkCache {
    /// Opens, or makes, the cache in `dir`. Never fails: an unusable directory gives a cache that keeps nothing.
    pub fn open(dir: &Path, options: CacheOptions) -> Self {
        let disk = Disk {
            dir: dir.join("chunks"),
            max_bytes: options.max_bytes,
            // The first write looks at what is there.
            unchecked: AtomicU64::new(options.max_bytes),
            warned: AtomicBool::new(false),
        };
        let usable = fs::create_dir_all(&disk.dir).map_err(|error| disk.warn(&error)).is_ok();
        Self { disk: usable.then(|| Arc::new(disk)), writer: OnceLock::new() }
    }

    /// The frame with that digest and length, if it is here and intact. A damaged entry is removed.
    pub fn get(&self, digest: Digest, len: u64) -> Option<Bytes> {
        self.disk.as_ref()?.get(digest, len)
    }

    /// Whether there is an entry for that digest; whether it is intact only [`ChunkCache::get`] tells.
    pub fn contains(&self, digest: Digest) -> bool {
        let present =
            |disk: &Arc<Disk>| rustix::fs::access(disk.path(digest), rustix::fs::Access::EXISTS).is_ok();
        self.disk.as_ref().is_some_and(present)
    }

    /// Keeps a frame that hashes to `digest`. Returns at once; the frame is written behind the caller's back.
    pub fn put(&self, digest: Digest, frame: Bytes) {
        let Some(disk) = &self.disk else { return };
        match self.sender(disk).map(|jobs| jobs.try_send(Job::Put(digest, frame))) {
            Some(Err(TrySendError::Full(job) | TrySendError::Disconnected(job))) => disk.run(job),
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

    fn sender(&self, disk: &Arc<Disk>) -> Option<SyncSender<Job>> {
        self.writer.get_or_init(|| Writer::start(disk.clone())).jobs()
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
        let work = move || queue.into_iter().for_each(|job| disk.run(job));
        // Without a thread the queue is disconnected and callers write by themselves.
        let thread = std::thread::Builder::new().name("forkd-cache".into()).spawn(work).ok();
        Self { jobs: Mutex::new(Some(jobs)), thread: Mutex::new(thread) }
    }

    fn jobs(&self) -> Option<SyncSender<Job>> {
        self.jobs.lock().expect("no panics while held").clone()
    }
}

impl Disk {
    fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.dir.join(&name[..2]).join(&name)
    }

    fn get(&self, digest: Digest, len: u64) -> Option<Bytes> {
        let path = self.path(digest);
        let file = File::open(&path).ok()?;
        let metadata = file.metadata().ok()?;
        let mut frame = Vec::new();
        let intact = metadata.len() == len
            && (&file).take(len).read_to_end(&mut frame).is_ok()
            && Digest::of(&frame) == digest;
        if !intact {
            tracing::warn!(path = %path.display(), "removed a damaged cache entry");
            let _ = fs::remove_file(&path);
            return None;
        }
        let now = SystemTime::now();
        if metadata
            .modified()
            .is_ok_and(|used| now.duration_since(used).is_ok_and(|age| age > USE_RESOLUTION))
        {
            // Best effort: the cache may belong to someone else.
            let _ = file.set_modified(now);
        }
        Some(frame.into())
    }

    fn run(&self, job: Job) {
        match job {
            Job::Flush(done) => drop(done.send(())),
            Job::Put(digest, frame) => {
                if let Err(error) = self.write(digest, &frame) {
                    self.warn(&error);
                    return;
                }
                let unchecked = self.unchecked.fetch_add(frame.len() as u64, Relaxed) + frame.len() as u64;
                if unchecked > self.max_bytes / 16 {
                    self.unchecked.store(0, Relaxed);
                    self.evict();
                }
            }
        }
    }

    fn write(&self, digest: Digest, frame: &[u8]) -> io::Result<()> {
        let path = self.path(digest);
        if path.exists() {
            return Ok(());
        }
        let folder = path.parent().expect("entries lie in folders");
        fs::create_dir_all(folder)?;
        let mut temporary = tempfile::Builder::new().prefix(".tmp-").tempfile_in(folder)?;
        temporary.write_all(frame)?;
        temporary.persist(&path).map_err(|failed| failed.error)?;
        Ok(())
    }

    /// Removes the longest unused entries until an eighth of the space is free again. Another process doing so at the
    /// same time is enough.
    fn evict(&self) {
        let Ok(lock) = File::create(self.dir.join(".lock")) else { return };
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            return;
        }
        let mut entries = self.entries();
        let mut total: u64 = entries.iter().map(|(_, len, _)| len).sum();
        if total <= self.max_bytes {
            return;
        }
        entries.sort_unstable();
        for (_, len, path) in entries {
            if total <= self.max_bytes - self.max_bytes / 8 {
                break;
            }
            if fs::remove_file(&path).is_ok() {
                total -= len;
            }
        }
    }

    /// Every entry as (time of last use, length, path). Removes what dead processes left.
    fn entries(&self) -> Vec<(SystemTime, u64, PathBuf)> {
        let now = SystemTime::now();
        let mut entries = Vec::new();
        let folders = fs::read_dir(&self.dir).into_iter().flatten().flatten().map(|folder| folder.path());
        for entry in folders.filter(|path| path.is_dir()).flat_map(fs::read_dir).flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            if !entry.file_name().as_encoded_bytes().starts_with(b".tmp-") {
                entries.push((used, metadata.len(), entry.path()));
            } else if now.duration_since(used).is_ok_and(|age| age > STALE_AFTER) {
                let _ = fs::remove_file(entry.path());
            }
        }
        entries
    }

    fn warn(&self, error: &io::Error) {
        if !self.warned.swap(true, Relaxed) {
            tracing::warn!(dir = %self.dir.display(), %error, "cannot write to the cache; continuing without");
        }
    }
}

#[cfg(test)]
mod tests;
