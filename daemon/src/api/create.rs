//! POST /v1/sandboxes: new sandboxes.

use super::body::JsonBody;
use super::caller::Caller;
use super::error::{ApiError, ErrorBody};
use super::shapes::{OnTimeout, Sandbox};
use crate::census::Reservation;
use crate::mark::Mark;
use crate::order::{ForkAnswer, ForkOrder, ForkedChild, NetworkOrder, Origin};
use crate::pool::PoolError;
use crate::sandboxes::{self, MarkedFork, Owner};
use crate::state::Daemon;
use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use forkd_engine::local::lifetime::Lifetime;
use forkd_engine::network::gateway::{DNS_PORT, GatewayOptions};
use forkd_engine::network::policy::Policy;
use forkd_engine::network::rule::Rule;
use forkd_fs::digest::Digest;
use forkd_vmm::process::monotonic_ns;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;
use utoipa::ToSchema;

const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// Longest key.
const KEY_MAX: usize = 255;
/// Most that is noted of a sandbox: fields, and bytes of all together.
const METADATA_MAX: (usize, usize) = (64, 16 << 10);
/// The longest that a sandbox can be given, s: ten years.
const TIMEOUT_MAX: u64 = 10 * 366 * 24 * 3600;

/// What is wanted. `snapshot_tag` or `image` says of what.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// A snapshot of the daemon's host.
    snapshot_tag: Option<String>,
    /// A package of the hub, owner/name or owner/name@version.
    image: Option<String>,
    /// How many.
    #[serde(default = "one")]
    #[schema(default = 1, minimum = 1, maximum = 1000)]
    n: u32,
    /// Variables that all have.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Variables of which each gets the next value, and after the last one the first again.
    #[serde(default)]
    vary: BTreeMap<String, Vec<String>>,
    /// What their network devices lead to; nowhere without it.
    #[serde(default)]
    network: NetworkRequest,
    /// How long each may live, s; without an end when it is absent.
    timeout_s: Option<u64>,
    /// What is done then.
    #[serde(default)]
    on_timeout: OnTimeout,
    /// What is noted of them, for lists.
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    /// The most memory of the host that each may take, MiB: its own RAM and 64 more without it.
    memory_limit_mib: Option<u64>,
    /// The most processors that each may use.
    cpus: Option<f64>,
}

/// How many where nobody says.
pub fn one() -> u32 {
    1
}

/// A network by its mode alone, or a way out with rules.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged)]
pub enum NetworkRequest {
    /// One of the modes.
    Mode(NetworkMode),
    /// A way out.
    Nat(NatRequest),
}

impl Default for NetworkRequest {
    fn default() -> NetworkRequest {
        NetworkRequest::Mode(NetworkMode::None)
    }
}

/// What network devices lead to.
#[derive(Debug, Clone, Copy, Deserialize, Serialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NetworkMode {
    /// Nowhere.
    None,
    /// Into a namespace of the sandbox's own, and no further.
    Isolated,
    /// Out, to public addresses.
    Nat,
}

/// A way out with rules, as `forkd fork --net nat` has them.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NatRequest {
    /// Where sandboxes may go, and nowhere else: `public`, an address, a network, a name, `*.NAME`, each with `:PORT`.
    #[serde(default)]
    allow: Vec<String>,
    /// Where they may not go, whatever is allowed.
    #[serde(default)]
    deny: Vec<String>,
    /// Name servers that answer for them.
    #[serde(default)]
    dns: Vec<String>,
    /// What each may send, and receive: `10mbit`, `1MB/s`, `500pps`, or both with a comma.
    rate: Option<String>,
}

/// New sandboxes: all of them ready, or none.
#[utoipa::path(post, path = "/v1/sandboxes", tag = "sandboxes", request_body = CreateRequest,
    params(("Idempotency-Key" = Option<String>, Header,
        description = "A second request with the same key gets the sandboxes of the first, as long as one of them lives")),
    responses((status = 201, body = Vec<Sandbox>), (status = 400, body = ErrorBody), (status = 401, body = ErrorBody),
        (status = 404, body = ErrorBody), (status = 409, body = ErrorBody), (status = 429, body = ErrorBody)))]
