//! What servers and networks do wrong, one real exchange each: what the reader gets, how often it was tried, how long it
//! took.

use std::time::{Duration, Instant};

use forkd_fs::index::ChunkId;
use forkd_fs::source::{Class, HttpError, SourceError};
use forkd_fs::store::{OpenError, PackLocation, PackSource, ReadError, Store};

mod support;
use support::server::{Fault, Server};
use support::{Fixture, http, noise, options};

type Opened = (Fixture, Server, std::sync::Arc<Store>, ChunkId);

/// A pack of two chunks on a server, opened, and the first chunk.
async fn opened() -> Opened {
    let fixture = Fixture::with(&[("memory.bin", noise(1, 100_000))]);
    let server = Server::start(fixture.bytes()).await;
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let file = store.index().file("memory.bin").unwrap();
    (fixture, server, store, ChunkId { file, chunk: 0 })
}

/// Faults that pass: the read succeeds, after this many requests.
#[tokio::test]
async fn passing_faults_are_retried() {
    use Fault::*;
    let cases: [(&str, Vec<Fault>, usize); 9] = [
        ("reset", vec![Reset], 2),
        ("stall", vec![Stall], 2),
        ("stall in mid-body, resumed", vec![StallHalfway], 2),
        ("short body", vec![ShortBody], 2),
        ("short length", vec![ShortLength], 2),
        ("500 then good", vec![Status(500, None)], 2),
        ("503 and 429", vec![Status(503, None), Status(429, Some(0)), Status(502, None)], 4),
        ("one of each", vec![Reset, ShortBody, Status(500, None)], 4),
        ("nothing", vec![Fine], 1),
    ];
    for (name, faults, requests) in cases {
        let (fixture, server, store, id) = opened().await;
        server.fail_next(faults);
        let started = Instant::now();
        let read = store.read(id.file, 0, 100_000).await;
        assert_eq!(read.unwrap_or_else(|e| panic!("{name}: {e:?}")), fixture.files["memory.bin"], "{name}");
        assert_eq!(server.request_count() - 1, requests, "{name}");
        assert!(started.elapsed() < Duration::from_millis(1200), "{name}: {:?}", started.elapsed());
        assert!(store.progress().retrying_since.is_none(), "{name}: all is well again");
    }
}

