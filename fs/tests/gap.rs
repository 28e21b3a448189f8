//! What reading across the gaps between wanted frames costs and saves: the measurement behind `StoreOptions::max_gap`.

use std::time::{Duration, Instant};

use forkd_fs::index::ChunkId;
use forkd_fs::source::Priority;
use forkd_fs::store::{Store, StoreOptions};

mod support;
use support::server::Server;
use support::{CHUNK, Fixture, http, noise, text};

/// Every sixth chunk in clusters, as the pages a program touches lie: 256 clusters of 1 to 4 chunks among 4096.
fn wanted(store: &Store) -> Vec<ChunkId> {
    let file = store.index().file("memory.bin").expect("the pack has memory");
    let mut rng = fastrand::Rng::with_seed(3);
    let mut chunks: Vec<u32> =
        (0..256).flat_map(|_| (rng.u32(0..4090)..).take(rng.usize(1..5)).collect::<Vec<_>>()).collect();
    chunks.sort_unstable();
    chunks.dedup();
    chunks.into_iter().map(|chunk| ChunkId { file, chunk }).collect()
}

struct Fetched {
    requests: u64,
    bytes: u64,
    took: Duration,
}

async fn fetch(fixture: &Fixture, link: u64, rtt: Duration, max_gap: u64) -> Fetched {
    let server = Server::start(fixture.bytes()).await;
    let options = StoreOptions { http: http(), max_gap, ..StoreOptions::default() };
    let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    server.set_latency(rtt);
    server.set_bandwidth(link);
    let before = store.progress();
    let started = Instant::now();
    store.fetch(&[wanted(&store)], Priority::Demand, &|_, _| ()).await.unwrap();
    let after = store.progress();
    Fetched {
        requests: after.requests - before.requests,
        bytes: after.bytes_fetched - before.bytes_fetched,
        took: started.elapsed(),
    }
}

/// A memory image of which most chunks compress well, as guests' do: about 10 KiB a frame.
fn fixture() -> Fixture {
    let mut memory = Vec::with_capacity(4096 * CHUNK);
    for chunk in 0..4096 {
        let mut plain = vec![0; CHUNK];
        plain[..12_000].copy_from_slice(&text(chunk, 12_000));
        plain[20_000..24_000].copy_from_slice(&noise(chunk, 4000));
        memory.extend_from_slice(&plain);
    }
    Fixture::with(&[("memory.bin", memory)])
}

#[tokio::test]
#[ignore = "a measurement, not a check"]
async fn gaps_of_several_sizes() {
    let fixture = fixture();
    println!("| link | RTT | max gap | requests | MiB | ms |");
    println!("|---|---|---|---|---|---|");
    for (link, rtt) in [(50_000_000, 20), (50_000_000, 80), (10_000_000, 20), (200_000_000, 5)] {
        for max_gap in [0u64, 16, 32, 64, 128, 256, 1024] {
            let mut runs = Vec::new();
            for _ in 0..3 {
                runs.push(fetch(&fixture, link, Duration::from_millis(rtt), max_gap << 10).await);
            }
            runs.sort_by_key(|run| run.took);
            let Fetched { requests, bytes, took } = &runs[1];
            let (mib, ms) = (*bytes as f64 / f64::from(1 << 20), took.as_millis());
            println!(
                "| {} MB/s | {rtt} ms | {max_gap} KiB | {requests} | {mib:.1} | {ms} |",
                link / 1_000_000
            );
        }
    }
}

#[tokio::test]
async fn larger_gaps_mean_fewer_requests_and_more_bytes() {
    let memory = noise(1, 64 * CHUNK);
    let fixture = Fixture::with(&[("memory.bin", memory)]);
    let mut seen = Vec::new();
    for max_gap in [0, 1 << 20] {
        let server = Server::start(fixture.bytes()).await;
        let options = StoreOptions { http: http(), max_gap, ..StoreOptions::default() };
        let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
        let file = store.index().file("memory.bin").unwrap();
        let every_fourth = (0..32).step_by(4).map(|chunk| ChunkId { file, chunk }).collect();
        store.fetch(&[every_fourth], Priority::Demand, &|_, _| ()).await.unwrap();
        seen.push((server.request_count() - 1, store.progress().chunks_fetched));
    }
    assert_eq!(seen, [(8, 8), (1, 29)], "what lies between is kept");
}