pub async fn create(
    State(daemon): State<Arc<Daemon>>,
    Caller(owner): Caller,
    headers: HeaderMap,
    JsonBody { value: wanted, bytes }: JsonBody<CreateRequest>,
) -> Result<(StatusCode, Json<Vec<Sandbox>>), ApiError> {
    let started_ns = monotonic_ns();
    let key = key(&headers)?;
    let (mut mark, mut order) = order(&daemon, &owner, wanted, started_ns)?;
    // A client that goes away meanwhile does not leave half a fork behind.
    let making = tokio::spawn(async move {
        let Some(key) = key else {
            return make(&daemon, &mark, order).await;
        };
        let _turn = daemon.keys.turn(format!("{}/{key}", owner.tenant().unwrap_or_default())).await;
        let digest = Digest::of(&bytes).to_string();
        if let Some(fork) = known(&daemon, owner, key.clone()).await? {
            return repeat(&fork, &digest);
        }
        mark.idempotency = Some((key, digest));
        order.labels = mark.labels();
        make(&daemon, &mark, order).await
    });
    let made = making.await.map_err(|error| ApiError::internal(error.to_string()))??;
    Ok((StatusCode::CREATED, Json(made)))
}

fn key(headers: &HeaderMap) -> Result<Option<String>, ApiError> {
    let Some(value) = headers.get(IDEMPOTENCY_KEY) else { return Ok(None) };
    let text = value.to_str().ok().filter(|text| (1..=KEY_MAX).contains(&text.len()));
    let wrong = || ApiError::invalid(format!("an Idempotency-Key has 1 to {KEY_MAX} printable characters"));
    text.map(|text| Some(text.to_owned())).ok_or_else(wrong)
}

async fn known(daemon: &Daemon, owner: Owner, key: String) -> Result<Option<MarkedFork>, ApiError> {
    let paths = daemon.paths.clone();
    Ok(daemon.blocking.short(move || sandboxes::of_key(&paths, &owner, &key)).await??)
}

/// What was made before with the same key.
fn repeat(fork: &MarkedFork, digest: &str) -> Result<Vec<Sandbox>, ApiError> {
    match fork.mark.idempotency.as_ref().is_some_and(|(_, known)| known == digest) {
        true => {
            let first = fork.status.children.iter().filter(|child| child.parent.is_none());
            Ok(first.map(|child| Sandbox::of(fork, child)).collect())
        }
        false => Err(ApiError::new(
            StatusCode::CONFLICT,
            "key_reused",
            "this Idempotency-Key came with another request before",
        )),
    }
}

/// What a supervisor is to be told. The request is checked here, too, so that nothing is reserved for a wrong one.
fn order(
    daemon: &Daemon,
    owner: &Owner,
    wanted: CreateRequest,
    started_ns: u64,
) -> Result<(Mark, ForkOrder), ApiError> {
    let origin = match (wanted.snapshot_tag, wanted.image) {
        (Some(tag), None) => Origin::Tag(tag),
        (None, Some(reference)) => Origin::Image { reference, hub: daemon.options.hub.clone() },
        _ => return Err(ApiError::invalid("either snapshot_tag or image says what to start")),
    };
    let bytes: usize = wanted.metadata.iter().map(|(name, value)| name.len() + value.len()).sum();
    if wanted.metadata.len() > METADATA_MAX.0 || bytes > METADATA_MAX.1 {
        let (fields, bytes) = METADATA_MAX;
        return Err(ApiError::invalid(format!("metadata has {fields} fields and {bytes} bytes at most")));
    }
    let mark = Mark::now(owner.tenant(), wanted.metadata);
    let order = ForkOrder {
        origin,
        count: wanted.n,
        env: wanted.env,
        vary: wanted.vary,
        network: network(wanted.network)?,
        memory_limit_mib: wanted.memory_limit_mib,
        cpus: wanted.cpus,
        lifetime: wanted.timeout_s.map(|seconds| lifetime(seconds, wanted.on_timeout)).transpose()?,
        labels: mark.labels(),
        cache: daemon.options.cache,
        on_exit: daemon.options.on_exit,
        started_ns,
    };
    order.request()?;
    Ok((mark, order))
}

