//! The part of the tree below one VERSION: the pack's members, and the reports about it.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustix::io::Errno;
use serde::Serialize;
use tokio::sync::OnceCell;

use super::errno::{of_open_error, of_read_error, of_whole_error};
use super::legacy::{self, LegacyNode};
use super::rootfs::{Refusal, RootDisk, errno_of};
use super::{Attributes, Entry, IMMUTABLE, Inode, Kind, LISTING, Listing, Opened};
use crate::digest::Digest;
use crate::format::ROOTFS;
use crate::index::{ChunkId, FileId, Index};
use crate::legacy::whole::WholePack;
use crate::store::{OpenError, PackLocation, Store, StoreOptions};

/// The version's directory.
const DIRECTORY: u32 = 0;
/// `.forkd` in it.
const REPORTS: u32 = 1;
/// `.forkd/stats.json`.
const STATS: u32 = 2;
/// `.forkd/blocks`.
const BLOCKS: u32 = 3;
/// `rootfs`, the files of the root disk; what is below it has the slots of [`RootDisk::has_slot`].
pub(super) const ROOT_DISK: u32 = 4;
/// Its name.
const ROOT_DISK_NAME: &str = "rootfs";
/// The first member; the others follow in the pack's order.
pub(super) const FIRST_MEMBER: u32 = 16;

/// One pack in the tree, opened when first needed.
#[derive(Debug)]
pub(super) struct PackNode {
    inode: Inode,
    parent: Inode,
    label: String,
    location: PackLocation,
    sha256: Option<Digest>,
    modified: SystemTime,
    options: StoreOptions,
    store: OnceCell<Arc<Store>>,
    root_disk: OnceCell<RootDisk>,
    legacy: LegacyNode,
    /// When opening it last failed, and how.
    open_failed: Mutex<Option<(Instant, Errno)>>,
    trouble: Mutex<Trouble>,
}

