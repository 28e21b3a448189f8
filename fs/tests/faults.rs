//! What readers and documents make of faults beyond the single exchanges of `fault_matrix`.

use std::time::{Duration, Instant};

use forkd_fs::index::ChunkId;
use forkd_fs::source::{HttpError, Priority, SourceError};
use forkd_fs::store::{OpenError, PackLocation, PackSource, ReadError, Store, StoreOptions};

mod support;
use support::server::{Fault, Server};
use support::{CHUNK, Fixture, http, noise, options, source};

type OpenedFile = (Fixture, Server, std::sync::Arc<Store>, ChunkId);

/// A pack of two chunks on a server, opened, and the first chunk.
async fn opened() -> OpenedFile {
    let fixture = Fixture::with(&[("memory.bin", noise(1, 100_000))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let file = store.index().file("memory.bin").unwrap();
    (fixture, server, store, ChunkId { file, chunk: 0 })
}

#[tokio::test]
async fn a_lasting_flipped_byte_is_named_and_its_neighbours_are_not_affected() {
    for priority in [Priority::Demand, Priority::WorkingSet, Priority::Prefetch] {
        let (fixture, server, store, id) = opened().await;
        server.flip(store.index().record(id).unwrap().offset as usize + 100, u32::MAX);
        let failed = match priority {
            Priority::Demand => store.chunk(id).await.map(drop),
            Priority::WorkingSet | Priority::Prefetch => {
                store.fetch(&[vec![id]], priority, &|_, _| panic!("handed over")).await
            }
        };
        let Err(ReadError::Corrupt { file, chunk, expected, found, location }) = failed else {
            panic!("{failed:?}")
        };
        assert_eq!((file.as_str(), chunk, location), ("memory.bin", 0, server.url()));
        assert!(expected == store.index().record(id).unwrap().digest && expected != found);
        assert!(!store.is_fetched(id));
        // The chunk beside it is not affected.
        let rest = store.read(id.file, 70_000, 30_000).await.unwrap();
        assert_eq!(rest, fixture.files["memory.bin"][70_000..]);
    }
}

#[tokio::test]
async fn one_bad_chunk_of_a_read_does_not_spoil_its_neighbours() {
    let (_fixture, server, store, id) = opened().await;
    server.flip(store.index().record(id).unwrap().offset as usize, u32::MAX);
    assert!(matches!(store.read(id.file, 0, 100_000).await, Err(ReadError::Corrupt { chunk: 0, .. })));
    let before = server.request_count();
    store.chunk(ChunkId { chunk: 1, ..id }).await.unwrap();
    assert_eq!(server.request_count(), before, "it came in the same request and was kept");
}

#[tokio::test]
async fn a_strong_etag_is_pinned_and_a_weak_one_is_not() {
    let (_fixture, server, store, id) = opened().await;
    store.chunk(id).await.unwrap();
    assert_eq!(server.requests()[1].if_match.as_deref(), Some("\"one\""));

    let fixture = Fixture::with(&[("memory.bin", noise(1, 100_000))]);
    let server = Server::start(fixture.bytes()).await;
    server.replace(fixture.bytes(), Some("W/\"weak\""));
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    store.chunk(id).await.unwrap();
    assert!(server.requests().iter().all(|request| request.if_match.is_none()));
}

#[tokio::test]
async fn a_server_that_comes_back_is_found_again_and_the_stall_is_visible() {
    let (fixture, mut server, store, id) = opened().await;
    server.stop().await;
    let reading = tokio::spawn({
        let store = store.clone();
        async move { store.read(id.file, 0, 100_000).await }
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    let progress = store.progress();
    let since = progress.retrying_since.expect("the stall shows");
    assert!(since.elapsed() >= Duration::from_millis(200), "{since:?}");
    assert!(progress.last_error.unwrap().contains("refused"));
    server.resume().await;
    assert_eq!(reading.await.unwrap().unwrap(), fixture.files["memory.bin"]);
    assert!(store.progress().retrying_since.is_none());
}

#[tokio::test]
async fn a_fetch_goes_on_where_it_broke_off() {
    let fixture = Fixture::with(&[("memory.bin", noise(1, 1 << 20))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.fail_next([Fault::ShortBody, Fault::ShortBody]);
    let all: Vec<_> = store
        .index()
        .files()
        .flat_map(|(file, _)| store.index().stored_chunks(file).map(|(id, _)| id))
        .collect();
    store.fetch(&[all], Priority::Prefetch, &|_, _| ()).await.unwrap();
    let starts: Vec<_> =
        server.requests()[1..].iter().map(|request| request.range.clone().unwrap().start).collect();
    assert!(starts.len() == 3 && starts.is_sorted(), "each attempt asked for the rest only: {starts:?}");
    assert!(store.progress().bytes_fetched < fixture.summary.pack_size + 20_000);
    fixture.check_all(&store).await;
}

#[tokio::test]
async fn opening_meets_the_same_faults() {
    let fixture = Fixture::new();
    let location = |url| PackLocation { source: PackSource::Url(url), size: None, index: None };
    let server = Server::start(fixture.bytes()).await;
    server.fail_next([Fault::Status(500, None), Fault::Reset]);
    Store::open(location(server.url()), options()).await.unwrap();
    let wrong_size = PackLocation { size: Some(12), ..location(Server::start(fixture.bytes()).await.url()) };
    assert!(Store::open(wrong_size, options()).await.is_err());
    assert!(matches!(
        Store::open(location("ftp://x/y".into()), options()).await,
        Err(OpenError::Source { .. })
    ));
    let nobody = location("http://127.0.0.1:1/x".into());
    let failed = Store::open(nobody, options()).await.unwrap_err();
    assert!(matches!(
        failed,
        OpenError::Source { source: SourceError::Http(HttpError::Deadline { .. }), .. }
    ));
}

#[tokio::test]
async fn documents_are_fetched_whole_and_bounded() {
    let server = Server::start(b"{\"schema_version\":1}".to_vec()).await;
    server.fail_next([Fault::Status(503, None), Fault::Reset]);
    assert_eq!(http().get(&server.url(), 100).await.unwrap(), "{\"schema_version\":1}");
    assert!(matches!(http().get(&server.url(), 10).await, Err(HttpError::TooLong { limit: 10, .. })));
    server.fail_next([Fault::Status(404, None)]);
    assert!(matches!(http().get(&server.url(), 100).await, Err(HttpError::NotFound { .. })));
    // What is not the document is asked for again; a page that says why there is none may be compressed.
    server.fail_next([Fault::Gzip, Fault::NoContentRange]);
    assert_eq!(http().get(&server.url(), 100).await.unwrap(), "{\"schema_version\":1}");
    server.fail_always(Fault::Gzip);
    let failed = http().get(&server.url(), 100).await.unwrap_err();
    assert!(
        matches!(&failed, HttpError::Deadline { last, .. } if matches!(**last, HttpError::Encoded { .. })),
        "{failed}"
    );
    // Nobody speaks TLS there; that it is tried shows in the error of the handshake.
    server.fail_always(Fault::Redirect("https://127.0.0.1:1/x".into()));
    let failed = http().get(&server.url(), 100).await.unwrap_err();
    assert!(matches!(failed, HttpError::Deadline { last, .. } if matches!(*last, HttpError::Connect { .. })));
    assert!(matches!(http().get("file:///etc/passwd", 100).await, Err(HttpError::Url { .. })));
    let started = Instant::now();
    let failed = http().get("http://127.0.0.1:1/registry.json", 100).await.unwrap_err();
    assert!(matches!(failed, HttpError::Deadline { .. }) && started.elapsed() < Duration::from_secs(1));
}

/// Every answer that is not one to what was asked.
const WRONG: [Fault; 6] = [
    Fault::WrongRange,
    Fault::NoContentRange,
    Fault::Multipart,
    Fault::Gzip,
    Fault::ShortLength,
    Fault::Page,
];

#[tokio::test]
async fn an_opening_whose_every_first_answer_is_wrong_succeeds() {
    let fixture = Fixture::new();
    let pinned = |url| fixture.pinned(url);
    // Of an unpinned pack not even the size is known to tell a page by.
    let unpinned = |url| PackLocation { source: PackSource::Url(url), size: None, index: None };
    let locations: [(&dyn Fn(String) -> PackLocation, usize); 2] = [(&pinned, 6), (&unpinned, 5)];
    for (location, kinds) in locations {
        for wrong in &WRONG[..kinds] {
            let server = Server::start(fixture.bytes()).await;
            server.fail_next([wrong.clone(), wrong.clone()]);
            let options = StoreOptions { head_bytes: 100_000, ..options() };
            let store = Store::open(location(server.url()), options).await;
            let store = store.unwrap_or_else(|error| panic!("{wrong:?}: {error:?}"));
            fixture.check_all(&store).await;
        }
    }
}

#[tokio::test]
async fn wrong_answers_teach_nothing_and_take_nothing_away() {
    let (_fixture, server, store, id) = opened().await;
    for wrong in WRONG.into_iter().chain([Fault::OtherSize]) {
        server.fail_next([wrong]);
        store.chunk(id).await.unwrap();
        store.release_memory();
    }
    let asked = server.requests();
    assert_eq!(asked.len(), 1 + 7 * 2);
    assert!(asked[1..].iter().all(|asked| asked.if_match.as_deref() == Some("\"one\"")));
    // The object that was opened is still the one that is waited for.
    server.replace(noise(9, 200_000), Some("\"two\""));
    server.fail_next([Fault::WrongRange, Fault::Gzip]);
    let failed = store.chunk(ChunkId { chunk: 1, ..id }).await.unwrap_err();
    assert!(
        matches!(&failed, ReadError::Source { source, .. }
        if matches!(**source, SourceError::Http(HttpError::Replaced { .. }))),
        "{failed:?}"
    );
}

#[tokio::test]
async fn a_host_that_has_sent_ranges_is_asked_for_ranges_ever_after() {
    let object = noise(1, 5000);
    let server = Server::start(object.clone()).await;
    let source = source(&http(), &server.url(), Some(5000));
    assert_eq!(source.read_at(0, 100, Priority::Demand).await.unwrap(), object[..100]);
    server.fail_next([Fault::WrongRange, Fault::Chunked(noise(2, 300)), Fault::WholeChunked]);
    assert_eq!(source.read_at(100, 100, Priority::Demand).await.unwrap(), object[100..200]);
    assert_eq!(source.read_at(200, 100, Priority::Demand).await.unwrap(), object[200..300]);
    let asked = server.requests();
    assert!(asked.len() == 6 && asked.iter().all(|asked| asked.range.is_some()), "{asked:?}");
    assert_eq!(source.counters().bytes, 300, "nothing was downloaded whole");
}

#[tokio::test]
async fn reads_of_every_class_get_over_wrong_answers() {
    let memory = noise(1, 300 * CHUNK);
    let fixture = Fixture::with(&[("memory.bin", memory)]);
    for priority in [Priority::Demand, Priority::WorkingSet, Priority::Prefetch] {
        for wrong in &WRONG {
            let server = Server::start(fixture.bytes()).await;
            let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
            server.fail_every_fifth(wrong.clone());
            let file = store.index().file("memory.bin").unwrap();
            let all = store.index().stored_chunks(file).map(|(id, _)| id).collect();
            let fetched = store.fetch(&[all], priority, &|_, _| ()).await;
            fetched.unwrap_or_else(|error| panic!("{priority:?} {wrong:?}: {error:?}"));
            assert_eq!(store.progress().chunks_fetched, 300);
            assert!(server.request_count() > 10 && store.progress().retrying_since.is_none());
        }
    }
}

#[tokio::test]
async fn what_is_asked_again_is_asked_over_another_connection() {
    // So short that a connection is fit for the next request whether anybody has read the answer or not.
    let object = noise(1, 5000);
    let server = Server::start(object.clone()).await;
    let source = source(&http(), &server.url(), Some(5000));
    for at in 0..10 {
        server.fail_next([Fault::BadConnection]);
        let bytes = source.read_at(at * 100, 100, Priority::Demand).await.unwrap();
        assert_eq!(bytes, object[at as usize * 100..][..100]);
    }
    assert_eq!(server.request_count(), 20, "one that is kept answers wrongly for ever");
}

#[tokio::test]
async fn one_wrong_answer_costs_one_connection() {
    let object = noise(1, 4 << 20);
    let server = Server::start(object.clone()).await;
    server.set_bandwidth(10 << 20);
    let source = source(&http(), &server.url(), Some(4 << 20));
    // Beside a demand read, prefetch asks for little at a time: one body takes many requests.
    let mut beside = source.stream_at(0, 1 << 20, Priority::Prefetch);
    beside.next().await.unwrap();
    source.read_at(0, 100, Priority::Demand).await.unwrap();
    while beside.next().await.unwrap().is_some() {}
    let (requests, connections) = (server.request_count(), server.connection_count());
    server.fail_next([Fault::WrongRange]);
    let mut body = source.stream_at(0, 4 << 20, Priority::Prefetch);
    let mut got = Vec::new();
    while let Some(piece) = body.next().await.unwrap() {
        got.extend_from_slice(&piece);
    }
    assert_eq!(got, object);
    let (requests, opened) = (server.request_count() - requests, server.connection_count() - connections);
    // One for the question that was repeated, and one after it.
    assert!(requests > 4 && opened <= 2, "{opened} connections for {requests} requests");
}

#[tokio::test]
async fn bytes_beyond_the_end_are_asked_for_once() {
    let server = Server::start(noise(1, 5000)).await;
    server.fail_always(Fault::UpToTheEnd);
    let source = source(&http(), &server.url(), None);
    let error = source.read_at(4000, 2000, Priority::Demand).await.unwrap_err();
    assert!(matches!(error, SourceError::Http(HttpError::OutOfRange { .. })), "{error:?}");
    assert_eq!(server.request_count(), 1);
}

#[tokio::test]
async fn a_host_that_keeps_answering_wrongly_is_said_to() {
    let server = Server::start(noise(1, 5000)).await;
    for (fault, says) in [
        (Fault::WrongRange, "sent the range \"bytes 11-20/5000\" when asked for bytes 10-19"),
        (Fault::NoContentRange, "sent a range without saying which when asked for bytes 10-19"),
        (Fault::Multipart, "sent several ranges when asked for bytes 10-19"),
        (Fault::Gzip, "sent its answer gzip-encoded although that was not accepted"),
        (Fault::Page, "answered for an object of 28 bytes instead of 5000"),
    ] {
        server.fail_always(fault);
        let source = source(&http(), &server.url(), Some(5000));
        let SourceError::Http(HttpError::Deadline { url, attempts, waited, last }) =
            source.read_at(10, 10, Priority::Demand).await.unwrap_err()
        else {
            panic!("{says}")
        };
        assert_eq!((url, last.to_string()), (server.url(), format!("{} {says}", server.url())));
        assert!(attempts > 2 && waited < Duration::from_millis(1500), "{attempts} in {waited:?}");
    }
}
