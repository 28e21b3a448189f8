//! The store over HTTP and local files: how many requests things cost, who waits for whom, and that every byte is right.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::index::ChunkId;
use forkd_fs::prefetch;
use forkd_fs::source::Priority;
use forkd_fs::store::{ChunkData, OpenError, PackLocation, ReadError, Store, StoreOptions};
use forkd_fs::trace::{PageRun, RegionTrace, Trace};

mod support;
use support::server::{Fault, Request, Server};
use support::{CHUNK, Fixture, noise, options};

fn cached(dir: &std::path::Path) -> StoreOptions {
    let cache = ChunkCache::open(dir, CacheOptions::default());
    StoreOptions { cache: Some(Arc::new(cache)), ..options() }
}

fn flush(options: &StoreOptions) {
    options.cache.as_ref().unwrap().flush();
}

fn stored(store: &Store) -> Vec<ChunkId> {
    store.index().files().flat_map(|(file, _)| store.index().stored_chunks(file).map(|(id, _)| id)).collect()
}

/// Collects what `fetch` hands over.
#[derive(Default)]
struct Collected(Mutex<BTreeMap<ChunkId, ChunkData>>);

impl Collected {
    fn take(&self, id: ChunkId, data: ChunkData) {
        self.0.lock().unwrap().insert(id, data);
    }

    fn ids(&self) -> Vec<ChunkId> {
        self.0.lock().unwrap().keys().copied().collect()
    }

    fn check(&self, store: &Store, fixture: &Fixture) {
        for (id, data) in self.0.lock().unwrap().iter() {
            let plain = &fixture.files[&store.index().entry(id.file).unwrap().name];
            let start = id.chunk as usize * CHUNK;
            let expect = &plain[start..plain.len().min(start + CHUNK)];
            match data {
                ChunkData::Data(data) => assert!(data == expect, "{id:?}"),
                ChunkData::Zero => assert!(expect.iter().all(|&byte| byte == 0), "{id:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_pinned_pack_opens_with_one_request_and_with_none_when_cached() {
    let (fixture, dir) = (Fixture::new(), tempfile::tempdir().unwrap());
    let server = Server::start(fixture.bytes()).await;
    let options = cached(dir.path());
    let store = Store::open(fixture.pinned(server.url()), options.clone()).await.unwrap();
    assert_eq!((server.request_count(), store.progress().requests), (1, 1));
    assert_eq!(server.requests()[0].accept_encoding.as_deref(), Some("identity"));
    assert_eq!(store.index_pin(), fixture.summary.index);
    flush(&options);
    let again = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    assert_eq!((server.request_count(), again.progress().requests), (1, 0));
    fixture.check_all(&again).await;
}

#[tokio::test]
async fn an_unpinned_pack_opens_with_three_requests_at_most() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let location = PackLocation { index: None, size: None, ..fixture.pinned(server.url()) };
    let store = Store::open(location, options()).await.unwrap();
    assert!(server.request_count() <= 3, "{:?}", server.requests());
    assert_eq!(store.index_pin(), fixture.summary.index);
    fixture.check_all(&store).await;
    assert!(server.requests()[1..].iter().all(|request| request.if_match.as_deref() == Some("\"one\"")));
}

#[tokio::test]
async fn an_index_longer_than_the_tail_is_found() {
    // 8000 noisy chunks would be large; many tiny non-zero ones make the index long instead.
    let mut sparse = vec![0; 6000 * CHUNK];
    (0..6000).for_each(|chunk| sparse[chunk * CHUNK] = 1);
    let fixture = Fixture::with(&[("memory.bin", sparse)]);
    assert!(fixture.summary.index.length > 256 << 10);
    let server = Server::start(fixture.bytes()).await;
    let location = PackLocation { index: None, size: None, ..fixture.pinned(server.url()) };
    let store = Store::open(location, options()).await.unwrap();
    assert_eq!((server.request_count(), store.index_pin()), (3, fixture.summary.index));
}

#[tokio::test]
async fn the_head_comes_along_with_the_index() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let options = StoreOptions { head_bytes: 64 << 10, ..options() };
    let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    let names = ["manifest.toml", "snapshot.json", "vmstate", "trace"];
    let files = store.read_files(&names, 1 << 20).await.unwrap();
    for (name, plain) in names.iter().zip(&files) {
        assert_eq!(plain, &fixture.files[*name], "{name}");
    }
    assert_eq!(server.request_count(), 2, "index and head, nothing more");
    fixture.check_all(&store).await;
}

#[tokio::test]
async fn the_head_is_read_while_it_arrives_and_asked_for_once() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let head_bytes = fixture.bytes().len() as u64 / 2;
    let options = StoreOptions { head_bytes, ..options() };
    server.set_bandwidth(head_bytes);
    let began = Instant::now();
    let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    store.read_files(&["snapshot.json", "vmstate", "trace"], 1 << 20).await.unwrap();
    assert!(began.elapsed() < Duration::from_millis(500), "{:?}", began.elapsed());
    assert_eq!(server.request_count(), 2, "index and head");
    server.set_bandwidth(1 << 30);
    fixture.check_all(&store).await;
    // But for the frame across the head's end.
    let end = head_bytes as usize - CHUNK;
    let overlapping = |request: &&Request| request.range.as_ref().is_some_and(|range| range.start < end);
    assert_eq!(server.requests().iter().filter(overlapping).count(), 1, "{:?}", server.requests());
}

#[tokio::test]
async fn a_damaged_head_is_not_believed() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    server.flip(3000, 1);
    let options = StoreOptions { head_bytes: 64 << 10, ..options() };
    let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    fixture.check_all(&store).await;
}

