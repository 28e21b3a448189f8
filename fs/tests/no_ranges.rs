//! Hosts without byte ranges: the object is downloaded once, shared by all readers, and as well checked as any other.

use std::time::{Duration, Instant};

use forkd_fs::source::{
    HttpClient, HttpError, HttpOptions, HttpSource, Priority, ReadDeadlines, Source, SourceError,
};
use forkd_fs::store::{PackLocation, PackSource, ReadError, Store};
use forkd_fs::tree::of_read_error;
use rustix::io::Errno;

mod support;
use support::server::{Fault, Server};
use support::{Fixture, http, http_options, memory, noise, options, source};

async fn host(object: Vec<u8>) -> Server {
    let server = Server::start(object).await;
    server.fail_always(Fault::Whole);
    server
}

fn http_error(error: SourceError) -> HttpError {
    let SourceError::Http(error) = error else { panic!("{error:?}") };
    error
}

/// What a download that failed met.
fn met(error: SourceError) -> String {
    match http_error(error) {
        HttpError::Download { last, .. } => format!("{last:?}"),
        error => panic!("{error:?}"),
    }
}

#[tokio::test]
async fn a_pack_is_downloaded_once_for_all_its_readers_and_verified() {
    let fixture = Fixture::new();
    let server = host(fixture.bytes()).await;
    // Unpinned: size, end, index and members are all asked for.
    let location = PackLocation { source: PackSource::Url(server.url()), size: None, index: None };
    let store = Store::open(location, options()).await.unwrap();
    fixture.check_all(&store).await;
    assert_eq!(server.request_count(), 1);
    assert_eq!(store.progress().bytes_fetched, fixture.summary.pack_size);

    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let readers = (0..8).map(|_| fixture.check_all(&store));
    futures_util::future::join_all(readers).await;
    assert_eq!(server.request_count(), 2);

    let server = host(fixture.bytes()).await;
    // In the first member's frame.
    server.flip(200, u32::MAX);
    let store = Store::open(fixture.pinned(server.url()), options()).await.unwrap();
    let failed = store.manifest().await;
    assert!(matches!(failed, Err(ReadError::Corrupt { .. })), "{failed:?}");
}

#[tokio::test]
async fn ranges_are_handed_out_as_they_arrive() {
    let object = noise(1, 1 << 20);
    let server = host(object.clone()).await;
    server.set_bandwidth(1 << 20);
    let source = source(&http(), &server.url(), None);
    let started = Instant::now();
    assert_eq!(source.read_at(100_000, 100, Priority::Demand).await.unwrap(), object[100_000..100_100]);
    assert!(
        started.elapsed() < Duration::from_millis(600),
        "did not wait for the rest: {:?}",
        started.elapsed()
    );
    // Longer than the deadline would allow for a silent host; this one is not silent.
    let (last, middle) = tokio::join!(
        source.read_at((1 << 20) - 100, 100, Priority::Prefetch),
        source.read_at(500_000, 100_000, Priority::Demand),
    );
    assert_eq!(last.unwrap(), object[(1 << 20) - 100..]);
    assert_eq!(middle.unwrap(), object[500_000..600_000]);
    assert_eq!((server.request_count(), source.counters().bytes), (1, 1 << 20));
    assert!(
        http_error(source.read_at(1 << 20, 1, Priority::Demand).await.unwrap_err())
            .to_string()
            .contains("no bytes")
    );
}

#[tokio::test]
async fn a_broken_download_goes_on_and_a_replaced_object_is_noticed() {
    let object = noise(1, 300_000);
    let server = host(object.clone()).await;
    server.fail_next([100_000, 100_000, 250_000].map(Fault::WholeUpTo));
    server.fail_next([Fault::Reset, Fault::Status(503, None)]);
    let whole = source(&http(), &server.url(), None);
    assert_eq!(whole.read_at(0, 300_000, Priority::Demand).await.unwrap(), object);
    assert_eq!(server.request_count(), 6);
    assert!(whole.outage().is_none());

    // By its ETag, by its length, by its bytes.
    let mut same_length = object.clone();
    same_length[10] ^= 1;
    for (other, etag, word) in [
        (noise(2, 300_000), Some("\"two\""), "Replaced"),
        (noise(2, 299_999), None, "WrongLength"),
        (same_length, None, "Replaced"),
    ] {
        let server = host(object.clone()).await;
        server.replace(object.clone(), etag.map(|_| "\"one\""));
        server.fail_next([Fault::WholeUpTo(100_000)]);
        let source = source(&http(), &server.url(), None);
        source.read_at(0, 100, Priority::Demand).await.unwrap();
        server.replace(other, etag);
        let error = met(source.read_at(200_000, 100, Priority::Demand).await.unwrap_err());
        assert!(error.starts_with(word), "{error}");
        // What it is now may be what it was before the host erred: whoever reads knows by the digests.
        let before = server.request_count();
        source.read_at(200_000, 100, Priority::Demand).await.unwrap();
        assert!(server.request_count() > before, "the next reader starts afresh");
    }
}

