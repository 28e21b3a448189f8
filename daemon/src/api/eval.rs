//! POST /v1/sandboxes/{id}/eval: code for the warm worker.

use super::body::JsonBody;
use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use super::sandboxes::found;
use crate::state::Daemon;
use axum::Json;
use axum::extract::{Path, State};
use forkd_abi::protocol::Answer;
use forkd_engine::fork::children::{self, ChildrenError, agent_error};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::Duration;
use utoipa::ToSchema;

/// How long code may run, s, without another wish and at most.
const TIMEOUT: (u64, u64) = (600, 7 * 24 * 3600);

/// Code.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct EvalRequest {
    /// In the worker's language.
    code: String,
    /// How long to wait for the answer, s: 600 without it.
    timeout_s: Option<u64>,
}

/// What the worker made of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Evaluated {
    /// The value, written as the worker's language writes values; null when the code has none or failed.
    answer: Option<String>,
    /// Why the code failed.
    error: Option<String>,
    /// What the code printed.
    output: Option<String>,
}

/// Has the warm worker evaluate code. Code that fails is an answer, too.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/eval", tag = "inside", params(("id" = String, Path)),
    request_body = EvalRequest,
    responses((status = 200, body = Evaluated), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody),
        (status = 422, body = ErrorBody), (status = 504, body = ErrorBody)))]
pub async fn eval(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    JsonBody { value: EvalRequest { code, timeout_s }, .. }: JsonBody<EvalRequest>,
) -> Result<Json<Evaluated>, ApiError> {
    found(&daemon, &owner, &id).await?;
    let permit = daemon.blocking.stream()?;
    let paths = daemon.paths.clone();
    let timeout = Duration::from_secs(timeout_s.unwrap_or(TIMEOUT.0).clamp(1, TIMEOUT.1));
    let asked = tokio::task::spawn_blocking(move || -> Result<Answer, ChildrenError> {
        // A client that goes away does not make room for another while the worker is at it.
        let _permit = permit;
        children::connect(&paths, &id)?.eval(&code, timeout).map_err(agent_error(&id))
    });
    let Answer { answer, error, output } =
        asked.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok(Json(Evaluated { answer, error, output }))
}
