//! What everything over HTTP in a process shares: connections, budgets of requests, and who we are to which host.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use reqwest::StatusCode;
use reqwest::header::HeaderMap;
use tokio::time::timeout;

use super::address::Address;
use super::budget::RequestBudgets;
use super::credential::Credential;
use super::error::HttpError;
use super::keyring::Keyring;
use super::redirect::{Route, fetch};
use super::retry::{Retries, bad_status};
use super::transport::{HttpOptions, Transport, check_encoding, next_piece, own_connection};

/// Connections, budgets and timeouts, shared by everything that talks HTTP in a process. Cheap to clone; keep one, so
/// that a pack is fetched over the connection its registry came through.
#[derive(Debug, Clone)]
pub struct HttpClient(Arc<ClientShared>);

#[derive(Debug)]
struct ClientShared {
    transport: Transport,
    budgets: RequestBudgets,
    keyring: Keyring,
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
            budgets: RequestBudgets::new(options.demand_requests, options.prefetch_requests),
            keyring: Keyring::new(options.credentials.clone()),
            transport: Transport::new(options),
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
        self.get_within(url, limit, self.options().document_deadline).await
    }

    /// The same, failing and retrying for `deadline` at most. An attempt that is getting somewhere is not cut short.
    pub async fn get_within(&self, url: &str, limit: u64, deadline: Duration) -> Result<Bytes, HttpError> {
        let (address, in_url) = Address::parse(url)?;
        let credential = in_url.or_else(|| self.0.keyring.credential_for(&address));
        let started = Instant::now();
        let mut retries = Retries::new(deadline);
        loop {
            // Bounds an attempt whose bytes drip in.
            let patience = self.options().idle_timeout * 6;
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
        // Whoever needs the host hears what is wrong with it.
        tokio::spawn(async move { this.0.transport.preconnect(&address, credential.as_ref()).await });
    }

    /// The way to the object at a URL.
    pub(super) fn route(&self, url: &str) -> Result<Route, HttpError> {
        let (address, in_url) = Address::parse(url)?;
        let credential = in_url.or_else(|| self.0.keyring.credential_for(&address));
        Ok(Route::new(address, credential))
    }

    /// Where temporary copies of whole objects go.
    pub(crate) fn download_dir(&self) -> PathBuf {
        self.options().download_dir.clone().unwrap_or_else(std::env::temp_dir)
    }

    pub(super) fn options(&self) -> &HttpOptions {
        self.0.transport.options()
    }

    pub(super) fn transport(&self) -> &Transport {
        &self.0.transport
    }

    pub(super) fn budgets(&self) -> &RequestBudgets {
        &self.0.budgets
    }

    async fn get_once(
        &self,
        address: &Address,
        credential: Option<&Credential>,
        limit: u64,
        again: bool,
    ) -> Result<Bytes, HttpError> {
        let (url, idle) = (address.label(), self.options().idle_timeout);
        let headers = HeaderMap::from_iter(own_connection().into_iter().filter(|_| again));
        let mut response = fetch(self.transport(), address.clone(), credential, idle, &headers).await?;
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
