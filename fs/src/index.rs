//! The index of a pack: which frame holds which chunk of which file, and its digest. Pure: no I/O, no tar, no HTTP.
//! The writer makes one, the store trusts nothing about a pack but what its (verified) index says.
//!
//! ```text
//! frame header   u32 0x184D2A5A   u32 length of what follows
//! header         "FORKDIDX"  u32 version=3  u32 flags  u32 chunk size  u32 files  u32 records  u32 bases  u64 pack size
//! bases          bases x   { u64 index offset, u64 index length, u64 pack size, sha256 of the index, hint [u8; 200] }
//! files          files x   { name [u8; 64] zero padded, u64 size, u32 first record, u32 records }
//! records        records x { u32 chunk, u24 frame length, u8 pack, u64 frame offset, sha256 of the frame [u8; 32] }
//! trailer        u32 length of the whole index frame   u32 version=3   "FORKDEND"
//! ```
//!
//! A chunk without a record is all zeros. Records are sorted by file, then by chunk, and their frames lie in that order
//! in the pack without overlap, which makes every check a single pass.
//!
//! Flag 1 is a delta's: its frames with pack n > 0 lie in the nth of its bases, anywhere before that one's index. Without
//! the flag there are no bases.

use std::ops::Range;

use crate::digest::Digest;
use crate::format::{
    self, FLAG_DELTA, INDEX_FRAME_MAGIC, KNOWN_FLAGS, MAX_FILE_SIZE, MAX_FILES, MAX_INDEX_LEN, MAX_NAME_LEN,
    PACK_VERSION,
};

mod base;
mod error;

use base::BASE_LEN;
pub use base::{BasePack, IndexPin};
pub use error::IndexError;

const HEADER_MAGIC: [u8; 8] = *b"FORKDIDX";
const TRAILER_MAGIC: [u8; 8] = *b"FORKDEND";
const FRAME_HEADER_LEN: usize = 8;
const HEADER_LEN: usize = 40;
const FILE_LEN: usize = MAX_NAME_LEN + 16;
const RECORD_LEN: usize = 48;
/// Bits of a frame's length in its record; above them stands the number of its pack.
const LENGTH_BITS: u32 = 24;
/// Bytes at the end of the index frame that tell a reader of the pack's tail where the frame starts.
pub const TRAILER_LEN: usize = 16;

/// Where every stored chunk of a pack lies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    chunk_size: u32,
    pack_size: u64,
    bases: Vec<BasePack>,
    files: Vec<FileEntry>,
    records: Vec<ChunkRecord>,
}

/// One file of the pack.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileEntry {
    /// Plain file name.
    pub name: String,
    /// Plain size in bytes.
    pub size: u64,
    records: Range<u32>,
}

/// One stored chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkRecord {
    /// Number of the chunk within its file.
    pub chunk: u32,
    /// Length of its zstd frame in bytes.
    pub length: u32,
    /// The pack that holds the frame: 0 for this one, or else the number of a base, counted from 1.
    pub pack: u8,
    /// Offset of the frame in that pack.
    pub offset: u64,
    /// Digest of the frame as stored (compressed).
    pub digest: Digest,
}

/// A file of one index. Only meaningful with the index it came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub(crate) u32);

/// A chunk of one index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkId {
    /// The file.
    pub file: FileId,
    /// Number of the chunk within the file.
    pub chunk: u32,
}

/// A part of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkSpan {
    /// Number of the chunk within the file.
    pub chunk: u32,
    /// First byte wanted, counted from the start of the chunk.
    pub start: u32,
    /// Bytes wanted.
    pub len: u32,
}

/// How much of a file is stored.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FileStats {
    /// Chunks in the file, zero ones included.
    pub chunks: u32,
    /// Chunks that are stored.
    pub stored_chunks: u32,
    /// Bytes of their frames.
    pub stored_bytes: u64,
}

fn malformed(what: &'static str) -> IndexError {
    IndexError::Malformed { what }
}

