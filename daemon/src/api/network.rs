//! GET /v1/sandboxes/{id}/network: what a sandbox sent, received and was refused.

use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use super::sandboxes::found;
use crate::state::Daemon;
use axum::Json;
use axum::extract::{Path, State};
use forkd_engine::local::run_dir::RunDirError;
use forkd_engine::network::wire::{GatewayStatus, NetworkStatus};
use serde::Serialize;
use std::sync::Arc;

/// A sandbox's network, as far as it has one.
#[derive(Serialize)]
#[serde(tag = "mode", rename_all = "snake_case")]
pub enum Network {
    /// It leads nowhere.
    None,
    /// Into a namespace.
    Isolated(NetworkStatus),
    /// Out.
    Nat(GatewayStatus),
}

/// Its network: `mode` is `none`, `isolated` with its addresses, or `nat` with what `forkd net --json` shows.
#[utoipa::path(get, path = "/v1/sandboxes/{id}/network", tag = "inside", params(("id" = String, Path)),
    responses((status = 200, body = Object), (status = 404, body = ErrorBody)))]
pub async fn show(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Network>, ApiError> {
    let found = found(&daemon, &owner, &id).await?;
    let Some(network) = found.child.network else { return Ok(Json(Network::None)) };
    let fork = found.fork.dir;
    let gateway = daemon.blocking.short(move || -> Result<_, RunDirError> { fork.gateway(&id) }).await??;
    Ok(Json(gateway.map_or(Network::Isolated(network), Network::Nat)))
}
