//! Stopping a sandbox, letting it go on, and how long it may live.

use super::body::JsonBody;
use super::caller::Caller;
use super::create::lifetime;
use super::error::{ApiError, ErrorBody};
use super::sandboxes::found;
use super::shapes::{OnTimeout, Sandbox};
use crate::sandboxes::Owner;
use crate::state::Daemon;
use axum::Json;
use axum::extract::{Path, State};
use forkd_engine::fork::children;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::run_dir::RunDirError;
use serde::Deserialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// Does something to the caller's sandbox, and shows it as it is then.
async fn change(
    daemon: &Daemon,
    owner: &Owner,
    id: &str,
    work: impl FnOnce(&Paths, &str) -> Result<usize, RunDirError> + Send + 'static,
) -> Result<Json<Sandbox>, ApiError> {
    found(daemon, owner, id).await?;
    let (paths, name) = (daemon.paths.clone(), id.to_owned());
    daemon.blocking.short(move || work(&paths, &name)).await??;
    Ok(Json(Sandbox::found(&found(daemon, owner, id).await?)))
}

/// Stops it where it stands: it keeps its memory and takes no processor time.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/pause", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Sandbox), (status = 404, body = ErrorBody)))]
pub async fn pause(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    change(&daemon, &owner, &id, children::pause).await
}

/// Lets it go on.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/resume", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Sandbox), (status = 404, body = ErrorBody)))]
pub async fn resume(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    change(&daemon, &owner, &id, children::resume).await
}

/// How long it may live from now on.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TimeoutRequest {
    /// Seconds from now on; without an end when it is null or absent.
    timeout_s: Option<u64>,
    /// What is done then.
    #[serde(default)]
    on_timeout: OnTimeout,
}

/// Gives it so much time from now on, or no end to it.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/timeout", tag = "sandboxes", params(("id" = String, Path)),
    request_body = TimeoutRequest,
    responses((status = 200, body = Sandbox), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub async fn timeout(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    JsonBody { value: TimeoutRequest { timeout_s, on_timeout }, .. }: JsonBody<TimeoutRequest>,
) -> Result<Json<Sandbox>, ApiError> {
    let wanted = timeout_s.map(|seconds| lifetime(seconds, on_timeout)).transpose()?;
    let fork = found(&daemon, &owner, &id).await?.fork.dir;
    change(&daemon, &owner, &id, move |_, id| fork.set_lifetime(Some(id), wanted)).await
}
