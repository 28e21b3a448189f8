//! Packs on HTTP servers: single byte ranges, one object pinned by its strong ETag, retries up to a deadline. The only
//! file that knows reqwest. Nothing an answer says is believed beyond what was asked for.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{self, HeaderMap};
use reqwest::{Response, StatusCode};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::{Class, Counters, Deadlines, Trouble};

mod error;

pub use error::HttpError;

/// Bytes that must arrive within one deadline: a server that drips is treated like one that is silent.
const PROGRESS: u64 = 64 << 10;
/// First pause before trying again; doubles up to [`LONGEST_PAUSE`], each time scattered by half.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// Timeouts and budgets of an [`HttpClient`].
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for an answer to begin, or for its next bytes.
    pub idle_timeout: Duration,
    /// How long fetching a whole document ([`HttpClient::get`]) may fail and be retried.
    pub document_deadline: Duration,
    /// Most demand requests under way.
    pub demand_requests: usize,
    /// Most prefetch requests under way, beside those.
    pub prefetch_requests: usize,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            document_deadline: Duration::from_secs(5),
            demand_requests: 32,
            prefetch_requests: 4,
        }
    }
}

/// Connections, budgets and timeouts, shared by everything that talks HTTP in a process. Cheap to clone; keep one, so
/// that a pack is fetched over the connection its registry came through.
#[derive(Debug, Clone)]
pub struct HttpClient(Arc<ClientShared>);

#[derive(Debug)]
struct ClientShared {
    options: HttpOptions,
    client: OnceLock<reqwest::Client>,
    demand: Arc<Semaphore>,
    prefetch: Arc<Semaphore>,
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new(HttpOptions::default())
    }
}

impl HttpClient {
    /// Costs nothing: the client proper is set up by its first request.
    pub fn new(options: HttpOptions) -> Self {
        let (demand, prefetch) =
            (Semaphore::new(options.demand_requests), Semaphore::new(options.prefetch_requests));
        let client = OnceLock::new();
        Self(Arc::new(ClientShared {
            options,
            client,
            demand: Arc::new(demand),
            prefetch: Arc::new(prefetch),
        }))
    }

    /// Fetches a whole document of at most `limit` bytes, such as a registry.json, retrying up to the document deadline.
    pub async fn get(&self, url: &str, limit: u64) -> Result<Bytes, HttpError> {
        let started = Instant::now();
        let mut retries = Retries::new(self.0.options.document_deadline);
        loop {
            match self.get_once(url, limit).await {
                Ok(document) => return Ok(document),
                Err(error) => retries.pause(url, started, error).await?,
            }
        }
    }

    /// An object to read ranges of. `size` is what a registry says about it; an object of another size is refused.
    pub fn source(
        &self,
        url: &str,
        size: Option<u64>,
        deadlines: Deadlines,
    ) -> Result<HttpSource, HttpError> {
        check_url(url)?;
        let known_size = OnceLock::new();
        if let Some(size) = size {
            let _ = known_size.set(size);
        }
        Ok(HttpSource(Arc::new(SourceShared {
            client: self.clone(),
            url: url.to_owned(),
            deadlines,
            etag: OnceLock::new(),
            size: known_size,
            requests: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            failing: Mutex::default(),
        })))
    }

    fn client(&self) -> Result<&reqwest::Client, HttpError> {
        if let Some(client) = self.0.client.get() {
            return Ok(client);
        }
        // Fails when another provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = reqwest::Client::builder()
            .connect_timeout(self.0.options.connect_timeout)
            .tcp_nodelay(true)
            .http1_only()
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("forkd/", env!("CARGO_PKG_VERSION")))
            .build()
            .map_err(HttpError::Client)?;
        Ok(self.0.client.get_or_init(|| client))
    }

    async fn get_once(&self, url: &str, limit: u64) -> Result<Bytes, HttpError> {
        check_url(url)?;
        let idle = self.0.options.idle_timeout;
        let request = self.client()?.get(url).header(header::ACCEPT_ENCODING, "identity");
        let mut response = send(url, idle, request).await?;
        check_encoding(url, response.headers())?;
        if response.status() != StatusCode::OK {
            return Err(bad_status(url, &response));
        }
        let too_long = || HttpError::TooLong { url: url.to_owned(), limit };
        if response.content_length().is_some_and(|len| len > limit) {
            return Err(too_long());
        }
        let mut document = BytesMut::new();
        while let Some(piece) = next_piece(url, idle, &mut response).await? {
            if (document.len() + piece.len()) as u64 > limit {
                return Err(too_long());
            }
            document.extend_from_slice(&piece);
        }
        Ok(document.freeze())
    }
}

