//! Arguments of the commands that start copies and deal with those that run.

use super::network::NetArgs;
use super::ports::{LifetimeArgs, PublishArgs};
use super::shared::{CacheArgs, HubSource};
use crate::units;
use clap::{ArgGroup, Args};
use forkd_engine::fork::ask::ChildRequest;
use forkd_engine::fork::branch::Branching;
use forkd_engine::fork::run::ForkRequest;
use forkd_engine::fork::supervisor::{ChildrenSpec, ResourceLimits};
use forkd_engine::fork::variables::{self, Variable, Variables, VariablesError, VariedVariable};
use forkd_engine::local::paths::Paths;
use forkd_engine::network::wire::NetworkMode;
use forkd_engine::target::{self, Target};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// `forkd fork`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["target", "tag"]))]
pub struct ForkArgs {
    /// A name of the hub (owner/name[@version]), a pack file, or a version's folder in a mount
    #[arg(value_name = "REF|PATH")]
    pub target: Option<String>,
    /// A local snapshot
    #[arg(long)]
    pub tag: Option<String>,
    /// How many copies
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Evaluate CODE in each copy's warm worker
    #[arg(long, value_name = "CODE", conflicts_with = "exec")]
    pub eval: Option<String>,
    /// Run the command after `--` in each copy
    #[arg(long, requires = "command")]
    pub exec: bool,
    /// The command for --exec
    #[arg(last = true, value_name = "CMD", requires = "exec")]
    pub command: Vec<String>,
    /// NAME=VALUE for every copy: the warm worker and what is started there see it (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = variables::parse_variable)]
    pub env: Vec<Variable>,
    /// NAME=A,B,C: the first copy gets A, the second B, and after C comes A again (repeatable)
    #[arg(long, value_name = "NAME=A,B,C", value_parser = variables::parse_varied)]
    pub vary: Vec<VariedVariable>,
    /// The network.
    #[command(flatten)]
    pub net: NetArgs,
    /// The most memory each copy may take of this host, MiB [default: its own RAM and 64 more]
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    pub memory_limit_mib: Option<u64>,
    /// The most processors each copy may use, e.g. 0.5 [default: no limit]
    #[arg(long, value_name = "F", value_parser = units::parse_cpus)]
    pub cpus: Option<f64>,
    /// Their ports.
    #[command(flatten)]
    pub publish: PublishArgs,
    /// Their time.
    #[command(flatten)]
    pub lifetime: LifetimeArgs,
    /// Leave the copies running and return
    #[arg(long)]
    pub detach: bool,
    /// Download the whole pack before starting (for comparison)
    #[arg(long)]
    pub eager: bool,
    /// Draw what happened when, as an SVG picture: phases, requests, faults, children
    #[arg(long, value_name = "FILE")]
    pub timeline: Option<PathBuf>,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

impl ForkArgs {
    /// As the engine takes it. `look_at_prefetched`: whether the report has to say what prefetching was good for.
    pub fn request(
        &self,
        paths: &Paths,
        (variables, network): (Variables, NetworkMode),
        started_ns: u64,
        look_at_prefetched: bool,
    ) -> ForkRequest {
        let (tag, target) = (self.tag.as_deref(), self.target.as_deref());
        ForkRequest {
            target: Target::of(paths, tag, target, self.hub.hub.as_deref()),
            name: shown_name(tag, target),
            children: ChildrenSpec {
                count: self.count,
                variables,
                network,
                limits: ResourceLimits { memory_mib: self.memory_limit_mib, cpus: self.cpus },
                publish: self.publish.publish.clone(),
                lifetime: self.lifetime.lifetime(),
                reachable: true,
                labels: BTreeMap::new(),
            },
            request: child_request(self.eval.as_deref(), self.exec.then_some(&self.command)),
            eager: self.eager,
            cache: self.cache.options(),
            timeline: self.timeline.clone(),
            look_at_prefetched,
            started_ns,
        }
    }

