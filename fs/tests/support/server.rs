//! An HTTP server for one object, on loopback, that does as it is told: slowly, wrongly, or not at all.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

/// What goes wrong with one request.
#[derive(Debug, Clone)]
pub enum Fault {
    /// Nothing.
    Fine,
    /// 200 and the whole object.
    Whole,
    /// 206 for one byte further on.
    WrongRange,
    /// 206 without saying of what, also to a request for the whole object.
    NoContentRange,
    /// 206 for several ranges.
    Multipart,
    /// 206 with another size of the object.
    OtherSize,
    /// 206 with another ETag.
    OtherEtag,
    /// 206 up to the end of the object, which lies before that of the range.
    UpToTheEnd,
    /// This and all later answers on the connection are 206 for one byte further on.
    BadConnection,
    /// 200 and a page of somebody else's.
    Page,
    /// 200 and these bytes, chunked: their length is not announced.
    Chunked(Vec<u8>),
    /// The connection closes in mid-body.
    ShortBody,
    /// The connection closes in mid-body, and then there is another object.
    ShortBodyThenReplaced(Vec<u8>),
    /// A shorter body, honestly announced, of a range that claims to be whole.
    ShortLength,
    /// More bytes than the range, chunked.
    LongBody,
    /// The connection is reset before the answer.
    Reset,
    /// No answer ever.
    Stall,
    /// Half of the body, then nothing.
    StallHalfway,
    /// A byte every so often.
    Drip(Duration),
    /// This status, with Retry-After if given.
    Status(u16, Option<u32>),
    /// 503 with this Retry-After.
    RetryAfter(String),
    /// 200 and the whole object, of which so many bytes arrive before the connection closes.
    WholeUpTo(usize),
    /// 200 and the whole object, chunked: its length is not announced.
    WholeChunked,
    /// The same, which ends after so many bytes as if that were all.
    ChunkedUpTo(usize),
    /// A gzip-encoded answer.
    Gzip,
    /// A redirect to this location.
    Redirect(String),
}

#[derive(Debug, Clone)]
pub struct Request {
    /// Path and query.
    pub target: String,
    pub authorization: Option<String>,
    pub range: Option<Range<usize>>,
    pub if_match: Option<String>,
    pub accept_encoding: Option<String>,
}

pub struct State {
    pub object: Mutex<Arc<Vec<u8>>>,
    pub etag: Mutex<Option<String>>,
    /// Faults for the next requests, in order; then `always`.
    pub next: Mutex<VecDeque<Fault>>,
    pub always: Mutex<Fault>,
    /// What every fifth request meets.
    pub fifth: Mutex<Option<Fault>>,
    /// Offsets of bytes sent flipped, each so many times.
    pub flips: Mutex<Vec<(usize, u32)>>,
    pub latency: Mutex<Duration>,
    /// 403 for requests whose target does not contain this.
    pub key: Mutex<String>,
    /// 401 for requests without this Authorization.
    pub authorization: Mutex<Option<String>>,
    pub link: Mutex<Option<Link>>,
    /// Body bytes that crossed the link.
    pub sent: AtomicU64,
    pub requests: Mutex<Vec<Request>>,
    /// Connections that were accepted.
    pub connections: AtomicU64,
}

/// A link that all bodies of a server share, piece by piece.
#[derive(Debug, Clone)]
pub struct Link {
    bytes_per_second: f64,
    free_at: Arc<Mutex<Instant>>,
}

impl Link {
    /// Waits until `len` more bytes have crossed.
    async fn cross(&self, len: usize) {
        let crossed = {
            let mut free_at = self.free_at.lock().unwrap();
            let crossing = Duration::from_secs_f64(len as f64 / self.bytes_per_second);
            // A late timer is caught up with.
            let earliest = Instant::now() - Duration::from_millis(10);
            *free_at = (*free_at).max(earliest) + crossing;
            *free_at
        };
        tokio::time::sleep_until(crossed).await;
    }
}

