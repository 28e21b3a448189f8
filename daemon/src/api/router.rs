//! Which path leads where, and the OpenAPI document of it.

use super::error::ApiError;
use super::{
    branch, caller, catalogue, create, eval, exec, files, lifetime, network, observe, sandboxes, system,
    terminal,
};
use crate::state::Daemon;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router, middleware};
use std::sync::Arc;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

/// What the document says beside the paths.
#[derive(OpenApi)]
#[openapi(info(title = "forkd", description = "Sandboxes: copies of machines that run already"))]
struct Document;

/// Paths that take no token, and those that do.
fn paths() -> (OpenApiRouter<Arc<Daemon>>, OpenApiRouter<Arc<Daemon>>) {
    let open = OpenApiRouter::with_openapi(Document::openapi()).routes(routes!(system::health));
    let guarded = OpenApiRouter::new()
        .routes(routes!(system::version))
        .routes(routes!(system::metrics))
        .routes(routes!(catalogue::snapshots))
        .routes(routes!(catalogue::images))
        .routes(routes!(create::create, sandboxes::list))
        .routes(routes!(sandboxes::show, sandboxes::end))
        .routes(routes!(sandboxes::ping))
        .routes(routes!(eval::eval))
        .routes(routes!(exec::exec, terminal::exec))
        .routes(routes!(files::read, files::write))
        .routes(routes!(lifetime::pause))
        .routes(routes!(lifetime::resume))
        .routes(routes!(lifetime::timeout))
        .routes(routes!(branch::branch))
        .routes(routes!(network::show));
    (open, guarded)
}

/// The OpenAPI document, as JSON.
pub fn document() -> String {
    let (open, guarded) = paths();
    let document = open.merge(guarded).into_openapi();
    // It consists of text and lists.
    document.to_pretty_json().unwrap_or_default() + "\n"
}

/// The whole interface.
pub fn router(daemon: Arc<Daemon>) -> Router {
    let (open, guarded) = paths();
    let (guarded, _) = guarded.split_for_parts();
    let (open, _) = open.split_for_parts();
    let guarded = guarded
        .route("/openapi.json", get(openapi))
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), caller::identify));
    open.merge(guarded)
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(middleware::from_fn_with_state(Arc::clone(&daemon), observe::observe))
        .with_state(daemon)
}

async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    let (open, guarded) = paths();
    Json(open.merge(guarded).into_openapi())
}

async fn no_such_path() -> ApiError {
    ApiError::not_found("there is no such path").hint("GET /openapi.json has all of them")
}

async fn no_such_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "this path takes another method")
}
