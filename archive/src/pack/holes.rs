//! The holes of a file, and how GNU tar writes a file that has some.

use std::fs::File;

use rustix::fs::{SeekFrom, seek};
use tar::{EntryType, GnuExtSparseHeader, Header};

/// Most pieces that are described; a file with more is packed with its holes as zeros.
const PIECES_MAX: usize = 1 << 16;
/// Sizes from here on do not fit into the eleven octal digits of the format; such a file is packed whole.
const SIZE_LIMIT: u64 = 1 << 33;
/// Pieces described in the header itself.
const IN_HEADER: usize = 4;
/// Pieces described in each block behind it.
const IN_BLOCK: usize = 21;

/// A part of a file that is there.
pub struct Piece {
    /// Where it begins, in bytes.
    pub at: u64,
    /// Its length, in bytes.
    pub len: u64,
}

/// The parts of a file of `len` bytes that are no holes, the last one ending with the file even if it is empty. `None`
/// when there is no hole, or the file is better packed whole.
pub fn pieces(file: &File, len: u64) -> Option<Vec<Piece>> {
    if len >= SIZE_LIMIT {
        return None;
    }
    let mut pieces = Vec::new();
    let mut end = 0;
    while end < len && pieces.len() < PIECES_MAX {
        // There is no data behind the last hole.
        let Ok(at) = seek(file, SeekFrom::Data(end)) else { break };
        let hole = seek(file, SeekFrom::Hole(at)).ok()?.min(len);
        if hole <= at {
            break;
        }
        pieces.push(Piece { at, len: hole - at });
        end = hole;
    }
    let whole = pieces.first().is_some_and(|piece| piece.len == len);
    seek(file, SeekFrom::Start(0)).ok()?;
    if whole || pieces.len() == PIECES_MAX || pieces.iter().rev().skip(1).any(|piece| piece.len % 512 != 0) {
        return None;
    }
    if end < len {
        pieces.push(Piece { at: len, len: 0 });
    }
    Some(pieces)
}

/// Makes `header` one of a file with holes.
pub fn describe(header: &mut Header, pieces: &[Piece], len: u64) {
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(pieces.iter().map(|piece| piece.len).sum());
    let Some(gnu) = header.as_gnu_mut() else { return };
    gnu.set_real_size(len);
    for (slot, piece) in gnu.sparse.iter_mut().zip(pieces) {
        slot.set_offset(piece.at);
        slot.set_length(piece.len);
    }
    gnu.set_is_extended(pieces.len() > IN_HEADER);
}

/// The blocks behind the header, for pieces that did not fit into it.
pub fn more(pieces: &[Piece]) -> Vec<u8> {
    let rest = pieces.get(IN_HEADER..).unwrap_or_default();
    let mut blocks = Vec::new();
    for (number, described) in rest.chunks(IN_BLOCK).enumerate() {
        let mut block = GnuExtSparseHeader::new();
        for (slot, piece) in block.sparse.iter_mut().zip(described) {
            slot.set_offset(piece.at);
            slot.set_length(piece.len);
        }
        block.set_is_extended((number + 1) * IN_BLOCK < rest.len());
        blocks.extend_from_slice(block.as_bytes());
    }
    blocks
}
