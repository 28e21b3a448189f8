//! /v1/snapshots and /v1/images: what sandboxes can be made from.

use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use crate::state::Daemon;
use axum::Json;
use axum::extract::State;
use forkd_engine::hub::listing::{self, HubListing};
use forkd_engine::local::snapshot_list::{self, SnapshotDescription};
use std::sync::Arc;

/// Snapshots of this host, as `forkd snapshots --json` shows them.
#[utoipa::path(get, path = "/v1/snapshots", tag = "catalogue",
    responses((status = 200, body = Vec<Object>), (status = 401, body = ErrorBody)))]
pub async fn snapshots(
    State(daemon): State<Arc<Daemon>>,
    _: Caller,
) -> Result<Json<Vec<SnapshotDescription>>, ApiError> {
    let paths = daemon.paths.clone();
    Ok(Json(daemon.blocking.short(move || snapshot_list::list(&paths)).await??))
}

/// Packages of the hub, as `forkd images --hub --json` shows them.
#[utoipa::path(get, path = "/v1/images", tag = "catalogue",
    responses((status = 200, body = Object), (status = 404, body = ErrorBody), (status = 502, body = ErrorBody)))]
pub async fn images(State(daemon): State<Arc<Daemon>>, _: Caller) -> Result<Json<HubListing>, ApiError> {
    Ok(Json(listing::packages(&daemon.paths, daemon.options.hub.as_deref()).await?))
}