    /// Whether the children are asked anything: those that are not stay.
    pub fn asks_anything(&self) -> bool {
        self.eval.is_some() || self.exec
    }
}

/// `forkd branch`.
#[derive(Debug, Args)]
pub struct BranchArgs {
    /// The child, as `forkd ps` names it
    pub id: String,
    /// How many branches
    #[arg(short = 'n', long = "count", value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// Evaluate CODE in each branch's warm worker
    #[arg(long, value_name = "CODE", conflicts_with = "exec")]
    pub eval: Option<String>,
    /// Run the command after `--` in each branch
    #[arg(long, requires = "command")]
    pub exec: bool,
    /// The command for --exec
    #[arg(last = true, value_name = "CMD", requires = "exec")]
    pub command: Vec<String>,
    /// NAME=VALUE for every branch: the warm worker and what is started there see it (repeatable)
    #[arg(long, value_name = "NAME=VALUE", value_parser = variables::parse_variable)]
    pub env: Vec<Variable>,
    /// NAME=A,B,C: the first branch gets A, the second B, and after C comes A again (repeatable)
    #[arg(long, value_name = "NAME=A,B,C", value_parser = variables::parse_varied)]
    pub vary: Vec<VariedVariable>,
    /// Leave the branches running and return
    #[arg(long)]
    pub detach: bool,
}

impl BranchArgs {
    /// As the engine takes it.
    pub fn branching(&self, started_ns: u64) -> Result<Branching, VariablesError> {
        Ok(Branching {
            child: self.id.clone(),
            count: self.count,
            variables: Variables::new(&self.env, &self.vary, self.count)?,
            request: child_request(self.eval.as_deref(), self.exec.then_some(&self.command)),
            started_ns,
        })
    }
}

/// What every child is asked.
fn child_request(eval: Option<&str>, exec: Option<&Vec<String>>) -> ChildRequest {
    match (eval, exec) {
        (Some(code), _) => ChildRequest::Eval(code.to_owned()),
        (None, Some(command)) => ChildRequest::Exec(command.clone()),
        (None, None) => ChildRequest::Nothing,
    }
}

/// `forkd warm`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("warmed").args(["target", "tag", "list", "all"]).required(true)))]
pub struct WarmArgs {
    /// A name of the hub (owner/name[@version]) or a pack file, named as `forkd fork` will name it
    #[arg(value_name = "REF|PATH")]
    pub target: Option<String>,
    /// A local snapshot
    #[arg(long)]
    pub tag: Option<String>,
    /// List what is kept
    #[arg(long, conflicts_with = "stop")]
    pub list: bool,
    /// Keep it no longer, even if its file or tag has been replaced or removed; copies that run go on
    #[arg(long)]
    pub stop: bool,
    /// With --stop: all that is kept
    #[arg(long, requires = "stop")]
    pub all: bool,
    /// Stay in the foreground
    #[arg(long)]
    pub foreground: bool,
    /// Which hub.
    #[command(flatten)]
    pub hub: HubSource,
    /// The cache.
    #[command(flatten)]
    pub cache: CacheArgs,
}

impl WarmArgs {
    /// What is named, and what people call it.
    pub fn target(&self, paths: &Paths) -> (Target, String) {
        let (tag, target) = (self.tag.as_deref(), self.target.as_deref());
        let name = shown_name(tag, target);
        (Target::of(paths, tag, target, self.hub.hub.as_deref()), name)
    }
}

/// What people call what is named.
fn shown_name(tag: Option<&str>, target: Option<&str>) -> String {
    tag.map_or_else(|| target::shown_name(target.unwrap_or_default()), str::to_owned)
}

/// `forkd eval`.
#[derive(Debug, Args)]
pub struct EvalArgs {
    /// The child, as `forkd ps` names it
    pub id: String,
    /// What to evaluate
    pub code: String,
}

/// `forkd logs`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("whose").required(true).args(["id", "tag"]))]
pub struct LogsArgs {
    /// The child, as `forkd ps` names it
    pub id: Option<String>,
    /// A local snapshot instead: what its machine printed while it was built
    #[arg(long)]
    pub tag: Option<String>,
}

/// `forkd kill`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["ids", "all"]))]
pub struct KillArgs {
    /// The children, as `forkd ps` names them
    #[arg(value_name = "ID")]
    pub ids: Vec<String>,
    /// Every child
    #[arg(long)]
    pub all: bool,
}
