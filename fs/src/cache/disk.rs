//! The cache's directory: entries, their bounds, and what is put aside.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustix::fs::{Access, FlockOperation, access, flock, statvfs};

use crate::digest::Digest;

/// An entry's time of last use is this exact, to spare a write on every read.
const USE_RESOLUTION: Duration = Duration::from_secs(600);
/// A temporary file that is older than this is locked by its maker, or was left by one that died.
const LOCKED_AFTER: Duration = Duration::from_secs(1);
/// After a disk turned out to be full even without the cache: how long nothing is written.
const FULL_FOR: Duration = Duration::from_secs(10);
/// Most bytes of the disk left to others when nobody says how many.
const MOST_RESERVED: u64 = 1 << 30;
/// No frame or index is longer, in bytes: see `format::MAX_INDEX_LEN` and the frames of the largest chunks.
const LARGEST_FRAME: u64 = 64 << 20;
/// How the names of unfinished files start.
const TEMPORARY: &str = ".tmp-";

/// How large a cache may grow.
#[derive(Debug, Clone, Copy)]
pub struct CacheOptions {
    /// Bytes of frames kept at most; the longest unused go first. One process may exceed it by a sixteenth before it
    /// looks.
    pub max_bytes: u64,
    /// Bytes of the disk to leave to others: the cache shrinks, down to nothing, rather than take them. `None` is a
    /// twentieth of the disk and 1 GiB at most.
    pub min_free_bytes: Option<u64>,
}

impl Default for CacheOptions {
    fn default() -> Self {
        Self { max_bytes: 10 << 30, min_free_bytes: None }
    }
}

/// What a cache holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheContents {
    /// Frames.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Frames that failed their digest and were put aside.
    pub damaged: u64,
    /// Files that are being written, or were when their process died.
    pub unfinished: u64,
    /// When the longest unused entry was last used, to about ten minutes.
    pub oldest_use: Option<SystemTime>,
}

/// What [`super::ChunkCache::verify`] found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheCheck {
    /// Frames read and hashed.
    pub entries: u64,
    /// Their bytes.
    pub bytes: u64,
    /// How many of them failed, and are put aside now.
    pub damaged: u64,
}

/// What [`super::ChunkCache::collect`] removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RemovedFiles {
    /// Files.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

#[derive(Debug)]
pub(super) struct Disk {
    chunks: PathBuf,
    damaged: PathBuf,
    max_bytes: u64,
    min_free_bytes: u64,
    /// Bytes written since the size was last looked at.
    unchecked: AtomicU64,
    /// Until when nothing is written, because the disk is full.
    full_until: Mutex<Option<Instant>>,
    warned: AtomicBool,
}

/// A file of the cache.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Entry {
    used: SystemTime,
    len: u64,
    path: PathBuf,
}

/// Every file of the cache.
#[derive(Debug, Default)]
struct Entries {
    frames: Vec<Entry>,
    damaged: Vec<Entry>,
    unfinished: Vec<Entry>,
}

impl Entry {
    /// Whether a temporary file's maker is dead.
    fn is_abandoned(&self) -> bool {
        let free = |file: File| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
        let old = self.used.elapsed().is_ok_and(|age| age > LOCKED_AFTER);
        old && File::open(&self.path).is_ok_and(free)
    }
}

impl Disk {
    /// `None` when the directory cannot be made.
    pub(super) fn open(dir: &Path, options: CacheOptions) -> Option<Self> {
        let mut disk = Self {
            chunks: dir.join("chunks"),
            damaged: dir.join("damaged"),
            max_bytes: options.max_bytes,
            min_free_bytes: options.min_free_bytes.unwrap_or(MOST_RESERVED),
            // The first write looks at what is there.
            unchecked: AtomicU64::new(options.max_bytes),
            full_until: Mutex::new(None),
            warned: AtomicBool::new(false),
        };
        fs::create_dir_all(&disk.chunks).map_err(|error| disk.warn(&error)).ok()?;
        if options.min_free_bytes.is_none()
            && let Ok(space) = statvfs(&disk.chunks)
        {
            disk.min_free_bytes = MOST_RESERVED.min(space.f_blocks.saturating_mul(space.f_frsize) / 20);
        }
        Some(disk)
    }

