//! The fault matrix: what servers and networks do wrong, one real exchange each, and what the reader gets: the errno of
//! the mount's contract, how soon, after how many requests. Prints itself as a table with `--no-capture`.

use std::time::{Duration, Instant};

use forkd_fs::index::ChunkId;
use forkd_fs::source::{HttpError, SourceError};
use forkd_fs::store::{OpenError, PackLocation, ReadError, Store};
use forkd_fs::tree::{of_open_error, of_read_error};
use rustix::io::Errno;

mod support;
use support::server::{Fault, Server};
use support::{CHUNK, Fixture, noise, options};

/// The reader's deadline is 1.5 s, a silent server is given up after 0.2 s.
const DEADLINE: Duration = Duration::from_millis(1500);
const SLACK: Duration = Duration::from_millis(700);

struct Row {
    fault: &'static str,
    inject: Inject,
    outcome: &'static str,
    errno: Option<Errno>,
    requests: Requests,
}

enum Inject {
    /// The next requests meet these faults.
    Next(Vec<Fault>),
    /// All requests do.
    Always(Fault),
    /// Every fifth request does, of those for forty chunks one after the other.
    Fifth(Fault),
    /// A byte of the frame arrives flipped so many times.
    Flip(u32),
    /// The object is another one from now on, of the same size or not, with this ETag.
    Replace { same_size: bool, etag: Option<&'static str> },
    /// The host leads to a signed URL, which was followed once and has expired since. Whether the next one is good.
    SignedUrl { renewed: bool },
    /// The pack is opened, from a host that has only its first part; whether a registry pinned its index.
    Truncated { pinned: bool },
    /// The pack is opened, and a byte of its pinned index arrives flipped every time.
    FlippedIndex,
}

enum Requests {
    Exactly(usize),
    /// Two chunks are read side by side, and the error of one ends the read while the other is tried again.
    UpTo(usize),
    /// Tried until the deadline.
    UntilDeadline,
}
use Requests::{Exactly, UntilDeadline, UpTo};

/// A row whose read succeeds.
fn passes(fault: &'static str, inject: Inject, requests: usize) -> Row {
    Row { fault, inject, outcome: "the right bytes", errno: None, requests: Exactly(requests) }
}

/// A row that fails on its first answer.
fn fails(fault: &'static str, always: Fault, outcome: &'static str, errno: Errno) -> Row {
    Row { fault, inject: Inject::Always(always), outcome, errno: Some(errno), requests: Exactly(1) }
}

/// A row that is tried until the deadline.
fn lasts(fault: &'static str, always: Fault, outcome: &'static str) -> Row {
    let (inject, requests) = (Inject::Always(always), UntilDeadline);
    Row { fault, inject, outcome, errno: Some(Errno::IO), requests }
}

/// The same, of an object that may be another one now.
fn stale(fault: &'static str, always: Fault, outcome: &'static str) -> Row {
    Row { errno: Some(Errno::STALE), ..lasts(fault, always, outcome) }
}

fn other(fault: &'static str, inject: Inject, outcome: &'static str, errno: Errno, requests: usize) -> Row {
    Row { fault, inject, outcome, errno: Some(errno), requests: Exactly(requests) }
}

fn passing_rows() -> Vec<Row> {
    use Fault::*;
    let next = |faults: &[Fault]| Inject::Next(faults.to_vec());
    vec![
        passes("none", next(&[]), 1),
        passes("reset", next(&[Reset]), 2),
        passes("stall", next(&[Stall]), 2),
        passes("stall in mid-body", next(&[StallHalfway]), 2),
        passes("short body", next(&[ShortBody]), 2),
        passes("short body, honestly announced", next(&[ShortLength]), 2),
        passes("200 for 206: no ranges", Inject::Always(Whole), 1),
        passes("200 for 206, cut off once", next(&[WholeUpTo(50_000), Whole]), 2),
        passes("another range", next(&[WrongRange]), 2),
        passes("another range on every answer of a connection", next(&[BadConnection]), 2),
        passes("206 without Content-Range", next(&[NoContentRange]), 2),
        passes("several ranges", next(&[Multipart]), 2),
        passes("206, another size with the same ETag", next(&[OtherSize]), 2),
        passes("gzip-encoded answer", next(&[Gzip]), 2),
        passes("200 of another length", next(&[Page]), 2),
        passes("200 of another length, not announced", next(&[Chunked(noise(2, 3000))]), 2),
        passes(
            "another range, then 200 of another length, not announced",
            next(&[WrongRange, Chunked(noise(2, 3000))]),
            3,
        ),
        passes("another range, one answer in five", Inject::Fifth(WrongRange), 50),
        passes("gzip-encoded, one answer in five", Inject::Fifth(Gzip), 50),
        passes("200 of another length, one answer in five", Inject::Fifth(Page), 50),
        passes(
            "200 of another length, not announced, one answer in five",
            Inject::Fifth(Chunked(noise(2, 3000))),
            50,
        ),
        passes("206, another size with the same ETag, one answer in five", Inject::Fifth(OtherSize), 50),
        passes("429 with Retry-After of 1 s", next(&[Status(429, Some(1))]), 2),
        passes("503 with Retry-After as a date gone by", next(&[RetryAfter(date(-10))]), 2),
        passes("500 then good", next(&[Status(500, None)]), 2),
        passes(
            "503, 429, 502, then good",
            next(&[Status(503, None), Status(429, Some(0)), Status(502, None)]),
            4,
        ),
        passes("reset, short body, 500, then good", next(&[Reset, ShortBody, Status(500, None)]), 4),
        passes("expired signed URL", Inject::SignedUrl { renewed: true }, 3),
        passes("flipped byte, once", Inject::Flip(1), 2),
    ]
}

fn failing_rows() -> Vec<Row> {
    use Fault::*;
    let replace = |same_size, etag| Inject::Replace { same_size, etag };
    let mid_read = Inject::Next(vec![ShortBodyThenReplaced(noise(7, 100_000))]);
    vec![
        lasts("reset for ever", Reset, "Deadline: Connect"),
        lasts("stall for ever", Stall, "Deadline: Stalled"),
        lasts("503 for ever", Status(503, None), "Deadline: Busy"),
        lasts("longer body for ever", LongBody, "Deadline: BodyLength"),
        fails("429 with Retry-After of an hour", Status(429, Some(3600)), "Deadline: Busy", Errno::IO),
        fails(
            "503 with Retry-After as a date in an hour",
            RetryAfter(date(3600)),
            "Deadline: Busy",
            Errno::IO,
        ),
        fails("slow drip", Drip(Duration::from_millis(100)), "TooSlow", Errno::IO),
        lasts("another range for ever", WrongRange, "Deadline: WrongRange"),
        lasts("206 without Content-Range for ever", NoContentRange, "Deadline: WrongRange"),
        lasts("several ranges for ever", Multipart, "Deadline: WrongRange"),
        lasts("gzip-encoded for ever", Gzip, "Deadline: Encoded"),
        stale("200 of another length for ever", Page, "Deadline: WrongLength"),
        lasts(
            "200 of another length for ever, not announced",
            Chunked(noise(2, 3000)),
            "Deadline: WrongRange",
        ),
        lasts("200 for 206 for ever, length not announced", WholeChunked, "Deadline: WrongRange"),
        stale("206, another size with the same ETag for ever", OtherSize, "Deadline: WrongLength"),
        fails("206, another ETag", OtherEtag, "Replaced", Errno::STALE),
        fails("401", Status(401, None), "Denied", Errno::ACCESS),
        fails("403", Status(403, None), "Denied", Errno::ACCESS),
        fails("404", Status(404, None), "NotFound", Errno::STALE),
        fails("416", Status(416, None), "OutOfRange", Errno::IO),
        fails("418", Status(418, None), "Status", Errno::IO),
        other("redirect loop", Inject::Always(Redirect(String::new())), "Redirects", Errno::IO, 2),
        other(
            "expired signed URL, none better",
            Inject::SignedUrl { renewed: false },
            "Denied",
            Errno::ACCESS,
            3,
        ),
        other("replaced object, other ETag", replace(true, Some("\"two\"")), "Replaced", Errno::STALE, 1),
        other("replaced object mid-read", mid_read, "Replaced", Errno::STALE, 2),
        other(
            "replaced object, other size, weak ETag",
            replace(false, Some("W/\"x\"")),
            "Replaced",
            Errno::STALE,
            1,
        ),
        Row {
            requests: UpTo(5),
            ..other("replaced object, same size, no ETag", replace(true, None), "Corrupt", Errno::IO, 0)
        },
        other("flipped byte, for ever", Inject::Flip(u32::MAX), "Corrupt", Errno::IO, 3),
        other("truncated index", Inject::Truncated { pinned: false }, "Truncated", Errno::IO, 3),
        other("truncated index, pinned", Inject::Truncated { pinned: true }, "OutOfRange", Errno::IO, 1),
        other("flipped byte in the index, for ever", Inject::FlippedIndex, "IndexDigest", Errno::IO, 2),
    ]
}

/// The time so many seconds from now, as headers have it.
fn date(seconds: i64) -> String {
    let (now, by) = (std::time::SystemTime::now(), Duration::from_secs(seconds.unsigned_abs()));
    httpdate::fmt_http_date(if seconds < 0 { now - by } else { now + by })
}

/// A pack on a server with a fault about to happen.
struct Prepared {
    fixture: Fixture,
    server: Server,
    /// The server clients are told of, when it only redirects.
    front: Option<Server>,
    location: PackLocation,
    /// `None` when the opening is what is tried.
    store: Option<std::sync::Arc<Store>>,
}

async fn prepare(inject: &Inject) -> Prepared {
    let len = if matches!(inject, Inject::Fifth(_)) { 40 * CHUNK } else { 100_000 };
    let fixture = Fixture::with(&[("memory.bin", noise(1, len))]);
    let server = Server::start(fixture.bytes()).await;
    let mut front = None;
    if let Inject::Replace { etag, .. } = inject {
        // Weak or missing from the start where that is what is tried.
        server
            .replace(fixture.bytes(), etag.filter(|etag| etag.starts_with("W/")).or(etag.map(|_| "\"one\"")));
    }
    if let Inject::SignedUrl { .. } = inject {
        let redirecting = Server::start(Vec::new()).await;
        redirecting.fail_always(Fault::Redirect(format!("{}?key=first", server.url())));
        front = Some(redirecting);
    }
    let mut location = fixture.pinned(front.as_ref().unwrap_or(&server).url());
    let opening = matches!(inject, Inject::Truncated { .. } | Inject::FlippedIndex);
    let store = match opening {
        false => Some(Store::open(location.clone(), options()).await.unwrap()),
        true => None,
    };
    if let Inject::Truncated { pinned: false } = inject {
        (location.size, location.index) = (None, None);
    }
    Prepared { fixture, server, front, location, store }
}

impl Prepared {
    fn inject(&self, inject: Inject) {
        let (fixture, server) = (&self.fixture, &self.server);
        match inject {
            Inject::Next(faults) => server.fail_next(faults),
            // A redirect to itself.
            Inject::Always(Fault::Redirect(_)) => server.fail_always(Fault::Redirect(server.url())),
            Inject::Always(fault) => server.fail_always(fault),
            Inject::Fifth(fault) => server.fail_every_fifth(fault),
            Inject::Flip(times) => {
                let store = self.store.as_ref().unwrap();
                let file = store.index().file("memory.bin").unwrap();
                server.flip(
                    store.index().record(ChunkId { file, chunk: 0 }).unwrap().offset as usize + 100,
                    times,
                );
            }
            Inject::Replace { same_size, etag } => {
                let len = fixture.bytes().len() + if same_size { 0 } else { 10 };
                server.replace(noise(9, len), etag);
            }
            Inject::SignedUrl { renewed } => {
                server.set_key("key=second");
                let key = if renewed { "second" } else { "third" };
                let front = self.front.as_ref().unwrap();
                front.fail_always(Fault::Redirect(format!("{}?key={key}", server.url())));
            }
            Inject::Truncated { .. } => {
                let cut = fixture.summary.index.offset as usize + 10;
                server.replace(fixture.bytes()[..cut].to_vec(), Some("\"one\""));
            }
            Inject::FlippedIndex => server.flip(fixture.summary.index.offset as usize + 10, u32::MAX),
        }
    }

