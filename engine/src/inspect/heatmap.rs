//! A pack's images by chunk, as a picture.

use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::format::{MEMORY, ROOTFS};
use forkd_fs::index::{ChunkId, FileId};
use forkd_fs::store::Store;
use forkd_fs::trace::bucket_name;

use crate::inspect::working_set::WorkingSet;
use crate::local::paths::Paths;
use crate::picture::heatmap::{Heatmap, HeatmapCell, ImageCells};
use crate::picture::svg::{LegendEntry, PALE};

/// Colours of the buckets, the first one first; buckets beyond share the last colour.
const BUCKETS: [&str; 4] = ["#c0392b", "#f28e2b", "#edc948", "#b07aa1"];
const REST: &str = "#a0b8d0";
const FETCHED: &str = "#2e8b57";

/// The picture of an opened pack: what is zero, what a fork touches, what is in this user's chunk cache, what is left.
pub(super) fn of_pack(store: &Store, working_set: Option<&WorkingSet>, paths: &Paths) -> Heatmap {
    let index = store.index();
    let buckets = working_set.map_or(&[][..], |set| &set.chunks[..]);
    let cache = ChunkCache::open(&paths.cache, CacheOptions::default());
    let shown_buckets = buckets.len().min(BUCKETS.len());
    let (rest, zero) = (shown_buckets as u8, shown_buckets as u8 + 1);
    let image = |(file, name): (FileId, &str)| {
        let mut cells = vec![HeatmapCell { shade: zero, marked: false }; index.chunk_count(file) as usize];
        for (chunk, record) in index.stored_chunks(file) {
            cells[chunk.chunk as usize] = HeatmapCell { shade: rest, marked: cache.contains(record.digest) };
        }
        let touched =
            buckets.iter().enumerate().flat_map(|(at, chunks)| chunks.iter().map(move |chunk| (at, chunk)));
        for (bucket, ChunkId { chunk, .. }) in touched.filter(|(_, chunk)| chunk.file == file) {
            cells[*chunk as usize].shade = bucket.min(BUCKETS.len() - 1) as u8;
        }
        let bytes = index.entry(file).map_or(0, |entry| entry.size);
        ImageCells { name: name.to_owned(), bytes, chunk_bytes: u64::from(index.chunk_size()), cells }
    };
    let files = [MEMORY, ROOTFS].into_iter().filter_map(|name| Some((index.file(name)?, name)));
    let hot = (0..shown_buckets).map(|at| {
        let more = if at + 1 == BUCKETS.len() { " and later" } else { "" };
        LegendEntry { colour: BUCKETS[at], text: format!("working set, {}{more}", bucket_name(at)) }
    });
    let others = [(REST, "stored, not in the working set"), (PALE, "zero, not stored")];
    let others = others.map(|(colour, text)| LegendEntry { colour, text: text.to_owned() });
    Heatmap {
        title: store.location().to_owned(),
        lines: vec![match buckets.len() {
            0 => "no working set is recorded".to_owned(),
            _ => "a chunk has the colour of the first touch in it".to_owned(),
        }],
        shades: hot.chain(others).collect(),
        mark: Some(LegendEntry { colour: FETCHED, text: "fetched: in the local chunk cache".to_owned() }),
        images: files.map(image).collect(),
    }
}
