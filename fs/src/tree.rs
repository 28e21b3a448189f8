//! The mount's tree of read-only inodes, without a word about FUSE: `fuse.rs` adapts it, tests call it directly.
//!
//! ```text
//! /OWNER/NAME/VERSION/{manifest.toml, memory.bin, ...}    the pack's files, opened on the first look inside VERSION
//! /OWNER/NAME/latest -> VERSION                           when another version is the same pack; else a directory
//! /OWNER/NAME/VERSION/.forkd/{stats.json, blocks}         what of this pack was fetched, and what went wrong
//! /.forkd/stats.json                                      the same of all packs opened so far
//! ```
//!
//! Inode numbers are never used twice: small ones for the directories above packs, `(pack + 1) << 32 | slot` inside a
//! pack. A new registry ([`Tree::refresh`]) adds and removes names; whoever has a removed file open keeps reading it.

use std::ffi::{OsStr, OsString};
use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustix::io::Errno;

use crate::digest::Digest;
use crate::store::{PackLocation, StoreOptions};

mod errno;
mod legacy;
mod listed;
mod pack;
mod rootfs;

pub use errno::{of_open_error, of_read_error, of_whole_error};
pub use listed::Changed;
use listed::{Content, Listed};
use pack::PackNode;

/// An inode number.
pub type Inode = u64;

/// The mountpoint's own inode.
pub const ROOT: Inode = 1;
/// Most bytes one read returns.
pub const MAX_READ: u32 = 1 << 20;

/// How long a member of a pack may be remembered: its contents and size never change.
const IMMUTABLE: Duration = Duration::from_secs(3600);
/// How long the listing above packs may be remembered.
const LISTING: Duration = Duration::from_secs(60);

/// Where a pack's number starts in an inode number.
const PACK_SHIFT: u32 = 32;

/// One version of one package, as a registry lists it.
#[derive(Debug, Clone)]
pub struct Listing {
    /// First path component; a plain name.
    pub owner: String,
    /// Second path component; a plain name.
    pub name: String,
    /// Third path component; a plain name.
    pub version: String,
    /// Where the pack is.
    pub location: PackLocation,
    /// What the whole pack hashes to, from a registry. A pack of the predecessor has no other anchor of trust.
    pub sha256: Option<Digest>,
    /// Time shown for everything in it.
    pub modified: SystemTime,
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A directory.
    Directory,
    /// A regular file.
    File,
    /// A symbolic link.
    Symlink,
    /// A named pipe of a root disk; opening it makes one of the kernel's own.
    Fifo,
    /// A socket of a root disk; nobody listens.
    Socket,
    /// A character device of a root disk; mounts refuse to open it.
    CharDevice,
    /// A block device of a root disk; mounts refuse to open it.
    BlockDevice,
}

impl Kind {
    /// The permission bits of what has none of its own: readable by everyone, writable by nobody.
    fn read_only(self) -> u16 {
        match self {
            Kind::Directory => 0o555,
            Kind::Symlink => 0o777,
            Kind::File | Kind::Fifo | Kind::Socket | Kind::CharDevice | Kind::BlockDevice => 0o444,
        }
    }
}

/// What `stat` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attributes {
    /// The inode.
    pub inode: Inode,
    /// What it is.
    pub kind: Kind,
    /// Bytes.
    pub size: u64,
    /// Bytes that are not holes.
    pub allocated: u64,
    /// Names it has; for a directory, 2 and one per subdirectory.
    pub links: u32,
    /// The twelve permission bits.
    pub permissions: u16,
    /// User and group that own it; `None` is whoever mounted.
    pub owner: Option<(u32, u32)>,
    /// Number of a device, as the kernel packs it into 32 bits (include/linux/kdev_t.h, new_encode_dev).
    pub device: u32,
    /// When it last changed.
    pub modified: SystemTime,
    /// How long this answer holds; zero for reports, which change all the time.
    pub valid: Duration,
}

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The inode it names.
    pub inode: Inode,
    /// What that is.
    pub kind: Kind,
    /// The name.
    pub name: OsString,
    /// The position after it, to go on from.
    pub next: u64,
}

impl Entry {
    /// A directory whose order never changes, from `position` on: a position is the number of entries before it.
    fn listing(
        inode: Inode,
        parent: Inode,
        names: impl Iterator<Item = (Inode, Kind, OsString)>,
        position: u64,
    ) -> Vec<Entry> {
        let dots = [(inode, "."), (parent, "..")];
        dots.into_iter()
            .map(|(inode, name)| (inode, Kind::Directory, OsString::from(name)))
            .chain(names)
            .zip(1..)
            .map(|((inode, kind, name), next)| Entry { inode, kind, name, next })
            .filter(|entry| entry.next > position)
            .collect()
    }
}

/// What opening a file gives.
#[derive(Debug, Clone)]
pub enum Opened {
    /// Immutable contents: what the kernel has read it may keep.
    Immutable,
    /// A report, made now; to be read around the kernel's cache.
    Report(Bytes),
}

/// The tree.
#[derive(Debug)]
pub struct Tree {
    listed: RwLock<Listed>,
    options: StoreOptions,
}

impl Tree {
    /// A tree over `listings`. Listings with names that are not plain, or the same names twice, are left out: the
    /// first one counts.
    pub fn new(listings: Vec<Listing>, options: StoreOptions) -> Tree {
        let mut listed = Listed::new();
        listed.update(&listings, &options);
        Tree { listed: RwLock::new(listed), options }
    }

