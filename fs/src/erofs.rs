//! EROFS images as `mkfs.erofs` makes them without compression, read in user space through whatever can read a range of
//! bytes. The mount shows a pack's root disk as files through it: a hostile image must not reach the kernel's parser.
//!
//! ```text
//! 1024                      superblock, 128 bytes
//! meta area + 32 * nid      inode, 32 bytes (compact) or 64 (extended); its attributes; the file's tail, if inline
//! block address << bits     contents of files, blocks of directories
//! ```
//!
//! Layout after the kernel's `fs/erofs/erofs_fs.h`; what a field means after
//! `fs/erofs/{super,inode,data,dir,namei}.c` (Linux 6.12). Nothing is kept in memory but the superblock, nothing is
//! allocated before it is known to lie within the image, and nothing here follows one inode to the next without the
//! caller asking. Checksums are not looked at: the pack's digests vouch for the bytes.

use std::future::Future;
use std::time::SystemTime;

use bytes::{Bytes, BytesMut};

mod directory;
mod fields;
mod inode;

pub use directory::DirEntry;
use fields::{time, u16_at, u32_at, u64_at};
use inode::InodeData;
pub use inode::{ErofsInode, mode};

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_LEN: u64 = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
/// Block sizes from 512 bytes to 64 KiB.
const BLOCK_BITS: std::ops::RangeInclusive<u8> = 9..=16;
/// EROFS_FEATURE_INCOMPAT_*: what may be set. Compression (1, 2, 8, 0x10, 0x20) is refused file by file; 4 is chunked
/// files, 0x40 long prefixes of extended attributes, which are not shown. Not here: 0x80 (48-bit addresses), 0x100
/// (metadata in an inode of its own) and all that is to come.
const KNOWN_FEATURES: u32 = 0x7f;
/// Smallest distance between inodes, in bytes.
const INODE_SLOT: u64 = 32;

/// What an image is read through: its whole size, and any range of it.
pub trait ReadImage: Send + Sync {
    /// Why a range could not be read.
    type Error: std::error::Error + Send + Sync + 'static;

    /// Bytes in the image.
    fn size(&self) -> u64;

    /// Exactly `len` bytes from `offset`; the caller stays within [`ReadImage::size`].
    fn read(&self, offset: u64, len: u64) -> impl Future<Output = Result<Bytes, Self::Error>> + Send;
}

/// Why something in an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ErofsError<E: std::error::Error + 'static> {
    /// The image's bytes.
    #[error("the root disk cannot be read")]
    Read(#[source] E),
    /// No EROFS superblock.
    #[error("the root disk is not an EROFS image")]
    NotErofs,
    /// A feature that this reader lacks.
    #[error("the root disk uses {what}, which forkd does not read")]
    Unsupported {
        /// Which.
        what: &'static str,
    },
    /// The image contradicts itself.
    #[error("inode {nid} of the root disk is corrupt: {what}")]
    Corrupt {
        /// Number of the inode.
        nid: u64,
        /// What is wrong.
        what: &'static str,
    },
}

/// An opened image.
#[derive(Debug)]
pub struct ErofsImage<R> {
    reader: R,
    block_bits: u8,
    /// Offset of inode 0 in bytes.
    meta: u64,
    root: u64,
    /// When the image was made: the time of inodes that have none.
    made: SystemTime,
}

impl<R: ReadImage> ErofsImage<R> {
    /// Reads and checks the superblock.
    pub async fn open(reader: R) -> Result<Self, ErofsError<R::Error>> {
        if reader.size() < SUPERBLOCK_AT + SUPERBLOCK_LEN {
            return Err(ErofsError::NotErofs);
        }
        let raw = reader.read(SUPERBLOCK_AT, SUPERBLOCK_LEN).await.map_err(ErofsError::Read)?;
        if u32_at(&raw, 0) != MAGIC {
            return Err(ErofsError::NotErofs);
        }
        let unsupported = |what| Err(ErofsError::Unsupported { what });
        let (block_bits, directory_bits) = (raw[12], raw[90]);
        if u32_at(&raw, 80) & !KNOWN_FEATURES != 0 {
            return unsupported("features newer than Linux 6.12");
        }
        if !BLOCK_BITS.contains(&block_bits) || directory_bits != 0 {
            return unsupported("an unusual block size");
        }
        if u16_at(&raw, 86) != 0 {
            return unsupported("data on other devices");
        }
        let (root, meta) = (u64::from(u16_at(&raw, 14)), u64::from(u32_at(&raw, 40)) << block_bits);
        let made = time(u64_at(&raw, 24), u32_at(&raw, 32));
        Ok(Self { reader, block_bits, meta, root, made })
    }

    /// Number of the root directory's inode.
    pub fn root(&self) -> u64 {
        self.root
    }

