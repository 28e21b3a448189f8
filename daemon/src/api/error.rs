//! How a request fails: a status, and `{code, message, hint}`. The table of what the engine's errors lead to is here.

use crate::blocking::BusyError;
use crate::order::{FailureKind, OrderError};
use crate::pool::PoolError;
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use forkd_engine::chain::{chain, plain};
use forkd_engine::fork::agent::ClientError;
use forkd_engine::fork::children::ChildrenError;
use forkd_engine::fork::copy::CopyError;
use forkd_engine::hub::registry::RegistryError;
use forkd_engine::local::run_dir::RunDirError;
use forkd_engine::local::snapshots::SnapshotError;
use serde::Serialize;
use utoipa::ToSchema;

/// A request that failed.
#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: ErrorBody,
    /// When to try again, s.
    retry_after: Option<u32>,
}

/// What a client hears of a failure.
#[derive(Debug, Serialize, ToSchema)]
pub struct ErrorBody {
    /// For programs: `not_found`, `invalid_request`, ...
    pub code: &'static str,
    /// For people: what failed and why.
    pub message: String,
    /// What could be done.
    pub hint: Option<&'static str>,
}

impl ApiError {
    /// One of that status and code.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<String>) -> ApiError {
        let body = ErrorBody { code, message: message.into(), hint: None };
        ApiError { status, body, retry_after: None }
    }

    /// With what could be done.
    pub fn hint(mut self, hint: &'static str) -> ApiError {
        self.body.hint = Some(hint);
        self
    }

    /// With when to try again, s.
    pub fn retry_after(mut self, seconds: u32) -> ApiError {
        self.retry_after = Some(seconds);
        self
    }

    /// The request makes no sense.
    pub fn invalid(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::BAD_REQUEST, "invalid_request", message)
    }

    /// There is no such thing.
    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, "not_found", message)
    }

    /// This host's fault.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, "internal", message)
            .hint("the daemon's log says more; `forkd doctor` says what this host lacks")
    }

    /// What a client is told.
    pub fn body(&self) -> &ErrorBody {
        &self.body
    }

    /// What failed and why.
    pub fn message(&self) -> &str {
        &self.body.message
    }

    /// What came of a fork.
    pub fn of_fork(kind: FailureKind, message: &str) -> ApiError {
        let message = plain(message);
        match kind {
            FailureKind::NotFound => ApiError::not_found(message)
                .hint("GET /v1/snapshots lists local snapshots, GET /v1/images packages of the hub"),
            FailureKind::Refused => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "refused", message),
            FailureKind::Upstream => ApiError::new(StatusCode::BAD_GATEWAY, "upstream", message),
            FailureKind::Host => ApiError::internal(message),
        }
    }

    /// There are as many sandboxes as may be.
    pub fn too_many(limit: usize) -> ApiError {
        let message = format!("there are {limit} sandboxes at most");
        ApiError::new(StatusCode::TOO_MANY_REQUESTS, "too_many_sandboxes", message)
            .hint("end some, or start the daemon with a higher --max-sandboxes")
            .retry_after(1)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<BusyError> for ApiError {
    fn from(error: BusyError) -> ApiError {
        match error {
            BusyError::Full => {
                ApiError::new(StatusCode::TOO_MANY_REQUESTS, "busy", chain(&error)).retry_after(1)
            }
            BusyError::Panicked(_) => ApiError::internal(chain(&error)),
        }
    }
}

impl From<OrderError> for ApiError {
    fn from(error: OrderError) -> ApiError {
        ApiError::invalid(chain(&error))
    }
}

impl From<PoolError> for ApiError {
    fn from(error: PoolError) -> ApiError {
        ApiError::internal(chain(&error))
    }
}

impl From<RunDirError> for ApiError {
    fn from(error: RunDirError) -> ApiError {
        let message = chain(&error);
        match error {
            RunDirError::UnknownChild { id } => ApiError::not_found(format!("there is no sandbox {id}")),
            RunDirError::UnknownFork { .. } | RunDirError::Dead { .. } => ApiError::not_found(message),
            RunDirError::Refused { .. } => ApiError::new(StatusCode::CONFLICT, "refused", message),
            RunDirError::OtherVersion { .. } => {
                ApiError::new(StatusCode::NOT_IMPLEMENTED, "other_version", message)
            }
            _ => ApiError::internal(message),
        }
    }
}

impl From<ChildrenError> for ApiError {
    fn from(error: ChildrenError) -> ApiError {
        let message = chain(&error);
        match error {
            ChildrenError::RunDir(error) => error.into(),
            ChildrenError::Paused { .. } => ApiError::new(StatusCode::CONFLICT, "paused", message)
                .hint("POST /v1/sandboxes/{id}/resume lets it go on"),
            ChildrenError::NoGateway { .. } => ApiError::new(StatusCode::CONFLICT, "no_gateway", message)
                .hint("create it with network \"nat\" for a way out"),
            ChildrenError::Agent { source, .. } => source.into(),
            _ => ApiError::internal(message),
        }
    }
}

impl From<ClientError> for ApiError {
    fn from(error: ClientError) -> ApiError {
        let message = chain(&error);
        let of_guest = |code| ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, code, message.clone());
        match error {
            ClientError::NotStarted { .. } => of_guest("not_started"),
            ClientError::Agent { .. } => of_guest("guest_error"),
            ClientError::FileTooLong { .. } => {
                ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, "too_large", message)
            }
            ClientError::Timeout { .. } => ApiError::new(StatusCode::GATEWAY_TIMEOUT, "timeout", message),
            ClientError::Outdated => ApiError::new(StatusCode::NOT_IMPLEMENTED, "outdated", message)
                .hint("build the snapshot again with this forkd"),
            _ => ApiError::new(StatusCode::BAD_GATEWAY, "no_answer", message)
                .hint("GET /v1/sandboxes/{id} says whether it lives, `forkd logs ID` shows its console"),
        }
    }
}

impl From<SnapshotError> for ApiError {
    fn from(error: SnapshotError) -> ApiError {
        ApiError::internal(chain(&error))
    }
}

impl From<RegistryError> for ApiError {
    fn from(error: RegistryError) -> ApiError {
        match &error {
            RegistryError::NoHub => ApiError::not_found(chain(&error))
                .hint("start the daemon with --hub, or set FORKD_HUB_URL for it"),
            _ => ApiError::new(StatusCode::BAD_GATEWAY, "upstream", chain(&error)),
        }
    }
}

impl From<CopyError> for ApiError {
    fn from(error: CopyError) -> ApiError {
        match error {
            CopyError::Client(error) => error.into(),
            error => ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "copy_failed", chain(&error)),
        }
    }
}