    /// Shows `listings` from now on, as [`Tree::new`] would. What did not change keeps its inodes; what changed or went
    /// stays readable through the inodes that are in use. Returns the names that changed, for the kernel to forget.
    pub fn refresh(&self, listings: &[Listing]) -> Vec<Changed> {
        self.listed.write().expect("no panics while held").update(listings, &self.options)
    }

    fn listed(&self) -> RwLockReadGuard<'_, Listed> {
        self.listed.read().expect("no panics while held")
    }

    /// The pack and slot behind an inode; `None` for one above the packs.
    fn pack(&self, inode: Inode) -> Result<Option<(Arc<PackNode>, u32)>, Errno> {
        let (pack, slot) = (inode >> PACK_SHIFT, inode as u32);
        match (pack as usize).checked_sub(1) {
            Some(pack) => Ok(Some((self.listed().pack(pack)?, slot))),
            None => Ok(None),
        }
    }

    /// The inode `name` in the directory `parent`. Opens the pack when `name` is one of its members.
    pub async fn lookup(&self, parent: Inode, name: &OsStr) -> Result<Attributes, Errno> {
        if let Some((pack, slot)) = self.pack(parent)? {
            return pack.lookup(slot, name).await;
        }
        // Every name above the packs is UTF-8.
        let inode = self.listed().named(parent, name.to_str().ok_or(Errno::NOENT)?)?;
        self.attributes(inode).await
    }

    /// What `stat` shows of an inode.
    pub async fn attributes(&self, inode: Inode) -> Result<Attributes, Errno> {
        if let Some((pack, slot)) = self.pack(inode)? {
            return pack.attributes(slot).await;
        }
        let listed = self.listed();
        let node = listed.node(inode)?;
        let (kind, size, links, valid) = match &node.content {
            Content::Directory(_) => (Kind::Directory, 0, 2 + listed.subdirectories(inode), LISTING),
            Content::Symlink(target) => (Kind::Symlink, target.len() as u64, 1, LISTING),
            Content::Report => (Kind::File, report(&listed).len() as u64, 1, Duration::ZERO),
        };
        Ok(Attributes {
            inode,
            kind,
            size,
            allocated: size,
            links,
            permissions: kind.read_only(),
            owner: None,
            device: 0,
            modified: node.modified,
            valid,
        })
    }

    /// Some of the names in a directory from a position on (0: the start), `.` and `..` included; none at the end. Opens
    /// the pack when it is one's.
    pub async fn entries_from(&self, inode: Inode, position: u64) -> Result<Vec<Entry>, Errno> {
        match self.pack(inode)? {
            Some((pack, slot)) => pack.entries_from(slot, position).await,
            None => self.listed().entries_from(inode, position),
        }
    }

    /// Where a symbolic link leads.
    pub async fn link_target(&self, inode: Inode) -> Result<Bytes, Errno> {
        if let Some((pack, slot)) = self.pack(inode)? {
            return pack.link_target(slot).await;
        }
        match &self.listed().node(inode)?.content {
            Content::Symlink(target) => Ok(Bytes::copy_from_slice(target.as_bytes())),
            Content::Directory(_) | Content::Report => Err(Errno::INVAL),
        }
    }

    /// Opens a file.
    pub fn open(&self, inode: Inode) -> Result<Opened, Errno> {
        if let Some((pack, slot)) = self.pack(inode)? {
            return pack.open(slot);
        }
        let listed = self.listed();
        match listed.node(inode)?.content {
            Content::Report => Ok(Opened::Report(report(&listed))),
            Content::Directory(_) => Err(Errno::ISDIR),
            Content::Symlink(_) => Err(Errno::INVAL),
        }
    }

    /// At most `len` bytes of a pack's member from `offset`; fewer only at its end.
    pub async fn read(&self, inode: Inode, offset: u64, len: u32) -> Result<Bytes, Errno> {
        let (pack, slot) = self.pack(inode)?.ok_or(Errno::INVAL)?;
        pack.read(slot, offset, len.min(MAX_READ)).await
    }

    /// The next offset from `offset` that holds data, or that is in a hole: whole zero chunks are holes.
    pub async fn seek(&self, inode: Inode, offset: u64, data: bool) -> Result<u64, Errno> {
        let (pack, slot) = self.pack(inode)?.ok_or(Errno::INVAL)?;
        pack.seek(slot, offset, data).await
    }

    /// Bytes of all packs whose size is known.
    pub fn total_bytes(&self) -> u64 {
        self.listed().shown().filter_map(|pack| pack.pack_bytes()).fold(0, u64::saturating_add)
    }

    /// How many inodes can be named without opening a pack.
    pub fn inodes(&self) -> u64 {
        self.listed().names()
    }
}

/// `/.forkd/stats.json`.
fn report(listed: &Listed) -> Bytes {
    let packs: Vec<_> = listed.shown().filter(|pack| pack.was_tried()).map(|pack| pack.stats()).collect();
    pack::as_json(&serde_json::json!({
        "forkd_version": env!("CARGO_PKG_VERSION"),
        "packs_listed": listed.shown().count(),
        "packs": packs,
    }))
}

/// Shared by everything that serves one mount.
pub type SharedTree = Arc<Tree>;
