//! What the daemon has a supervisor fork, and what that answers: one line of JSON each.

use forkd_engine::fork::ask::ChildRequest;
use forkd_engine::fork::run::ForkRequest;
use forkd_engine::fork::supervisor::{ChildrenSpec, Lifetime, ResourceLimits};
use forkd_engine::fork::variables::{Variable, Variables, VariablesError, VariedVariable};
use forkd_engine::local::daemon::OnExit;
use forkd_engine::local::paths::{PathsError, checked_tag};
use forkd_engine::network::gateway::GatewayOptions;
use forkd_engine::network::wire::NetworkMode;
use forkd_engine::reference::InvalidReference;
use forkd_engine::target::Target;
use forkd_fs::cache::CacheOptions;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// The most children of one fork.
pub const COUNT_MAX: u32 = 1000;

/// What to fork.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForkOrder {
    /// From what.
    pub origin: Origin,
    /// How many.
    pub count: u32,
    /// Variables that all have.
    pub env: BTreeMap<String, String>,
    /// Variables of which each gets the next value.
    pub vary: BTreeMap<String, Vec<String>>,
    /// Their networks.
    pub network: NetworkOrder,
    /// The most memory of the host that each may take, MiB.
    pub memory_limit_mib: Option<u64>,
    /// The most processors.
    pub cpus: Option<f64>,
    /// How long each may live.
    pub lifetime: Option<Lifetime>,
    /// What is noted of them.
    pub labels: BTreeMap<String, String>,
    /// The chunk cache's limits, bytes: the most it holds, and what it leaves free.
    pub cache: (u64, Option<u64>),
    /// What becomes of them when the daemon ends.
    pub on_exit: OnExit,
    /// When the request came, CLOCK_MONOTONIC, ns.
    pub started_ns: u64,
}

/// What children are forked from. Clients name no paths.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// A local snapshot.
    Tag(String),
    /// A package of the hub: `owner/name[@version]`.
    Image {
        /// The package.
        reference: String,
        /// The hub, where one was named.
        hub: Option<String>,
    },
}

/// What children's network devices lead to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NetworkOrder {
    /// Nowhere.
    #[default]
    None,
    /// Into a namespace, and no further.
    Isolated,
    /// Out.
    Nat(GatewayOptions),
}

