//! Inodes: from 32 or 64 bytes to what `stat` shows and where the contents lie. Pure; everything that comes out points
//! into the image.

use std::time::SystemTime;

use super::fields::{time, u16_at, u32_at, u64_at};

/// Bytes of an extended inode; a compact one has half.
pub(super) const EXTENDED_LEN: u64 = 64;
/// Largest size a file can have anywhere (the kernel's `loff_t`).
const MAX_SIZE: u64 = i64::MAX as u64;
/// Largest directory, so that positions in it fit into 63 bits.
const MAX_DIRECTORY_SIZE: u64 = 1 << 40;

/// Where a file's contents lie. Every range was checked against the image's size, but for those that a chunk table
/// names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum InodeData {
    /// It has none: devices, pipes, sockets.
    None,
    /// In one piece.
    Flat { start: u64 },
    /// In one piece but for the last block's part, from byte `tail_from` on, which follows the inode at `tail`.
    Inline { start: u64, tail_from: u64, tail: u64 },
    /// In chunks of `1 << chunk_bits` bytes; one entry each in the table.
    Chunks { table: u64, entry_len: u64, chunk_bits: u32 },
    /// In a form this reader does not know.
    Compressed,
}

/// One inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErofsInode {
    /// Its number.
    pub nid: u64,
    /// Type and permission bits, as in `st_mode`.
    pub mode: u16,
    /// Bytes; 0 for what has no contents.
    pub size: u64,
    /// Names it has.
    pub links: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Device number as the image packs it (`new_encode_dev`); 0 for what is none.
    pub device: u32,
    /// When it last changed.
    pub modified: SystemTime,
    pub(super) data: InodeData,
}

impl ErofsInode {
    /// Whether it is a directory.
    pub fn is_directory(&self) -> bool {
        self.mode & mode::TYPE == mode::DIRECTORY
    }

    /// Whether it is a symbolic link.
    pub fn is_symlink(&self) -> bool {
        self.mode & mode::TYPE == mode::SYMLINK
    }

    /// Whether it is a regular file.
    pub fn is_file(&self) -> bool {
        self.mode & mode::TYPE == mode::FILE
    }
}

/// File types in `st_mode` (uapi/linux/stat.h).
pub mod mode {
    /// The bits that hold the type.
    pub const TYPE: u16 = 0o170_000;
    /// A socket.
    pub const SOCKET: u16 = 0o140_000;
    /// A symbolic link.
    pub const SYMLINK: u16 = 0o120_000;
    /// A regular file.
    pub const FILE: u16 = 0o100_000;
    /// A block device.
    pub const BLOCK_DEVICE: u16 = 0o060_000;
    /// A directory.
    pub const DIRECTORY: u16 = 0o040_000;
    /// A character device.
    pub const CHAR_DEVICE: u16 = 0o020_000;
    /// A named pipe.
    pub const FIFO: u16 = 0o010_000;
}