/// What an opened pack is read from.
enum Contents<'a> {
    Indexed(&'a Arc<Store>),
    /// A pack of the predecessor.
    Whole(&'a WholePack),
}

/// What went wrong so far, for the report.
#[derive(Debug, Default, Clone, Serialize)]
struct Trouble {
    failed_reads: u64,
    last_error: Option<String>,
}

/// `stats.json` of one pack.
#[derive(Debug, Serialize)]
pub(super) struct Stats {
    name: String,
    opened: bool,
    bytes_total: Option<u64>,
    bytes_fetched: u64,
    requests: u64,
    chunks_total: u32,
    chunks_fetched: u32,
    retrying_for_ms: Option<u64>,
    retrying_because: Option<String>,
    failed_reads: u64,
    last_error: Option<String>,
    files: Vec<FileReport>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    name: String,
    size: u64,
    chunks: u32,
    stored_chunks: u32,
    stored_bytes: u64,
    fetched_chunks: u32,
}

impl PackNode {
    pub(super) fn new(inode: Inode, parent: Inode, listing: &Listing, options: StoreOptions) -> PackNode {
        PackNode {
            inode,
            parent,
            label: format!("{}/{}/{}", listing.owner, listing.name, listing.version),
            location: listing.location.clone(),
            sha256: listing.sha256,
            modified: listing.modified,
            options,
            store: OnceCell::new(),
            root_disk: OnceCell::new(),
            legacy: LegacyNode::default(),
            open_failed: Mutex::default(),
            trouble: Mutex::default(),
        }
    }

    /// What the pack holds. Whoever comes first opens it, the others wait; a failure is tried again by the next one.
    async fn contents(&self) -> Result<Contents<'_>, Errno> {
        let began = Instant::now();
        // `None`: it is one of the predecessor's.
        let open = || async {
            if self.legacy.is_known() {
                return Err(None);
            }
            // Readers queue here: whoever waited while another failed shares that failure, or the last of many would
            // wait for as many deadlines.
            let failed = *self.open_failed.lock().expect("no panics while held");
            if let Some((_, errno)) = failed.filter(|&(at, _)| at > began) {
                return Err(Some(errno));
            }
            match Store::open(self.location.clone(), self.options.clone()).await {
                Ok(store) => Ok(store),
                Err(OpenError::Legacy { .. }) => {
                    self.legacy.make_known();
                    Err(None)
                }
                Err(error) => {
                    self.failed(&error);
                    let errno = of_open_error(&error);
                    *self.open_failed.lock().expect("no panics while held") = Some((Instant::now(), errno));
                    Err(Some(errno))
                }
            }
        };
        match self.store.get_or_try_init(open).await {
            Ok(store) => return Ok(Contents::Indexed(store)),
            Err(None) => {}
            Err(Some(errno)) => return Err(errno),
        }
        let fetched = self.legacy.fetch(&self.location, self.sha256, &self.options).await;
        fetched.map(Contents::Whole).map_err(|error| {
            self.failed(&error);
            of_whole_error(&error)
        })
    }

    /// The store of a pack that has an index.
    async fn store(&self) -> Result<&Arc<Store>, Errno> {
        match self.contents().await? {
            Contents::Indexed(store) => Ok(store),
            Contents::Whole(_) => Err(Errno::STALE),
        }
    }

    /// Whether this is the pack of that listing.
    pub(super) fn shows(&self, listing: &Listing) -> bool {
        self.location == listing.location && self.sha256 == listing.sha256
    }

    /// Drops what can be fetched again.
    pub(super) fn release_memory(&self) {
        if let Some(store) = self.store.get() {
            store.release_memory();
        }
    }

    /// The root disk, opened by whoever comes first.
    async fn root_disk(&self) -> Result<&RootDisk, Errno> {
        let store = self.store().await?;
        let file = browsable(store.index()).ok_or(Errno::STALE)?;
        let open = || RootDisk::open(store.clone(), file, self.inode);
        self.root_disk.get_or_try_init(open).await.map_err(|error| self.refused(error.into()))
    }

    fn refused(&self, refusal: Refusal) -> Errno {
        match refusal {
            Refusal::Request(errno) => errno,
            Refusal::Image(error) => {
                self.failed(&error);
                errno_of(&error)
            }
        }
    }

    fn failed(&self, error: &dyn std::error::Error) {
        let text = chain(error);
        tracing::warn!(pack = %self.label, error = %text, "a read failed");
        let mut trouble = self.trouble.lock().expect("no panics while held");
        trouble.failed_reads += 1;
        trouble.last_error = Some(text);
    }

    pub(super) fn was_tried(&self) -> bool {
        self.store.initialized()
            || self.legacy.get().is_some()
            || self.trouble.lock().expect("no panics while held").failed_reads > 0
    }

    pub(super) fn pack_bytes(&self) -> Option<u64> {
        let whole = || self.legacy.get().map(|whole| whole.packed_size);
        self.store.get().map(|store| store.index().pack_size()).or_else(whole).or(self.location.size)
    }

    fn lookup_whole(&self, whole: &WholePack, slot: u32, name: &str) -> Result<Attributes, Errno> {
        let names = legacy::names(whole, slot)?;
        let (found, ..) = names.iter().find(|(_, _, own)| own == name).ok_or(Errno::NOENT)?;
        self.show_whole(whole, *found)
    }

    fn show_whole(&self, whole: &WholePack, slot: u32) -> Result<Attributes, Errno> {
        let (kind, size, allocated, links) = legacy::attributes(whole, slot)?;
        Ok(Attributes {
            inode: self.at(slot),
            kind,
            size,
            allocated,
            links,
            permissions: kind.read_only(),
            owner: None,
            device: 0,
            modified: self.modified,
            valid: IMMUTABLE,
        })
    }

    fn at(&self, slot: u32) -> Inode {
        self.inode | Inode::from(slot)
    }

    pub(super) async fn lookup(&self, slot: u32, name: &OsStr) -> Result<Attributes, Errno> {
        if RootDisk::has_slot(slot) {
            let found = self.root_disk().await?.lookup(slot, name.as_encoded_bytes()).await;
            return found.map_err(|refusal| self.refused(refusal));
        }
        let name = name.to_str().ok_or(Errno::NOENT)?;
        match (slot, name) {
            (DIRECTORY, ".forkd") => self.attributes(REPORTS).await,
            (DIRECTORY, _) => {
                let index = match self.contents().await? {
                    Contents::Indexed(store) => store.index(),
                    Contents::Whole(whole) => return self.lookup_whole(whole, slot, name),
                };
                if name == ROOT_DISK_NAME && browsable(index).is_some() {
                    return self.attributes(ROOT_DISK).await;
                }
                let file = index.file(name).ok_or(Errno::NOENT)?;
                self.attributes(slot_of(file)).await
            }
            (REPORTS, "stats.json") => self.attributes(STATS).await,
            (REPORTS, "blocks") => self.attributes(BLOCKS).await,
            (REPORTS, _) => Err(Errno::NOENT),
            _ if legacy::is_tag(slot) => match self.contents().await? {
                Contents::Indexed(_) => Err(Errno::STALE),
                Contents::Whole(whole) => self.lookup_whole(whole, slot, name),
            },
            _ => Err(Errno::NOTDIR),
        }
    }

    pub(super) async fn attributes(&self, slot: u32) -> Result<Attributes, Errno> {
        let directory = |links| (Kind::Directory, 0, 0, links, LISTING);
        let report =
            |report: Bytes| (Kind::File, report.len() as u64, report.len() as u64, 1, Duration::ZERO);
        let (kind, size, allocated, links, valid) = match slot {
            // One link means: nobody has counted the subdirectories. For the root disk's own links, the image would have
            // to be read, which listing a pack must not cost.
            DIRECTORY => directory(1),
            REPORTS => directory(2),
            ROOT_DISK => directory(1),
            STATS => report(as_json(&self.stats())),
            BLOCKS => report(self.blocks()),
            _ if RootDisk::has_slot(slot) => {
                let found = self.root_disk().await?.attributes(slot).await;
                return found.map_err(|refusal| self.refused(refusal));
            }
            _ => {
                let index = match self.contents().await? {
                    Contents::Indexed(store) => store.index(),
                    Contents::Whole(whole) => return self.show_whole(whole, slot),
                };
                let (file, size) = member(index, slot)?;
                let plain = u64::from(index.stats(file).stored_chunks) * u64::from(index.chunk_size());
                (Kind::File, size, plain.min(size), 1, IMMUTABLE)
            }
        };
        let inode = self.at(slot);
        let permissions = kind.read_only();
        let modified = self.modified;
        Ok(Attributes {
            inode,
            kind,
            size,
            allocated,
            links,
            permissions,
            owner: None,
            device: 0,
            modified,
            valid,
        })
    }

    /// Some of the names in a directory from a position on.
    pub(super) async fn entries_from(&self, slot: u32, position: u64) -> Result<Vec<Entry>, Errno> {
        let file = |slot, name: &str| (self.at(slot), Kind::File, OsString::from(name));
        match slot {
            DIRECTORY => {
                let directory = |slot, name: &str| (self.at(slot), Kind::Directory, OsString::from(name));
                let index = match self.contents().await? {
                    Contents::Indexed(store) => store.index(),
                    Contents::Whole(whole) => {
                        let members = legacy::names(whole, slot)?.into_iter();
                        let members = members.map(|(slot, kind, name)| (self.at(slot), kind, name));
                        let names = [directory(REPORTS, ".forkd")].into_iter().chain(members);
                        return Ok(Entry::listing(self.inode, self.parent, names, position));
                    }
                };
                let members = index.files().map(|(id, entry)| file(slot_of(id), &entry.name));
                let root_disk = browsable(index).map(|_| directory(ROOT_DISK, ROOT_DISK_NAME));
                let names = [directory(REPORTS, ".forkd")].into_iter().chain(members).chain(root_disk);
                Ok(Entry::listing(self.inode, self.parent, names, position))
            }
            REPORTS => {
                let reports = [file(STATS, "stats.json"), file(BLOCKS, "blocks")];
                Ok(Entry::listing(self.at(REPORTS), self.inode, reports.into_iter(), position))
            }
            _ if legacy::is_tag(slot) && !RootDisk::has_slot(slot) => match self.contents().await? {
                Contents::Indexed(_) => Err(Errno::STALE),
                Contents::Whole(whole) => {
                    let members = legacy::names(whole, slot)?.into_iter();
                    let members = members.map(|(slot, kind, name)| (self.at(slot), kind, name));
                    Ok(Entry::listing(self.at(slot), self.inode, members, position))
                }
            },
            _ if RootDisk::has_slot(slot) => {
                let found = self.root_disk().await?.entries_from(slot, position).await;
                found.map_err(|refusal| self.refused(refusal))
            }
            _ => Err(Errno::NOTDIR),
        }
    }

    /// Where a symbolic link leads.
    pub(super) async fn link_target(&self, slot: u32) -> Result<Bytes, Errno> {
        match RootDisk::has_slot(slot) {
            true => {
                let found = self.root_disk().await?.link_target(slot).await;
                found.map_err(|refusal| self.refused(refusal))
            }
            false => Err(Errno::INVAL),
        }
    }

    pub(super) fn open(&self, slot: u32) -> Result<Opened, Errno> {
        match slot {
            DIRECTORY | REPORTS | ROOT_DISK => Err(Errno::ISDIR),
            STATS => Ok(Opened::Report(as_json(&self.stats()))),
            BLOCKS => Ok(Opened::Report(self.blocks())),
            _ => Ok(Opened::Immutable),
        }
    }

    pub(super) async fn read(&self, slot: u32, offset: u64, len: u32) -> Result<Bytes, Errno> {
        if RootDisk::has_slot(slot) {
            let read = self.root_disk().await?.read(slot, offset, len).await;
            return read.map_err(|refusal| self.refused(refusal));
        }
        let store = match self.contents().await? {
            Contents::Indexed(store) => store,
            Contents::Whole(whole) => return legacy::read(whole, slot, offset, len).await,
        };
        let (file, size) = member(store.index(), slot)?;
        let len = size.saturating_sub(offset).min(u64::from(len));
        if len == 0 {
            return Ok(Bytes::new());
        }
        store.read(file, offset, len).await.map_err(|error| {
            self.failed(&error);
            of_read_error(&error)
        })
    }

    pub(super) async fn seek(&self, slot: u32, offset: u64, data: bool) -> Result<u64, Errno> {
        if RootDisk::has_slot(slot) {
            let found = self.root_disk().await?.seek(slot, offset, data).await;
            return found.map_err(|refusal| self.refused(refusal));
        }
        let index = match self.contents().await? {
            Contents::Indexed(store) => store.index(),
            Contents::Whole(whole) => return legacy::seek(whole, slot, offset, data),
        };
        let (file, size) = member(index, slot)?;
        if offset >= size {
            return Err(Errno::NXIO);
        }
        let chunk_size = u64::from(index.chunk_size());
        let first = (offset / chunk_size) as u32;
        let found =
            (first..index.chunk_count(file)).find(|&chunk| index.is_zero(ChunkId { file, chunk }) != data);
        match found {
            Some(chunk) => Ok(offset.max(u64::from(chunk) * chunk_size)),
            None if data => Err(Errno::NXIO),
            // Every file ends in a hole.
            None => Ok(size),
        }
    }

    pub(super) fn stats(&self) -> Stats {
        let trouble = self.trouble.lock().expect("no panics while held").clone();
        let store = self.store.get();
        let progress = store.map(|store| store.progress()).unwrap_or_default();
        let files = store.map_or_else(Vec::new, |store| {
            let index = store.index();
            index.files().map(|(id, entry)| file_report(store, id, &entry.name, entry.size)).collect()
        });
        Stats {
            name: self.label.clone(),
            opened: store.is_some() || self.legacy.get().is_some(),
            bytes_total: self.pack_bytes(),
            bytes_fetched: progress.bytes_fetched,
            requests: progress.requests,
            chunks_total: progress.chunks_total,
            chunks_fetched: progress.chunks_fetched,
            retrying_for_ms: progress.retrying_since.map(|since| since.elapsed().as_millis() as u64),
            retrying_because: progress.last_error,
            failed_reads: trouble.failed_reads,
            last_error: trouble.last_error,
            files,
        }
    }

    /// One line a file: its name, then one character a chunk: `0` zero, `#` fetched, `.` not fetched.
    fn blocks(&self) -> Bytes {
        let Some(store) = self.store.get() else { return Bytes::new() };
        let index = store.index();
        let mut text = String::new();
        for (file, entry) in index.files() {
            let _ = write!(text, "{} ", entry.name);
            let chunks = (0..index.chunk_count(file)).map(|chunk| ChunkId { file, chunk });
            text.extend(chunks.map(|id| match (index.is_zero(id), store.is_fetched(id)) {
                (true, _) => '0',
                (false, true) => '#',
                (false, false) => '.',
            }));
            text.push('\n');
        }
        text.into()
    }
}

