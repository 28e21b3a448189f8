//! /v1/sandboxes and /v1/sandboxes/{id}: listing, showing and ending them.

use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use super::shapes::Sandbox;
use crate::sandboxes::{self, FoundSandbox, MarkedFork, Owner};
use crate::state::Daemon;
use axum::Json;
use axum::extract::rejection::QueryRejection;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use forkd_engine::fork::agent::ClientError;
use forkd_engine::fork::children::{self, ChildrenError};
use forkd_engine::local::run_dir::{ChildStatus, RunDirError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use utoipa::{IntoParams, ToSchema};

const NEXT_CURSOR: HeaderName = HeaderName::from_static("x-next-cursor");
/// Sandboxes on a page, without another wish and at most.
const PAGE: (usize, usize) = (100, 1000);
/// How long an agent may take to say that it is there.
const PING_TIMEOUT: Duration = Duration::from_secs(10);

/// Which sandboxes.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListQuery {
    /// Only those that stand there: starting, running, stalled, ready, paused.
    state: Option<String>,
    /// Only those that were made from it.
    image: Option<String>,
    /// Only those of which this is noted, as in a query: `user=abc&app=prod`, encoded.
    metadata: Option<String>,
    /// How many at most: 100 without it, 1000 at most.
    limit: Option<usize>,
    /// Where the page before ended: its `x-next-cursor`.
    cursor: Option<String>,
}

/// Sandboxes that live, by their names. Where there are more, the answer's `x-next-cursor` leads to them.
#[utoipa::path(get, path = "/v1/sandboxes", tag = "sandboxes", params(ListQuery),
    responses((status = 200, body = Vec<Sandbox>), (status = 400, body = ErrorBody)))]
pub async fn list(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    query: Result<Query<ListQuery>, QueryRejection>,
) -> Result<(HeaderMap, Json<Vec<Sandbox>>), ApiError> {
    let Query(query) = query.map_err(|error| ApiError::invalid(error.body_text()))?;
    let limit = query.limit.unwrap_or(PAGE.0).clamp(1, PAGE.1);
    let filter = Filter::of(query)?;
    let paths = daemon.paths.clone();
    let listed = daemon.blocking.short(move || page(&paths, &owner, &filter, limit)).await??;
    let mut headers = HeaderMap::new();
    if listed.len() > limit
        && let Ok(cursor) = HeaderValue::from_str(&listed[limit - 1].id)
    {
        headers.insert(NEXT_CURSOR, cursor);
    }
    Ok((headers, Json(listed.into_iter().take(limit).collect())))
}

struct Filter {
    state: Option<String>,
    image: Option<String>,
    metadata: BTreeMap<String, String>,
    /// Fork and number that the page before ended with.
    after: Option<(String, u64)>,
}

impl Filter {
    fn of(query: ListQuery) -> Result<Filter, ApiError> {
        let metadata = query.metadata.unwrap_or_default();
        let pairs = form_urlencoded::parse(metadata.as_bytes());
        let wrong = || ApiError::invalid("the cursor is none of this daemon");
        let after = query.cursor.map(|cursor| place(&cursor).ok_or_else(wrong)).transpose()?;
        Ok(Filter { state: query.state, image: query.image, metadata: pairs.into_owned().collect(), after })
    }

    fn wants_fork(&self, fork: &MarkedFork) -> bool {
        let noted = &fork.mark.metadata;
        let image =
            |image: &String| *image == fork.status.pack || Some(image) == fork.status.forked_from.as_ref();
        self.image.as_ref().is_none_or(image)
            && self.metadata.iter().all(|(name, value)| noted.get(name) == Some(value))
    }

    fn wants(&self, child: &ChildStatus) -> bool {
        let behind = self.after.as_ref().is_none_or(|after| place(&child.id).is_some_and(|at| at > *after));
        let stands = self.state.as_ref().is_none_or(|state| state == child.state.name());
        behind && stands && !child.state.is_over()
    }
}

/// Where a sandbox is in the list.
fn place(id: &str) -> Option<(String, u64)> {
    let (fork, number) = id.split_once('-')?;
    Some((fork.to_owned(), number.parse().ok()?))
}

/// One more than `limit`, where there are more.
fn page(
    paths: &forkd_engine::local::paths::Paths,
    owner: &Owner,
    filter: &Filter,
    limit: usize,
) -> Result<Vec<Sandbox>, RunDirError> {
    let mut listed = Vec::new();
    for fork in sandboxes::forks(paths, owner)?.filter(|fork| filter.wants_fork(fork)) {
        let mut children: Vec<_> = fork.status.children.iter().filter(|child| filter.wants(child)).collect();
        children.sort_by_key(|child| place(&child.id));
        listed.extend(children.into_iter().map(|child| Sandbox::of(&fork, child)));
        if listed.len() > limit {
            break;
        }
    }
    listed.truncate(limit + 1);
    Ok(listed)
}

/// The sandbox that a request is about, which is the caller's and lives.
pub async fn found(daemon: &Daemon, owner: &Owner, id: &str) -> Result<FoundSandbox, ApiError> {
    let (paths, owner, id) = (daemon.paths.clone(), owner.clone(), id.to_owned());
    Ok(daemon.blocking.short(move || sandboxes::find(&paths, &owner, &id)).await??)
}

/// One sandbox.
#[utoipa::path(get, path = "/v1/sandboxes/{id}", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Sandbox), (status = 404, body = ErrorBody)))]
pub async fn show(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Sandbox>, ApiError> {
    Ok(Json(Sandbox::found(&found(&daemon, &owner, &id).await?)))
}

/// Ends one.
#[utoipa::path(delete, path = "/v1/sandboxes/{id}", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 204), (status = 404, body = ErrorBody)))]
pub async fn end(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    found(&daemon, &owner, &id).await?;
    let paths = daemon.paths.clone();
    daemon.blocking.short(move || children::kill(&paths, &id)).await??;
    Ok(StatusCode::NO_CONTENT)
}

/// A sandbox that answers.
#[derive(Debug, Serialize, ToSchema)]
pub struct Pong {
    /// Always true.
    ok: bool,
    /// How long it took, ms.
    ms: f64,
}

/// Whether its agent answers.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/ping", tag = "sandboxes", params(("id" = String, Path)),
    responses((status = 200, body = Pong), (status = 404, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub async fn ping(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
) -> Result<Json<Pong>, ApiError> {
    found(&daemon, &owner, &id).await?;
    let (paths, begun) = (daemon.paths.clone(), Instant::now());
    let _permit = daemon.blocking.stream()?;
    let asked = tokio::task::spawn_blocking(move || -> Result<(), ChildrenError> {
        let agent_error = |source: ClientError| ChildrenError::Agent { id: id.clone(), source };
        children::connect(&paths, &id)?.ping(PING_TIMEOUT).map_err(agent_error)
    });
    asked.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok(Json(Pong { ok: true, ms: begun.elapsed().as_secs_f64() * 1e3 }))
}