    /// What a reader gets: the outcome's name, and the errno.
    async fn outcome(&self) -> (String, Option<Errno>) {
        let Some(store) = &self.store else {
            let error = Store::open(self.location.clone(), options()).await.expect_err("must not open");
            return (name_of_open(&error), Some(of_open_error(&error)));
        };
        let (file, plain) = (store.index().file("memory.bin").unwrap(), &self.fixture.files["memory.bin"]);
        let step = if plain.len() > 100_000 { CHUNK } else { plain.len() };
        for (at, expected) in (0..).step_by(step).zip(plain.chunks(step)) {
            match store.read(file, at, step as u64).await {
                Ok(bytes) => assert_eq!(bytes, expected),
                Err(error) => return (name_of_read(&error), Some(of_read_error(&error))),
            }
        }
        ("the right bytes".into(), None)
    }

    fn requests(&self) -> usize {
        self.server.request_count() + self.front.as_ref().map_or(0, Server::request_count)
    }
}

/// A variant's name: what `Debug` begins with.
fn name(error: &impl std::fmt::Debug) -> String {
    let text = format!("{error:?}");
    text.split([' ', '(', '{']).next().unwrap().to_owned()
}

fn name_of_http(error: &HttpError) -> String {
    match error {
        HttpError::Deadline { last, .. } => format!("Deadline: {}", name_of_http(last)),
        HttpError::Download { last, .. } => format!("Download: {}", name_of_http(last)),
        error => name(error),
    }
}

fn name_of_read(error: &ReadError) -> String {
    match error {
        ReadError::Source { source, .. } => match &**source {
            SourceError::Http(error) => name_of_http(error),
            error => name(error),
        },
        error => name(error),
    }
}

fn name_of_open(error: &OpenError) -> String {
    match error {
        OpenError::Source { source: SourceError::Http(error), .. } => name_of_http(error),
        error => name(error),
    }
}

async fn run(row: Row, prepared: Prepared) -> String {
    let Row { fault, inject, outcome, errno, requests } = row;
    let before = prepared.requests();
    prepared.inject(inject);
    let started = Instant::now();
    let got = prepared.outcome().await;
    let took = started.elapsed();
    let sent = prepared.requests() - before;
    assert_eq!((got.0.as_str(), got.1), (outcome, errno), "{fault}");
    match requests {
        Exactly(requests) => assert_eq!(sent, requests, "{fault}: requests"),
        UpTo(most) => assert!((3..=most).contains(&sent), "{fault}: {sent} requests"),
        UntilDeadline => {
            assert!(sent > 2, "{fault}: {sent} requests");
            assert!(took > Duration::from_millis(400), "{fault}: {took:?}");
        }
    }
    assert!(took < DEADLINE + SLACK, "{fault}: {took:?}");
    // Neither done nor given up is retrying; the task that read may still be about to end.
    while prepared.store.as_ref().is_some_and(|store| store.progress().retrying_since.is_some()) {
        assert!(started.elapsed() < 2 * DEADLINE, "{fault}: still said to be retried");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let errno = got.1.map_or_else(|| "-".into(), |errno| name_of_errno(errno).to_owned());
    format!("| {fault} | {outcome} | {errno} | {} | {sent} |", took.as_millis())
}

fn name_of_errno(errno: Errno) -> &'static str {
    match errno {
        Errno::IO => "EIO",
        Errno::ACCESS => "EACCES",
        Errno::STALE => "ESTALE",
        _ => panic!("{errno}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_fault_has_its_outcome() {
    let rows = passing_rows().into_iter().chain(failing_rows());
    // All packs first: building one holds up a thread, and with it servers and timeouts.
    let mut prepared = Vec::new();
    for row in rows {
        let of_row = prepare(&row.inject).await;
        prepared.push((row, of_row));
    }
    let runs = prepared.into_iter().map(|(row, prepared)| run(row, prepared));
    let lines = futures_util::future::join_all(runs).await;
    println!("| fault | outcome | errno | ms | requests |\n|---|---|---|---|---|\n{}", lines.join("\n"));
}
