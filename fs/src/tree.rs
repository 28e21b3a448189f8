//! The mount's tree of read-only inodes, without a word about FUSE: `fuse.rs` adapts it, tests call it directly.
//!
//! ```text
//! /OWNER/NAME/VERSION/{manifest.toml, memory.bin, ...}    the pack's files, opened on the first look inside VERSION
//! /OWNER/NAME/latest -> VERSION                           when another version is the same pack; else a directory
//! /OWNER/NAME/VERSION/.forkd/{stats.json, blocks}         what of this pack was fetched, and what went wrong
//! /.forkd/stats.json                                      the same of all packs opened so far
//! ```
//!
//! Inode numbers are fixed when the tree is made: small ones for the directories above packs, `(pack + 1) << 32 | slot`
//! inside a pack. Nothing is ever forgotten, because nothing is made on demand but the stores.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustix::io::Errno;

use crate::digest::Digest;
use crate::store::{PackLocation, StoreOptions};

mod errno;
mod pack;

pub use errno::{of_open_error, of_read_error};
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
    nodes: Vec<Node>,
    packs: Vec<PackNode>,
    mounted: SystemTime,
}

#[derive(Debug)]
struct Node {
    parent: Inode,
    content: Content,
}

#[derive(Debug)]
enum Content {
    Directory(BTreeMap<String, Inode>),
    Symlink(String),
    Report,
}

impl Tree {
    /// A tree over `listings`. Listings with names that are not plain, or the same names twice, are left out: the
    /// first one counts.
    pub fn new(listings: Vec<Listing>, options: StoreOptions) -> Tree {
        let mut tree = Tree { nodes: Vec::new(), packs: Vec::new(), mounted: SystemTime::now() };
        tree.add(ROOT, Content::Directory(BTreeMap::new()));
        let report_dir = tree.add_named(ROOT, ".forkd", Content::Directory(BTreeMap::new()));
        tree.add_named(report_dir, "stats.json", Content::Report);
        for listing in &listings {
            let names = [&listing.owner, &listing.name, &listing.version];
            if !names.iter().all(|name| crate::format::is_plain_name(name)) {
                continue;
            }
            let owner = tree.directory(ROOT, &listing.owner);
            let package = tree.directory(owner, &listing.name);
            match tree.same_pack(&listings, listing) {
                Some(version) => {
                    if tree.child(package, &listing.version).is_none() {
                        tree.add_named(package, &listing.version, Content::Symlink(version));
                    }
                }
                None => tree.add_pack(package, listing, &options),
            }
        }
        tree
    }

    /// For a `latest` that is the same pack as a named version: that version.
    fn same_pack(&self, listings: &[Listing], latest: &Listing) -> Option<String> {
        if latest.version != "latest" {
            return None;
        }
        let twin = |other: &&Listing| {
            (&other.owner, &other.name) == (&latest.owner, &latest.name)
                && other.version != latest.version
                && crate::format::is_plain_name(&other.version)
                && other.location == latest.location
        };
        listings.iter().filter(twin).map(|other| other.version.clone()).next_back()
    }

    fn add(&mut self, parent: Inode, content: Content) -> Inode {
        self.nodes.push(Node { parent, content });
        self.nodes.len() as Inode
    }

    fn add_named(&mut self, parent: Inode, name: &str, content: Content) -> Inode {
        let inode = self.add(parent, content);
        self.name(parent, name, inode);
        inode
    }

    fn name(&mut self, parent: Inode, name: &str, inode: Inode) {
        if let Some(Node { content: Content::Directory(children), .. }) =
            self.nodes.get_mut(parent as usize - 1)
        {
            children.insert(name.to_owned(), inode);
        }
    }

    fn directory(&mut self, parent: Inode, name: &str) -> Inode {
        match self.child(parent, name) {
            Some(inode) => inode,
            None => self.add_named(parent, name, Content::Directory(BTreeMap::new())),
        }
    }

    fn add_pack(&mut self, package: Inode, listing: &Listing, options: &StoreOptions) {
        if self.child(package, &listing.version).is_some() {
            return;
        }
        let inode = (self.packs.len() as Inode + 1) << PACK_SHIFT;
        self.packs.push(PackNode::new(inode, package, listing, options.clone()));
        self.name(package, &listing.version, inode);
    }

    fn child(&self, parent: Inode, name: &str) -> Option<Inode> {
        match &self.nodes.get(parent as usize - 1)?.content {
            Content::Directory(children) => children.get(name).copied(),
            Content::Symlink(_) | Content::Report => None,
        }
    }