#[tokio::test]
async fn small_members_share_one_request() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    store.read_files(&["vmstate", "manifest.toml", "snapshot.json", "trace"], 1 << 20).await.unwrap();
    assert_eq!(server.request_count(), 2);
    assert!(matches!(store.read_files(&["nope"], 9).await, Err(ReadError::NoSuchFile { .. })));
    assert!(matches!(store.read_files(&["vmstate"], 9).await, Err(ReadError::TooLarge { .. })));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_readers_of_a_chunk_make_one_request() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    // Nothing is kept: whoever came too late for the flight would have to ask again.
    let options = StoreOptions { decoded_bytes: 0, ..options() };
    let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    server.set_latency(Duration::from_millis(100));
    let id = stored(&store)[5];
    let readers: Vec<_> = (0..50)
        .map(|_| {
            tokio::spawn({
                let store = store.clone();
                async move { store.chunk(id).await }
            })
        })
        .collect();
    for reader in readers {
        assert!(matches!(reader.await.unwrap().unwrap(), ChunkData::Data(_)));
    }
    assert_eq!(server.request_count(), 2);
}

#[tokio::test]
async fn reads_cross_chunks_in_one_request_and_zeros_cost_none() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let memory = store.index().file("memory.bin").unwrap();
    let plain = &fixture.files["memory.bin"];
    assert!(store.read(memory, 0, 2 * CHUNK as u64).await.unwrap().iter().all(|&byte| byte == 0));
    assert_eq!(store.chunk(ChunkId { file: memory, chunk: 0 }).await.unwrap(), ChunkData::Zero);
    assert_eq!(server.request_count(), 1, "only the index");
    let (from, to) = (2 * CHUNK - 10, 5 * CHUNK + 10);
    assert_eq!(store.read(memory, from as u64, (to - from) as u64).await.unwrap(), &plain[from..to]);
    assert_eq!(server.request_count(), 2, "three chunks together");
    store.read(memory, 3 * CHUNK as u64, 1).await.unwrap();
    assert_eq!(server.request_count(), 2, "kept in memory");
}

#[tokio::test]
async fn odd_reads_are_clipped_or_refused() {
    let fixture = Fixture::new();
    let store = Store::open(fixture.local(), options()).await.unwrap();
    let memory = store.index().file("memory.bin").unwrap();
    let size = fixture.files["memory.bin"].len() as u64;
    for (offset, len, expect) in
        [(0, 0, 0), (size, 1, 0), (size - 1, 100, 1), (u64::MAX, u64::MAX, 0), (size + 5, 0, 0)]
    {
        assert_eq!(store.read(memory, offset, len).await.unwrap().len(), expect, "{offset}+{len}");
    }
    let empty = store.index().file("trace").unwrap();
    assert!(store.read(empty, 0, 10).await.unwrap().is_empty());
    for (file, chunk) in [(memory, 41), (memory, u32::MAX), (empty, 0)] {
        let failed = store.chunk(ChunkId { file, chunk }).await;
        assert!(matches!(failed, Err(ReadError::NoSuchChunk { .. })), "{chunk}");
    }
}

