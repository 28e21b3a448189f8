//! What a chunk costs on its way out of a pack that is here already: its digest, its decoding, and the whole read through
//! the store from the cache on disk, for contents that compress differently.

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::digest::Digest;
use forkd_fs::index::ChunkId;
use forkd_fs::store::{PackLocation, PackSource, Store, StoreOptions};
use forkd_fs::writer::{PackOptions, PackWriter};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use tokio::runtime::Runtime;

const CHUNK: usize = 256 << 10;
/// More than one, so that no read finds what the one before left in the processor's caches.
const CHUNKS: usize = 64;

/// This program itself, over and over: machine code and its tables.
fn code(len: usize) -> Vec<u8> {
    let program = std::env::current_exe().and_then(std::fs::read).expect("a program can read itself");
    program.into_iter().cycle().take(len).collect()
}

/// A pack whose memory.bin has these contents, opened with a cache that holds all of it and nothing decoded.
fn warm_store(dir: &Path, runtime: &Runtime, contents: &[u8]) -> Arc<Store> {
    let from = dir.join("snapshot");
    std::fs::create_dir(&from).unwrap();
    std::fs::write(from.join("memory.bin"), contents).unwrap();
    let pack = dir.join("bench.forkd-snapshot.tar.zst");
    let options = PackOptions { chunk_size: CHUNK as u32, ..PackOptions::default() };
    PackWriter::new(options).write(&from, support::manifest(), &pack, &|_| ()).unwrap();
    let location = PackLocation { source: PackSource::Path(pack), size: None, index: None };
    let cache = Arc::new(ChunkCache::open(&dir.join("cache"), CacheOptions::default()));
    let options =
        StoreOptions { cache: Some(Arc::clone(&cache)), decoded_bytes: 0, ..StoreOptions::default() };
    let store = runtime.block_on(Store::open(location, options)).unwrap();
    for id in chunks(&store) {
        runtime.block_on(store.chunk(id)).unwrap();
    }
    cache.flush();
    store
}

fn chunks(store: &Store) -> Vec<ChunkId> {
    let memory = store.index().file("memory.bin").unwrap();
    store.index().stored_chunks(memory).map(|(id, _)| id).collect()
}

/// The compressed frames of the chunks, as the pack has them.
fn frames(dir: &Path, store: &Store) -> Vec<Vec<u8>> {
    let pack = std::fs::File::open(dir.join("bench.forkd-snapshot.tar.zst")).unwrap();
    let read = |id| {
        let record = store.index().record(id).unwrap();
        let mut frame = vec![0; record.length as usize];
        pack.read_exact_at(&mut frame, record.offset).unwrap();
        frame
    };
    chunks(store).into_iter().map(read).collect()
}

fn decode_chunks(criterion: &mut Criterion) {
    let runtime = Runtime::new().unwrap();
    let mut group = criterion.benchmark_group("chunk");
    group.throughput(Throughput::Bytes(CHUNK as u64));
    let len = CHUNK * CHUNKS;
    for (kind, contents) in
        [("noise", support::noise(1, len)), ("text", support::text(2, len)), ("code", code(len))]
    {
        let dir = tempfile::tempdir().unwrap();
        let store = warm_store(dir.path(), &runtime, &contents);
        let frames = frames(dir.path(), &store);
        let mut turn = frames.iter().cycle();
        group.bench_function(BenchmarkId::new("sha256", kind), |bencher| {
            bencher.iter(|| Digest::of(black_box(turn.next().unwrap())));
        });
        let mut decoder = zstd::bulk::Decompressor::new().unwrap();
        group.bench_function(BenchmarkId::new("decode", kind), |bencher| {
            bencher.iter(|| decoder.decompress(black_box(turn.next().unwrap()), CHUNK).unwrap());
        });
        let ids = chunks(&store);
        let mut turn = ids.iter().cycle();
        group.bench_function(BenchmarkId::new("cached on disk", kind), |bencher| {
            bencher.iter(|| runtime.block_on(store.chunk(*turn.next().unwrap())).unwrap());
        });
    }
    group.finish();
}

criterion_group!(benches, decode_chunks);
criterion_main!(benches);