impl Index {
    /// Reads an index frame out of a pack of `pack_size` bytes (`None` when unknown) and checks every number in it
    /// before any memory is spent on it. Everything that comes back can be used without further checks.
    pub fn parse(bytes: &[u8], pack_size: Option<u64>) -> Result<Self, IndexError> {
        let body = frame_body(bytes)?;
        let (header, tables) = body.split_at_checked(HEADER_LEN).ok_or(malformed("header cut short"))?;
        if header[..8] != HEADER_MAGIC {
            return Err(malformed("header magic"));
        }
        let (version, flags) = (u32_at(header, 8), u32_at(header, 12));
        if version != PACK_VERSION || flags & !KNOWN_FLAGS != 0 {
            return Err(IndexError::Unsupported { version, flags });
        }
        let chunk_size = u32_at(header, 16);
        if !format::is_chunk_size(chunk_size) {
            return Err(malformed("chunk size"));
        }
        let (file_count, record_count) = (u32_at(header, 20), u32_at(header, 24));
        let base_count = base::base_count(flags & FLAG_DELTA != 0, u32_at(header, 28))?;
        let own_size = u64_at(header, 32);
        if pack_size.is_some_and(|size| size != own_size) {
            return Err(malformed("pack size differs from the pack"));
        }
        let bases_len = base_count * BASE_LEN;
        let (files_len, records_len) =
            (u64::from(file_count) * FILE_LEN as u64, u64::from(record_count) * RECORD_LEN as u64);
        if file_count > MAX_FILES || tables.len() as u64 != bases_len as u64 + files_len + records_len {
            return Err(malformed("table lengths"));
        }
        // The tables are as long as the bytes in hand, so these allocations are bounded by the input.
        let (bases, tables) = tables.split_at(bases_len);
        let (files, records) = tables.split_at(files_len as usize);
        let (bases, files) = (BasePack::parse_all(bases)?, parse_files(files, record_count)?);
        let records = records.chunks_exact(RECORD_LEN).map(ChunkRecord::from_bytes).collect::<Vec<_>>();
        let index = Self { chunk_size, pack_size: own_size, bases, files, records };
        index.check_records(own_size.saturating_sub(bytes.len() as u64))?;
        Ok(index)
    }

    /// Reads the last [`TRAILER_LEN`] bytes of an index frame: the length of that frame.
    pub fn parse_trailer(trailer: &[u8]) -> Result<u64, IndexError> {
        if trailer.len() != TRAILER_LEN || trailer[8..] != TRAILER_MAGIC {
            return Err(malformed("trailer magic"));
        }
        match u64::from(u32_at(trailer, 0)) {
            len @ ..=MAX_INDEX_LEN => Ok(len),
            _ => Err(malformed("longer than any index may be")),
        }
    }

    /// Length of the index frame for that many bases, files and chunks that are not zero, in bytes.
    pub(crate) fn encoded_len(bases: usize, files: usize, records: usize) -> u64 {
        let tables = bases * BASE_LEN + files * FILE_LEN + records * RECORD_LEN;
        (FRAME_HEADER_LEN + HEADER_LEN + tables + TRAILER_LEN) as u64
    }

    /// Builds an index from files in pack order with their records; the writer's half of [`Index::parse`].
    pub(crate) fn new(
        chunk_size: u32,
        pack_size: u64,
        bases: Vec<BasePack>,
        files: Vec<(String, u64, Vec<ChunkRecord>)>,
    ) -> Self {
        let mut index = Self { chunk_size, pack_size, bases, files: Vec::new(), records: Vec::new() };
        for (name, size, records) in files {
            let first = index.records.len() as u32;
            index.records.extend(records);
            index.files.push(FileEntry { name, size, records: first..index.records.len() as u32 });
        }
        index
    }

