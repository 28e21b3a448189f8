//! Who asks: this user, over the Unix socket, or whoever shows a token.

use super::error::ApiError;
use crate::listener::Peer;
use crate::sandboxes::Owner;
use crate::state::Daemon;
use axum::extract::{FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::sync::Arc;

/// In front of a token.
const BEARER: &str = "bearer ";

/// Who asks, as requests carry it.
#[derive(Debug, Clone)]
pub struct Caller(pub Owner);

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Caller, ApiError> {
        parts.extensions.get::<Caller>().cloned().ok_or_else(unauthorized)
    }
}

/// Lets through who may ask.
pub async fn identify(State(daemon): State<Arc<Daemon>>, mut request: Request, next: Next) -> Response {
    let peer = request.extensions().get::<Peer>().copied();
    let owner = match peer {
        Some(Peer::Unix) => Some(Owner::User),
        _ => tenant(&daemon, request.headers()).map(Owner::Tenant),
    };
    match owner {
        Some(owner) => {
            let caller = Caller(owner);
            request.extensions_mut().insert(caller.clone());
            let mut response = next.run(request).await;
            // For the audit log.
            response.extensions_mut().insert(caller);
            response
        }
        None => unauthorized().into_response(),
    }
}

fn tenant(daemon: &Daemon, headers: &HeaderMap) -> Option<String> {
    let value = headers.get(header::AUTHORIZATION)?.as_bytes();
    let (scheme, token) = value.split_at_checked(BEARER.len())?;
    if !scheme.eq_ignore_ascii_case(BEARER.as_bytes()) {
        return None;
    }
    daemon.tokens.as_ref()?.tenant(token).map(str::to_owned)
}

fn unauthorized() -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, "unauthorized", "a token of this daemon is needed")
        .hint("send `Authorization: Bearer TOKEN` with one of the daemon's --token-file")
}
