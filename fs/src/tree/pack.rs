//! The part of the tree below one VERSION: the pack's members, and the reports about it.

use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustix::io::Errno;
use tokio::sync::OnceCell;

use super::errno::{of_open_error, of_read_error, of_whole_error};
use super::inode::{Attributes, Entry, IMMUTABLE, Inode, Kind, LISTING, OpenedFile};
use super::legacy::{self, LegacyNode, MemberAttributes};
use super::listing::PackListing;
use super::report::{self, ReadFailures, Stats, as_json};
use super::rootfs::{Refusal, RootDisk, errno_of};
use super::slot::Slot;
use crate::chain::chain;
use crate::digest::Digest;
use crate::format::ROOTFS;
use crate::index::{ChunkId, FileId, Index};
use crate::legacy::whole::WholePack;
use crate::store::{OpenError, PackLocation, Store, StoreOptions};

/// Name of the directory with the root disk's files.
const ROOT_DISK_NAME: &str = "rootfs";
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
    failures: Mutex<ReadFailures>,
}

/// What an opened pack is read from.
enum Contents<'a> {
    Indexed(&'a Arc<Store>),
    /// A pack of the predecessor.
    Whole(&'a WholePack),
}

impl PackNode {
    pub(super) fn new(inode: Inode, parent: Inode, listing: &PackListing, options: StoreOptions) -> PackNode {
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
            failures: Mutex::default(),
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

    /// A pack of the predecessor.
    async fn whole(&self) -> Result<&WholePack, Errno> {
        match self.contents().await? {
            Contents::Whole(whole) => Ok(whole),
            Contents::Indexed(_) => Err(Errno::STALE),
        }
    }

    /// Whether this is the pack of that listing.
    pub(super) fn shows(&self, listing: &PackListing) -> bool {
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
        let mut failures = self.failures.lock().expect("no panics while held");
        failures.failed_reads += 1;
        failures.last_error = Some(text);
    }

    pub(super) fn was_tried(&self) -> bool {
        self.store.initialized()
            || self.legacy.get().is_some()
            || self.failures.lock().expect("no panics while held").failed_reads > 0
    }

    pub(super) fn pack_bytes(&self) -> Option<u64> {
        let whole = || self.legacy.get().map(|whole| whole.packed_size);
        self.store.get().map(|store| store.progress().bytes_total).or_else(whole).or(self.location.size)
    }

    /// The directory of a tag, or with `None` the version's own, of a pack of the predecessor.
    fn names_whole(
        &self,
        whole: &WholePack,
        tag: Option<u32>,
    ) -> Result<impl Iterator<Item = (Inode, Kind, OsString)> + use<'_>, Errno> {
        let names = legacy::names(whole, tag)?.into_iter();
        Ok(names.map(|(slot, kind, name)| (self.at(slot), kind, name)))
    }

    fn lookup_whole(&self, whole: &WholePack, tag: Option<u32>, name: &str) -> Result<Attributes, Errno> {
        let names = legacy::names(whole, tag)?;
        match names.iter().find(|(_, _, own)| own == name) {
            Some(&(slot @ Slot::Member(position), ..)) => {
                Ok(self.show(slot, legacy::member(whole, position)?))
            }
            Some(&(slot @ Slot::Tag(position), ..)) => Ok(self.show(slot, legacy::tag(whole, position)?)),
            _ => Err(Errno::NOENT),
        }
    }

    /// Attributes of what never changes.
    fn show(&self, slot: Slot, shown: MemberAttributes) -> Attributes {
        self.show_for(slot, shown, IMMUTABLE)
    }

    fn show_for(
        &self,
        slot: Slot,
        (kind, size, allocated, links): MemberAttributes,
        valid: Duration,
    ) -> Attributes {
        Attributes {
            inode: self.at(slot),
            kind,
            size,
            allocated,
            links,
            permissions: kind.read_only(),
            owner: None,
            device: 0,
            modified: self.modified,
            valid,
        }
    }

    fn at(&self, slot: Slot) -> Inode {
        self.inode | Inode::from(slot.encode())
    }

    /// The inode `name` in the directory `slot`.
    pub(super) async fn lookup(&self, slot: Slot, name: &OsStr) -> Result<Attributes, Errno> {
        if let Slot::RootDisk | Slot::Image(_) = slot {
            let found = self.root_disk().await?.lookup(slot, name.as_encoded_bytes()).await;
            return found.map_err(|refusal| self.refused(refusal));
        }
        let name = name.to_str().ok_or(Errno::NOENT)?;
        match (slot, name) {
            (Slot::Directory, ".forkd") => self.attributes(Slot::Reports).await,
            (Slot::Directory, _) => {
                let index = match self.contents().await? {
                    Contents::Indexed(store) => store.index(),
                    Contents::Whole(whole) => return self.lookup_whole(whole, None, name),
                };
                if name == ROOT_DISK_NAME && browsable(index).is_some() {
                    return self.attributes(Slot::RootDisk).await;
                }
                let file = index.file(name).ok_or(Errno::NOENT)?;
                self.attributes(Slot::Member(file.0)).await
            }
            (Slot::Reports, "stats.json") => self.attributes(Slot::Stats).await,
            (Slot::Reports, "blocks") => self.attributes(Slot::Blocks).await,
            (Slot::Reports, _) => Err(Errno::NOENT),
            (Slot::Tag(tag), _) => self.lookup_whole(self.whole().await?, Some(tag), name),
            _ => Err(Errno::NOTDIR),
        }
    }

    /// What `stat` shows.
    pub(super) async fn attributes(&self, slot: Slot) -> Result<Attributes, Errno> {
        // One link means: nobody has counted the subdirectories. For the root disk's own links, the image would have
        // to be read, which listing a pack must not cost.
        let directory = |links| self.show_for(slot, (Kind::Directory, 0, 0, links), LISTING);
        let report = |report: Bytes| {
            let len = report.len() as u64;
            self.show_for(slot, (Kind::File, len, len, 1), Duration::ZERO)
        };
        match slot {
            Slot::Directory | Slot::RootDisk => Ok(directory(1)),
            Slot::Reports => Ok(directory(2)),
            Slot::Stats => Ok(report(as_json(&self.stats()))),
            Slot::Blocks => Ok(report(self.blocks())),
            Slot::Image(_) => {
                let found = self.root_disk().await?.attributes(slot).await;
                found.map_err(|refusal| self.refused(refusal))
            }
            Slot::Tag(tag) => Ok(self.show(slot, legacy::tag(self.whole().await?, tag)?)),
            Slot::Member(position) => {
                let index = match self.contents().await? {
                    Contents::Indexed(store) => store.index(),
                    Contents::Whole(whole) => return Ok(self.show(slot, legacy::member(whole, position)?)),
                };
                let (file, size) = member(index, position)?;
                let plain = u64::from(index.stats(file).stored_chunks) * u64::from(index.chunk_size());
                Ok(self.show(slot, (Kind::File, size, plain.min(size), 1)))
            }
        }
    }

    /// Some of the names in a directory from a position on.
    pub(super) async fn entries_from(&self, slot: Slot, position: u64) -> Result<Vec<Entry>, Errno> {
        let file = |slot, name: &str| (self.at(slot), Kind::File, OsString::from(name));
        match slot {
            Slot::Directory => {
                let directory = |slot, name: &str| (self.at(slot), Kind::Directory, OsString::from(name));
                let reports = [directory(Slot::Reports, ".forkd")].into_iter();
                let index = match self.contents().await? {
                    Contents::Indexed(store) => store.index(),
                    Contents::Whole(whole) => {
                        let names = reports.chain(self.names_whole(whole, None)?);
                        return Ok(Entry::listing(self.inode, self.parent, names, position));
                    }
                };
                let members = index.files().map(|(id, entry)| file(Slot::Member(id.0), &entry.name));
                let root_disk = browsable(index).map(|_| directory(Slot::RootDisk, ROOT_DISK_NAME));
                let names = reports.chain(members).chain(root_disk);
                Ok(Entry::listing(self.inode, self.parent, names, position))
            }
            Slot::Reports => {
                let reports = [file(Slot::Stats, "stats.json"), file(Slot::Blocks, "blocks")];
                Ok(Entry::listing(self.at(slot), self.inode, reports.into_iter(), position))
            }
            Slot::Tag(tag) => {
                let members = self.names_whole(self.whole().await?, Some(tag))?;
                Ok(Entry::listing(self.at(slot), self.inode, members, position))
            }
            Slot::RootDisk | Slot::Image(_) => {
                let found = self.root_disk().await?.entries_from(slot, position).await;
                found.map_err(|refusal| self.refused(refusal))
            }
            Slot::Stats | Slot::Blocks | Slot::Member(_) => Err(Errno::NOTDIR),
        }
    }

    /// Where a symbolic link leads.
    pub(super) async fn link_target(&self, slot: Slot) -> Result<Bytes, Errno> {
        match slot {
            Slot::RootDisk | Slot::Image(_) => {
                let found = self.root_disk().await?.link_target(slot).await;
                found.map_err(|refusal| self.refused(refusal))
            }
            _ => Err(Errno::INVAL),
        }
    }

    pub(super) fn open(&self, slot: Slot) -> Result<OpenedFile, Errno> {
        match slot {
            Slot::Directory | Slot::Reports | Slot::RootDisk => Err(Errno::ISDIR),
            Slot::Stats => Ok(OpenedFile::Report(as_json(&self.stats()))),
            Slot::Blocks => Ok(OpenedFile::Report(self.blocks())),
            Slot::Member(_) | Slot::Tag(_) | Slot::Image(_) => Ok(OpenedFile::Immutable),
        }
    }

    pub(super) async fn read(&self, slot: Slot, offset: u64, len: u32) -> Result<Bytes, Errno> {
        let position = match slot {
            Slot::Member(position) => position,
            Slot::RootDisk | Slot::Image(_) => {
                let read = self.root_disk().await?.read(slot, offset, len).await;
                return read.map_err(|refusal| self.refused(refusal));
            }
            Slot::Tag(_) => return self.whole().await.and(Err(Errno::ISDIR)),
            Slot::Directory | Slot::Reports | Slot::Stats | Slot::Blocks => return Err(Errno::STALE),
        };
        let store = match self.contents().await? {
            Contents::Indexed(store) => store,
            Contents::Whole(whole) => return legacy::read(whole, position, offset, len).await,
        };
        let (file, size) = member(store.index(), position)?;
        let len = size.saturating_sub(offset).min(u64::from(len));
        if len == 0 {
            return Ok(Bytes::new());
        }
        store.read(file, offset, len).await.map_err(|error| {
            self.failed(&error);
            of_read_error(&error)
        })
    }

    pub(super) async fn seek(&self, slot: Slot, offset: u64, data: bool) -> Result<u64, Errno> {
        let position = match slot {
            Slot::Member(position) => position,
            Slot::RootDisk | Slot::Image(_) => {
                let found = self.root_disk().await?.seek(slot, offset, data).await;
                return found.map_err(|refusal| self.refused(refusal));
            }
            Slot::Directory | Slot::Reports | Slot::Stats | Slot::Blocks | Slot::Tag(_) => {
                return Err(Errno::STALE);
            }
        };
        let index = match self.contents().await? {
            Contents::Indexed(store) => store.index(),
            Contents::Whole(whole) => return legacy::seek(whole, position, offset, data),
        };
        let (file, size) = member(index, position)?;
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
        let failures = self.failures.lock().expect("no panics while held").clone();
        let store = self.store.get().map(Arc::as_ref);
        let opened = store.is_some() || self.legacy.get().is_some();
        Stats::new(&self.label, opened, self.pack_bytes(), store, failures)
    }

    /// `.forkd/blocks`.
    fn blocks(&self) -> Bytes {
        self.store.get().map_or_else(Bytes::new, |store| report::blocks(store))
    }
}

/// The root disk, if the pack has one whose files can be shown; a member of that name keeps it.
fn browsable(index: &Index) -> Option<FileId> {
    index.file(ROOTFS).filter(|_| index.file(ROOT_DISK_NAME).is_none())
}

/// The member at a position and its size.
fn member(index: &Index, position: u32) -> Result<(FileId, u64), Errno> {
    let file = FileId(position);
    Ok((file, index.entry(file).ok_or(Errno::STALE)?.size))
}