    /// The index as a skippable frame.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let len = Self::encoded_len(self.bases.len(), self.files.len(), self.records.len());
        let mut out = Vec::with_capacity(len as usize);
        let put = |out: &mut Vec<u8>, value: u32| out.extend_from_slice(&value.to_le_bytes());
        put(&mut out, INDEX_FRAME_MAGIC);
        put(&mut out, len as u32 - FRAME_HEADER_LEN as u32);
        out.extend_from_slice(&HEADER_MAGIC);
        let flags = if self.is_delta() { FLAG_DELTA } else { 0 };
        let counts = [self.files.len(), self.records.len(), self.bases.len()].map(|count| count as u32);
        for value in [PACK_VERSION, flags, self.chunk_size].into_iter().chain(counts) {
            put(&mut out, value);
        }
        out.extend_from_slice(&self.pack_size.to_le_bytes());
        self.bases.iter().for_each(|base| base.encode(&mut out));
        for file in &self.files {
            let mut name = [0; MAX_NAME_LEN];
            name[..file.name.len()].copy_from_slice(file.name.as_bytes());
            out.extend_from_slice(&name);
            out.extend_from_slice(&file.size.to_le_bytes());
            put(&mut out, file.records.start);
            put(&mut out, file.records.end - file.records.start);
        }
        for record in &self.records {
            put(&mut out, record.chunk);
            put(&mut out, record.length | u32::from(record.pack) << LENGTH_BITS);
            out.extend_from_slice(&record.offset.to_le_bytes());
            out.extend_from_slice(&record.digest.0);
        }
        put(&mut out, len as u32);
        put(&mut out, PACK_VERSION);
        out.extend_from_slice(&TRAILER_MAGIC);
        out
    }

    /// Plain bytes in a chunk (the last one of a file may be shorter).
    pub fn chunk_size(&self) -> u32 {
        self.chunk_size
    }

    /// Size of the whole pack in bytes.
    pub fn pack_size(&self) -> u64 {
        self.pack_size
    }

    /// The packs that hold chunks of this one, its base first; none unless it is a delta.
    pub fn bases(&self) -> &[BasePack] {
        &self.bases
    }

    /// Whether chunks of it lie in other packs.
    pub fn is_delta(&self) -> bool {
        !self.bases.is_empty()
    }

    /// How many chunks the pack with that number holds, and the bytes of their frames: 0 for this one, or else a base.
    pub fn held_by(&self, pack: u8) -> (u32, u64) {
        let held = self.records.iter().filter(|record| record.pack == pack);
        held.fold((0, 0), |(count, bytes), record| (count + 1, bytes + u64::from(record.length)))
    }

    /// Bytes of the frames that lie in bases.
    pub fn base_bytes(&self) -> u64 {
        self.stored_bytes() - self.held_by(0).1
    }

    /// The files in the order they are stored.
    pub fn files(&self) -> impl ExactSizeIterator<Item = (FileId, &FileEntry)> {
        self.files.iter().enumerate().map(|(position, entry)| (FileId(position as u32), entry))
    }

    /// The file called `name`.
    pub fn file(&self, name: &str) -> Option<FileId> {
        self.files.iter().position(|entry| entry.name == name).map(|position| FileId(position as u32))
    }

    /// The entry of `file`; `None` for an id of another index.
    pub fn entry(&self, file: FileId) -> Option<&FileEntry> {
        self.files.get(file.0 as usize)
    }

    /// How many chunks `file` has, zero ones included; 0 for an id of another index.
    pub fn chunk_count(&self, file: FileId) -> u32 {
        self.entry(file).map_or(0, |entry| format::chunk_count(entry.size, self.chunk_size))
    }

    /// Plain bytes in a chunk; 0 past the end of its file.
    pub fn plain_len(&self, id: ChunkId) -> u32 {
        self.entry(id.file).map_or(0, |entry| format::chunk_len(entry.size, self.chunk_size, id.chunk))
    }

    /// Where a chunk is stored, here or in a base; `None` when it is all zeros or does not exist.
    pub fn record(&self, id: ChunkId) -> Option<&ChunkRecord> {
        self.record_number(id).map(|number| &self.records[number as usize])
    }

    /// Whether a chunk lies within its file and is all zeros.
    pub fn is_zero(&self, id: ChunkId) -> bool {
        self.plain_len(id) > 0 && self.record_number(id).is_none()
    }

    /// The parts of chunks that hold bytes `offset..offset + len` of `file`, clipped to the file, in order.
    pub fn spans(&self, file: FileId, offset: u64, len: u64) -> impl Iterator<Item = ChunkSpan> + use<> {
        let size = self.entry(file).map_or(0, |entry| entry.size);
        let chunk_size = u64::from(self.chunk_size);
        let end = offset.saturating_add(len).min(size);
        let chunks = if offset < end { offset / chunk_size..end.div_ceil(chunk_size) } else { 0..0 };
        chunks.map(move |chunk| {
            let (from, to) = (offset.max(chunk * chunk_size), end.min((chunk + 1) * chunk_size));
            ChunkSpan {
                chunk: chunk as u32,
                start: (from - chunk * chunk_size) as u32,
                len: (to - from) as u32,
            }
        })
    }

    /// The chunks of `file` that are not zero, in order; those of a delta's bases count as stored everywhere.
    pub fn stored_chunks(&self, file: FileId) -> impl Iterator<Item = (ChunkId, &ChunkRecord)> {
        let records = self.entry(file).map_or(0..0, |entry| entry.records.clone());
        self.records[records.start as usize..records.end as usize]
            .iter()
            .map(move |record| (ChunkId { file, chunk: record.chunk }, record))
    }

    /// How many chunks are stored in the whole pack.
    pub fn stored_chunk_count(&self) -> u32 {
        self.records.len() as u32
    }

    /// Bytes of all stored chunks' frames.
    pub fn stored_bytes(&self) -> u64 {
        self.records.iter().map(|record| u64::from(record.length)).sum()
    }

    /// How much of `file` is stored.
    pub fn stats(&self, file: FileId) -> FileStats {
        let mut stats = FileStats { chunks: self.chunk_count(file), ..FileStats::default() };
        for (_, record) in self.stored_chunks(file) {
            stats.stored_chunks += 1;
            stats.stored_bytes += u64::from(record.length);
        }
        stats
    }

    /// Number of a chunk's record in the whole table.
    pub(crate) fn record_number(&self, id: ChunkId) -> Option<u32> {
        let records = self.entry(id.file)?.records.clone();
        let own = &self.records[records.start as usize..records.end as usize];
        let position = own.binary_search_by_key(&id.chunk, |record| record.chunk).ok()?;
        Some(records.start + position as u32)
    }

    /// Numbers of the records of `file` whose chunks lie in `chunks`.
    pub(crate) fn records_in(&self, file: FileId, chunks: Range<u32>) -> Range<u32> {
        let records = self.entry(file).map_or(0..0, |entry| entry.records.clone());
        let own = &self.records[records.start as usize..records.end as usize];
        let before = |chunk| records.start + own.partition_point(|record| record.chunk < chunk) as u32;
        before(chunks.start)..before(chunks.end).max(before(chunks.start))
    }

    /// The record with that number.
    pub(crate) fn record_at(&self, number: u32) -> &ChunkRecord {
        &self.records[number as usize]
    }

    /// The chunk of the record with that number.
    pub(crate) fn chunk_at(&self, number: u32) -> ChunkId {
        let file = self.files.partition_point(|entry| entry.records.end <= number);
        ChunkId { file: FileId(file as u32), chunk: self.records[number as usize].chunk }
    }

    fn check_records(&self, frames_end: u64) -> Result<(), IndexError> {
        let mut free_from = 0;
        for (file, entry) in self.files() {
            let mut next_chunk = 0;
            for position in entry.records.clone() {
                let refuse = |what| Err(IndexError::Record { position, what });
                let record = self.record_at(position);
                let plain = self.plain_len(ChunkId { file, chunk: record.chunk });
                if plain == 0 {
                    return refuse("chunk past the end of its file");
                }
                if record.chunk < next_chunk {
                    return refuse("chunks out of order");
                }
                if record.length == 0 || record.length > format::compressed_bound(plain) {
                    return refuse("frame length");
                }
                let end = record.offset.checked_add(u64::from(record.length));
                if let Some(base) = record.pack.checked_sub(1) {
                    let Some(base) = self.bases.get(usize::from(base)) else {
                        return refuse("frame in a base that is not named");
                    };
                    if end.is_none_or(|end| end > base.index.offset) {
                        return refuse("frame outside its base");
                    }
                } else if record.offset < free_from {
                    return refuse("frame overlaps the one before");
                } else {
                    match end {
                        Some(end) if end <= frames_end => free_from = end,
                        _ => return refuse("frame outside the pack"),
                    }
                }
                next_chunk = record.chunk + 1;
            }
        }
        Ok(())
    }
}