    fn place(&self, inode: Inode) -> Result<Place<'_>, Errno> {
        let (pack, slot) = (inode >> PACK_SHIFT, inode as u32);
        if pack > 0 {
            let pack = self.packs.get(pack as usize - 1).ok_or(Errno::STALE)?;
            return Ok(Place::Pack(pack, slot));
        }
        let node = (inode as usize).checked_sub(1).and_then(|at| self.nodes.get(at)).ok_or(Errno::STALE)?;
        Ok(Place::Node(node))
    }

    /// The inode `name` in the directory `parent`. Opens the pack when `name` is one of its members.
    pub async fn lookup(&self, parent: Inode, name: impl AsRef<OsStr>) -> Result<Attributes, Errno> {
        let name = name.as_ref();
        match self.place(parent)? {
            Place::Node(Node { content: Content::Directory(children), .. }) => {
                let child = name.to_str().and_then(|name| children.get(name));
                self.attributes(*child.ok_or(Errno::NOENT)?).await
            }
            Place::Node(_) => Err(Errno::NOTDIR),
            Place::Pack(pack, slot) => pack.lookup(slot, name).await,
        }
    }

    /// What `stat` shows of an inode.
    pub async fn attributes(&self, inode: Inode) -> Result<Attributes, Errno> {
        let node = match self.place(inode)? {
            Place::Pack(pack, slot) => return pack.attributes(slot).await,
            Place::Node(node) => node,
        };
        let (kind, size, links, valid) = match &node.content {
            Content::Directory(children) => {
                let below = children.values().filter(|&&child| self.kind(child) == Kind::Directory).count();
                (Kind::Directory, 0, 2 + below as u32, LISTING)
            }
            Content::Symlink(target) => (Kind::Symlink, target.len() as u64, 1, LISTING),
            Content::Report => (Kind::File, self.report().len() as u64, 1, Duration::ZERO),
        };
        let permissions = kind.read_only();
        let (modified, allocated) = (self.mounted, size);
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

    /// The names in a directory, `.` and `..` included. Opens the pack when it is one's.
    pub async fn entries(&self, inode: Inode) -> Result<Vec<Entry>, Errno> {
        let mut all = Vec::new();
        loop {
            let position = all.last().map_or(0, |entry: &Entry| entry.next);
            let more = self.entries_from(inode, position).await?;
            if more.is_empty() {
                return Ok(all);
            }
            all.extend(more);
        }
    }

    /// Some of the names in a directory from a position on: 0, or an entry's `next`. None at its end.
    pub async fn entries_from(&self, inode: Inode, position: u64) -> Result<Vec<Entry>, Errno> {
        let (parent, children) = match self.place(inode)? {
            Place::Node(Node { parent, content: Content::Directory(children) }) => (*parent, children),
            Place::Node(_) => return Err(Errno::NOTDIR),
            Place::Pack(pack, slot) => return pack.entries_from(slot, position).await,
        };
        let names = children.iter().map(|(name, &inode)| (inode, self.kind(inode), OsString::from(name)));
        Ok(Entry::listing(inode, parent, names, position))
    }

    /// Where a symbolic link leads.
    pub async fn link_target(&self, inode: Inode) -> Result<Bytes, Errno> {
        match self.place(inode)? {
            Place::Node(Node { content: Content::Symlink(target), .. }) => Ok(target.clone().into()),
            Place::Node(_) => Err(Errno::INVAL),
            Place::Pack(pack, slot) => pack.link_target(slot).await,
        }
    }

    /// Opens a file.
    pub fn open(&self, inode: Inode) -> Result<Opened, Errno> {
        match self.place(inode)? {
            Place::Node(Node { content: Content::Report, .. }) => Ok(Opened::Report(self.report())),
            Place::Node(Node { content: Content::Directory(_), .. }) => Err(Errno::ISDIR),
            Place::Node(_) => Err(Errno::INVAL),
            Place::Pack(pack, slot) => pack.open(slot),
        }
    }

    /// At most `len` bytes of a pack's member from `offset`; fewer only at its end.
    pub async fn read(&self, inode: Inode, offset: u64, len: u32) -> Result<Bytes, Errno> {
        match self.place(inode)? {
            Place::Pack(pack, slot) => pack.read(slot, offset, len.min(MAX_READ)).await,
            Place::Node(_) => Err(Errno::INVAL),
        }
    }

    /// The next offset from `offset` that holds data, or that is in a hole: whole zero chunks are holes.
    pub async fn seek(&self, inode: Inode, offset: u64, data: bool) -> Result<u64, Errno> {
        match self.place(inode)? {
            Place::Pack(pack, slot) => pack.seek(slot, offset, data).await,
            Place::Node(_) => Err(Errno::INVAL),
        }
    }

    /// Bytes of all packs whose size is known.
    pub fn total_bytes(&self) -> u64 {
        self.packs.iter().filter_map(PackNode::pack_bytes).fold(0, u64::saturating_add)
    }

    /// How many inodes can be named without opening a pack.
    pub fn inodes(&self) -> u64 {
        (self.nodes.len() + self.packs.len()) as u64
    }

    fn kind(&self, inode: Inode) -> Kind {
        match self.place(inode) {
            Ok(Place::Node(Node { content: Content::Symlink(_), .. })) => Kind::Symlink,
            Ok(Place::Node(Node { content: Content::Report, .. })) => Kind::File,
            // What directories name is a directory or a pack's, never missing.
            Ok(Place::Node(_) | Place::Pack(..)) | Err(_) => Kind::Directory,
        }
    }

    fn report(&self) -> Bytes {
        let packs: Vec<_> = self.packs.iter().filter(|pack| pack.was_tried()).map(PackNode::stats).collect();
        pack::as_json(&serde_json::json!({
            "forkd_version": env!("CARGO_PKG_VERSION"),
            "packs_listed": self.packs.len(),
            "packs": packs,
        }))
    }
}

enum Place<'a> {
    Node(&'a Node),
    Pack(&'a PackNode, u32),
}

/// Shared by everything that serves one mount.
pub type SharedTree = Arc<Tree>;
