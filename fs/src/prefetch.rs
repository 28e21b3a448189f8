//! What to fetch ahead: a recorded trace turned into batches of chunks. Pure; [`crate::store::Store::fetch`] does it.

use std::ops::Range;

use crate::format::{HOTSET, MANIFEST, SNAPSHOT, TRACE, VMSTATE};
use crate::index::{ChunkId, FileId, Index};
use crate::trace::{PAGE_SIZE, PageRun, Trace};

/// Most plain bytes of the `hotset` that a machine waits for before it starts. Every page of the first bucket is touched
/// before the first instruction, and by itself it would come with 256 KiB and a round trip of its own.
const FIRST_BYTES_MAX: u64 = 16 << 20;

/// How many chunks at the start of the `hotset` hold the pages that are touched before the first instruction: one at least,
/// and none when the pack has no `hotset` or one that does not fit `trace`.
pub fn first_hot_chunks(index: &Index, trace: &Trace) -> u32 {
    let Some((file, entry)) = index.file(HOTSET).and_then(|file| Some((file, index.entry(file)?))) else {
        return 0;
    };
    if trace.page_count() * PAGE_SIZE != entry.size {
        return 0;
    }
    let runs = trace.regions.iter().filter_map(|region| region.buckets.first()).flatten();
    let bytes = runs.map(|run| u64::from(run.pages)).sum::<u64>() * PAGE_SIZE;
    let chunks = bytes.min(FIRST_BYTES_MAX).div_ceil(u64::from(index.chunk_size())).max(1);
    chunks.min(index.chunk_count(file).into()) as u32
}

/// How many bytes at the start of a pack hold what a machine needs before its first instruction.
pub fn head_len(index: &Index, trace: &Trace) -> u64 {
    let first = first_hot_chunks(index, trace);
    let small = [MANIFEST, SNAPSHOT, VMSTATE, TRACE].map(|name| (name, u32::MAX));
    let records = small.into_iter().chain([(HOTSET, first)]).filter_map(|(name, chunks)| {
        let record = index.records_in(index.file(name)?, 0..chunks).next_back()?;
        Some(index.record_at(record))
    });
    records.map(|record| record.offset + u64::from(record.length)).max().unwrap_or(0)
}

/// The stored chunks that `trace` touches: one batch a bucket, in pack order within it. A chunk stands in the earliest
/// bucket that touches it only; zero chunks and files the pack does not have are left out.
pub fn plan(index: &Index, trace: &Trace) -> Vec<Vec<ChunkId>> {
    let buckets = trace.regions.iter().map(|region| region.buckets.len()).max().unwrap_or(0);
    let mut planned = vec![false; index.stored_chunk_count() as usize];
    let mut batches = Vec::with_capacity(buckets);
    for bucket in 0..buckets {
        let mut records: Vec<u32> = Vec::new();
        for region in &trace.regions {
            let (Some(file), Some(runs)) = (index.file(&region.file), region.buckets.get(bucket)) else {
                continue;
            };
            for chunks in chunk_ranges(index, file, runs) {
                records.extend(index.records_in(file, chunks).filter(|&record| !planned[record as usize]));
            }
        }
        records.sort_unstable();
        records.dedup();
        records.iter().for_each(|&record| planned[record as usize] = true);
        batches.push(records.into_iter().map(|record| index.chunk_at(record)).collect());
    }
    batches
}

/// Every stored chunk that `planned` leaves out, in pack order.
pub fn remaining(index: &Index, planned: &[Vec<ChunkId>]) -> Vec<ChunkId> {
    let mut left = vec![true; index.stored_chunk_count() as usize];
    for record in planned.iter().flatten().filter_map(|&id| index.record_number(id)) {
        left[record as usize] = false;
    }
    (0..index.stored_chunk_count())
        .filter(|&record| left[record as usize])
        .map(|r| index.chunk_at(r))
        .collect()
}

