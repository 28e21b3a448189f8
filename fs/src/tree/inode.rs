//! What the tree says of an inode: its number, kind and attributes.

use std::ffi::OsString;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

/// An inode number.
pub type Inode = u64;

/// The mountpoint's own inode.
pub const ROOT: Inode = 1;
/// How long a member of a pack may be remembered: its contents and size never change.
pub(super) const IMMUTABLE: Duration = Duration::from_secs(3600);
/// How long the listing above packs may be remembered.
pub(super) const LISTING: Duration = Duration::from_secs(60);

/// Where a pack's number starts in an inode number.
pub(super) const PACK_SHIFT: u32 = 32;

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
    pub(super) fn read_only(self) -> u16 {
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
    pub(super) fn listing(
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
pub enum OpenedFile {
    /// Immutable contents: what the kernel has read it may keep.
    Immutable,
    /// A report, made now; to be read around the kernel's cache.
    Report(Bytes),
}
