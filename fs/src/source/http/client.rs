//! Connections, timeouts and single exchanges: what everything over HTTP shares. The only file that sets up reqwest.
//!
//! Proxies come from `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy`; trusted roots from the system's store, or
//! from `SSL_CERT_FILE` and `SSL_CERT_DIR`.

use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::header::{self, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Client, Response, StatusCode, redirect};
use tokio::time::timeout;

use super::address::Address;
use super::credentials::{Credential, Credentials, Keyring};
use super::lanes::Lanes;
use super::names::SystemNames;
use super::redirect::{Route, fetch};
use super::retry::{Retries, bad_status};
use super::{HttpError, HttpSource};
use crate::source::Deadlines;

/// Timeouts, budgets and identity of an [`HttpClient`].
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
    /// Who we are to hosts the user named.
    pub credentials: Credentials,
    /// Where copies of objects are kept whose host serves no byte ranges: files without a name, gone with the process.
    /// `None`: the system's temporary directory.
    pub spool_dir: Option<PathBuf>,
    /// Most bytes downloaded of such an object when neither a registry nor the host tells its size.
    pub spool_limit: u64,
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
            spool_dir: None,
            spool_limit: 16 << 30,
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
    /// Whose connections are kept for later requests.
    keeping: Clients,
    /// Whose connections serve one request each.
    closing: Clients,
    lanes: Lanes,
    keyring: Keyring,
}

#[derive(Debug, Default)]
struct Clients {
    /// For http URLs. Reading the system's root certificates takes longer than a round trip; this one does without.
    plain: OnceLock<Client>,
    /// For https URLs.
    secure: OnceLock<Client>,
}

impl Default for HttpClient {
    fn default() -> Self {
        Self::new(HttpOptions::default())
    }
}

impl HttpClient {
    /// Costs nothing: the client proper is set up by its first request.
    pub fn new(options: HttpOptions) -> Self {
        Self(Arc::new(ClientShared {
            keeping: Clients::default(),
            closing: Clients::default(),
            lanes: Lanes::new(options.demand_requests, options.prefetch_requests),
            keyring: Keyring::new(options.credentials.clone()),
            options,
        }))
    }

    /// The user named this URL: its scheme, host and port may learn who we are ([`HttpOptions::credentials`]). What is
    /// no http(s) URL is ignored.
    pub fn authorize(&self, url: &str) {
        if let Ok((address, in_url)) = Address::parse(url) {
            self.0.keyring.authorize(&address, in_url);
        }
    }

    /// Fetches a whole document of at most `limit` bytes, such as a registry.json, retrying up to the document
    /// deadline.
    pub async fn get(&self, url: &str, limit: u64) -> Result<Bytes, HttpError> {
        self.get_within(url, limit, self.0.options.document_deadline).await
    }

    /// The same, failing and retrying for `deadline` at most. An attempt that is getting somewhere is not cut short.
    pub async fn get_within(&self, url: &str, limit: u64, deadline: Duration) -> Result<Bytes, HttpError> {
        let (address, in_url) = Address::parse(url)?;
        let credential = in_url.or_else(|| self.0.keyring.credential_for(&address));
        let started = Instant::now();
        let mut retries = Retries::new(deadline);
        loop {
            // Bounds an attempt whose bytes drip in.
            let patience = self.0.options.idle_timeout * 6;
            let stalled = |_| HttpError::Stalled { url: address.label().to_owned(), waited: patience };
            let again = retries.after_wrong_answer();
            let attempt = self.get_once(&address, credential.as_ref(), limit, again);
            match timeout(patience, attempt).await.unwrap_or_else(|e| Err(stalled(e))) {
                Ok(document) => return Ok(document),
                Err(error) => retries.pause(address.label(), started, error).await?,
            }
        }
    }

    /// Opens one more connection to the host of `url`, by a request for nothing, and does not wait for it: of two
    /// requests that are sent at once later, the second would otherwise wait a round trip for its connection. It says
    /// who we are as [`HttpClient::get`] does. Needs a tokio runtime.
    pub fn preconnect(&self, url: &str) {
        let Ok((address, in_url)) = Address::parse(url) else { return };
        let credential = in_url.or_else(|| self.0.keyring.credential_for(&address));
        let this = self.clone();
        tokio::spawn(async move {
            if let Ok(client) = this.client(address.is_secure(), true) {
                let request = client.head(address.url().clone());
                let request = match &credential {
                    Some(credential) => credential.dress(request),
                    None => request,
                };
                // Whoever needs the host hears what is wrong with it.
                drop(timeout(this.0.options.idle_timeout, request.send()).await);
            }
        });
    }

    /// An object to read ranges of. `size` is what a registry says about it; an object of another size is refused.
    pub fn source(
        &self,
        url: &str,
        size: Option<u64>,
        deadlines: Deadlines,
    ) -> Result<HttpSource, HttpError> {
        let (address, in_url) = Address::parse(url)?;
        let credential = in_url.or_else(|| self.0.keyring.credential_for(&address));
        Ok(HttpSource::new(self.clone(), Route::new(address, credential), size, deadlines))
    }

    /// Where temporary copies of whole objects go.
    pub(crate) fn spool_dir(&self) -> PathBuf {
        self.0.options.spool_dir.clone().unwrap_or_else(std::env::temp_dir)
    }

    pub(super) fn options(&self) -> &HttpOptions {
        &self.0.options
    }

    pub(super) fn lanes(&self) -> &Lanes {
        &self.0.lanes
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
        let request = match credential {
            Some(credential) => credential.dress(request),
            None => request,
        };
        match timeout(idle, request.send()).await {
            Err(_) => Err(HttpError::Stalled { url: address.label().to_owned(), waited: idle }),
            Ok(answer) => answer.map_err(|error| HttpError::of_failed_exchange(address.label(), error)),
        }
    }

    /// `keep`: whether connections serve more than one request.
    fn client(&self, secure: bool, keep: bool) -> Result<&Client, HttpError> {
        let clients = if keep { &self.0.keeping } else { &self.0.closing };
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
            .dns_resolver(SystemNames)
            .connect_timeout(self.0.options.connect_timeout)
            .tcp_nodelay(true)
            .http1_only()
            .pool_idle_timeout(Duration::from_secs(30))
            .user_agent(concat!("forkd/", env!("CARGO_PKG_VERSION")))
    }

    async fn get_once(
        &self,
        address: &Address,
        credential: Option<&Credential>,
        limit: u64,
        again: bool,
    ) -> Result<Bytes, HttpError> {
        let (url, idle) = (address.label(), self.0.options.idle_timeout);
        let headers = HeaderMap::from_iter(own_connection().into_iter().filter(|_| again));
        let mut response = fetch(self, address.clone(), credential, idle, &headers).await?;
        if response.status() != StatusCode::OK {
            return Err(bad_status(url, response.status(), response.headers()));
        }
        check_encoding(url, response.headers())?;
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

/// What a request says that is to have a connection of its own ([`HttpClient::exchange`] heeds it too). After a wrong
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