#[tokio::test]
async fn a_download_gets_over_wrong_answers() {
    use Fault::{Chunked, Gzip, NoContentRange, Page, WholeUpTo};
    let object = noise(1, 300_000);
    let cut = WholeUpTo(100_000);
    for wrong in [
        vec![Page, Gzip, cut.clone(), Page],
        vec![cut, NoContentRange, Gzip],
        // What seemed to be the object is not held against it.
        vec![Chunked(noise(2, 3000))],
        vec![Chunked(noise(2, 400_000))],
    ] {
        let (server, requests) = (host(object.clone()).await, wrong.len() + 1);
        server.fail_next(wrong);
        let whole = source(&http(), &server.url(), Some(300_000));
        assert_eq!(whole.read_at(299_000, 1000, Priority::Demand).await.unwrap(), object[299_000..]);
        assert_eq!(whole.read_at(0, 300_000, Priority::Demand).await.unwrap(), object);
        assert_eq!(server.request_count(), requests);
    }
}

#[tokio::test]
async fn an_early_end_that_is_not_announced_keeps_what_came() {
    use Fault::{ChunkedUpTo, Stall, WholeUpTo};
    let object = noise(1, 300_000);
    // More of them than a download may break off in a row without getting further.
    let ends: Vec<_> = (1..=12).map(|n| ChunkedUpTo(n * 20_000)).collect();
    for first in [None, Some(WholeUpTo(10_000))] {
        let server = host(object.clone()).await;
        let faults: Vec<_> = first.into_iter().chain(ends.clone()).collect();
        let requests = faults.len() + 1;
        server.fail_next(faults);
        let whole = source(&http(), &server.url(), Some(300_000));
        assert_eq!(whole.read_at(299_000, 1000, Priority::Prefetch).await.unwrap(), object[299_000..]);
        assert_eq!(whole.read_at(0, 300_000, Priority::Demand).await.unwrap(), object);
        assert_eq!(server.request_count(), requests);
    }
    // What is new of such an answer is there for readers that come before the next one.
    let server = host(object.clone()).await;
    server.fail_next([WholeUpTo(100_000), ChunkedUpTo(200_000), Stall]);
    let whole = source(&http(), &server.url(), Some(300_000));
    whole.read_at(0, 100, Priority::Demand).await.unwrap();
    while server.request_count() < 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let started = Instant::now();
    assert_eq!(whole.read_at(150_000, 50_000, Priority::Demand).await.unwrap(), object[150_000..200_000]);
    assert!(started.elapsed() < Duration::from_millis(100), "{:?}", started.elapsed());
    assert_eq!(server.request_count(), 3);
    // One that never gets further is given up.
    server.fail_always(ChunkedUpTo(200_000));
    let error = met(whole.read_at(250_000, 100, Priority::Demand).await.unwrap_err());
    assert!(error.starts_with("WrongLength"), "{error}");
}

#[tokio::test]
async fn a_host_that_is_gone_fails_by_the_deadline_and_is_found_again() {
    let object = noise(1, 300_000);
    let mut server = host(object.clone()).await;
    server.fail_next([Fault::WholeUpTo(100_000)]);
    let source = source(&http(), &server.url(), None);
    source.read_at(0, 100_000, Priority::Demand).await.unwrap();
    server.stop().await;
    let started = Instant::now();
    let error = met(source.read_at(200_000, 100, Priority::Demand).await.unwrap_err());
    assert!(error.contains("Connect") || error.contains("Transfer"), "{error}");
    let waited = started.elapsed();
    assert!((200..2200).contains(&waited.as_millis()), "{waited:?}");
    source.read_at(0, 100_000, Priority::Demand).await.unwrap();
    // Until the download gives up as well, which the next read starts again.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    server.resume().await;
    assert_eq!(source.read_at(200_000, 100, Priority::Demand).await.unwrap(), object[200_000..200_100]);
}

#[tokio::test]
async fn a_host_that_never_gets_further_is_given_up() {
    let server = host(noise(1, 300_000)).await;
    server.fail_always(Fault::WholeUpTo(100_000));
    let source = source(&http(), &server.url(), None);
    let error = met(source.read_at(200_000, 100, Priority::Demand).await.unwrap_err());
    assert!(error.contains("BodyLength") || error.contains("Transfer"), "{error}");
    assert!((3..20).contains(&server.request_count()), "{}", server.request_count());
}

