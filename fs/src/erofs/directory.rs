//! Directories: blocks that each hold entries of 12 bytes and then their names, sorted by name across all blocks.
//!
//! ```text
//! entry   u64 nid   u16 offset of the name in the block   u8 type   u8 0
//! ```
//!
//! A name ends where the next one starts, the last one of a block at a NUL or the block's end. `.` and `..` are entries
//! like any others, sorted among them.

use std::cmp::Ordering;
use std::ops::Range;

use bytes::Bytes;

use super::fields::{u16_at, u64_at};
use super::inode::ErofsInode;
use super::{ErofsError, ErofsImage, ReadImage};

const ENTRY_LEN: usize = 12;
/// EROFS_NAME_LEN.
const MAX_NAME_LEN: usize = 255;
/// Bits of a position that count entries within a block: the largest block holds 5461.
const POSITION_BITS: u32 = 16;

/// One name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// Number of the inode it names.
    pub nid: u64,
    /// FT_*, as the directory has it.
    pub file_type: u8,
    /// The name: neither empty nor with `/` or NUL in it.
    pub name: Bytes,
    /// The position after it.
    pub next: u64,
}

/// A directory block and where its names are.
struct Block {
    bytes: Bytes,
    names: Vec<Range<usize>>,
}

impl Block {
    /// Checks a block: names in order, none twice, none that could be a path.
    fn parse(bytes: Bytes) -> Result<Self, &'static str> {
        let count = entry_count(&bytes)?;
        let mut names: Vec<Range<usize>> = Vec::with_capacity(count);
        for position in 0..count {
            let name = name_range(&bytes, position, count)?;
            if let Some(previous) = names.last()
                && bytes[previous.clone()] >= bytes[name.clone()]
            {
                return Err("its names are out of order");
            }
            names.push(name);
        }
        Ok(Self { bytes, names })
    }

    fn name(&self, position: usize) -> &[u8] {
        &self.bytes[self.names[position].clone()]
    }

    fn nid(&self, position: usize) -> u64 {
        u64_at(&self.bytes, position * ENTRY_LEN)
    }

    fn find(&self, name: &[u8]) -> Option<u64> {
        let found = self.names.binary_search_by(|range| self.bytes[range.clone()].cmp(name));
        found.ok().map(|position| self.nid(position))
    }
}

/// How many entries a block has: the first name follows the last entry.
fn entry_count(block: &[u8]) -> Result<usize, &'static str> {
    if block.len() < ENTRY_LEN {
        return Err("a directory block is cut short");
    }
    match usize::from(u16_at(block, 8)) {
        first if first < ENTRY_LEN || first % ENTRY_LEN != 0 || first >= block.len() => {
            Err("a directory block is malformed")
        }
        first => Ok(first / ENTRY_LEN),
    }
}

fn name_range(block: &[u8], position: usize, count: usize) -> Result<Range<usize>, &'static str> {
    let offset = |position: usize| usize::from(u16_at(block, position * ENTRY_LEN + 8));
    let start = offset(position);
    let end = if position + 1 < count { offset(position + 1) } else { block.len() };
    if start < count * ENTRY_LEN || start >= end || end > block.len() {
        return Err("a name lies outside its directory block");
    }
    let name = &block[start..end];
    let len = match position + 1 == count {
        true => name.iter().position(|&byte| byte == 0).unwrap_or(name.len()),
        false => name.len(),
    };
    let name = &name[..len];
    if name.is_empty() || len > MAX_NAME_LEN || name.contains(&0) || name.contains(&b'/') {
        return Err("a name is no name");
    }
    Ok(start..start + len)
}

impl<R: ReadImage> ErofsImage<R> {
    fn block_count(&self, directory: &ErofsInode) -> u64 {
        directory.size.div_ceil(1 << self.block_bits)
    }

