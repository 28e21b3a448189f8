//! The packs that a delta names: where their chunks lie is in the delta's own index, so of them nothing but frames is
//! ever read.

use super::error::IndexError;
use crate::digest::Digest;
use crate::format::{MAX_BASES, MAX_INDEX_LEN, is_plain_name};

/// Bytes of a base in the index.
pub(super) const BASE_LEN: usize = 56 + MAX_HINT_LEN;
/// Longest [`BasePack::hint`], in bytes.
const MAX_HINT_LEN: usize = 200;

/// The root of trust of a pack: its index frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexPin {
    /// Offset of the index frame in the pack.
    pub offset: u64,
    /// Its length in bytes.
    pub length: u64,
    /// Its digest.
    pub sha256: Digest,
}

/// A pack that holds chunks of a delta.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BasePack {
    /// Its index: the digest says which pack is meant, whatever it is called.
    pub index: IndexPin,
    /// Its size in bytes.
    pub pack_size: u64,
    /// Where it was when the delta was made: an http(s) URL, or the name of a file. Empty if there is nothing to say.
    /// Trusted for nothing.
    pub hint: String,
}

impl BasePack {
    /// `hint` without what a delta may not say: it is left out when it is too long, or neither a URL nor a plain name.
    pub fn new(index: IndexPin, pack_size: u64, hint: &str) -> BasePack {
        let hint = if is_hint(hint) { hint.to_owned() } else { String::new() };
        BasePack { index, pack_size, hint }
    }

    /// Reads the bases of an index, one after the other.
    pub(super) fn parse_all(bytes: &[u8]) -> Result<Vec<BasePack>, IndexError> {
        let mut bases: Vec<BasePack> = Vec::with_capacity(bytes.len() / BASE_LEN);
        for (position, bytes) in bytes.chunks_exact(BASE_LEN).enumerate() {
            let refuse = |what| IndexError::Base { position: position as u32, what };
            let base = BasePack::parse(bytes).ok_or(refuse("hint"))?;
            let IndexPin { offset, length, sha256 } = base.index;
            let end = offset.checked_add(length);
            if length > MAX_INDEX_LEN || end.is_none_or(|end| end > base.pack_size) {
                return Err(refuse("index outside its pack"));
            }
            if bases.iter().any(|other| other.index.sha256 == sha256) {
                return Err(refuse("named twice"));
            }
            bases.push(base);
        }
        Ok(bases)
    }

    fn parse(bytes: &[u8]) -> Option<BasePack> {
        let (numbers, hint) = bytes.split_at(56);
        let number = |at: usize| u64::from_le_bytes(numbers[at..at + 8].try_into().expect("eight bytes"));
        let sha256 = Digest(numbers[24..].try_into().expect("32 bytes"));
        let len = hint.iter().position(|&c| c == 0).unwrap_or(MAX_HINT_LEN);
        let (hint, padding) = hint.split_at(len);
        let hint = std::str::from_utf8(hint).ok().filter(|hint| hint.is_empty() || is_hint(hint))?;
        let index = IndexPin { offset: number(0), length: number(8), sha256 };
        let padded = padding.iter().all(|&c| c == 0);
        padded.then(|| BasePack { index, pack_size: number(16), hint: hint.to_owned() })
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        for number in [self.index.offset, self.index.length, self.pack_size] {
            out.extend_from_slice(&number.to_le_bytes());
        }
        out.extend_from_slice(&self.index.sha256.0);
        let mut hint = [0; MAX_HINT_LEN];
        hint[..self.hint.len()].copy_from_slice(self.hint.as_bytes());
        out.extend_from_slice(&hint);
    }
}

/// Whether a delta may say that of a base: no path leads out of the folder that the delta is in.
fn is_hint(text: &str) -> bool {
    let is_url = text.starts_with("http://") || text.starts_with("https://");
    let plain_url = is_url && text.len() <= MAX_HINT_LEN && text.bytes().all(|c| c.is_ascii_graphic());
    plain_url || is_plain_name(text)
}

/// How many bases an index with these flags and that count has.
pub(super) fn base_count(is_delta: bool, count: u32) -> Result<usize, IndexError> {
    match (is_delta, count as usize) {
        (false, _) => Ok(0),
        (true, count @ 1..=MAX_BASES) => Ok(count),
        (true, count) => Err(IndexError::Bases { count }),
    }
}
