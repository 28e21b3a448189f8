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

use std::ffi::OsStr;
use std::sync::{Arc, RwLock, RwLockReadGuard};
use std::time::Duration;

use bytes::Bytes;
use rustix::io::Errno;

use crate::store::StoreOptions;

mod errno;
mod inode;
mod legacy;
mod listed;
mod listing;
mod pack;
mod report;
mod rootfs;
mod slot;

pub use errno::{of_open_error, of_read_error, of_whole_error};
pub use inode::{Attributes, Entry, Inode, Kind, OpenedFile, ROOT};
use inode::{LISTING, PACK_SHIFT};
pub use listed::ChangedName;
use listed::{Content, ListedTree};
pub use listing::PackListing;
use pack::PackNode;
use slot::Slot;

/// Most bytes one read returns.
pub const MAX_READ: u32 = 1 << 20;

/// The tree.
#[derive(Debug)]
pub struct Tree {
    listed: RwLock<ListedTree>,
    options: StoreOptions,
}

impl Tree {
    /// A tree over `listings`. Listings with names that are not plain, or the same names twice, are left out: the
    /// first one counts.
    pub fn new(listings: Vec<PackListing>, options: StoreOptions) -> Tree {
        let mut listed = ListedTree::new();
        listed.update(&listings, &options);
        Tree { listed: RwLock::new(listed), options }
    }

    /// Shows `listings` from now on, as [`Tree::new`] would. What did not change keeps its inodes; what changed or went
    /// stays readable through the inodes that are in use. Returns the names that changed, for the kernel to forget.
    pub fn refresh(&self, listings: &[PackListing]) -> Vec<ChangedName> {
        self.listed.write().expect("no panics while held").update(listings, &self.options)
    }

    fn listed(&self) -> RwLockReadGuard<'_, ListedTree> {
        self.listed.read().expect("no panics while held")
    }

    /// The pack and slot behind an inode; `None` for one above the packs.
    fn pack(&self, inode: Inode) -> Result<Option<(Arc<PackNode>, Slot)>, Errno> {
        let Some(pack) = ((inode >> PACK_SHIFT) as usize).checked_sub(1) else { return Ok(None) };
        let slot = Slot::decode(inode as u32).ok_or(Errno::STALE)?;
        Ok(Some((self.listed().pack(pack)?, slot)))
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
            Content::Report => (Kind::File, report_on_all(&listed).len() as u64, 1, Duration::ZERO),
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

    /// Some of the names in a directory from a position on (0: the start), `.` and `..` included; none at the end.
    /// Opens the pack when it is one's.
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
    pub fn open(&self, inode: Inode) -> Result<OpenedFile, Errno> {
        if let Some((pack, slot)) = self.pack(inode)? {
            return pack.open(slot);
        }
        let listed = self.listed();
        match listed.node(inode)?.content {
            Content::Report => Ok(OpenedFile::Report(report_on_all(&listed))),
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
fn report_on_all(listed: &ListedTree) -> Bytes {
    let packs: Vec<_> = listed.shown().filter(|pack| pack.was_tried()).map(|pack| pack.stats()).collect();
    report::as_json(&serde_json::json!({
        "forkd_version": env!("CARGO_PKG_VERSION"),
        "packs_listed": listed.shown().count(),
        "packs": packs,
    }))
}

/// Shared by everything that serves one mount.
pub type SharedTree = Arc<Tree>;