#[tokio::test]
async fn only_what_was_announced_is_downloaded() {
    let object = noise(1, 300_000);
    let options = |limit| HttpOptions { download_limit: limit, ..http_options() };
    let server = host(object.clone()).await;
    server.fail_always(Fault::WholeChunked);
    // Neither a registry nor the host says how long it is.
    let limited = source(&HttpClient::new(options(299_999)), &server.url(), None);
    let error = met(limited.read_at(0, 300_000, Priority::Demand).await.unwrap_err());
    assert!(error.starts_with("NoRanges"), "{error}");
    let enough = source(&HttpClient::new(options(300_000)), &server.url(), None);
    assert_eq!(enough.size().await.unwrap(), 300_000);
    assert_eq!(enough.read_at(299_000, 1000, Priority::Demand).await.unwrap(), object[299_000..]);
    // A registry does, and may be as hostile: the limit holds, and neither more nor less is taken.
    let known = source(&HttpClient::new(options(299_999)), &server.url(), Some(300_000));
    let error = met(known.read_at(0, 300_000, Priority::Demand).await.unwrap_err());
    assert!(error.starts_with("NoRanges"), "{error}");
    let known = source(&HttpClient::new(options(300_000)), &server.url(), Some(300_000));
    assert_eq!(known.read_at(0, 300_000, Priority::Demand).await.unwrap(), object);
    let shorter = source(&http(), &server.url(), Some(200_000));
    let error = met(shorter.read_at(150_000, 50_000, Priority::Demand).await.unwrap_err());
    assert!(error.starts_with("WrongLength"), "{error}");
    server.fail_always(Fault::Whole);
    let longer =
        source(&http(), &server.url(), Some(400_000)).read_at(0, 100, Priority::Demand).await.unwrap_err();
    let HttpError::Deadline { last, .. } = http_error(longer) else { panic!("not retried") };
    assert!(matches!(*last, HttpError::WrongLength { wanted: 400_000, got: 300_000, .. }), "{last}");
}

/// A disk of 256 KiB.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn mount() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut mount = std::process::Command::new("mount");
        let status = mount.args(["-t", "tmpfs", "-o", "size=256k", "none"]).arg(dir.path()).status().unwrap();
        assert!(status.success(), "this test mounts a small tmpfs, which root may");
        Self(dir)
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[tokio::test]
async fn a_full_disk_is_said_at_once_and_never_hangs() {
    let fixture = Fixture::with(&[("memory.bin", memory(20))]);
    let (object, disk) = (noise(1, 1 << 20), SmallDisk::mount());
    let dir = &disk.0;
    let small = HttpClient::new(HttpOptions { download_dir: Some(dir.path().to_owned()), ..http_options() });
    let server = host(object).await;
    let started = Instant::now();
    // Announced to be too long; and not announced, but found to be.
    for fault in [Fault::Whole, Fault::WholeChunked] {
        server.fail_always(fault);
        let source = source(&small, &server.url(), None);
        let error = match http_error(source.read_at(1 << 19, 10, Priority::Demand).await.unwrap_err()) {
            HttpError::Download { last, .. } => format!("{last}"),
            error => format!("{error}"),
        };
        assert!(error.contains("No space left") && error.contains(dir.path().to_str().unwrap()), "{error}");
    }
    assert!(started.elapsed() < Duration::from_secs(1));
    // The reader of a pack is told so by its errno.
    let server = host(fixture.bytes()).await;
    server.fail_always(Fault::Fine);
    let options = support::options();
    let store =
        Store::open(fixture.pinned(server.url()), forkd_fs::store::StoreOptions { http: small, ..options });
    let store = store.await.unwrap();
    server.fail_always(Fault::Whole);
    let file = store.index().file("memory.bin").unwrap();
    let failed = store.read(file, 0, (20 * support::CHUNK) as u64).await.unwrap_err();
    assert_eq!(of_read_error(&failed), Errno::NOSPC, "{failed}");
}

#[tokio::test]
async fn a_download_nobody_needs_any_more_ends() {
    let server = host(noise(1, 8 << 20)).await;
    server.set_bandwidth(1 << 20);
    let deadline = Duration::from_secs(1);
    let deadlines = ReadDeadlines { demand: deadline, prefetch: deadline };
    let whole = Source::Http(HttpSource::new(&http(), &server.url(), None, deadlines).unwrap());
    whole.read_at(0, 100, Priority::Demand).await.unwrap();
    drop(whole);
    tokio::time::sleep(Duration::from_millis(300)).await;
    let before = server.bytes_sent();
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(server.bytes_sent(), before, "the server sends on to nobody");
    assert!(before < 4 << 20, "{before}");
}