impl FileEntry {
    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (name, numbers) = bytes.split_at(MAX_NAME_LEN);
        let len = name.iter().position(|&c| c == 0).unwrap_or(MAX_NAME_LEN);
        let (name, padding) = name.split_at(len);
        let name = std::str::from_utf8(name).ok().filter(|name| format::is_plain_name(name))?;
        let first = u32_at(numbers, 8);
        let end = first.checked_add(u32_at(numbers, 12))?;
        let padded = padding.iter().all(|&c| c == 0);
        padded.then(|| Self { name: name.to_owned(), size: u64_at(numbers, 0), records: first..end })
    }
}

impl ChunkRecord {
    fn from_bytes(bytes: &[u8]) -> Self {
        let digest = bytes[16..RECORD_LEN].try_into().expect("a record ends with 32 bytes");
        Self {
            chunk: u32_at(bytes, 0),
            length: u32_at(bytes, 4) & ((1 << LENGTH_BITS) - 1),
            pack: bytes[7],
            offset: u64_at(bytes, 8),
            digest: Digest(digest),
        }
    }
}

fn parse_files(bytes: &[u8], record_count: u32) -> Result<Vec<FileEntry>, IndexError> {
    let mut files: Vec<FileEntry> = Vec::with_capacity(bytes.len() / FILE_LEN);
    let mut next_record = 0;
    for (position, entry) in bytes.chunks_exact(FILE_LEN).enumerate() {
        let refuse = |what| IndexError::File { position: position as u32, what };
        let entry = FileEntry::from_bytes(entry).ok_or(refuse("name"))?;
        if entry.size > MAX_FILE_SIZE {
            return Err(refuse("size"));
        }
        if files.iter().any(|other| other.name == entry.name) {
            return Err(refuse("name used twice"));
        }
        if entry.records.start != next_record {
            return Err(refuse("records"));
        }
        next_record = entry.records.end;
        files.push(entry);
    }
    match next_record == record_count {
        true => Ok(files),
        false => Err(malformed("records without a file")),
    }
}

/// What lies between the frame header and the trailer, with both checked.
fn frame_body(bytes: &[u8]) -> Result<&[u8], IndexError> {
    if bytes.len() as u64 > MAX_INDEX_LEN {
        return Err(malformed("longer than any index may be"));
    }
    let Some((rest, trailer)) = bytes.split_last_chunk::<TRAILER_LEN>() else {
        return Err(malformed("cut short"));
    };
    let Some((header, body)) = rest.split_first_chunk::<FRAME_HEADER_LEN>() else {
        return Err(malformed("cut short"));
    };
    if u32_at(header, 0) != INDEX_FRAME_MAGIC {
        return Err(malformed("frame magic"));
    }
    let len = bytes.len() as u64;
    if u64::from(u32_at(header, 4)) + FRAME_HEADER_LEN as u64 != len || Index::parse_trailer(trailer)? != len
    {
        return Err(malformed("frame length"));
    }
    Ok(body)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests;