/// An order that makes no sense.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// Too few or too many.
    #[error("n is {count}: from 1 to {COUNT_MAX} at once")]
    Count {
        /// How many were asked for.
        count: u32,
    },
    /// The variables.
    #[error(transparent)]
    Variables(#[from] VariablesError),
    /// The tag.
    #[error(transparent)]
    Tag(#[from] PathsError),
    /// The package.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// A limit that is none.
    #[error("{name} is out of range")]
    Range {
        /// The field.
        name: &'static str,
    },
}

impl ForkOrder {
    /// As the engine takes it.
    ///
    /// # Errors
    /// [`OrderError`] as its variants say.
    pub fn request(&self) -> Result<ForkRequest, OrderError> {
        if !(1..=COUNT_MAX).contains(&self.count) {
            return Err(OrderError::Count { count: self.count });
        }
        if self.memory_limit_mib.is_some_and(|mib| !(1..=1 << 20).contains(&mib)) {
            return Err(OrderError::Range { name: "memory_limit_mib" });
        }
        if self.cpus.is_some_and(|cpus| !(0.01..=1024.0).contains(&cpus)) {
            return Err(OrderError::Range { name: "cpus" });
        }
        let (target, name) = self.origin.target()?;
        let children = ChildrenSpec {
            count: self.count,
            variables: variables(&self.env, &self.vary, self.count)?,
            network: self.network.mode(),
            limits: ResourceLimits { memory_mib: self.memory_limit_mib, cpus: self.cpus },
            lifetime: self.lifetime,
            labels: self.labels.clone(),
            ..ChildrenSpec::default()
        };
        let (max_bytes, min_free_bytes) = self.cache;
        Ok(ForkRequest {
            children,
            cache: CacheOptions { max_bytes, min_free_bytes },
            started_ns: self.started_ns,
            ..ForkRequest::new(target, &name, ChildRequest::Nothing)
        })
    }
}

/// The variables of `count` children.
///
/// # Errors
/// [`VariablesError`] as its variants say.
pub fn variables(
    env: &BTreeMap<String, String>,
    vary: &BTreeMap<String, Vec<String>>,
    count: u32,
) -> Result<Variables, VariablesError> {
    let fixed: Vec<_> =
        env.iter().map(|(name, value)| Variable::new(name, value)).collect::<Result<_, _>>()?;
    let varied: Vec<_> =
        vary.iter().map(|(name, values)| VariedVariable::new(name, values)).collect::<Result<_, _>>()?;
    Variables::new(&fixed, &varied, count)
}

impl Origin {
    fn target(&self) -> Result<(Target, String), OrderError> {
        Ok(match self {
            Origin::Tag(tag) => (Target::Tag(checked_tag(tag)?.to_owned()), tag.clone()),
            Origin::Image { reference, hub } => {
                (Target::Package { hub: hub.clone(), reference: reference.parse()? }, reference.clone())
            }
        })
    }
}

impl NetworkOrder {
    fn mode(&self) -> NetworkMode {
        match self {
            NetworkOrder::None => NetworkMode::None,
            NetworkOrder::Isolated => NetworkMode::Isolated,
            NetworkOrder::Nat(options) => NetworkMode::Nat(options.clone()),
        }
    }
}

/// What came of an order.
#[derive(Debug, Serialize, Deserialize)]
pub enum ForkAnswer {
    /// All children are ready.
    Forked {
        /// The fork's name.
        fork: String,
        /// They.
        children: Vec<ForkedChild>,
    },
    /// None lives.
    Failed {
        /// What kind of failure it is.
        kind: FailureKind,
        /// What failed and why.
        message: String,
    },
}

/// A child that is ready. Times are ms from when the request came.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ForkedChild {
    /// Its name.
    pub id: String,
    /// Its first instruction.
    pub first_instruction_ms: Option<f64>,
    /// It was unique and ready.
    pub ready_ms: Option<f64>,
}

/// Whose fault a failure is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// What is to be forked is not there.
    NotFound,
    /// What was asked for cannot be had on this host.
    Refused,
    /// The hub, or the host of the pack.
    Upstream,
    /// This host.
    Host,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order() -> ForkOrder {
        ForkOrder {
            origin: Origin::Tag("t".to_owned()),
            count: 1,
            env: BTreeMap::new(),
            vary: BTreeMap::new(),
            network: NetworkOrder::None,
            memory_limit_mib: None,
            cpus: None,
            lifetime: None,
            labels: BTreeMap::new(),
            cache: (1, None),
            on_exit: OnExit::Keep,
            started_ns: 0,
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        assert!(order().request().is_ok());
        let image = |reference: &str| Origin::Image { reference: reference.to_owned(), hub: None };
        let named = |name: &str| BTreeMap::from([(name.to_owned(), "v".to_owned())]);
        for bad in [
            ForkOrder { count: 0, ..order() },
            ForkOrder { count: COUNT_MAX + 1, ..order() },
            ForkOrder { origin: Origin::Tag("../t".to_owned()), ..order() },
            ForkOrder { origin: image("/etc/passwd"), ..order() },
            ForkOrder { origin: image("file:///etc/passwd"), ..order() },
            ForkOrder { origin: image("http://host/pack"), ..order() },
            ForkOrder { env: named("A=B"), ..order() },
            ForkOrder { env: named(""), ..order() },
            ForkOrder { vary: BTreeMap::from([("A".to_owned(), Vec::new())]), ..order() },
            ForkOrder { cpus: Some(f64::NAN), ..order() },
            ForkOrder { memory_limit_mib: Some(0), ..order() },
        ] {
            assert!(bad.request().is_err(), "{bad:?} was taken");
        }
    }
}
