//! What the index of a pack costs: checking it when a pack is opened, and finding a chunk in it.

#[path = "../tests/support/mod.rs"]
mod support;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use forkd_fs::index::{ChunkId, Index};
use forkd_fs::writer::{PackOptions, PackWriter};
use std::fs::File;
use std::hint::black_box;
use std::os::unix::fs::FileExt;

const CHUNK: u64 = 64 << 10;

/// The index of a pack whose memory.bin has as many chunks, every third of them zero.
fn encoded_index(chunks: u64) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let from = dir.path().join("snapshot");
    std::fs::create_dir(&from).unwrap();
    let memory = File::create(from.join("memory.bin")).unwrap();
    memory.set_len(chunks * CHUNK).unwrap();
    for chunk in (0..chunks).filter(|chunk| chunk % 3 != 0) {
        memory.write_all_at(&chunk.to_le_bytes(), chunk * CHUNK).unwrap();
    }
    let pack = dir.path().join("bench.forkd-snapshot.tar.zst");
    let options = PackOptions { chunk_size: CHUNK as u32, level: 1, ..PackOptions::default() };
    let summary = PackWriter::new(options).write(&from, support::manifest(), &pack, &|_| ()).unwrap();
    let mut bytes = vec![0; summary.index.length as usize];
    File::open(&pack).unwrap().read_exact_at(&mut bytes, summary.index.offset).unwrap();
    bytes
}

fn indexes(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("index");
    for chunks in [1 << 10, 1 << 14] {
        let bytes = encoded_index(chunks);
        group.throughput(Throughput::Elements(chunks));
        group.bench_function(BenchmarkId::new("parse", chunks), |bencher| {
            bencher.iter(|| Index::parse(black_box(&bytes), None).unwrap());
        });
        let index = Index::parse(&bytes, None).unwrap();
        let memory = index.file("memory.bin").unwrap();
        let mut rng = fastrand::Rng::with_seed(1);
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("look up 4 KiB", chunks), |bencher| {
            bencher.iter(|| {
                let offset = rng.u64(0..chunks * CHUNK / 4096) * 4096;
                let spans = index.spans(memory, offset, 4096);
                spans
                    .filter_map(|span| index.record(ChunkId { file: memory, chunk: span.chunk }))
                    .fold(0, |sum, record| sum + record.offset)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, indexes);
criterion_main!(benches);