fn check_url(url: &str) -> Result<(), HttpError> {
    let parsed = reqwest::Url::parse(url).ok();
    match parsed.filter(|parsed| matches!(parsed.scheme(), "http" | "https") && parsed.has_host()) {
        Some(_) => Ok(()),
        None => Err(HttpError::Url { url: url.to_owned() }),
    }
}

async fn send(url: &str, idle: Duration, request: reqwest::RequestBuilder) -> Result<Response, HttpError> {
    match timeout(idle, request.send()).await {
        Err(_) => Err(HttpError::Stalled { url: url.to_owned(), waited: idle }),
        Ok(answer) => answer.map_err(|e| HttpError::Connect { url: url.to_owned(), source: e.without_url() }),
    }
}

async fn next_piece(url: &str, idle: Duration, response: &mut Response) -> Result<Option<Bytes>, HttpError> {
    match timeout(idle, response.chunk()).await {
        Err(_) => Err(HttpError::Stalled { url: url.to_owned(), waited: idle }),
        Ok(piece) => piece.map_err(|e| HttpError::Transfer { url: url.to_owned(), source: e.without_url() }),
    }
}

fn check_encoding(url: &str, headers: &HeaderMap) -> Result<(), HttpError> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            let encoding = String::from_utf8_lossy(encoding.as_bytes()).into_owned();
            Err(HttpError::Encoded { url: url.to_owned(), encoding })
        }
        _ => Ok(()),
    }
}

/// The error for a status that is not success.
fn bad_status(url: &str, response: &Response) -> HttpError {
    let (url, status) = (url.to_owned(), response.status().as_u16());
    match status {
        401 | 403 => HttpError::Denied { url, status },
        404 | 410 => HttpError::NotFound { url, status },
        408 | 429 | 500.. => {
            // Only the form in seconds; a date would need the server's clock to be right.
            let seconds = response
                .headers()
                .get(header::RETRY_AFTER)
                .and_then(|value| value.to_str().ok()?.parse().ok());
            HttpError::Busy { url, status, retry_after: seconds.map(Duration::from_secs) }
        }
        _ => HttpError::Status { url, status },
    }
}

/// Counts attempts and pauses between them until a deadline.
#[derive(Debug)]
struct Retries {
    deadline: Duration,
    attempts: u32,
}

impl Retries {
    fn new(deadline: Duration) -> Self {
        Self { deadline, attempts: 0 }
    }

    /// Waits before the next attempt, or ends in an error when `error` is final or the deadline, which counts from
    /// `since`, would pass.
    async fn pause(&mut self, url: &str, since: Instant, error: HttpError) -> Result<(), HttpError> {
        if !error.is_transient() {
            return Err(error);
        }
        self.attempts += 1;
        let doubled = FIRST_PAUSE.saturating_mul(1 << (self.attempts - 1).min(16)).min(LONGEST_PAUSE);
        let mut pause = doubled.mul_f64(0.5 + fastrand::f64());
        if let HttpError::Busy { retry_after: Some(asked), .. } = &error {
            pause = pause.max(*asked);
        }
        let waited = since.elapsed();
        if waited.saturating_add(pause) > self.deadline {
            let (url, attempts) = (url.to_owned(), self.attempts);
            return Err(HttpError::Deadline { url, attempts, waited, last: Box::new(error) });
        }
        tracing::debug!(%error, attempts = self.attempts, pause_ms = pause.as_millis(), "trying again");
        tokio::time::sleep(pause).await;
        Ok(())
    }
}

/// One object on an HTTP server.
#[derive(Debug, Clone)]
pub struct HttpSource(Arc<SourceShared>);

#[derive(Debug)]
struct SourceShared {
    client: HttpClient,
    url: String,
    deadlines: Deadlines,
    /// The strong ETag of the first answer (`None`: it had none); later ones must agree.
    etag: OnceLock<Option<String>>,
    size: OnceLock<u64>,
    requests: AtomicU64,
    bytes: AtomicU64,
    failing: Mutex<Failing>,
}