/// The chunks under `runs`, as ranges without overlap: a hostile trace may name the same pages a million times.
fn chunk_ranges(index: &Index, file: FileId, runs: &[PageRun]) -> Vec<Range<u32>> {
    let (count, chunk_size) = (u64::from(index.chunk_count(file)), u64::from(index.chunk_size()));
    let chunks = |run: &PageRun| {
        let (first, pages) = (u64::from(run.first_page) * PAGE_SIZE, u64::from(run.pages) * PAGE_SIZE);
        let (from, to) = (first / chunk_size, (first + pages).div_ceil(chunk_size).min(count));
        (from < to).then_some(from as u32..to as u32)
    };
    let mut ranges: Vec<Range<u32>> = runs.iter().filter_map(chunks).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u32>> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::digest::Digest;
    use crate::format::MIN_CHUNK_SIZE;
    use crate::index::ChunkRecord;
    use crate::trace::RegionTrace;

    /// Two files of 40 chunks each with the given ones stored.
    fn index(stored: [&BTreeSet<u32>; 2]) -> Index {
        let mut offset = 0;
        let files = ["memory.bin", "rootfs.erofs"].iter().zip(stored).map(|(name, chunks)| {
            let record = |&chunk| {
                offset += 10;
                ChunkRecord { chunk, length: 10, pack: 0, offset: offset - 10, digest: Digest::of(b"") }
            };
            (name.to_string(), 40 * u64::from(MIN_CHUNK_SIZE), chunks.iter().map(record).collect())
        });
        Index::new(MIN_CHUNK_SIZE, 1 << 20, Vec::new(), files.collect())
    }

    fn runs() -> impl Strategy<Value = Vec<PageRun>> {
        let run = (0u32..800, 1u32..100).prop_map(|(first_page, pages)| PageRun { first_page, pages });
        proptest::collection::vec(run, 0..8)
    }

    fn traces() -> impl Strategy<Value = Trace> {
        let region = |file: &'static str| {
            proptest::collection::vec(runs(), 0..4)
                .prop_map(move |buckets| RegionTrace { file: file.into(), buckets })
        };
        (region("rootfs.erofs"), region("memory.bin"), region("no-such-file"))
            .prop_map(|(a, b, c)| Trace { regions: vec![a, b, c] })
    }

    proptest! {
        #[test]
        fn plan_and_remaining_split_the_stored_chunks(
            trace in traces(),
            memory in proptest::collection::btree_set(0u32..40, 0..40),
            rootfs in proptest::collection::btree_set(0u32..40, 0..40),
        ) {
            let index = index([&memory, &rootfs]);
            let batches = plan(&index, &trace);
            let rest = remaining(&index, &batches);
            let mut all: Vec<ChunkId> = batches.iter().flatten().chain(&rest).copied().collect();
            all.sort();
            let stored: Vec<ChunkId> = index.files().flat_map(|(file, _)| index.stored_chunks(file).map(|(id, _)| id)).collect();
            prop_assert_eq!(all, stored, "every stored chunk exactly once");
            // Model: the first bucket whose pages meet the chunk.
            let pages = MIN_CHUNK_SIZE / PAGE_SIZE as u32;
            for (number, batch) in batches.iter().enumerate() {
                prop_assert!(batch.is_sorted());
                for id in batch {
                    let name = &index.entry(id.file).unwrap().name;
                    let touches = |runs: &Vec<PageRun>| runs.iter().any(|run| {
                        run.first_page < (id.chunk + 1) * pages && run.first_page + run.pages > id.chunk * pages
                    });
                    let first = trace.region(name).unwrap().buckets.iter().position(touches);
                    prop_assert_eq!(first, Some(number));
                }
            }
        }
    }

    /// A pack with a trace of 10 bytes and a hot set for `buckets` of so many pages.
    fn hot(buckets: &[u32]) -> (Index, Trace) {
        let mut from = 0;
        let runs = buckets.iter().map(|&pages| {
            from += pages;
            vec![PageRun { first_page: from - pages, pages }]
        });
        let buckets: Vec<_> = runs.collect();
        let trace = Trace { regions: vec![RegionTrace { file: "memory.bin".into(), buckets }] };
        let hot_bytes = trace.page_count() * PAGE_SIZE;
        let mut offset = 0;
        let files = [("trace", 10), (HOTSET, hot_bytes), ("memory.bin", hot_bytes)].map(|(name, size)| {
            let records = (0..size.div_ceil(MIN_CHUNK_SIZE.into()) as u32).map(|chunk| {
                offset += 100;
                ChunkRecord { chunk, length: 100, pack: 0, offset: offset - 100, digest: Digest::of(b"") }
            });
            (name.to_owned(), size, records.collect())
        });
        (Index::new(MIN_CHUNK_SIZE, 1 << 30, Vec::new(), files.into()), trace)
    }

    #[test]
    fn the_head_ends_with_the_pages_of_the_first_instruction() {
        // 16 pages a chunk.
        for (buckets, chunks) in
            [(&[1, 40][..], 1), (&[16, 40], 1), (&[17, 40], 2), (&[100, 1], 7), (&[0, 1], 1)]
        {
            let (index, trace) = hot(buckets);
            assert_eq!(first_hot_chunks(&index, &trace), chunks, "{buckets:?}");
            assert_eq!(head_len(&index, &trace), 100 + 100 * u64::from(chunks), "{buckets:?}");
        }
        let (index, trace) = hot(&[1 << 20]);
        assert_eq!(u64::from(first_hot_chunks(&index, &trace)) * u64::from(MIN_CHUNK_SIZE), FIRST_BYTES_MAX);
        let (index, _) = hot(&[17]);
        let (_, other) = hot(&[18]);
        assert_eq!((first_hot_chunks(&index, &other), head_len(&index, &other)), (0, 100), "not its trace");
        let stored = BTreeSet::from([1, 2]);
        assert_eq!(head_len(&self::index([&stored, &stored]), &Trace::default()), 0, "neither is there");
    }

    #[test]
    fn no_trace_plans_nothing() {
        let stored = BTreeSet::from([1, 2]);
        let index = index([&stored, &BTreeSet::new()]);
        assert!(plan(&index, &Trace::default()).is_empty());
        assert_eq!(remaining(&index, &[]).len(), 2);
    }
}