/// Faults that stay: the named error, at once when trying again is pointless, else at the deadline.
#[tokio::test]
async fn lasting_faults_end_in_their_error() {
    use Fault::*;
    type Expected = fn(&HttpError) -> bool;
    type Case = (&'static str, Fault, bool, Expected);
    let drip = Drip(Duration::from_millis(100));
    let cases: [Case; 15] = [
        ("drip", drip, true, |e| matches!(e, HttpError::TooSlow { .. })),
        ("no ranges", Whole, true, |e| matches!(e, HttpError::NoRanges { .. })),
        ("wrong range", WrongRange, true, |e| matches!(e, HttpError::WrongRange { .. })),
        ("no range", NoContentRange, true, |e| matches!(e, HttpError::WrongRange { .. })),
        ("gzip", Gzip, true, |e| matches!(e, HttpError::Encoded { .. })),
        ("401", Status(401, None), true, |e| matches!(e, HttpError::Denied { .. })),
        ("403", Status(403, None), true, |e| matches!(e, HttpError::Denied { .. })),
        ("404", Status(404, None), true, |e| matches!(e, HttpError::NotFound { .. })),
        ("412", Status(412, None), true, |e| matches!(e, HttpError::Replaced { .. })),
        ("416", Status(416, None), true, |e| matches!(e, HttpError::OutOfRange { .. })),
        ("418", Status(418, None), true, |e| matches!(e, HttpError::Status { status: 418, .. })),
        ("500", Status(500, None), false, |e| matches!(e, HttpError::Busy { status: 500, .. })),
        ("long body", LongBody, false, |e| matches!(e, HttpError::BodyLength { .. })),
        ("stall", Stall, false, |e| matches!(e, HttpError::Stalled { .. })),
        ("reset", Reset, false, |e| matches!(e, HttpError::Connect { .. })),
    ];
    // All packs first: building one holds up this thread, and with it servers and timeouts.
    let mut prepared = Vec::new();
    for case in cases {
        prepared.push((case, opened().await));
    }
    let run = |((name, fault, at_once, expected), (_fixture, server, store, id)): (Case, Opened)| async move {
        server.fail_always(fault);
        let started = Instant::now();
        let failed = store.chunk(id).await.expect_err(name);
        let took = started.elapsed();
        let ReadError::Source { source, .. } = &failed else { panic!("{name}: {failed:?}") };
        match (&**source, at_once) {
            (SourceError::Http(error), true) => {
                assert!(expected(error), "{name}: {error}");
                assert_eq!(server.request_count() - 1, 1, "{name}: not tried again");
            }
            (SourceError::Http(HttpError::Deadline { last, attempts, .. }), false) => {
                assert!(expected(last), "{name}: {last}");
                assert!(*attempts > 1 && took > Duration::from_millis(400), "{name}: {attempts} in {took:?}");
            }
            (error, _) => panic!("{name}: {error}"),
        }
        // The deadline of 1.5 s and one idle timeout more.
        assert!(took < Duration::from_millis(1800), "{name}: {took:?}");
        assert!(store.progress().retrying_since.is_none(), "{name}: given up is not retrying");
    };
    futures_util::future::join_all(prepared.into_iter().map(run)).await;
}

#[tokio::test]
async fn retry_after_is_honoured_within_the_deadline() {
    let (_fixture, server, store, id) = opened().await;
    server.fail_next([Fault::Status(503, Some(1))]);
    let started = Instant::now();
    store.chunk(id).await.unwrap();
    assert!(started.elapsed() >= Duration::from_secs(1));
    let (_fixture, server, store, id) = opened().await;
    server.fail_next([Fault::Status(503, Some(3600))]);
    let started = Instant::now();
    assert!(store.chunk(id).await.is_err());
    assert!(
        started.elapsed() < Duration::from_millis(500),
        "waiting an hour would pass the deadline: not waited for"
    );
}

#[tokio::test]
async fn a_flipped_byte_is_fetched_again_and_a_lasting_one_is_refused() {
    let (fixture, server, store, id) = opened().await;
    let offset = store.index().record(id).unwrap().offset as usize;
    server.flip(offset + 100, 1);
    assert_eq!(store.read(id.file, 0, 100_000).await.unwrap(), fixture.files["memory.bin"]);
    assert_eq!(server.request_count() - 1, 2);

    for class in [Class::Demand, Class::Prefetch] {
        let (fixture, server, store, id) = opened().await;
        server.flip(offset + 100, u32::MAX);
        let failed = match class {
            Class::Demand => store.chunk(id).await.map(drop),
            Class::Prefetch => store.fetch(&[vec![id]], class, &|_, _| panic!("handed over")).await,
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

fn is_replaced(error: &ReadError) -> bool {
    let ReadError::Source { source, .. } = error else { return false };
    matches!(**source, SourceError::Http(HttpError::Replaced { .. }))
}

#[tokio::test]
async fn a_replaced_object_is_noticed() {
    let other = Fixture::with(&[("memory.bin", noise(2, 100_000))]).bytes();
    // By If-Match; by a new ETag where If-Match is ignored; by its size where there is no strong ETag.
    let (_fixture, server, store, id) = opened().await;
    server.replace(other.clone(), Some("\"two\""));
    assert!(is_replaced(&store.chunk(id).await.unwrap_err()));
    assert_eq!(server.requests()[1].if_match.as_deref(), Some("\"one\""));

    let fixture = Fixture::with(&[("memory.bin", noise(1, 100_000))]);
    let server = Server::start(fixture.bytes()).await;
    server.replace(fixture.bytes(), Some("W/\"weak\""));
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    server.replace([&other[..], b"more"].concat(), Some("W/\"weak\""));
    let failed = store.chunk(id).await.unwrap_err();
    assert!(is_replaced(&failed), "{failed:?}");
    assert!(server.requests().iter().all(|request| request.if_match.is_none()), "a weak ETag pins nothing");
}

#[tokio::test]
async fn a_replaced_object_of_the_same_size_without_etag_fails_its_digest() {
    let fixture = Fixture::with(&[("memory.bin", noise(1, 100_000))]);
    let server = Server::start(fixture.bytes()).await;
    server.replace(fixture.bytes(), None);
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let file = store.index().file("memory.bin").unwrap();
    server.replace(noise(9, fixture.bytes().len()), None);
    assert!(matches!(store.chunk(ChunkId { file, chunk: 0 }).await, Err(ReadError::Corrupt { .. })));
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
    store.fetch(&[all], Class::Prefetch, &|_, _| ()).await.unwrap();
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
    server.fail_always(Fault::Whole);
    let failed = Store::open(location(server.url()), options()).await.unwrap_err();
    assert!(matches!(
        failed,
        OpenError::Source { source: SourceError::Http(HttpError::NoRanges { .. }), .. }
    ));
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
    server.fail_next([Fault::Redirect(server.url())]);
    assert!(http().get(&server.url(), 100).await.is_ok(), "redirects are followed");
    server.fail_always(Fault::Redirect(server.url()));
    let failed = http().get(&server.url(), 100).await.unwrap_err();
    assert!(matches!(failed, HttpError::Redirects { .. }), "but not for ever: {failed}");
    // Nobody speaks TLS there; that it is tried shows in the error of the handshake.
    server.fail_always(Fault::Redirect("https://127.0.0.1:1/x".into()));
    let failed = http().get(&server.url(), 100).await.unwrap_err();
    assert!(matches!(failed, HttpError::Deadline { last, .. } if matches!(*last, HttpError::Connect { .. })));
    assert!(matches!(http().get("file:///etc/passwd", 100).await, Err(HttpError::Url { .. })));
    let started = Instant::now();
    let failed = http().get("http://127.0.0.1:1/registry.json", 100).await.unwrap_err();
    assert!(matches!(failed, HttpError::Deadline { .. }) && started.elapsed() < Duration::from_secs(1));
}
