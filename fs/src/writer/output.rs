//! The pack file as it grows: frames, their index and seek table.

use std::fs::File;
use std::io::{self, BufWriter, Write};

use zstd::bulk::Compressor;

use crate::digest::{Digest, Hasher};
use crate::format;
use crate::index::{BasePack, ChunkRecord, Index, IndexPin};

/// A compressed chunk.
pub(super) struct Frame {
    pub(super) bytes: Vec<u8>,
    pub(super) digest: Digest,
    pub(super) plain_len: u32,
}

/// The pack as it grows.
pub(super) struct Output<'a> {
    file: BufWriter<&'a mut File>,
    compressor: Compressor<'static>,
    hasher: Hasher,
    offset: u64,
    /// Compressed and plain length of every frame.
    frames: Vec<(u32, u32)>,
}

impl<'a> Output<'a> {
    pub(super) fn new(file: &'a mut File, compressor: Compressor<'static>) -> Self {
        let file = BufWriter::with_capacity(1 << 20, file);
        Self { file, compressor, hasher: Hasher::new(), offset: 0, frames: Vec::new() }
    }

    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hasher.update(bytes);
        self.offset += bytes.len() as u64;
        self.file.write_all(bytes)
    }

    fn frame(&mut self, bytes: &[u8], plain_len: usize) -> io::Result<()> {
        self.frames.push((bytes.len() as u32, plain_len as u32));
        self.append(bytes)
    }

    /// Appends bytes of tar's own in a frame.
    pub(super) fn tar_bytes(&mut self, plain: &[u8]) -> io::Result<()> {
        let frame = self.compressor.compress(plain)?;
        self.frame(&frame, plain.len())
    }

    /// Appends a chunk.
    pub(super) fn chunk(&mut self, chunk: u32, frame: &Frame) -> io::Result<ChunkRecord> {
        let record = ChunkRecord {
            chunk,
            length: frame.bytes.len() as u32,
            pack: 0,
            offset: self.offset,
            digest: frame.digest,
        };
        self.frame(&frame.bytes, frame.plain_len as usize)?;
        Ok(record)
    }

    /// Appends the index of `files` (name, plain size, chunks that are not zero) and the seek table; returns the index
    /// with its place, and the pack's size.
    pub(super) fn finish(
        &mut self,
        chunk_size: u32,
        bases: Vec<BasePack>,
        files: Vec<(String, u64, Vec<ChunkRecord>)>,
    ) -> io::Result<((Index, IndexPin), u64)> {
        let records = files.iter().map(|(.., records)| records.len()).sum();
        let index_len = Index::encoded_len(bases.len(), files.len(), records);
        // The index frame itself has an entry in the seek table, with nothing in it.
        let pack_size = self.offset + index_len + format::seek_table_len(self.frames.len() as u64 + 1);
        let index = Index::new(chunk_size, pack_size, bases, files);
        let bytes = index.encode();
        let pin = IndexPin { offset: self.offset, length: index_len, sha256: Digest::of(&bytes) };
        self.frame(&bytes, 0)?;
        self.append(&format::encode_seek_table(&self.frames))?;
        debug_assert_eq!(self.offset, pack_size);
        Ok(((index, pin), pack_size))
    }

    /// Writes out what is buffered; returns the digest of the whole pack.
    pub(super) fn close(mut self) -> io::Result<Digest> {
        self.file.flush()?;
        Ok(self.hasher.finish())
    }
}