/// Why an inode cannot be used.
pub(super) enum BadInode {
    Corrupt(&'static str),
    Unsupported(&'static str),
}

/// What an inode's bytes are read with.
pub(super) struct Geometry {
    pub(super) nid: u64,
    /// Where the inode lies.
    pub(super) offset: u64,
    pub(super) block_bits: u8,
    pub(super) image_size: u64,
    pub(super) made: SystemTime,
}

impl Geometry {
    /// Reads an inode out of at least 32 bytes.
    pub(super) fn parse(&self, raw: &[u8]) -> Result<ErofsInode, BadInode> {
        let format = u16_at(raw, 0);
        // Bit 0: compact or extended. Bits 1 to 3: the layout of the contents. The others are not used yet.
        let (extended, layout) = (format & 1 != 0, format >> 1 & 7);
        if format >> 4 != 0 {
            return Err(BadInode::Unsupported("inodes of a newer kind"));
        }
        if extended && (raw.len() as u64) < EXTENDED_LEN {
            return Err(BadInode::Corrupt("it lies outside the image"));
        }
        let own_len = if extended { EXTENDED_LEN } else { EXTENDED_LEN / 2 };
        let mode = u16_at(raw, 4);
        let union = u32_at(raw, 16);
        // erofs_xattr_ibody_size: a header of 12 bytes, and 4 for every further unit.
        let attributes_len = match u64::from(u16_at(raw, 2)) {
            0 => 0,
            units => 12 + 4 * (units - 1),
        };
        let size = if extended { u64_at(raw, 8) } else { u64::from(u32_at(raw, 8)) };
        if size > MAX_SIZE || mode & mode::TYPE == mode::DIRECTORY && size > MAX_DIRECTORY_SIZE {
            return Err(BadInode::Corrupt("it is too large"));
        }
        let after = self.offset + own_len + attributes_len;
        let (size, device, data) = match mode & mode::TYPE {
            mode::FILE | mode::DIRECTORY | mode::SYMLINK => (size, 0, self.data(layout, size, union, after)?),
            mode::CHAR_DEVICE | mode::BLOCK_DEVICE => (0, union, InodeData::None),
            mode::FIFO | mode::SOCKET => (0, 0, InodeData::None),
            _ => return Err(BadInode::Corrupt("it is of no known type")),
        };
        let (links, uid, gid, modified) = match extended {
            true => {
                let modified = time(u64_at(raw, 32), u32_at(raw, 40));
                (u32_at(raw, 44), u32_at(raw, 24), u32_at(raw, 28), modified)
            }
            false => {
                let short = |at| u32::from(u16_at(raw, at));
                (short(6), short(24), short(26), self.made)
            }
        };
        Ok(ErofsInode { nid: self.nid, mode, size, links, uid, gid, device, modified, data })
    }

    /// Where `size` bytes of contents lie. `union` is the inode's `i_u`; `after` is where the inode ends.
    fn data(&self, layout: u16, size: u64, union: u32, after: u64) -> Result<InodeData, BadInode> {
        const FLAT_PLAIN: u16 = 0;
        const COMPRESSED_FULL: u16 = 1;
        const FLAT_INLINE: u16 = 2;
        const COMPRESSED_COMPACT: u16 = 3;
        const CHUNK_BASED: u16 = 4;
        let outside = BadInode::Corrupt("its data lies outside the image");
        let block = 1u64 << self.block_bits;
        let start = u64::from(union) << self.block_bits;
        let within = |start: u64, len: u64| start.checked_add(len).is_some_and(|end| end <= self.image_size);
        match layout {
            FLAT_PLAIN | FLAT_INLINE if size == 0 => Ok(InodeData::None),
            FLAT_PLAIN if within(start, size) => Ok(InodeData::Flat { start }),
            FLAT_INLINE => {
                let tail_from = (size - 1) & !(block - 1);
                let tail_len = size - tail_from;
                if after % block + tail_len > block {
                    return Err(BadInode::Corrupt("its inline data crosses a block"));
                }
                match within(after, tail_len) && (tail_from == 0 || within(start, tail_from)) {
                    true => Ok(InodeData::Inline { start, tail_from, tail: after }),
                    false => Err(outside),
                }
            }
            CHUNK_BASED => self.chunk_table(size, union, after),
            COMPRESSED_FULL | COMPRESSED_COMPACT => Ok(InodeData::Compressed),
            FLAT_PLAIN => Err(outside),
            _ => Err(BadInode::Unsupported("a file layout newer than Linux 6.12")),
        }
    }

    fn chunk_table(&self, size: u64, union: u32, after: u64) -> Result<InodeData, BadInode> {
        // EROFS_CHUNK_FORMAT_*: five bits of chunk size, one for entries of 8 bytes instead of 4.
        const BITS: u32 = 0x1f;
        const INDEXES: u32 = 0x20;
        let format = union & 0xffff;
        if format & !(BITS | INDEXES) != 0 {
            return Err(BadInode::Unsupported("chunks of a newer kind"));
        }
        let chunk_bits = u32::from(self.block_bits) + (format & BITS);
        let entry_len = if format & INDEXES != 0 { 8 } else { 4 };
        let table = after.next_multiple_of(entry_len);
        // At most 2^54 entries of 8 bytes.
        let len = size.div_ceil(1 << chunk_bits) * entry_len;
        match table.checked_add(len).is_some_and(|end| end <= self.image_size) {
            true => Ok(InodeData::Chunks { table, entry_len, chunk_bits }),
            false => Err(BadInode::Corrupt("its chunk table lies outside the image")),
        }
    }
}
