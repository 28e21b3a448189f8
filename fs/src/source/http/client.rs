//! Connections, budgets, timeouts and retries: what every exchange over HTTP shares.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{self, HeaderMap};
use reqwest::{Client, RequestBuilder, Response, StatusCode, redirect};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use super::{HttpError, HttpSource};
use crate::source::{Class, Deadlines};

/// First pause before trying again; doubles up to [`LONGEST_PAUSE`], each time scattered by half.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
const MAX_REDIRECTS: usize = 10;

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
    /// For http URLs. Reading the system's root certificates takes longer than a round trip; this one does without.
    plain: OnceLock<reqwest::Client>,
    /// For https URLs, and http URLs that redirect to one.
    secure: OnceLock<reqwest::Client>,
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
        Self(Arc::new(ClientShared {
            options,
            plain: OnceLock::new(),
            secure: OnceLock::new(),
            demand: Arc::new(demand),
            prefetch: Arc::new(prefetch),
        }))
    }

    /// Fetches a whole document of at most `limit` bytes, such as a registry.json, retrying up to the document deadline.
    pub async fn get(&self, url: &str, limit: u64) -> Result<Bytes, HttpError> {
        let started = Instant::now();
        let mut retries = Retries::new(self.0.options.document_deadline);
        loop {
            // Bounds an attempt whose bytes drip in.
            let patience = self.0.options.idle_timeout * 6;
            let stalled = |_| HttpError::Stalled { url: url.to_owned(), waited: patience };
            match timeout(patience, self.get_once(url, limit)).await.unwrap_or_else(|e| Err(stalled(e))) {
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
        Ok(HttpSource::new(self.clone(), url, size, deadlines))
    }

    pub(super) fn idle_timeout(&self) -> Duration {
        self.0.options.idle_timeout
    }

    /// Waits for the right to send a request of that class.
    pub(super) async fn permit(&self, class: Class) -> OwnedSemaphorePermit {
        let budget = match class {
            Class::Demand => &self.0.demand,
            Class::Prefetch => &self.0.prefetch,
        };
        budget.clone().acquire_owned().await.expect("the budgets are never closed")
    }

    /// Sends a GET with the headers `dress` adds; the answer's body is still to come.
    pub(super) async fn send(
        &self,
        url: &str,
        idle: Duration,
        dress: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response, HttpError> {
        let request = |client: &Client| dress(client.get(url).header(header::ACCEPT_ENCODING, "identity"));
        if !url.starts_with("https:") && self.0.secure.get().is_none() {
            let response = answer(url, idle, request(self.plain()?)).await?;
            let location =
                response.headers().get(header::LOCATION).filter(|_| response.status().is_redirection());
            if !location.is_some_and(|location| location.as_bytes().starts_with(b"https:")) {
                return Ok(response);
            }
        }
        answer(url, idle, request(self.secure()?)).await
    }

    fn plain(&self) -> Result<&Client, HttpError> {
        let follow = redirect::Policy::custom(|attempt| match attempt.url().scheme() {
            "https" => attempt.stop(),
            _ if attempt.previous().len() > MAX_REDIRECTS => attempt.error("too many redirects"),
            _ => attempt.follow(),
        });
        set_up(&self.0.plain, || self.builder().redirect(follow).tls_certs_only([]))
    }

    fn secure(&self) -> Result<&Client, HttpError> {
        set_up(&self.0.secure, || self.builder().redirect(redirect::Policy::limited(MAX_REDIRECTS)))
    }

    fn builder(&self) -> reqwest::ClientBuilder {
        // Fails when another provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Client::builder()
            .connect_timeout(self.0.options.connect_timeout)
            .tcp_nodelay(true)
            .http1_only()
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("forkd/", env!("CARGO_PKG_VERSION")))
    }

    async fn get_once(&self, url: &str, limit: u64) -> Result<Bytes, HttpError> {
        check_url(url)?;
        let idle = self.0.options.idle_timeout;
        let mut response = self.send(url, idle, |request| request).await?;
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

fn set_up(
    place: &OnceLock<Client>,
    builder: impl FnOnce() -> reqwest::ClientBuilder,
) -> Result<&Client, HttpError> {
    if let Some(client) = place.get() {
        return Ok(client);
    }
    let client = builder().build().map_err(HttpError::Client)?;
    Ok(place.get_or_init(|| client))
}

async fn answer(url: &str, idle: Duration, request: RequestBuilder) -> Result<Response, HttpError> {
    match timeout(idle, request.send()).await {
        Err(_) => Err(HttpError::Stalled { url: url.to_owned(), waited: idle }),
        Ok(Err(error)) if error.is_redirect() => Err(HttpError::Redirects { url: url.to_owned() }),
        Ok(answer) => answer.map_err(|e| HttpError::Connect { url: url.to_owned(), source: e.without_url() }),
    }
}

pub(super) async fn next_piece(
    url: &str,
    idle: Duration,
    response: &mut Response,
) -> Result<Option<Bytes>, HttpError> {
    match timeout(idle, response.chunk()).await {
        Err(_) => Err(HttpError::Stalled { url: url.to_owned(), waited: idle }),
        Ok(piece) => piece.map_err(|e| HttpError::Transfer { url: url.to_owned(), source: e.without_url() }),
    }
}

pub(super) fn check_encoding(url: &str, headers: &HeaderMap) -> Result<(), HttpError> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            let encoding = String::from_utf8_lossy(encoding.as_bytes()).into_owned();
            Err(HttpError::Encoded { url: url.to_owned(), encoding })
        }
        _ => Ok(()),
    }
}

/// The error for a status that is not success.
pub(super) fn bad_status(url: &str, response: &Response) -> HttpError {
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
pub(super) struct Retries {
    deadline: Duration,
    attempts: u32,
}

impl Retries {
    pub(super) fn new(deadline: Duration) -> Self {
        Self { deadline, attempts: 0 }
    }

    /// Forgets the attempts so far, after a success.
    pub(super) fn reset(&mut self) {
        self.attempts = 0;
    }

    /// Waits before the next attempt, or ends in an error when `error` is final or the deadline, which counts from
    /// `since`, would pass.
    pub(super) async fn pause(
        &mut self,
        url: &str,
        since: Instant,
        error: HttpError,
    ) -> Result<(), HttpError> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_http_urls_are_taken() {
        assert!(check_url("http://127.0.0.1:1/x").is_ok() && check_url("https://host/x").is_ok());
        for bad in ["", "x", "/path", "file:///x", "ftp://host/x", "http://"] {
            assert!(matches!(check_url(bad), Err(HttpError::Url { .. })), "{bad}");
        }
    }
}
