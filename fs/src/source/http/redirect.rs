//! Where an object is now: redirects are followed here, once, and what they lead to is remembered. Release hosts answer
//! with signed URLs that live for minutes; when one is refused, the way is asked for once again, by one reader for all.

use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use reqwest::header::{self, HeaderMap};
use reqwest::{Response, StatusCode};

use super::address::Address;
use super::credential::Credential;
use super::error::HttpError;
use super::retry::bad_status;
use super::transport::Transport;

/// Most redirects followed in a row.
const MAX_REDIRECTS: usize = 10;

/// The way to one object.
#[derive(Debug)]
pub(super) struct Route {
    start: Address,
    credential: Option<Credential>,
    known: Mutex<KnownRoute>,
    /// Held by whoever asks for the way again.
    resolving: tokio::sync::Mutex<()>,
    /// Requests sent, each redirect's one too.
    requests: AtomicU64,
}

/// What is known of the way.
#[derive(Debug, Default)]
struct KnownRoute {
    /// How often the way was found out.
    generation: u64,
    target: Option<Target>,
    /// What the last finding out ended in, when that was a refusal.
    refused: Option<StatusCode>,
}

/// Where redirects lead.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Target {
    address: Address,
    /// Whether any redirect led here.
    redirected: bool,
    /// Whether every step so far stayed at the host that may have the credentials.
    at_home: bool,
}

impl Route {
    pub(super) fn new(start: Address, credential: Option<Credential>) -> Self {
        let (known, resolving) = (Mutex::default(), tokio::sync::Mutex::default());
        Self { start, credential, known, resolving, requests: AtomicU64::new(0) }
    }

    /// Requests sent so far, each redirect's one too.
    pub(super) fn requests(&self) -> u64 {
        self.requests.load(Relaxed)
    }

    /// What messages call the object: its URL, and where that leads.
    pub(super) fn label(&self) -> String {
        let known = self.known.lock().expect("no panics while held");
        match known.target.as_ref().filter(|target| target.redirected) {
            Some(target) => format!("{} (redirected to {})", self.start.label(), target.address.label()),
            None => self.start.label().to_owned(),
        }
    }

    /// The URL the object was named by, for messages.
    pub(super) fn start(&self) -> &str {
        self.start.label()
    }

    /// Sends a GET with `headers` to where the object is. The answer is never a redirect; an error status
    /// is left to the caller.
    pub(super) async fn send(
        &self,
        transport: &Transport,
        idle: Duration,
        headers: &HeaderMap,
    ) -> Result<Response, HttpError> {
        let (generation, target) = self.known();
        let Some(target) = target else {
            // Several first readers ask side by side: waiting for one of them would cost the others a round trip.
            return self.resolve(transport, idle, headers, generation).await;
        };
        let answer = self.exchange(transport, &target, idle, headers).await;
        match answer {
            Ok(response) if is_stale(&target, response.status()) => {
                drop(response);
                self.resolve_again(transport, idle, headers, generation).await
            }
            // The host it leads to may be gone for good: the next attempt asks for the way.
            Err(error) if target.redirected => {
                self.forget(generation);
                Err(error)
            }
            answer => answer,
        }
    }

    /// Finds the way again after generation `generation` of it went stale, or uses what another reader found meanwhile.
    async fn resolve_again(
        &self,
        transport: &Transport,
        idle: Duration,
        headers: &HeaderMap,
        generation: u64,
    ) -> Result<Response, HttpError> {
        let turn = self.resolving.lock().await;
        let (newest, refused, target) = {
            let known = self.known.lock().expect("no panics while held");
            (known.generation, known.refused, known.target.clone())
        };
        if newest == generation {
            return self.resolve(transport, idle, headers, generation).await;
        }
        drop(turn);
        match (refused, target) {
            (Some(status), _) => Err(bad_status(&self.label(), status, &HeaderMap::new())),
            (None, Some(target)) => self.exchange(transport, &target, idle, headers).await,
            (None, None) => self.resolve(transport, idle, headers, newest).await,
        }
    }

