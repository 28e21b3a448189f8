//! POST /v1/sandboxes/{id}/branch: sandboxes that go on from where another one is.

use super::body::JsonBody;
use super::caller::Caller;
use super::create::{one, reserve};
use super::error::{ApiError, ErrorBody};
use super::sandboxes::found;
use super::shapes::Sandbox;
use crate::order::{COUNT_MAX, OrderError, variables};
use crate::state::Daemon;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use forkd_engine::fork::ask::ChildRequest;
use forkd_engine::fork::branch::{BranchReport, Branching, branch as branch_child};
use forkd_engine::fork::children;
use forkd_engine::progress::Silent;
use forkd_vmm::process::monotonic_ns;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::sync::Arc;
use utoipa::ToSchema;

/// Which branches.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BranchRequest {
    /// How many.
    #[serde(default = "one")]
    #[schema(default = 1, minimum = 1, maximum = 1000)]
    n: u32,
    /// Variables that all have, beyond what they have from the sandbox.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Variables of which each gets the next value.
    #[serde(default)]
    vary: BTreeMap<String, Vec<String>>,
}

/// What came of it.
#[derive(Debug, Serialize, ToSchema)]
pub struct Branched {
    /// The sandbox that was branched.
    parent: String,
    /// How long it stood still, ms.
    pause_ms: f64,
    /// Memory that the branches share with each other and not with the image, bytes.
    copied_bytes: u64,
    /// The branches, which are ready.
    sandboxes: Vec<Sandbox>,
}

/// Branches a sandbox, which goes on itself: all branches are ready, or none is left.
#[utoipa::path(post, path = "/v1/sandboxes/{id}/branch", tag = "sandboxes", params(("id" = String, Path)),
    request_body = BranchRequest,
    responses((status = 201, body = Branched), (status = 400, body = ErrorBody), (status = 404, body = ErrorBody),
        (status = 409, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn branch(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    Path(id): Path<String>,
    JsonBody { value: BranchRequest { n, env, vary }, .. }: JsonBody<BranchRequest>,
) -> Result<(StatusCode, Json<Branched>), ApiError> {
    let started_ns = monotonic_ns();
    if !(1..=COUNT_MAX).contains(&n) {
        return Err(OrderError::Count { count: n }.into());
    }
    let variables = variables(&env, &vary, n).map_err(OrderError::from)?;
    let found = found(&daemon, &owner, &id).await?;
    let reserved = reserve(&daemon, n as usize).await?;
    let permit = daemon.blocking.stream()?;
    let branching = Branching { child: id, count: n, variables, request: ChildRequest::Nothing, started_ns };
    let paths = daemon.paths.clone();
    let working = tokio::task::spawn_blocking(move || -> Result<Branched, ApiError> {
        let _permit = permit;
        let report = branch_child(&paths, &branching, &Silent)?;
        if let Some(error) = report.children.iter().find_map(|child| child.error.clone()) {
            for child in &report.children {
                // One that is over needs no end.
                let _ = children::kill(&paths, &child.id);
            }
            return Err(ApiError::internal(error));
        }
        reserved.fill();
        let mut fork = found.fork;
        fork.status = fork.dir.status()?;
        Ok(branched(&fork, report))
    });
    let branched = working.await.map_err(|error| ApiError::internal(error.to_string()))??;
    daemon.metrics.created.inc_by(branched.sandboxes.len() as u64);
    Ok((StatusCode::CREATED, Json(branched)))
}

fn branched(fork: &crate::sandboxes::MarkedFork, report: BranchReport) -> Branched {
    let sandbox = |branch: &forkd_engine::fork::branch::BranchOutcome| {
        let child = fork.status.children.iter().find(|child| child.id == branch.id)?;
        Some(Sandbox {
            first_instruction_ms: branch.first_instruction_ms,
            ready_ms: branch.ready_ms,
            ..Sandbox::of(fork, child)
        })
    };
    Branched {
        sandboxes: report.children.iter().filter_map(sandbox).collect(),
        parent: report.parent,
        pause_ms: report.pause_ms,
        copied_bytes: report.copied_bytes,
    }
}
