//! Which packs are in the chunk cache, and how much of them.

use std::collections::BTreeSet;

use forkd_fs::cache::ChunkCache;
use forkd_fs::index::Index;
use serde::Serialize;

use crate::hub::registry::{RegistryCopies, Resolved};
use crate::local::paths::Paths;

/// A pack of which something is in the cache, as `forkd cache ls --json` shows it.
#[derive(Debug, Serialize)]
pub struct CachedPack {
    /// owner/name@version.
    pub name: String,
    /// Chunks that are here.
    pub chunks: u32,
    /// Chunks that it stores.
    pub chunks_total: u32,
    /// Bytes of those that are here.
    pub bytes: u64,
    /// Whether it mounts and forks without its hub.
    pub complete: bool,
}

/// Packs of the hubs seen so far of which something is in `cache`.
pub fn packs(paths: &Paths, cache: &ChunkCache) -> Vec<CachedPack> {
    let mut packs = Vec::new();
    let mut seen = BTreeSet::new();
    for catalogue in RegistryCopies::new(paths).all() {
        for resolved in catalogue.entries().filter_map(Result::ok) {
            if let Some(pack) = pack(cache, &resolved).filter(|pack| seen.insert(pack.name.clone())) {
                packs.push(pack);
            }
        }
    }
    packs
}

/// What is here of a pack, when its index is.
fn pack(cache: &ChunkCache, resolved: &Resolved) -> Option<CachedPack> {
    let pin = resolved.location.index?;
    let index = Index::parse(&cache.get(pin.sha256, pin.length)?, resolved.location.size).ok()?;
    let (chunks, bytes) = cache.coverage(&index);
    let chunks_total = index.stored_chunk_count();
    Some(CachedPack {
        name: resolved.reference.to_string(),
        chunks,
        chunks_total,
        bytes,
        complete: chunks == chunks_total,
    })
}
