//! Bodies of requests: JSON, with a limit on its length and on the time that it takes.

use super::error::ApiError;
use axum::body::{Body, to_bytes};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::time::timeout;

/// Longest JSON document, bytes.
const JSON_MAX: usize = 1 << 20;
/// How long it may take to arrive.
const JSON_TIMEOUT: Duration = Duration::from_secs(20);

/// A request's body as JSON; an empty body is an empty object.
pub struct JsonBody<T> {
    /// What it says.
    pub value: T,
    /// The bytes that said so.
    pub bytes: Bytes,
}

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for JsonBody<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, _: &S) -> Result<JsonBody<T>, ApiError> {
        let bytes = read(request.into_body()).await?;
        let text = if bytes.is_empty() { b"{}" } else { &bytes[..] };
        let value = serde_json::from_slice(text).map_err(|error| ApiError::invalid(error.to_string()))?;
        Ok(JsonBody { value, bytes })
    }
}

async fn read(body: Body) -> Result<Bytes, ApiError> {
    let too_large = || {
        let message = format!("the body is longer than {JSON_MAX} bytes");
        ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
    };
    match timeout(JSON_TIMEOUT, to_bytes(body, JSON_MAX)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) if is_limit(&error) => Err(too_large()),
        Ok(Err(error)) => Err(ApiError::invalid(format!("the body cannot be read: {error}"))),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "timeout", "the body takes too long")),
    }
}

fn is_limit(error: &axum::Error) -> bool {
    let mut cause: Option<&dyn std::error::Error> = Some(error);
    while let Some(error) = cause {
        if error.is::<http_body_util::LengthLimitError>() {
            return true;
        }
        cause = error.source();
    }
    false
}