/// Reads that are being retried.
#[derive(Debug, Default)]
struct Failing {
    reads: u32,
    trouble: Option<Trouble>,
}

impl HttpSource {
    /// Its URL.
    pub fn url(&self) -> &str {
        &self.0.url
    }

    /// Its size in bytes; asks the server for one byte when nothing told the size yet.
    pub async fn size(&self) -> Result<u64, HttpError> {
        if self.0.size.get().is_none() {
            let mut body = self.stream_at(0, 1, Class::Demand);
            while body.next().await?.is_some() {}
        }
        Ok(*self.0.size.get().expect("every accepted answer sets the size"))
    }

    pub(super) fn known_size(&self) -> Option<u64> {
        self.0.size.get().copied()
    }

    pub(super) fn counters(&self) -> Counters {
        Counters { requests: self.0.requests.load(Relaxed), bytes: self.0.bytes.load(Relaxed) }
    }

    pub(super) fn trouble(&self) -> Option<Trouble> {
        self.0.failing.lock().expect("no panics while held").trouble.clone()
    }

    pub(super) fn stream_at(&self, offset: u64, len: u64, class: Class) -> HttpBody {
        let deadline = match class {
            Class::Demand => self.0.deadlines.demand,
            Class::Prefetch => self.0.deadlines.prefetch,
        };
        HttpBody {
            source: self.0.clone(),
            class,
            idle: self.0.client.0.options.idle_timeout.min(deadline),
            start: offset,
            next: offset,
            end: offset + len,
            answer: None,
            retries: Retries::new(deadline),
            failing: false,
            progress: (Instant::now(), offset),
        }
    }
}

/// A range of an [`HttpSource`] on its way.
#[derive(Debug)]
pub struct HttpBody {
    source: Arc<SourceShared>,
    class: Class,
    idle: Duration,
    start: u64,
    next: u64,
    end: u64,
    answer: Option<(Response, OwnedSemaphorePermit)>,
    retries: Retries,
    failing: bool,
    /// When, and up to where, the last [`PROGRESS`] bytes had arrived.
    progress: (Instant, u64),
}

impl HttpBody {
    pub(super) async fn next(&mut self) -> Result<Option<Bytes>, HttpError> {
        loop {
            if self.next == self.end && self.answer.is_none() {
                return Ok(None);
            }
            match self.attempt().await {
                Ok(Some(piece)) => {
                    self.arrived(piece.len() as u64);
                    return Ok(Some(piece));
                }
                Ok(None) => self.answer = None,
                Err(error) => {
                    self.answer = None;
                    self.note_failure(&error);
                    let source = self.source.clone();
                    self.retries.pause(&source.url, self.progress.0, error).await?;
                }
            }
        }
    }

    /// The next piece of the running answer, asking for the rest of the range first when none is running.
    async fn attempt(&mut self) -> Result<Option<Bytes>, HttpError> {
        let remaining = self.end - self.next;
        if self.answer.is_none() {
            self.answer = Some(self.request().await?);
        }
        let (response, _) = self.answer.as_mut().expect("just set");
        let url = &self.source.url;
        let piece = next_piece(url, self.idle, response).await?;
        let got = piece.as_ref().map_or(0, Bytes::len) as u64;
        self.source.bytes.fetch_add(got, Relaxed);
        // The end before the last byte, or anything after it.
        if (piece.is_none() && remaining > 0) || got > remaining {
            let got = got.abs_diff(remaining);
            return Err(HttpError::BodyLength { url: url.clone(), wanted: self.end - self.start, got });
        }
        Ok(piece)
    }

    async fn request(&self) -> Result<(Response, OwnedSemaphorePermit), HttpError> {
        let client = &self.source.client;
        let budget = match self.class {
            Class::Demand => &client.0.demand,
            Class::Prefetch => &client.0.prefetch,
        };
        let permit = budget.clone().acquire_owned().await.expect("the budgets are never closed");
        let range = format!("bytes={}-{}", self.next, self.end - 1);
        let mut request = client
            .client()?
            .get(&self.source.url)
            .header(header::ACCEPT_ENCODING, "identity")
            .header(header::RANGE, range);
        if let Some(Some(etag)) = self.source.etag.get() {
            request = request.header(header::IF_MATCH, etag);
        }
        self.source.requests.fetch_add(1, Relaxed);
        let response = send(&self.source.url, self.idle, request).await?;
        self.check(&response)?;
        Ok((response, permit))
    }

