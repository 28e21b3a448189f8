//! Demand before prefetch on a link both share: what a reader waits while prefetch runs, and that prefetch goes on.
//! Prints its measurements as a table with `--no-capture`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use forkd_fs::source::{HttpClient, HttpOptions, HttpSource, Priority, ReadDeadlines, Source};

mod support;
use support::noise;
use support::server::Server;

const FRAME: u64 = 256 << 10;
/// As long as the store's bulk reads ask for at a time.
const RUN: u64 = 2 << 20;

struct Measured {
    /// Of each demand read, sorted.
    latencies: Vec<Duration>,
    /// Bytes a second that prefetch got meanwhile.
    prefetched: f64,
}

impl Measured {
    fn quantile(&self, of: f64) -> f64 {
        self.latencies[((self.latencies.len() - 1) as f64 * of) as usize].as_secs_f64() * 1000.0
    }
}

/// Demand reads, `pause` apart, with so many prefetch streams running.
async fn measure(bandwidth: u64, streams: usize, pause: Duration, rtt: Duration) -> Measured {
    let server = Server::start(noise(1, 32 << 20)).await;
    server.set_bandwidth(bandwidth);
    server.set_latency(rtt);
    let http = HttpClient::new(HttpOptions::default());
    let deadlines = ReadDeadlines { demand: Duration::from_secs(30), prefetch: Duration::from_secs(30) };
    let source = Arc::new(Source::Http(HttpSource::new(&http, &server.url(), None, deadlines).unwrap()));
    // The connection demand uses is there already.
    source.read_at(0, 10, Priority::Demand).await.unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let tasks: Vec<_> = (0..streams as u64)
        .map(|stream| {
            let (source, stop) = (source.clone(), stop.clone());
            tokio::spawn(async move {
                let mut got = 0;
                for run in 0.. {
                    let mut body = source.stream_at((stream * 3 + run) % 15 * RUN, RUN, Priority::Prefetch);
                    while let Some(piece) = body.next().await.unwrap() {
                        got += piece.len() as u64;
                        if stop.load(Relaxed) {
                            return got;
                        }
                    }
                }
                got
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(700)).await;
    let (mut latencies, started) = (Vec::new(), Instant::now());
    for read in 0..16 {
        tokio::time::sleep(pause).await;
        let asked = Instant::now();
        source.read_at(read * 7 % 100 * FRAME, FRAME, Priority::Demand).await.unwrap();
        latencies.push(asked.elapsed());
    }
    stop.store(true, Relaxed);
    let took = started.elapsed() + Duration::from_millis(700);
    let mut prefetched = 0;
    for task in tasks {
        prefetched += task.await.unwrap();
    }
    latencies.sort_unstable();
    Measured { latencies, prefetched: prefetched as f64 / took.as_secs_f64() }
}

/// Measures and prints one row of the table.
async fn row(link: u64, rtt: u64, streams: usize, pause: u64) -> Measured {
    let (gap, latency) = (Duration::from_millis(pause), Duration::from_millis(rtt));
    let measured = measure(link * 1_000_000, streams, gap, latency).await;
    let (p50, p95, rate) = (measured.quantile(0.5), measured.quantile(0.95), measured.prefetched / 1e6);
    let apart = if pause == 0 { "without end".into() } else { format!("{pause} ms apart") };
    println!("| {link} | {rtt} | {streams} | {apart} | {p50:.0} | {p95:.0} | {rate:.2} |");
    measured
}

fn heading() {
    println!("| link MB/s | rtt ms | prefetch streams | demand reads | p50 ms | p95 ms | prefetch MB/s |");
    println!("|---|---|---|---|---|---|---|");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn demand_hardly_waits_for_prefetch_and_never_starves_it() {
    heading();
    let (alone, beside, endless) = (row(5, 0, 0, 50).await, row(5, 0, 4, 50).await, row(5, 0, 4, 0).await);
    // An even share of the link would be a factor of five.
    let factor = beside.quantile(0.5) / alone.quantile(0.5);
    assert!(factor < 3.5, "{factor}");
    assert!(beside.prefetched > 2.5e6 && endless.prefetched > 1.5e6, "prefetch goes on");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement, not a check"]
async fn links_of_several_kinds() {
    heading();
    for (link, rtt) in [(5, 0), (5, 20), (50, 20)] {
        for (streams, pause) in [(0, 50), (4, 50), (4, 0)] {
            row(link, rtt, streams, pause).await;
        }
    }
}
