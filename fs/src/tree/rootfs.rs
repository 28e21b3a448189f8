//! `rootfs/` below one VERSION: the files of the pack's root disk, read through the store as they are asked for.
//!
//! The directory itself is shown without a look at the image. What is below it has the image's owners, modes, times and
//! device numbers. An image may have inodes in its first 64 GiB only ([`Slot::of_image`]).

use std::num::NonZeroUsize;
use std::os::unix::ffi::OsStringExt;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use lru::LruCache;
use rustix::io::Errno;

use super::errno::of_read_error;
use super::inode::{Attributes, Entry, IMMUTABLE, Inode, Kind};
use super::slot::Slot;
use crate::erofs::{ErofsError, ErofsImage, ErofsInode, ReadImage, mode};
use crate::index::FileId;
use crate::store::{ReadError, Store};

/// Positions before those of the image: one each for `.` and `..`.
const DOTS: u64 = 2;
/// Inodes remembered, of about 150 bytes each.
const REMEMBERED: NonZeroUsize = NonZeroUsize::new(1024).expect("not zero");

/// Why the image's bytes do not give what was asked for.
pub(super) type RootDiskError = ErofsError<ReadError>;

/// Why a request about the root disk is not answered.
#[derive(Debug)]
pub(super) enum Refusal {
    /// It makes no sense: reading a directory, say.
    Request(Errno),
    /// The image cannot be read or makes no sense.
    Image(RootDiskError),
}

impl From<RootDiskError> for Refusal {
    fn from(error: RootDiskError) -> Self {
        Refusal::Image(error)
    }
}

/// The errno for a root disk that cannot be read.
pub(super) fn errno_of(error: &RootDiskError) -> Errno {
    match error {
        ErofsError::Read(error) => of_read_error(error),
        ErofsError::Unsupported { .. } => Errno::OPNOTSUPP,
        ErofsError::NotErofs | ErofsError::Corrupt { .. } => Errno::IO,
    }
}

/// The image as a member of a pack.
#[derive(Debug)]
struct Member {
    store: Arc<Store>,
    file: FileId,
    size: u64,
}

impl ReadImage for Member {
    type Error = ReadError;

    fn size(&self) -> u64 {
        self.size
    }

    async fn read(&self, offset: u64, len: u64) -> Result<Bytes, ReadError> {
        self.store.read(self.file, offset, len).await
    }
}

/// An opened root disk.
#[derive(Debug)]
pub(super) struct RootDisk {
    image: ErofsImage<Member>,
    /// Inode number of the pack's directory, which contains `rootfs`.
    pack: Inode,
    nodes: Mutex<LruCache<u64, Arc<ErofsInode>>>,
}

impl RootDisk {
    /// Reads the superblock of the member `file`.
    pub(super) async fn open(store: Arc<Store>, file: FileId, pack: Inode) -> Result<Self, RootDiskError> {
        let size = store.index().entry(file).map_or(0, |entry| entry.size);
        let image = ErofsImage::open(Member { store, file, size }).await?;
        Ok(Self { image, pack, nodes: Mutex::new(LruCache::new(REMEMBERED)) })
    }

    fn inode(&self, nid: u64) -> Result<Inode, RootDiskError> {
        let slot = match nid == self.image.root() {
            true => Slot::RootDisk,
            false => Slot::of_image(nid)
                .ok_or(ErofsError::Unsupported { what: "inodes beyond its first 64 GiB" })?,
        };
        Ok(self.pack | Inode::from(slot.encode()))
    }

    /// The inode of the image behind a slot.
    fn nid(&self, slot: Slot) -> u64 {
        match slot {
            Slot::Image(nid) => nid.into(),
            _ => self.image.root(),
        }
    }

    async fn node(&self, nid: u64) -> Result<Arc<ErofsInode>, RootDiskError> {
        if let Some(node) = self.nodes.lock().expect("no panics while held").get(&nid) {
            return Ok(node.clone());
        }
        Ok(self.remember(self.image.node(nid).await?))
    }

    fn remember(&self, node: ErofsInode) -> Arc<ErofsInode> {
        let node = Arc::new(node);
        self.nodes.lock().expect("no panics while held").put(node.nid, node.clone());
        node
    }