    /// Refuses every answer but the exact range of the object that was opened.
    fn check(&self, response: &Response) -> Result<(), HttpError> {
        let url = || self.source.url.clone();
        let (first, last) = (self.next, self.end - 1);
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {}
            StatusCode::OK => return Err(HttpError::NoRanges { url: url() }),
            StatusCode::PRECONDITION_FAILED => {
                return Err(HttpError::Replaced { url: url(), detail: "its ETag no longer matches".into() });
            }
            StatusCode::RANGE_NOT_SATISFIABLE => {
                return Err(HttpError::OutOfRange { url: url(), wanted: format!("{first}-{last}") });
            }
            _ => return Err(bad_status(&self.source.url, response)),
        }
        let headers = response.headers();
        check_encoding(&self.source.url, headers)?;
        let text = |name| headers.get(name).and_then(|value: &header::HeaderValue| value.to_str().ok());
        let etag = text(header::ETAG).filter(|etag| etag.starts_with('"')).map(str::to_owned);
        let pinned = self.source.etag.get_or_init(|| etag.clone());
        if let (Some(pinned), Some(etag)) = (pinned, &etag)
            && pinned != etag
        {
            let detail = format!("its ETag was {pinned}, now {etag}");
            return Err(HttpError::Replaced { url: url(), detail });
        }
        let got = text(header::CONTENT_RANGE).unwrap_or_default();
        let Some((got_first, got_last, total)) = parse_content_range(got) else {
            return Err(HttpError::WrongRange {
                url: url(),
                wanted: format!("{first}-{last}"),
                got: got.into(),
            });
        };
        let size = *self.source.size.get_or_init(|| total);
        if total != size {
            return Err(HttpError::Replaced {
                url: url(),
                detail: format!("{size} bytes were expected, it has {total}"),
            });
        }
        // A server clips a range that runs past the end; so does the check, and the length of the body tells.
        if (got_first, got_last) != (first, last) {
            return Err(HttpError::WrongRange {
                url: url(),
                wanted: format!("{first}-{last}"),
                got: got.into(),
            });
        }
        match response.content_length() {
            Some(len) if len != self.end - self.next => Err(HttpError::BodyLength {
                url: url(),
                wanted: self.end - self.next,
                got: len.abs_diff(self.end - self.next),
            }),
            _ => Ok(()),
        }
    }

    fn arrived(&mut self, len: u64) {
        self.next += len;
        if self.next - self.progress.1 >= PROGRESS || self.next == self.end {
            self.progress = (Instant::now(), self.next);
            self.retries.attempts = 0;
        }
        self.note_recovery();
    }

    fn note_failure(&mut self, error: &HttpError) {
        let mut failing = self.source.failing.lock().expect("no panics while held");
        if !self.failing {
            self.failing = true;
            failing.reads += 1;
        }
        let since = failing.trouble.as_ref().map_or_else(Instant::now, |trouble| trouble.since);
        failing.trouble = Some(Trouble { since, last_error: error.to_string() });
    }

    fn note_recovery(&mut self) {
        if !std::mem::take(&mut self.failing) {
            return;
        }
        let mut failing = self.source.failing.lock().expect("no panics while held");
        failing.reads -= 1;
        if failing.reads == 0 {
            failing.trouble = None;
        }
    }
}

impl Drop for HttpBody {
    fn drop(&mut self) {
        self.note_recovery();
    }
}

/// `bytes FIRST-LAST/TOTAL` as three numbers.
fn parse_content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?, total.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_ranges_are_read_exactly() {
        assert_eq!(parse_content_range("bytes 0-9/100"), Some((0, 9, 100)));
        for bad in ["", "bytes */100", "bytes 0-9/*", "bytes 0-9", "0-9/100", "bytes -9/100", "items 0-9/100"]
        {
            assert_eq!(parse_content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_http_urls_are_taken() {
        assert!(check_url("http://127.0.0.1:1/x").is_ok() && check_url("https://host/x").is_ok());
        for bad in ["", "x", "/path", "file:///x", "ftp://host/x", "http://"] {
            assert!(matches!(check_url(bad), Err(HttpError::Url { .. })), "{bad}");
        }
    }
}