    async fn block_bytes(&self, directory: &ErofsInode, number: u64) -> Result<Bytes, ErofsError<R::Error>> {
        self.read(directory, number << self.block_bits, 1 << self.block_bits).await
    }

    async fn block(&self, directory: &ErofsInode, number: u64) -> Result<Block, ErofsError<R::Error>> {
        let bytes = self.block_bytes(directory, number).await?;
        Block::parse(bytes).map_err(|what| ErofsError::Corrupt { nid: directory.nid, what })
    }

    /// The number of the inode `name` in a directory. Looks at one name in each of a few blocks, then through one.
    pub async fn find(
        &self,
        directory: &ErofsInode,
        name: &[u8],
    ) -> Result<Option<u64>, ErofsError<R::Error>> {
        let corrupt = |what| ErofsError::Corrupt { nid: directory.nid, what };
        // The last block that starts with `name` or something before it.
        let (mut low, mut high) = (0, self.block_count(directory));
        while low + 1 < high {
            let middle = low + (high - low) / 2;
            let bytes = self.block_bytes(directory, middle).await?;
            let count = entry_count(&bytes).map_err(corrupt)?;
            let first = name_range(&bytes, 0, count).map_err(corrupt)?;
            match bytes[first].cmp(name) {
                Ordering::Greater => high = middle,
                Ordering::Equal | Ordering::Less => low = middle,
            }
        }
        match high {
            0 => Ok(None),
            _ => Ok(self.block(directory, low).await?.find(name)),
        }
    }

    /// The inode `name` in a directory. A subdirectory must have that directory as its parent: so none has two, and
    /// none contains itself.
    pub async fn lookup(
        &self,
        directory: &ErofsInode,
        name: &[u8],
    ) -> Result<Option<ErofsInode>, ErofsError<R::Error>> {
        let Some(nid) = self.find(directory, name).await? else { return Ok(None) };
        let node = self.node(nid).await?;
        if node.is_directory() && self.parent(&node).await? != directory.nid {
            return Err(ErofsError::Corrupt { nid, what: "the directory has two parents" });
        }
        Ok(Some(node))
    }

    /// The number of the directory that contains a directory; the root contains itself.
    pub async fn parent(&self, directory: &ErofsInode) -> Result<u64, ErofsError<R::Error>> {
        let parent = self.find(directory, b"..").await?;
        parent.ok_or(ErofsError::Corrupt { nid: directory.nid, what: "the directory has no parent" })
    }

    /// Some of the names in a directory from a position on: 0, or an entry's `next`. None at its end. `.` and `..` are
    /// left out.
    pub async fn entries_from(
        &self,
        directory: &ErofsInode,
        position: u64,
    ) -> Result<Vec<DirEntry>, ErofsError<R::Error>> {
        let (mut number, mut skipped) =
            (position >> POSITION_BITS, (position & ((1 << POSITION_BITS) - 1)) as usize);
        while number < self.block_count(directory) {
            let block = self.block(directory, number).await?;
            if number > 0 && skipped == 0 {
                let before = self.block(directory, number - 1).await?;
                if before.name(before.names.len() - 1) >= block.name(0) {
                    let what = "its names are out of order";
                    return Err(ErofsError::Corrupt { nid: directory.nid, what });
                }
            }
            let entry = |at: usize| DirEntry {
                nid: block.nid(at),
                file_type: block.bytes[at * ENTRY_LEN + 10],
                name: block.bytes.slice(block.names[at].clone()),
                next: match at + 1 == block.names.len() {
                    true => (number + 1) << POSITION_BITS,
                    false => (number << POSITION_BITS) + at as u64 + 1,
                },
            };
            let entries = (skipped..block.names.len()).map(entry);
            let entries: Vec<_> = entries.filter(|entry| !matches!(&entry.name[..], b"." | b"..")).collect();
            if !entries.is_empty() {
                return Ok(entries);
            }
            (number, skipped) = (number + 1, 0);
        }
        Ok(Vec::new())
    }
}
