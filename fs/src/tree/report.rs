//! The reports about packs, below `.forkd`.

use std::fmt::Write as _;

use bytes::Bytes;
use serde::Serialize;

use crate::index::{ChunkId, FileId};
use crate::store::Store;

/// What went wrong so far, for the report.
#[derive(Debug, Default, Clone, Serialize)]
pub(super) struct ReadFailures {
    pub(super) failed_reads: u64,
    pub(super) last_error: Option<String>,
}

/// `stats.json` of one pack.
#[derive(Debug, Serialize)]
pub(super) struct Stats {
    name: String,
    opened: bool,
    bytes_total: Option<u64>,
    bytes_fetched: u64,
    requests: u64,
    chunks_total: u32,
    chunks_fetched: u32,
    retrying_for_ms: Option<u64>,
    retrying_because: Option<String>,
    failed_reads: u64,
    last_error: Option<String>,
    files: Vec<FileReport>,
}

#[derive(Debug, Serialize)]
struct FileReport {
    name: String,
    size: u64,
    chunks: u32,
    stored_chunks: u32,
    stored_bytes: u64,
    fetched_chunks: u32,
}

impl Stats {
    /// The report on the pack called `name`; `store` is it, opened, when it has an index.
    pub(super) fn new(
        name: &str,
        opened: bool,
        bytes_total: Option<u64>,
        store: Option<&Store>,
        failures: ReadFailures,
    ) -> Stats {
        let progress = store.map(Store::progress).unwrap_or_default();
        let files = store.map_or_else(Vec::new, |store| {
            let files = store.index().files();
            files.map(|(id, entry)| file_report(store, id, &entry.name, entry.size)).collect()
        });
        Stats {
            name: name.to_owned(),
            opened,
            bytes_total,
            bytes_fetched: progress.bytes_fetched,
            requests: progress.requests,
            chunks_total: progress.chunks_total,
            chunks_fetched: progress.chunks_fetched,
            retrying_for_ms: progress.retrying_since.map(|since| since.elapsed().as_millis() as u64),
            retrying_because: progress.last_error,
            failed_reads: failures.failed_reads,
            last_error: failures.last_error,
            files,
        }
    }
}

/// One line a file: its name, then one character a chunk: `0` zero, `#` fetched, `.` not fetched.
pub(super) fn blocks(store: &Store) -> Bytes {
    let index = store.index();
    let mut text = String::new();
    for (file, entry) in index.files() {
        let _ = write!(text, "{} ", entry.name);
        let chunks = (0..index.chunk_count(file)).map(|chunk| ChunkId { file, chunk });
        text.extend(chunks.map(|id| match (index.is_zero(id), store.is_fetched(id)) {
            (true, _) => '0',
            (false, true) => '#',
            (false, false) => '.',
        }));
        text.push('\n');
    }
    text.into()
}

fn file_report(store: &Store, file: FileId, name: &str, size: u64) -> FileReport {
    let (index, stats) = (store.index(), store.index().stats(file));
    let fetched = index.stored_chunks(file).filter(|&(id, _)| store.is_fetched(id)).count();
    FileReport {
        name: name.to_owned(),
        size,
        chunks: stats.chunks,
        stored_chunks: stats.stored_chunks,
        stored_bytes: stats.stored_bytes,
        fetched_chunks: fetched as u32,
    }
}

/// A report as text.
pub(super) fn as_json(report: &impl Serialize) -> Bytes {
    let mut text = serde_json::to_vec_pretty(report).unwrap_or_default();
    text.push(b'\n');
    text.into()
}