fn file_report(store: &Arc<Store>, file: FileId, name: &str, size: u64) -> FileReport {
    let (index, stats) = (store.index(), store.index().stats(file));
    let fetched = index.stored_chunks(file).filter(|&(id, _)| store.is_fetched(id)).count();
    FileReport {
        name: name.to_owned(),
        size,
        chunks: stats.chunks,
        stored_chunks: stats.stored_chunks,
        stored_bytes: stats.stored_bytes,
        fetched_chunks: fetched as u32,
    }
}

fn slot_of(file: FileId) -> u32 {
    FIRST_MEMBER + file.0
}

/// The root disk, if the pack has one whose files can be shown; a member of that name keeps it.
fn browsable(index: &Index) -> Option<FileId> {
    index.file(ROOTFS).filter(|_| index.file(ROOT_DISK_NAME).is_none())
}

/// The member behind a slot and its size.
fn member(index: &Index, slot: u32) -> Result<(FileId, u64), Errno> {
    let file = FileId(slot.checked_sub(FIRST_MEMBER).ok_or(Errno::STALE)?);
    Ok((file, index.entry(file).ok_or(Errno::STALE)?.size))
}

pub(super) fn as_json(report: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec_pretty(report).unwrap_or_default();
    text.push(b'\n');
    text.into()
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let _ = write!(text, ": {cause}");
        next = cause.source();
    }
    text
}