/// A time in seconds.
pub fn lifetime(seconds: u64, then: OnTimeout) -> Result<Lifetime, ApiError> {
    match (1..=TIMEOUT_MAX).contains(&seconds) {
        true => Ok(Lifetime { time: Duration::from_secs(seconds), then: then.into() }),
        false => Err(ApiError::invalid(format!("timeout_s is from 1 to {TIMEOUT_MAX}"))),
    }
}

fn network(wanted: NetworkRequest) -> Result<NetworkOrder, ApiError> {
    Ok(match wanted {
        NetworkRequest::Mode(NetworkMode::None) => NetworkOrder::None,
        NetworkRequest::Mode(NetworkMode::Isolated) => NetworkOrder::Isolated,
        NetworkRequest::Mode(NetworkMode::Nat) => NetworkOrder::Nat(GatewayOptions::default()),
        NetworkRequest::Nat(NatRequest { allow, deny, dns, rate }) => NetworkOrder::Nat(GatewayOptions {
            policy: Policy { allow: all(&allow, parse::<Rule>)?, deny: all(&deny, parse::<Rule>)? },
            name_servers: all(&dns, name_server)?,
            rate: rate.as_deref().map(parse).transpose()?,
        }),
    })
}

fn all<T>(texts: &[String], parse: fn(&str) -> Result<T, ApiError>) -> Result<Vec<T>, ApiError> {
    texts.iter().map(|text| parse(text)).collect()
}

fn parse<T: FromStr<Err: std::fmt::Display>>(text: &str) -> Result<T, ApiError> {
    text.parse().map_err(|error: T::Err| ApiError::invalid(error.to_string()))
}

fn name_server(text: &str) -> Result<SocketAddr, ApiError> {
    let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS_PORT));
    address.or_else(|_| text.parse()).map_err(|_| {
        ApiError::invalid(format!("`{text}` is no name server: an address, with :PORT if it is not 53"))
    })
}

/// Room for more sandboxes.
pub async fn reserve(daemon: &Daemon, count: usize) -> Result<Reservation, ApiError> {
    if let Some(reserved) = daemon.census.reserve(count) {
        return Ok(reserved);
    }
    // Some may have ended since they were counted.
    let (census, paths) = (Arc::clone(&daemon.census), daemon.paths.clone());
    daemon.blocking.short(move || census.count(&paths)).await?;
    daemon.census.reserve(count).ok_or_else(|| ApiError::too_many(daemon.census.limit()))
}

/// Forks.
async fn make(daemon: &Daemon, mark: &Mark, order: ForkOrder) -> Result<Vec<Sandbox>, ApiError> {
    let count = order.count as usize;
    let reserved = reserve(daemon, count).await?;
    let failed = |_: &PoolError| {
        daemon.metrics.failed_forks.inc();
    };
    let answer = daemon.pool.fork(&order).await.inspect_err(failed)?;
    match answer {
        ForkAnswer::Failed { kind, message } => {
            daemon.metrics.failed_forks.inc();
            Err(ApiError::of_fork(kind, &message))
        }
        ForkAnswer::Forked { fork, children } => {
            reserved.fill();
            note(daemon, &children);
            made(daemon, mark, fork, &children).await
        }
    }
}

fn note(daemon: &Daemon, children: &[ForkedChild]) {
    let metrics = &daemon.metrics;
    metrics.forks.inc();
    metrics.created.inc_by(children.len() as u64);
    for child in children {
        child.first_instruction_ms.iter().for_each(|ms| metrics.first_instruction.observe(ms / 1e3));
        child.ready_ms.iter().for_each(|ms| metrics.ready.observe(ms / 1e3));
    }
}

/// As their supervisor shows them, with when they were there.
async fn made(
    daemon: &Daemon,
    mark: &Mark,
    fork: String,
    children: &[ForkedChild],
) -> Result<Vec<Sandbox>, ApiError> {
    let paths = daemon.paths.clone();
    let asked = daemon.blocking.short(move || sandboxes::of_fork(&paths, &fork)).await?;
    let (dir, status) = asked?;
    let fork = MarkedFork { dir, mark: mark.clone(), status };
    let shown = fork.status.children.iter().zip(children).map(|(status, child)| Sandbox {
        first_instruction_ms: child.first_instruction_ms,
        ready_ms: child.ready_ms,
        ..Sandbox::of(&fork, status)
    });
    Ok(shown.collect())
}