    pub(super) fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.chunks.join(&name[..2]).join(&name)
    }

    pub(super) fn contains(&self, digest: Digest) -> bool {
        access(self.path(digest), Access::EXISTS).is_ok()
    }

    pub(super) fn get(&self, digest: Digest, len: u64) -> Option<Bytes> {
        let path = self.path(digest);
        let file = File::open(&path).ok()?;
        let metadata = file.metadata().ok()?;
        if metadata.len() > LARGEST_FRAME {
            self.put_aside(&path);
            return None;
        }
        // Room for one byte more, so that reading to the end needs no second allocation.
        let mut frame = Vec::with_capacity(metadata.len() as usize + 1);
        let read = (&file).take(LARGEST_FRAME).read_to_end(&mut frame);
        if read.is_err() || Digest::of(&frame) != digest {
            self.put_aside(&path);
            return None;
        }
        if frame.len() as u64 != len {
            // The frame is good; it is the index that lies.
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

    /// Moves a damaged entry out of the way, or removes it when that fails.
    fn put_aside(&self, path: &Path) {
        let moved = fs::create_dir_all(&self.damaged)
            .and_then(|()| fs::rename(path, self.damaged.join(path.file_name().unwrap_or_default())));
        if moved.is_err() {
            let _ = fs::remove_file(path);
        }
        tracing::warn!(path = %path.display(), "a damaged cache entry is put aside");
    }

    /// Writes a frame that hashes to `digest`, if there is room for it.
    pub(super) fn put(&self, digest: Digest, frame: &[u8]) {
        let len = frame.len() as u64;
        if !self.has_room(len) {
            return;
        }
        if let Err(error) = self.write(digest, frame) {
            self.warn(&error);
            return;
        }
        let unchecked = self.unchecked.fetch_add(len, Relaxed) + len;
        if unchecked > self.max_bytes / 16 {
            self.unchecked.store(0, Relaxed);
            self.evict(0);
        }
    }

    fn write(&self, digest: Digest, frame: &[u8]) -> io::Result<()> {
        let path = self.path(digest);
        if path.exists() {
            return Ok(());
        }
        let folder = path.parent().expect("entries lie in folders");
        let make = || tempfile::Builder::new().prefix(TEMPORARY).tempfile_in(folder);
        let mut temporary = match make() {
            // Making a folder costs a twentieth of a cold read; nearly always it is there.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(folder)?;
                make()?
            }
            made => made?,
        };
        // Tells that its maker lives. Where files cannot be locked nobody takes it for a dead one's either.
        let _ = flock(temporary.as_file(), FlockOperation::NonBlockingLockExclusive);
        temporary.write_all(frame)?;
        temporary.persist(&path).map_err(|failed| failed.error)?;
        Ok(())
    }

    /// Whether `len` more bytes leave enough of the disk to others; older entries go when they do not.
    fn has_room(&self, len: u64) -> bool {
        if self.shortage(len) == 0 {
            return true;
        }
        let mut full_until = self.full_until.lock().expect("no panics while held");
        if full_until.is_some_and(|until| Instant::now() < until) {
            return false;
        }
        self.evict(len);
        let room = self.shortage(len) == 0;
        if !room {
            *full_until = Some(Instant::now() + FULL_FOR);
            self.warn(&io::ErrorKind::StorageFull.into());
        }
        room
    }

    /// Bytes the disk lacks to take `len` more and keep its reserve; 0 when it cannot be asked.
    fn shortage(&self, len: u64) -> u64 {
        let Ok(space) = statvfs(&self.chunks) else { return 0 };
        let free = space.f_bavail.saturating_mul(space.f_frsize);
        self.min_free_bytes.saturating_add(len).saturating_sub(free)
    }

    /// Removes what was put aside and then the longest unused entries, until an eighth of the cache is free again and
    /// a sixteenth of the reserve beyond `len` more bytes on the disk. Another process doing so at the same time is
    /// enough.
    fn evict(&self, len: u64) {
        let Some(_lock) = self.lock(FlockOperation::NonBlockingLockExclusive) else { return };
        let Entries { frames, damaged, unfinished } = self.entries();
        let mut removed = RemovedFiles::default();
        unfinished
            .iter()
            .filter(|entry| entry.is_abandoned())
            .for_each(|entry| drop(remove(entry, &mut removed)));
        let total: u64 = frames.iter().chain(&damaged).map(|entry| entry.len).sum();
        let excess = match total > self.max_bytes {
            true => total - (self.max_bytes - self.max_bytes / 8),
            false => 0,
        };
        let mut bytes = excess;
        if self.shortage(len) > 0 {
            bytes = excess.max(self.shortage(len.saturating_add(self.min_free_bytes / 16)));
        }
        let before = removed.bytes;
        self.shrink(damaged, bytes, &mut removed);
        self.shrink(frames, bytes.saturating_sub(removed.bytes - before), &mut removed);
    }

    /// Removes the longest unused of `frames` until `bytes` are gone.
    fn shrink(&self, mut frames: Vec<Entry>, bytes: u64, removed: &mut RemovedFiles) {
        frames.sort_unstable();
        let mut gone = 0;
        for entry in frames {
            if gone >= bytes {
                break;
            }
            if remove(&entry, removed).is_ok() {
                gone += entry.len;
            }
        }
    }

    pub(super) fn contents(&self) -> CacheContents {
        let entries = self.entries();
        CacheContents {
            entries: entries.frames.len() as u64,
            bytes: entries.frames.iter().map(|entry| entry.len).sum(),
            damaged: entries.damaged.len() as u64,
            unfinished: entries.unfinished.len() as u64,
            oldest_use: entries.frames.iter().map(|entry| entry.used).min(),
        }
    }

    pub(super) fn verify(&self, on_progress: &dyn Fn(u64)) -> CacheCheck {
        let mut verified = CacheCheck::default();
        for Entry { path, .. } in self.entries().frames {
            let named: Option<Digest> =
                path.file_name().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
            // Gone since the listing is not damaged.
            let Ok(mut file) = File::open(&path) else { continue };
            let mut hasher = crate::digest::Hasher::new();
            let mut piece = [0; 64 << 10];
            let read = loop {
                match file.read(&mut piece) {
                    Ok(0) => break Ok(()),
                    Ok(len) => {
                        hasher.update(&piece[..len]);
                        verified.bytes += len as u64;
                    }
                    Err(error) => break Err(error),
                }
            };
            verified.entries += 1;
            if read.is_err() || named != Some(hasher.finish()) {
                verified.damaged += 1;
                self.put_aside(&path);
            }
            on_progress(verified.bytes);
        }
        verified
    }

    pub(super) fn collect(&self, everything: bool) -> io::Result<RemovedFiles> {
        let _lock = self.lock(FlockOperation::LockExclusive);
        let entries = self.entries();
        let mut removed = RemovedFiles::default();
        for entry in &entries.damaged {
            remove(entry, &mut removed)?;
        }
        for entry in entries.unfinished.iter().filter(|entry| everything || entry.is_abandoned()) {
            remove(entry, &mut removed)?;
        }
        let total: u64 = entries.frames.iter().map(|entry| entry.len).sum();
        let excess = total.saturating_sub(self.max_bytes).max(self.shortage(0));
        self.shrink(entries.frames, if everything { u64::MAX } else { excess }, &mut removed);
        Ok(removed)
    }

    pub(super) fn remove_abandoned(&self) -> io::Result<RemovedFiles> {
        let mut removed = RemovedFiles::default();
        for entry in self.entries().unfinished.iter().filter(|entry| entry.is_abandoned()) {
            remove(entry, &mut removed)?;
        }
        Ok(removed)
    }

    /// Held by whoever removes entries for space. Reading and writing need no lock: names are digests, and a file in
    /// use stays readable when it is removed.
    fn lock(&self, operation: FlockOperation) -> Option<File> {
        let file = File::create(self.chunks.join(".lock")).ok()?;
        flock(&file, operation).ok()?;
        Some(file)
    }

    fn entries(&self) -> Entries {
        let mut entries = Entries::default();
        let listed = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().collect::<Vec<_>>();
        let entry = |entry: &fs::DirEntry| {
            let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
            let used = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
            Some(Entry { used, len: metadata.len(), path: entry.path() })
        };
        for folder in listed(&self.chunks) {
            for file in listed(&folder.path()) {
                let unfinished = file.file_name().as_encoded_bytes().starts_with(TEMPORARY.as_bytes());
                let kind = if unfinished { &mut entries.unfinished } else { &mut entries.frames };
                kind.extend(entry(&file));
            }
        }
        entries.damaged.extend(listed(&self.damaged).iter().filter_map(entry));
        entries
    }

    fn warn(&self, error: &io::Error) {
        if !self.warned.swap(true, Relaxed) {
            tracing::warn!(dir = %self.chunks.display(), %error, "cannot write to the cache; continuing without");
        }
    }
}

/// Removes an entry; one that is gone already is no error, and not counted.
fn remove(entry: &Entry, removed: &mut RemovedFiles) -> io::Result<()> {
    match fs::remove_file(&entry.path) {
        Ok(()) => {
            removed.files += 1;
            removed.bytes += entry.len;
            Ok(())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}