    /// Follows redirects from the start and remembers where they lead, unless that was found out since `generation`.
    async fn resolve(
        &self,
        transport: &Transport,
        idle: Duration,
        headers: &HeaderMap,
        generation: u64,
    ) -> Result<Response, HttpError> {
        let start = Target { address: self.start.clone(), redirected: false, at_home: true };
        let count = || _ = self.requests.fetch_add(1, Relaxed);
        let (response, target) =
            follow(transport, start, self.credential.as_ref(), idle, headers, &count).await?;
        let status = response.status();
        let mut known = self.known.lock().expect("no panics while held");
        if known.generation == generation && !is_passing(status) {
            let refused = is_refusal(status);
            let target = (!refused).then_some(target);
            *known = KnownRoute { generation: generation + 1, target, refused: refused.then_some(status) };
        }
        Ok(response)
    }

    async fn exchange(
        &self,
        transport: &Transport,
        target: &Target,
        idle: Duration,
        headers: &HeaderMap,
    ) -> Result<Response, HttpError> {
        let credential = self.credential.as_ref().filter(|_| target.at_home);
        self.requests.fetch_add(1, Relaxed);
        transport.exchange(&target.address, credential, idle, headers).await
    }

    fn known(&self) -> (u64, Option<Target>) {
        let known = self.known.lock().expect("no panics while held");
        (known.generation, known.target.clone())
    }

    /// The next request asks the way again.
    pub(super) fn forget_all(&self) {
        let mut known = self.known.lock().expect("no panics while held");
        *known = KnownRoute { generation: known.generation + 1, ..KnownRoute::default() };
    }

    fn forget(&self, generation: u64) {
        let mut known = self.known.lock().expect("no panics while held");
        if known.generation == generation {
            *known = KnownRoute { generation: generation + 1, ..KnownRoute::default() };
        }
    }
}

/// Fetches `address` once with `headers`, following redirects and remembering nothing.
pub(super) async fn fetch(
    transport: &Transport,
    address: Address,
    credential: Option<&Credential>,
    idle: Duration,
    headers: &HeaderMap,
) -> Result<Response, HttpError> {
    let start = Target { address, redirected: false, at_home: true };
    Ok(follow(transport, start, credential, idle, headers, &|| ()).await?.0)
}

/// Asks at `at` and wherever redirects lead from there, until an answer is none.
async fn follow(
    transport: &Transport,
    mut at: Target,
    credential: Option<&Credential>,
    idle: Duration,
    headers: &HeaderMap,
    count: &(impl Fn() + Sync),
) -> Result<(Response, Target), HttpError> {
    let start = at.address.clone();
    let mut seen = Vec::new();
    loop {
        let credential = credential.filter(|_| at.at_home);
        count();
        let response = transport.exchange(&at.address, credential, idle, headers).await?;
        if !is_redirect(response.status()) {
            return Ok((response, at));
        }
        let location = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
        let Some(location) = location else {
            let (url, status) = (at.address.label().to_owned(), response.status().as_u16());
            return Err(HttpError::Status { url, status });
        };
        let next = at.address.redirected_to(location)?;
        seen.push(at.address);
        if seen.len() > MAX_REDIRECTS || seen.contains(&next) {
            return Err(HttpError::Redirects { url: start.label().to_owned() });
        }
        let at_home = at.at_home && next.origin() == start.origin();
        at = Target { address: next, redirected: true, at_home };
    }
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// What hosts say of signed URLs that have expired.
fn is_refusal(status: StatusCode) -> bool {
    // 400 is what some object stores answer to a signature that has expired.
    matches!(status.as_u16(), 400 | 401 | 403 | 404 | 410)
}

/// An answer that says nothing about the way.
fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || matches!(status.as_u16(), 408 | 429)
}

fn is_stale(target: &Target, status: StatusCode) -> bool {
    is_redirect(status) || (target.redirected && is_refusal(status))
}
