//! How to build a pack, and how far it is.

use std::thread;

use crate::format::DEFAULT_CHUNK_SIZE;

/// How to build a pack.
#[derive(Debug, Clone, Copy)]
pub struct PackOptions {
    /// Plain bytes in a chunk: a power of two from 64 KiB to 4 MiB.
    pub chunk_size: u32,
    /// zstd level, 1 to 22.
    pub level: i32,
    /// Threads that compress.
    pub threads: usize,
}

impl Default for PackOptions {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(2, usize::from).max(2);
        Self { chunk_size: DEFAULT_CHUNK_SIZE, level: 3, threads }
    }
}

/// How far building has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackProgress {
    /// Which pass.
    pub pass: Pass,
    /// Plain bytes done in this pass.
    pub done: u64,
    /// Plain bytes in this pass.
    pub total: u64,
}

/// The passes over the files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pass {
    /// Digests and zero chunks.
    Scan,
    /// Which chunks the base of a delta has.
    Compare,
    /// Compressing what is not zero.
    Compress,
}

/// Hears how far it is.
pub(super) type OnProgress<'a> = &'a (dyn Fn(PackProgress) + Sync);