    async fn directory(&self, slot: Slot) -> Result<Arc<ErofsInode>, Refusal> {
        let node = self.node(self.nid(slot)).await?;
        if node.is_directory() { Ok(node) } else { Err(Refusal::Request(Errno::NOTDIR)) }
    }

    pub(super) async fn lookup(&self, slot: Slot, name: &[u8]) -> Result<Attributes, Refusal> {
        let directory = self.directory(slot).await?;
        let Some(node) = self.image.lookup(&directory, name).await? else {
            return Err(Refusal::Request(Errno::NOENT));
        };
        Ok(self.show(&self.remember(node))?)
    }

    pub(super) async fn attributes(&self, slot: Slot) -> Result<Attributes, Refusal> {
        Ok(self.show(&*self.node(self.nid(slot)).await?)?)
    }

    fn show(&self, node: &ErofsInode) -> Result<Attributes, RootDiskError> {
        let kind = match node.mode & mode::TYPE {
            mode::DIRECTORY => Kind::Directory,
            mode::SYMLINK => Kind::Symlink,
            mode::FIFO => Kind::Fifo,
            mode::SOCKET => Kind::Socket,
            mode::CHAR_DEVICE => Kind::CharDevice,
            mode::BLOCK_DEVICE => Kind::BlockDevice,
            _ => Kind::File,
        };
        Ok(Attributes {
            inode: self.inode(node.nid)?,
            kind,
            size: node.size,
            allocated: node.size,
            links: node.links,
            permissions: node.mode & !mode::TYPE,
            owner: Some((node.uid, node.gid)),
            device: node.device,
            modified: node.modified,
            valid: IMMUTABLE,
        })
    }

    pub(super) async fn entries_from(&self, slot: Slot, position: u64) -> Result<Vec<Entry>, Refusal> {
        let directory = self.directory(slot).await?;
        let mut entries = Vec::new();
        if position < DOTS {
            let own = self.inode(directory.nid)?;
            let parent = match slot {
                Slot::Image(_) => self.inode(self.image.parent(&directory).await?)?,
                _ => self.pack,
            };
            entries = Entry::listing(own, parent, std::iter::empty(), position);
        }
        let more = self.image.entries_from(&directory, position.saturating_sub(DOTS)).await?;
        for entry in more {
            let (inode, kind) = (self.inode(entry.nid)?, kind_of(entry.file_type));
            let name = std::ffi::OsString::from_vec(entry.name.into());
            entries.push(Entry { inode, kind, name, next: entry.next + DOTS });
        }
        Ok(entries)
    }

    pub(super) async fn read(&self, slot: Slot, offset: u64, len: u32) -> Result<Bytes, Refusal> {
        let node = self.node(self.nid(slot)).await?;
        match node.is_file() {
            true => Ok(self.image.read(&node, offset, u64::from(len)).await?),
            false if node.is_directory() => Err(Refusal::Request(Errno::ISDIR)),
            false => Err(Refusal::Request(Errno::INVAL)),
        }
    }

    /// The next offset with data, or in a hole: all of a file is data, and every file ends in a hole.
    pub(super) async fn seek(&self, slot: Slot, offset: u64, data: bool) -> Result<u64, Refusal> {
        let node = self.node(self.nid(slot)).await?;
        match node.is_file() {
            true if offset >= node.size => Err(Refusal::Request(Errno::NXIO)),
            true => Ok(if data { offset } else { node.size }),
            false => Err(Refusal::Request(Errno::INVAL)),
        }
    }

    pub(super) async fn link_target(&self, slot: Slot) -> Result<Bytes, Refusal> {
        let node = self.node(self.nid(slot)).await?;
        match node.is_symlink() {
            true => Ok(self.image.link_target(&node).await?),
            false => Err(Refusal::Request(Errno::INVAL)),
        }
    }
}

/// What a directory says an entry is (FT_*, include/linux/fs_types.h).
fn kind_of(file_type: u8) -> Kind {
    match file_type {
        2 => Kind::Directory,
        3 => Kind::CharDevice,
        4 => Kind::BlockDevice,
        5 => Kind::Fifo,
        6 => Kind::Socket,
        7 => Kind::Symlink,
        _ => Kind::File,
    }
}