#[tokio::test]
async fn random_reads_equal_the_original() {
    let (fixture, dir) = (Fixture::new(), tempfile::tempdir().unwrap());
    let server = Server::start(fixture.bytes()).await;
    let options = StoreOptions { decoded_bytes: 3 * CHUNK, ..cached(dir.path()) };
    let store = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    let mut rng = fastrand::Rng::with_seed(7);
    for (file, entry) in store.index().files() {
        let plain = &fixture.files[&entry.name];
        for _ in 0..100 {
            let offset = rng.usize(0..=plain.len());
            let end = plain.len().min(offset + rng.usize(0..4 * CHUNK));
            let read = store.read(file, offset as u64, (end - offset) as u64).await.unwrap();
            assert!(read == plain[offset..end], "{} {offset}..{end}", entry.name);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bulk_read_begins_with_two_requests() {
    const LATENCY: Duration = Duration::from_millis(150);
    let fixture = Fixture::with(&[("memory.bin", noise(1, 300 * CHUNK))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.set_latency(LATENCY);
    let all = stored(&store);
    let reading = tokio::spawn({
        let store = store.clone();
        async move { store.fetch(&[all], Priority::WorkingSet, &|_, _| {}).await }
    });
    tokio::time::sleep(LATENCY / 2).await;
    assert_eq!(server.request_count(), 1 + 2, "what was asked for first has the link");
    reading.await.unwrap().unwrap();
    assert_eq!(server.request_count(), 1 + 10, "2 MiB at a time");
}

#[tokio::test]
async fn fetching_everything_takes_few_requests_and_hands_over_each_chunk() {
    let (fixture, dir) = (Fixture::new(), tempfile::tempdir().unwrap());
    let server = Server::start(fixture.bytes()).await;
    let options = cached(dir.path());
    let store = Store::open(fixture.pinned(server.url()), options.clone()).await.unwrap();
    let (all, collected) = (stored(&store), Collected::default());
    store
        .fetch(std::slice::from_ref(&all), Priority::Prefetch, &|id, data| collected.take(id, data))
        .await
        .unwrap();
    assert_eq!(collected.ids(), all);
    collected.check(&store, &fixture);
    assert_eq!(server.request_count(), 2, "a small pack is one run");
    let progress = store.progress();
    assert_eq!((progress.chunks_fetched, progress.chunks_total), (all.len() as u32, all.len() as u32));
    assert!(progress.bytes_fetched <= progress.bytes_total && progress.retrying_since.is_none());
    assert!(all.iter().all(|&id| store.is_fetched(id)));

    flush(&options);
    let offline = Store::open(fixture.pinned(server.url()), options).await.unwrap();
    drop(server);
    let again = Collected::default();
    offline
        .fetch(std::slice::from_ref(&all), Priority::Prefetch, &|id, data| again.take(id, data))
        .await
        .unwrap();
    assert_eq!(again.ids(), all);
    again.check(&offline, &fixture);
    fixture.check_all(&offline).await;
    assert_eq!(offline.progress().requests, 0, "complete packs work offline");
}

#[tokio::test]
async fn fetching_hands_over_zeros_and_what_lies_between() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let file = store.index().file("memory.bin").unwrap();
    let chunk = |chunk| ChunkId { file, chunk };
    let collected = Collected::default();
    let batches = [vec![chunk(0), chunk(2)], vec![chunk(4), chunk(2)]];
    store.fetch(&batches, Priority::Prefetch, &|id, data| collected.take(id, data)).await.unwrap();
    assert_eq!(collected.ids(), [chunk(0), chunk(2), chunk(4)]);
    let between = Collected::default();
    store
        .fetch(&[vec![chunk(7), chunk(9)]], Priority::Prefetch, &|id, data| between.take(id, data))
        .await
        .unwrap();
    assert_eq!(between.ids(), [chunk(7), chunk(8), chunk(9)], "8 came along");
    between.check(&store, &fixture);
    let nothing =
        store.fetch(&[vec![], vec![]], Priority::Demand, &|_, _| panic!("nothing was asked for")).await;
    nothing.unwrap();
    let beyond = store.fetch(&[vec![chunk(99)]], Priority::Prefetch, &|_, _| ()).await;
    assert!(matches!(beyond, Err(ReadError::NoSuchChunk { .. })));
}

#[tokio::test]
async fn runs_are_cut_at_two_mebibytes() {
    let fixture = Fixture::with(&[("memory.bin", noise(1, 5 << 20))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let collected = Collected::default();
    store.fetch(&[stored(&store)], Priority::Prefetch, &|id, data| collected.take(id, data)).await.unwrap();
    collected.check(&store, &fixture);
    let longest = server.requests().iter().map(|request| request.range.clone().unwrap().len()).max().unwrap();
    assert!(longest <= 2 << 20 && server.request_count() <= 1 + 4, "{:?}", server.requests());
}

#[tokio::test]
async fn a_trace_is_fetched_bucket_by_bucket() {
    let fixture = Fixture::with(&[("memory.bin", noise(1, 100 * CHUNK))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let pages = (CHUNK / 4096) as u32;
    let run = |chunk: u32| PageRun { first_page: chunk * pages + 3, pages: 2 };
    let buckets = vec![vec![run(90), run(91)], vec![run(10)]];
    let trace = Trace { regions: vec![RegionTrace { file: "memory.bin".into(), buckets }] };
    let plan = prefetch::plan(store.index(), &trace);
    let order = Mutex::new(Vec::new());
    store.fetch(&plan, Priority::Demand, &|id, _| order.lock().unwrap().push(id.chunk)).await.unwrap();
    let mut order = order.into_inner().unwrap();
    order.sort();
    assert_eq!(order, [10, 90, 91]);
    assert_eq!(
        server.requests()[1].range.as_ref().unwrap().len() / CHUNK,
        2,
        "the first bucket first, in one request"
    );
    assert_eq!(prefetch::remaining(store.index(), &plan).len(), 101 - 3);
}

#[tokio::test]
async fn demand_joins_a_prefetch_under_way() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.set_latency(Duration::from_millis(50));
    let all = stored(&store);
    let prefetch = store.fetch(std::slice::from_ref(&all), Priority::Prefetch, &|_, _| ());
    let demand = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        store.chunk(all[9]).await
    };
    let (prefetched, demanded) = tokio::join!(prefetch, demand);
    prefetched.unwrap();
    demanded.unwrap();
    assert_eq!(server.request_count(), 2, "index and one run");
}

#[tokio::test]
async fn demand_overtakes_a_prefetch_that_hangs() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.fail_next([Fault::Stall]);
    let all = stored(&store);
    let prefetch = store.fetch(std::slice::from_ref(&all), Priority::Prefetch, &|_, _| ());
    let demand = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let (one, two) = tokio::join!(store.chunk(all[9]), store.chunk(all[9]));
        one.and(two).unwrap();
    };
    let (prefetched, ()) = tokio::join!(prefetch, demand);
    prefetched.unwrap();
    assert_eq!(server.request_count(), 4, "index, the run twice, the overtaking chunk once");
}

#[tokio::test]
async fn a_prefetch_takes_what_demand_is_fetching_from_it() {
    let fixture = Fixture::with(&[("memory.bin", noise(3, 8 * CHUNK))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.set_latency(Duration::from_millis(60));
    let all = stored(&store);
    // A gap too wide to read across.
    let demand = store.read(all[1].file, 3 * CHUNK as u64, 3 * CHUNK as u64);
    let prefetch = async {
        tokio::time::sleep(Duration::from_millis(20)).await;
        let collected = Collected::default();
        store
            .fetch(std::slice::from_ref(&all), Priority::Prefetch, &|id, data| collected.take(id, data))
            .await
            .unwrap();
        assert_eq!(collected.ids(), all);
        collected.check(&store, &fixture);
    };
    let (demanded, ()) = tokio::join!(demand, prefetch);
    demanded.unwrap();
    let twice =
        server.requests()[1..].iter().map(|request| request.range.clone().unwrap().len()).sum::<usize>();
    assert!(twice as u64 <= fixture.summary.pack_size, "no frame came twice");
}

#[tokio::test]
async fn a_fetch_given_up_leaves_nothing_behind() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.fail_next([Fault::StallHalfway]);
    let all = stored(&store);
    let fetch = store.fetch(std::slice::from_ref(&all), Priority::Prefetch, &|_, _| ());
    assert!(tokio::time::timeout(Duration::from_millis(50), fetch).await.is_err());
    for &id in &all {
        store.chunk(id).await.unwrap();
    }
    assert!(store.progress().retrying_since.is_none());
}

#[tokio::test]
async fn two_stores_share_one_cache_and_damage_is_fetched_again() {
    let (fixture, dir) = (Fixture::new(), tempfile::tempdir().unwrap());
    let server = Server::start(fixture.bytes()).await;
    let (mine, yours) = (cached(dir.path()), cached(dir.path()));
    let one = Store::open(fixture.pinned(server.url()), mine.clone()).await.unwrap();
    let two = Store::open(fixture.pinned(server.url()), yours).await.unwrap();
    fixture.check_all(&one).await;
    flush(&mine);
    let before = server.request_count();
    fixture.check_all(&two).await;
    assert_eq!((server.request_count(), two.progress().requests), (before, 1), "all from the shared cache");

    let mut entries: Vec<_> = Vec::new();
    for folder in std::fs::read_dir(dir.path().join("chunks")).unwrap().map(|folder| folder.unwrap().path()) {
        entries.extend(std::fs::read_dir(folder).into_iter().flatten().map(|entry| entry.unwrap().path()));
    }
    assert!(entries.len() > 20, "equal chunks share an entry, but {}", entries.len());
    for (number, entry) in entries.iter().enumerate() {
        match number % 3 {
            0 => std::fs::write(entry, b"damaged").unwrap(),
            1 => std::fs::File::options().write(true).open(entry).unwrap().set_len(0).unwrap(),
            _ => {}
        }
    }
    let three = Store::open(fixture.pinned(server.url()), cached(dir.path())).await.unwrap();
    fixture.check_all(&three).await;
    assert!(server.request_count() > before, "damaged entries were fetched again");
}

#[tokio::test]
async fn packs_cut_short_and_other_things_are_told_apart() {
    let fixture = Fixture::new();
    let bytes = fixture.bytes();
    let open = async |contents: &[u8]| {
        let path = fixture.dir.path().join("other");
        std::fs::write(&path, contents).unwrap();
        let location = PackLocation { source: forkd_fs::store::PackSource::Path(path), ..fixture.local() };
        Store::open(location, options()).await.expect_err("not a whole pack")
    };
    for cut in [1, 9, 100, bytes.len() / 2] {
        let failed = open(&bytes[..bytes.len() - cut]).await;
        assert!(matches!(failed, OpenError::Truncated { .. }), "{cut}: {failed}");
    }
    assert!(matches!(open(b"").await, OpenError::NotAPack { .. }));
    assert!(matches!(open(b"hello").await, OpenError::NotAPack { .. }));
    assert!(matches!(open(&noise(1, 1 << 20)).await, OpenError::NotAPack { .. }));
    let longer = [&bytes[..], b"x"].concat();
    assert!(matches!(open(&longer).await, OpenError::Truncated { .. }));
    let missing =
        PackLocation { source: forkd_fs::store::PackSource::Path("/no/such/pack".into()), ..fixture.local() };
    assert!(matches!(Store::open(missing, options()).await, Err(OpenError::Source { .. })));
}

#[tokio::test]
async fn an_index_that_is_not_the_pinned_one_is_refused() {
    let fixture = Fixture::new();
    let server = Server::start(fixture.bytes()).await;
    server.flip(fixture.summary.index.offset as usize + 60, u32::MAX);
    let failed = Store::open(fixture.pinned(server.url()), options()).await.unwrap_err();
    assert!(matches!(failed, OpenError::IndexDigest { .. }), "{failed}");
    assert_eq!(server.request_count(), 2, "tried twice");

    let pin = |offset, length| {
        let mut location = fixture.pinned(server.url());
        let index = location.index.as_mut().unwrap();
        (index.offset, index.length) = (offset, length);
        location
    };
    for (offset, length) in [(0, 1 << 40), (u64::MAX, 1), (fixture.summary.pack_size, 1)] {
        assert!(Store::open(pin(offset, length), options()).await.is_err(), "{offset}+{length}");
    }
    assert_eq!(server.request_count(), 2, "refused without asking");
}