pub struct Server {
    pub state: Arc<State>,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    pub async fn start(object: Vec<u8>) -> Self {
        let state = State {
            object: Mutex::new(Arc::new(object)),
            etag: Mutex::new(Some("\"one\"".into())),
            next: Mutex::default(),
            always: Mutex::new(Fault::Fine),
            fifth: Mutex::default(),
            flips: Mutex::default(),
            latency: Mutex::default(),
            key: Mutex::default(),
            authorization: Mutex::default(),
            link: Mutex::default(),
            sent: AtomicU64::new(0),
            requests: Mutex::default(),
            connections: AtomicU64::new(0),
        };
        Self::listen("127.0.0.1:0".parse().unwrap(), Arc::new(state)).await
    }

    async fn listen(address: SocketAddr, state: Arc<State>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let shared = state.clone();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                shared.connections.fetch_add(1, Relaxed);
                connections.spawn(serve(stream, shared.clone()));
            }
        });
        Self { state, address, task }
    }

    /// Closes the port and every connection.
    pub async fn stop(&mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    /// Opens the port again.
    pub async fn resume(&mut self) {
        *self = Self::listen(self.address, self.state.clone()).await;
    }

    pub fn url(&self) -> String {
        format!("http://{}/test.forkd-snapshot.tar.zst", self.address)
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Every body from now on crosses one link.
    pub fn set_bandwidth(&self, bytes_per_second: u64) {
        let free_at = Arc::new(Mutex::new(Instant::now()));
        *self.state.link.lock().unwrap() = Some(Link { bytes_per_second: bytes_per_second as f64, free_at });
    }

    /// From now on 403 for requests whose path and query do not contain `key`.
    pub fn set_key(&self, key: &str) {
        *self.state.key.lock().unwrap() = key.to_owned();
    }

    /// From now on 401 for requests without this Authorization.
    pub fn require(&self, authorization: &str) {
        *self.state.authorization.lock().unwrap() = Some(authorization.to_owned());
    }

    /// Body bytes that crossed the link of [`Server::set_bandwidth`].
    pub fn bytes_sent(&self) -> u64 {
        self.state.sent.load(Relaxed)
    }

    pub fn requests(&self) -> Vec<Request> {
        self.state.requests.lock().unwrap().clone()
    }

    pub fn connection_count(&self) -> u64 {
        self.state.connections.load(Relaxed)
    }

    pub fn request_count(&self) -> usize {
        self.state.requests.lock().unwrap().len()
    }

    /// The next requests meet these faults.
    pub fn fail_next(&self, faults: impl IntoIterator<Item = Fault>) {
        self.state.next.lock().unwrap().extend(faults);
    }

    /// Every request from now on meets this fault.
    pub fn fail_always(&self, fault: Fault) {
        *self.state.always.lock().unwrap() = fault;
    }

    /// Every fifth request, counted from the server's first, meets this fault.
    pub fn fail_every_fifth(&self, fault: Fault) {
        *self.state.fifth.lock().unwrap() = Some(fault);
    }

    pub fn set_latency(&self, latency: Duration) {
        *self.state.latency.lock().unwrap() = latency;
    }

    /// The byte at `offset` arrives flipped so many times.
    pub fn flip(&self, offset: usize, times: u32) {
        self.state.flips.lock().unwrap().push((offset, times));
    }

    pub fn replace(&self, object: Vec<u8>, etag: Option<&str>) {
        *self.state.object.lock().unwrap() = Arc::new(object);
        *self.state.etag.lock().unwrap() = etag.map(str::to_owned);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl State {
    fn body(&self, range: Range<usize>) -> Vec<u8> {
        let mut body = self.object.lock().unwrap()[range.clone()].to_vec();
        for (offset, times) in self.flips.lock().unwrap().iter_mut() {
            if *times > 0 && range.contains(offset) {
                *times -= 1;
                body[*offset - range.start] ^= 1;
            }
        }
        body
    }
}

async fn serve(mut stream: TcpStream, state: Arc<State>) {
    stream.set_nodelay(true).unwrap();
    let mut bad = false;
    while let Some(request) = read_request(&mut stream).await {
        let count = {
            let mut requests = state.requests.lock().unwrap();
            requests.push(request.clone());
            requests.len()
        };
        let fifth = if count % 5 == 0 { state.fifth.lock().unwrap().clone() } else { None };
        let fault = fifth.or_else(|| state.next.lock().unwrap().pop_front());
        let fault = fault.unwrap_or_else(|| state.always.lock().unwrap().clone());
        bad |= matches!(fault, Fault::BadConnection);
        let fault = if bad { Fault::WrongRange } else { fault };
        let latency = *state.latency.lock().unwrap();
        tokio::time::sleep(latency).await;
        if !answer(&mut stream, &state, request, fault).await {
            return;
        }
    }
}

async fn read_request(stream: &mut TcpStream) -> Option<Request> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    let head = String::from_utf8(head).ok()?;
    let header = |name: &str| {
        let line = head.lines().find(|line| line.to_ascii_lowercase().starts_with(&format!("{name}:")))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let range = header("range").map(|text| {
        let (first, last) = text.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
        first.parse().unwrap()..last.parse::<usize>().unwrap() + 1
    });
    Some(Request {
        target: head.split(' ').nth(1)?.to_owned(),
        authorization: header("authorization"),
        range,
        if_match: header("if-match"),
        accept_encoding: header("accept-encoding"),
    })
}

/// Answers one request; whether the connection lives on.
async fn answer(stream: &mut TcpStream, state: &State, request: Request, fault: Fault) -> bool {
    let object = state.object.lock().unwrap().clone();
    let etag = state.etag.lock().unwrap().clone();
    let etag_line = etag.as_ref().map_or_else(String::new, |etag| format!("ETag: {etag}\r\n"));
    if let Fault::Status(status, retry_after) = fault {
        let retry = retry_after.map_or_else(String::new, |seconds| format!("Retry-After: {seconds}\r\n"));
        return send(stream, &format!("{status} X\r\n{retry}Content-Length: 0"), b"").await;
    }
    if let Fault::Redirect(to) = fault {
        return send(stream, &format!("302 Found\r\nLocation: {to}\r\nContent-Length: 0"), b"").await;
    }
    if let Fault::RetryAfter(when) = fault {
        let date = httpdate::fmt_http_date(std::time::SystemTime::now());
        let head = format!("503 X\r\nDate: {date}\r\nRetry-After: {when}\r\nContent-Length: 0");
        return send(stream, &head, b"").await;
    }
    if !request.target.contains(&*state.key.lock().unwrap()) {
        return send(stream, "403 Forbidden\r\nContent-Length: 0", b"").await;
    }
    let required = state.authorization.lock().unwrap().clone();
    if required.is_some() && request.authorization != required {
        return send(stream, "401 Unauthorized\r\nContent-Length: 0", b"").await;
    }
    if matches!(fault, Fault::Reset) {
        // With unread or unsent data pending, closing resets; linger 0 does so always.
        let _ = stream.set_zero_linger();
        return false;
    }
    if matches!(fault, Fault::Stall) {
        std::future::pending::<()>().await;
    }
    if request.if_match.is_some() && request.if_match != etag {
        return send(stream, "412 Precondition Failed\r\nContent-Length: 0", b"").await;
    }
    const PAGE: &[u8] = b"<title>Please log in</title>";
    if matches!(fault, Fault::Page) {
        return send(stream, &format!("200 OK\r\nContent-Length: {}", PAGE.len()), PAGE).await;
    }
    if let Fault::Chunked(page) = &fault {
        let body = [format!("{:x}\r\n", page.len()).as_bytes(), page, b"\r\n0\r\n\r\n"].concat();
        return send(stream, "200 OK\r\nTransfer-Encoding: chunked", &body).await;
    }
    let whole =
        matches!(fault, Fault::Whole | Fault::WholeUpTo(_) | Fault::WholeChunked | Fault::ChunkedUpTo(_));
    let Some(mut range) = request.range.filter(|_| !whole) else {
        return send_whole(stream, state, &etag_line, fault).await;
    };
    if matches!(fault, Fault::UpToTheEnd) {
        range.end = range.end.min(object.len());
    }
    if range.end > object.len() {
        return send(stream, "416 Range Not Satisfiable\r\nContent-Length: 0", b"").await;
    }
    let (first, last, total, len) = (range.start, range.end - 1, object.len(), range.len());
    let head = format!("206 Partial Content\r\n{etag_line}Content-Range: bytes {first}-{last}/{total}\r\n");
    let body = state.body(range);
    match fault {
        Fault::WrongRange => {
            let head = format!("206 X\r\nContent-Range: bytes {}-{}/{total}\r\n", first + 1, last + 1);
            send(stream, &format!("{head}Content-Length: {len}"), &body).await
        }
        Fault::NoContentRange => send(stream, &format!("206 X\r\nContent-Length: {len}"), &body).await,
        Fault::Multipart => {
            let head = "206 X\r\nContent-Type: multipart/byteranges; boundary=x";
            send(stream, &format!("{head}\r\nContent-Length: {len}"), &body).await
        }
        Fault::OtherSize => {
            let head = format!("206 X\r\n{etag_line}Content-Range: bytes {first}-{last}/{}", total + 1);
            send(stream, &format!("{head}\r\nContent-Length: {len}"), &body).await
        }
        Fault::OtherEtag => {
            let head = format!("206 X\r\nETag: \"other\"\r\nContent-Range: bytes {first}-{last}/{total}");
            send(stream, &format!("{head}\r\nContent-Length: {len}"), &body).await
        }
        Fault::Gzip => {
            send(stream, &format!("{head}Content-Encoding: gzip\r\nContent-Length: {len}"), &body).await
        }
        Fault::ShortLength => {
            send(stream, &format!("{head}Content-Length: {}", len / 2), &body[..len / 2]).await
        }
        Fault::LongBody => {
            let body = [format!("{:x}\r\n", len + 3).as_bytes(), &body, b"xyz\r\n0\r\n\r\n"].concat();
            send(stream, &format!("{head}Transfer-Encoding: chunked"), &body).await
        }
        Fault::ShortBody => {
            send(stream, &format!("{head}Content-Length: {len}"), &body[..len / 2]).await;
            false
        }
        Fault::ShortBodyThenReplaced(other) => {
            *state.object.lock().unwrap() = Arc::new(other);
            *state.etag.lock().unwrap() = Some("\"two\"".into());
            send(stream, &format!("{head}Content-Length: {len}"), &body[..len / 2]).await;
            false
        }
        Fault::Drip(pause) => {
            let mut alive = send(stream, &format!("{head}Content-Length: {len}"), b"").await;
            for byte in body {
                alive = alive && stream.write_u8(byte).await.is_ok();
                tokio::time::sleep(pause).await;
            }
            alive
        }
        Fault::StallHalfway => {
            send(stream, &format!("{head}Content-Length: {len}"), &body[..len / 2]).await;
            std::future::pending().await
        }
        _ => send_shaped(stream, state, &format!("{head}Content-Length: {len}"), &body).await,
    }
}

async fn send_whole(stream: &mut TcpStream, state: &State, etag_line: &str, fault: Fault) -> bool {
    let len = state.object.lock().unwrap().len();
    let body = state.body(0..len);
    let head = format!("200 OK\r\n{etag_line}");
    match fault {
        Fault::WholeChunked | Fault::ChunkedUpTo(_) => {
            let len = if let Fault::ChunkedUpTo(end) = fault { end } else { len };
            let body = [format!("{len:x}\r\n").as_bytes(), &body[..len], b"\r\n0\r\n\r\n"].concat();
            send(stream, &format!("{head}Transfer-Encoding: chunked"), &body).await
        }
        Fault::Gzip => {
            send(stream, &format!("{head}Content-Encoding: gzip\r\nContent-Length: {len}"), &body).await
        }
        Fault::NoContentRange => send(stream, &format!("206 X\r\nContent-Length: {len}"), &body).await,
        Fault::WholeUpTo(end) if end < len => {
            send(stream, &format!("{head}Content-Length: {len}"), &body[..end]).await;
            false
        }
        _ => send_shaped(stream, state, &format!("{head}Content-Length: {len}"), &body).await,
    }
}

/// As fast as the link allows.
async fn send_shaped(stream: &mut TcpStream, state: &State, head: &str, body: &[u8]) -> bool {
    let Some(link) = state.link.lock().unwrap().clone() else { return send(stream, head, body).await };
    let alive = send(stream, head, b"").await;
    for piece in body.chunks(16 << 10) {
        link.cross(piece.len()).await;
        if !alive || stream.write_all(piece).await.is_err() {
            return false;
        }
        state.sent.fetch_add(piece.len() as u64, Relaxed);
    }
    alive
}

async fn send(stream: &mut TcpStream, head: &str, body: &[u8]) -> bool {
    let head = format!("HTTP/1.1 {head}\r\n\r\n");
    stream.write_all(head.as_bytes()).await.is_ok() && stream.write_all(body).await.is_ok()
}
