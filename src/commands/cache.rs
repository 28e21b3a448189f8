//! `forkd cache`: what the chunk cache holds, whether it is intact, and making it smaller.

use std::process::ExitCode;
use std::time::SystemTime;

use forkd_fs::cache::{CacheContents, CacheOptions, ChunkCache};
use serde::Serialize;

use crate::cli::CacheGcArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_engine::build::recipe;
use forkd_engine::hub::cached::{self, CachedPack};
use forkd_engine::hub::client;
use forkd_engine::hub::download;
use forkd_engine::local::paths::PathsError;
use forkd_engine::progress::{Amount, Progress};

/// What `forkd cache ls` prints.
#[derive(Debug, Serialize)]
struct Report {
    directory: String,
    chunks: u64,
    bytes: u64,
    damaged: u64,
    unfinished: u64,
    oldest_use: Option<String>,
    /// Packs of the hubs seen so far of which something is here.
    packs: Vec<CachedPack>,
}

/// What `forkd cache verify` prints.
#[derive(Debug, Serialize)]
struct Verified {
    chunks: u64,
    bytes: u64,
    damaged: u64,
}

/// What `forkd cache gc` prints.
#[derive(Debug, Serialize)]
struct Collected {
    removed_files: u64,
    removed_bytes: u64,
    chunks: u64,
    bytes: u64,
}

/// Lists.
pub fn ls(output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let cache = ChunkCache::open(&paths.cache, CacheOptions::default());
    let CacheContents { entries, bytes, damaged, unfinished, oldest_use } = cache.contents();
    let report = Report {
        directory: paths.cache.display().to_string(),
        chunks: entries,
        bytes,
        damaged,
        unfinished,
        oldest_use: oldest_use.map(|used| humantime::format_rfc3339_seconds(used).to_string()),
        packs: cached::packs(&paths, &cache),
    };
    output.report(&report, |report| show(report, oldest_use));
    Ok(ExitCode::SUCCESS)
}

fn show(report: &Report, oldest_use: Option<SystemTime>) -> String {
    let Report { directory, chunks, bytes, damaged, unfinished, .. } = report;
    let mut text = format!("{directory}: {chunks} chunks, {}", show_size(*bytes));
    if let Some(age) = oldest_use.and_then(|used| used.elapsed().ok()) {
        let hours = age.as_secs() / 3600;
        text.push_str(&format!(", the longest unused for {hours} h"));
    }
    if *damaged > 0 {
        text.push_str(&format!(", {damaged} damaged"));
    }
    if *unfinished > 0 {
        text.push_str(&format!(", {unfinished} unfinished"));
    }
    text.push('\n');
    if !report.packs.is_empty() {
        let heading = ["PACK", ">CHUNKS", ">OF", ">SIZE", "OFFLINE"].map(str::to_owned).to_vec();
        let row = |pack: &CachedPack| {
            let offline = if pack.complete { "yes" } else { "no" };
            let (chunks, of) = (pack.chunks.to_string(), pack.chunks_total.to_string());
            vec![pack.name.clone(), chunks, of, show_size(pack.bytes), offline.to_owned()]
        };
        let rows: Vec<Vec<String>> = std::iter::once(heading).chain(report.packs.iter().map(row)).collect();
        text.push_str(&table(&rows));
    }
    text
}

/// Checks every chunk. Exit code 1 when some are damaged.
pub fn verify(output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let cache = ChunkCache::open(&paths.cache, CacheOptions::default());
    let progress = output.begin("checking", Amount::Bytes(cache.contents().bytes));
    let found = cache.verify(&|bytes| progress.to(bytes));
    drop(progress);
    let report = Verified { chunks: found.entries, bytes: found.bytes, damaged: found.damaged };
    output.report(&report, |report| {
        let intact = report.chunks - report.damaged;
        format!("{intact} of {} chunks are intact ({})\n", report.chunks, show_size(report.bytes))
    });
    Ok(if found.damaged == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Makes room.
pub fn gc(args: &CacheGcArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let cache = client::chunk_cache(&paths, args.cache.options());
    let failed = |source| PathsError::Directory { path: paths.cache.clone(), source };
    let removed = cache.collect(args.all).map_err(failed)?;
    let (downloads, download_bytes) = download::collect(&paths, args.all);
    let built = recipe::collect(&paths, args.all).map_err(failed)?;
    let left = cache.contents();
    let report = Collected {
        removed_files: removed.files + downloads + built.files,
        removed_bytes: removed.bytes + download_bytes + built.bytes,
        chunks: left.entries,
        bytes: left.bytes,
    };
    output.report(&report, |report| {
        let (removed, left) = (show_size(report.removed_bytes), show_size(report.bytes));
        format!(
            "removed {} files ({removed}); {} chunks ({left}) stay\n",
            report.removed_files, report.chunks
        )
    });
    Ok(ExitCode::SUCCESS)
}
