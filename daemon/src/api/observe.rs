//! What is noted of every request: an id, which the answer has too, a line in the log, and a count.

use super::caller::Caller;
use crate::audit::{Action, now};
use crate::metrics::RequestLabels;
use crate::state::Daemon;
use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::Response;
use rustix::rand::{GetRandomFlags, getrandom};
use std::sync::Arc;
use std::time::Instant;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Longest id that is taken from a client.
const ID_MAX: usize = 128;
/// What unknown paths are counted as: names from outside are no labels.
const OTHER: &str = "other";
/// Methods that are counted by their names.
const METHODS: [&str; 5] = ["GET", "HEAD", "POST", "PUT", "DELETE"];

/// See the module's description.
pub async fn observe(State(daemon): State<Arc<Daemon>>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let id = request_id(&request);
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let path = request.uri().path().to_owned();
    let mut response = next.run(request).await;
    let status = response.status().as_u16();
    let labels = RequestLabels {
        method: METHODS.iter().find(|known| **known == method.as_str()).unwrap_or(&OTHER).to_string(),
        route: route.unwrap_or_else(|| OTHER.to_owned()),
        status,
    };
    daemon.metrics.requests.get_or_create(&labels).inc();
    let ms = begun.elapsed().as_secs_f64() * 1e3;
    tracing::info!(%method, ?path, status, ms, ?id, "answered");
    let acts = method != Method::GET && method != Method::HEAD;
    if acts || status == StatusCode::SWITCHING_PROTOCOLS.as_u16() {
        audit(
            &daemon,
            &response,
            &Action {
                time: now(),
                request: id.to_str().unwrap_or_default(),
                tenant: None,
                method: method.as_str(),
                path: &path,
                status,
                ms,
            },
        );
    }
    response.headers_mut().insert(REQUEST_ID, id);
    response
}

/// Whoever acted was identified on the way to the answer.
fn audit(daemon: &Daemon, response: &Response, action: &Action<'_>) {
    if let Some(audit) = &daemon.audit {
        let caller = response.extensions().get::<Caller>();
        let tenant = caller.and_then(|Caller(owner)| owner.tenant());
        audit.note(&Action { tenant: tenant.as_deref(), ..*action });
    }
}

/// The client's, if it is one, or else a new one.
fn request_id(request: &Request) -> HeaderValue {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"-_.".contains(byte);
    let given = request.headers().get(REQUEST_ID).filter(|id| {
        let bytes = id.as_bytes();
        (1..=ID_MAX).contains(&bytes.len()) && bytes.iter().all(plain)
    });
    given.cloned().unwrap_or_else(|| {
        let mut random = [0; 8];
        // A kernel without randomness for 8 bytes does not run sandboxes either.
        let _ = getrandom(&mut random, GetRandomFlags::empty());
        HeaderValue::from_str(&format!("{:016x}", u64::from_ne_bytes(random)))
            .unwrap_or(HeaderValue::from_static("0"))
    })
}
