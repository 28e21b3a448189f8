//! Connections, timeouts and single exchanges. The only file that sets up reqwest.
//!
//! Proxies come from `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`; trusted roots from the system's store, or
//! from `SSL_CERT_FILE` and `SSL_CERT_DIR`.

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, RequestBuilder, Response, redirect};
use tokio::time::timeout;

use super::address::Address;
use super::credential::Credential;
use super::error::HttpError;
use super::keyring::Credentials;
use super::names::SystemResolver;

/// Timeouts, budgets and identity of an [`super::HttpClient`].
#[derive(Debug, Clone)]
pub struct HttpOptions {
    /// Longest wait for a connection.
    pub connect_timeout: Duration,
    /// Longest wait for an answer to begin, or for its next bytes.
    pub idle_timeout: Duration,
    /// How long fetching a whole document ([`super::HttpClient::get`]) may fail and be retried.
    pub document_deadline: Duration,
    /// Most demand requests under way.
    pub demand_requests: usize,
    /// Most prefetch requests under way, beside those.
    pub prefetch_requests: usize,
    /// Who we are to hosts the user named.
    pub credentials: Credentials,
    /// Where copies of objects are kept whose host serves no byte ranges: files without a name, gone with the process.
    /// `None`: the system's temporary directory.
    pub download_dir: Option<PathBuf>,
    /// Most bytes downloaded of such an object when neither a registry nor the host tells its size.
    pub download_limit: u64,
}

impl Default for HttpOptions {
    fn default() -> Self {
        Self {
            connect_timeout: Duration::from_secs(5),
            idle_timeout: Duration::from_secs(10),
            document_deadline: Duration::from_secs(5),
            demand_requests: 32,
            prefetch_requests: 4,
            credentials: Credentials::default(),
            download_dir: None,
            download_limit: 16 << 30,
        }
    }
}

/// The connections of a client. They are set up by the first request.
#[derive(Debug)]
pub(super) struct Transport {
    options: HttpOptions,
    /// Whose connections are kept for later requests.
    keeping: Clients,
    /// Whose connections serve one request each.
    closing: Clients,
}

#[derive(Debug, Default)]
struct Clients {
    /// For http URLs. Reading the system's root certificates takes longer than a round trip; this one does without.
    plain: OnceLock<Client>,
    /// For https URLs.
    secure: OnceLock<Client>,
}

impl Transport {
    pub(super) fn new(options: HttpOptions) -> Self {
        Self { options, keeping: Clients::default(), closing: Clients::default() }
    }

    pub(super) fn options(&self) -> &HttpOptions {
        &self.options
    }

    /// Opens one more connection to a host, by a request for nothing. Says nothing of failures.
    pub(super) async fn preconnect(&self, address: &Address, credential: Option<&Credential>) {
        if let Ok(client) = self.client(address.is_secure(), true) {
            let request = dressed(client.head(address.url().clone()), credential);
            drop(timeout(self.options.idle_timeout, request.send()).await);
        }
    }

    /// Sends one GET with `headers`, following nothing; the answer's body is still to come.
    pub(super) async fn exchange(
        &self,
        address: &Address,
        credential: Option<&Credential>,
        idle: Duration,
        headers: &HeaderMap,
    ) -> Result<Response, HttpError> {
        let client = self.client(address.is_secure(), !headers.contains_key(header::CONNECTION))?;
        let request = client.get(address.url().clone()).headers(headers.clone());
        let request = request.header(header::ACCEPT_ENCODING, "identity");
        let request = dressed(request, credential);
        match timeout(idle, request.send()).await {
            Err(_) => Err(HttpError::Stalled { url: address.label().to_owned(), waited: idle }),
            Ok(answer) => answer.map_err(|error| HttpError::of_failed_exchange(address.label(), error)),
        }
    }

    /// `keep`: whether connections serve more than one request.
    fn client(&self, secure: bool, keep: bool) -> Result<&Client, HttpError> {
        let clients = if keep { &self.keeping } else { &self.closing };
        let builder = || self.builder().pool_max_idle_per_host(if keep { usize::MAX } else { 0 });
        // A proxy that is itself reached by TLS needs the roots after all.
        let proxy = ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"].map(std::env::var);
        if secure || proxy.iter().flatten().any(|proxy| proxy.starts_with("https:")) {
            return set_up(&clients.secure, builder);
        }
        set_up(&clients.plain, || builder().tls_certs_only([]))
    }

    fn builder(&self) -> reqwest::ClientBuilder {
        // Fails when another provider is installed already, which is as good.
        let _ = rustls::crypto::ring::default_provider().install_default();
        Client::builder()
            .redirect(redirect::Policy::none())
            .dns_resolver(SystemResolver)
            .connect_timeout(self.options.connect_timeout)
            .tcp_nodelay(true)
            .http1_only()
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("forkd/", env!("CARGO_PKG_VERSION")))
    }
}

fn dressed(request: RequestBuilder, credential: Option<&Credential>) -> RequestBuilder {
    match credential {
        Some(credential) => credential.dress(request),
        None => request,
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

/// What a request says that is to have a connection of its own ([`Transport::exchange`] heeds it too). After a wrong
/// answer: behind one address may be several servers, of which a connection keeps the one it began with.
pub(super) fn own_connection() -> [(HeaderName, HeaderValue); 1] {
    [(header::CONNECTION, HeaderValue::from_static("close"))]
}

/// The next piece of a body, `None` at its end.
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

/// Refuses a body that is not sent as it is.
pub(super) fn check_encoding(url: &str, headers: &HeaderMap) -> Result<(), HttpError> {
    match headers.get(header::CONTENT_ENCODING) {
        Some(encoding) if encoding != "identity" => {
            let encoding = String::from_utf8_lossy(encoding.as_bytes()).into_owned();
            Err(HttpError::Encoded { url: url.to_owned(), encoding })
        }
        _ => Ok(()),
    }
}
