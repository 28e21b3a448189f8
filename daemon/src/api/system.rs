//! The daemon itself: whether it is there, what it is, and its figures.

use super::caller::Caller;
use crate::state::Daemon;
use axum::Json;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use serde::Serialize;
use std::sync::Arc;
use utoipa::ToSchema;

/// A daemon that is there.
#[derive(Debug, Serialize, ToSchema)]
pub struct Health {
    /// Always `ok`.
    status: &'static str,
}

/// Whether the daemon answers. Takes no token.
#[utoipa::path(get, path = "/healthz", tag = "daemon", responses((status = 200, body = Health)))]
pub async fn health() -> Json<Health> {
    Json(Health { status: "ok" })
}

/// What the daemon is.
#[derive(Debug, Serialize, ToSchema)]
pub struct Version {
    /// forkd's version.
    version: &'static str,
    /// Of this interface.
    api: &'static str,
}

/// Its version.
#[utoipa::path(get, path = "/version", tag = "daemon", responses((status = 200, body = Version)))]
pub async fn version(_: Caller) -> Json<Version> {
    Json(Version { version: env!("CARGO_PKG_VERSION"), api: "v1" })
}

/// Figures for Prometheus, in the text format of OpenMetrics.
#[utoipa::path(get, path = "/metrics", tag = "daemon",
    responses((status = 200, body = String, content_type = "application/openmetrics-text")))]
pub async fn metrics(State(daemon): State<Arc<Daemon>>, _: Caller) -> impl IntoResponse {
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], daemon.metrics.text(daemon.census.found()))
}