    /// Where an inode lies, if it does.
    fn inode_offset(&self, nid: u64) -> Option<u64> {
        let offset = nid.checked_mul(INODE_SLOT)?.checked_add(self.meta)?;
        (offset.checked_add(INODE_SLOT)? <= self.reader.size()).then_some(offset)
    }

    /// The inode with that number.
    pub async fn node(&self, nid: u64) -> Result<ErofsInode, ErofsError<R::Error>> {
        let Some(offset) = self.inode_offset(nid) else {
            return Err(ErofsError::Corrupt { nid, what: "it lies outside the image" });
        };
        let len = inode::EXTENDED_LEN.min(self.reader.size() - offset);
        let raw = self.reader.read(offset, len).await.map_err(ErofsError::Read)?;
        let geometry = inode::Geometry {
            nid,
            offset,
            block_bits: self.block_bits,
            image_size: self.reader.size(),
            made: self.made,
        };
        geometry.parse(&raw).map_err(|refused| match refused {
            inode::BadInode::Corrupt(what) => ErofsError::Corrupt { nid, what },
            inode::BadInode::Unsupported(what) => ErofsError::Unsupported { what },
        })
    }

    /// Bytes `offset..offset + len` of a file, directory or symbolic link, clipped to its end. The caller bounds `len`.
    pub async fn read(
        &self,
        node: &ErofsInode,
        offset: u64,
        len: u64,
    ) -> Result<Bytes, ErofsError<R::Error>> {
        let end = offset.saturating_add(len).min(node.size);
        if offset >= end {
            return Ok(Bytes::new());
        }
        match node.data {
            InodeData::None => Ok(Bytes::new()),
            InodeData::Compressed => Err(ErofsError::Unsupported { what: "compression" }),
            InodeData::Flat { start } => self.stored(start + offset, end - offset).await,
            InodeData::Inline { start, tail_from, tail } => {
                if offset >= tail_from {
                    return self.stored(tail + (offset - tail_from), end - offset).await;
                }
                let head = self.stored(start + offset, end.min(tail_from) - offset).await?;
                if end <= tail_from {
                    return Ok(head);
                }
                let mut all = BytesMut::with_capacity((end - offset) as usize);
                all.extend_from_slice(&head);
                all.extend_from_slice(&self.stored(tail, end - tail_from).await?);
                Ok(all.freeze())
            }
            InodeData::Chunks { table, entry_len, chunk_bits } => {
                self.chunks(node, (table, entry_len, chunk_bits), offset, end).await
            }
        }
    }

    /// Bytes that are known to lie within the image.
    async fn stored(&self, offset: u64, len: u64) -> Result<Bytes, ErofsError<R::Error>> {
        self.reader.read(offset, len).await.map_err(ErofsError::Read)
    }

    /// Bytes `offset..end` of a file made of chunks, some of which may be holes.
    async fn chunks(
        &self,
        node: &ErofsInode,
        (table, entry_len, chunk_bits): (u64, u64, u32),
        offset: u64,
        end: u64,
    ) -> Result<Bytes, ErofsError<R::Error>> {
        // EROFS_NULL_ADDR.
        const HOLE: u32 = u32::MAX;
        let corrupt = |what| Err(ErofsError::Corrupt { nid: node.nid, what });
        let (first, last) = (offset >> chunk_bits, (end - 1) >> chunk_bits);
        let entries = self.stored(table + first * entry_len, (last - first + 1) * entry_len).await?;
        let mut all = BytesMut::with_capacity((end - offset) as usize);
        for (chunk, entry) in (first..).zip(entries.chunks_exact(entry_len as usize)) {
            let (from, to) = (offset.max(chunk << chunk_bits), end.min((chunk + 1) << chunk_bits));
            let (device, block) = match entry.len() {
                4 => (0, u32_at(entry, 0)),
                _ => (u16_at(entry, 2), u32_at(entry, 4)),
            };
            if block == HOLE {
                all.resize(all.len() + (to - from) as usize, 0);
                continue;
            }
            if device != 0 {
                return Err(ErofsError::Unsupported { what: "data on other devices" });
            }
            let start = (u64::from(block) << self.block_bits) + (from - (chunk << chunk_bits));
            if start.checked_add(to - from).is_none_or(|end| end > self.reader.size()) {
                return corrupt("its data lies outside the image");
            }
            all.extend_from_slice(&self.stored(start, to - from).await?);
        }
        Ok(all.freeze())
    }

    /// Where a symbolic link leads.
    pub async fn link_target(&self, node: &ErofsInode) -> Result<Bytes, ErofsError<R::Error>> {
        // PATH_MAX counts the NUL that images leave out.
        const LONGEST: u64 = 4095;
        let corrupt = |what| Err(ErofsError::Corrupt { nid: node.nid, what });
        if node.size == 0 || node.size > LONGEST {
            return corrupt("the link is empty or too long");
        }
        let target = self.read(node, 0, node.size).await?;
        if target.contains(&0) {
            return corrupt("the link leads to a name with a NUL");
        }
        Ok(target)
    }
}
