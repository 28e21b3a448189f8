//! Arguments of the commands that reach ports of children, stop children and let them go on; and of what `forkd fork` has
//! to say about either.

use crate::units;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgGroup, Args};
use forkd_engine::fork::forward::ports::{PortMap, PortMapError};
use forkd_engine::fork::supervisor::{Lifetime, OnTimeout};
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;
use std::time::Duration;

/// `forkd forward`.
#[derive(Debug, Args)]
pub struct ForwardArgs {
    /// Children or forks, which stand for all of theirs, and TCP ports: GUEST is one of the child's loopback, LOCAL that on
    /// this host for the first child, one more for each further one. Without LOCAL, or with 0, any free port
    #[arg(required = true, num_args = 1.., value_name = "ID|FORK|GUEST[:LOCAL]")]
    what: Vec<Forwarded>,
    /// Where to listen. Whoever can connect there reaches the child
    #[arg(long, value_name = "IP", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST))]
    pub address: IpAddr,
    /// Go on in the background until the children are over
    #[arg(long)]
    pub detach: bool,
}

/// A part of `forkd forward`'s arguments.
#[derive(Debug, Clone)]
enum Forwarded {
    From(String),
    Port(PortMap),
}

impl FromStr for Forwarded {
    type Err = PortMapError;

    fn from_str(text: &str) -> Result<Forwarded, PortMapError> {
        match PortMap::is_meant(text) {
            true => text.parse().map(Forwarded::Port),
            false => Ok(Forwarded::From(text.to_owned())),
        }
    }
}

impl ForwardArgs {
    /// Names of children and forks.
    pub fn names(&self) -> Vec<String> {
        let name = |what: &Forwarded| match what {
            Forwarded::From(name) => Some(name.clone()),
            Forwarded::Port(_) => None,
        };
        self.what.iter().filter_map(name).collect()
    }

    /// Their ports.
    pub fn ports(&self) -> Vec<PortMap> {
        let port = |what: &Forwarded| match what {
            Forwarded::From(_) => None,
            Forwarded::Port(port) => Some(*port),
        };
        self.what.iter().filter_map(port).collect()
    }

    /// What is missing, if anything is.
    pub(super) fn lacks(&self) -> Option<&'static str> {
        match (self.names().is_empty(), self.ports().is_empty()) {
            (true, _) => Some("a child or fork whose ports are to be forwarded is missing"),
            (_, true) => Some("a port that is to be forwarded is missing, GUEST[:LOCAL]"),
            (false, false) => None,
        }
    }
}

/// `forkd pause`.
#[derive(Debug, Args)]
pub struct PauseArgs {
    /// Which children.
    #[command(flatten)]
    pub which: ChildrenArgs,
    /// Write what they have in their memory to disk and free it; `forkd resume` brings them back under the same names
    #[arg(long)]
    pub to_disk: bool,
}

/// `forkd resume`, and which children `forkd pause` means.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("which").required(true).args(["names", "all"]))]
pub struct ChildrenArgs {
    /// The children, as `forkd ps` names them, or forks, which stand for all of theirs
    #[arg(value_name = "ID|FORK")]
    pub names: Vec<String>,
    /// Every child
    #[arg(long)]
    pub all: bool,
}

/// Ports of a fork's children.
#[derive(Debug, Args)]
pub struct PublishArgs {
    /// Have TCP port GUEST of each copy's loopback reached at LOCAL of this host's, one more for each further copy [LOCAL
    /// absent or 0: any free port] (repeatable)
    #[arg(long, value_name = "GUEST[:LOCAL]")]
    pub publish: Vec<PortMap>,
}

/// How long a fork's children may live.
#[derive(Debug, Args)]
pub struct LifetimeArgs {
    /// The longest each copy may run, counted from its start, e.g. 90s or 5m
    #[arg(long, value_name = "D", value_parser = units::parse_duration)]
    pub timeout: Option<Duration>,
    /// What is done with a copy whose time is over
    #[arg(long, value_name = "WHAT", requires = "timeout", default_value = "kill",
          value_parser = PossibleValuesParser::new(["kill", "pause"]).map(|what| match what.as_str() {
              "pause" => OnTimeout::Pause,
              _ => OnTimeout::Kill,
          }))]
    pub on_timeout: OnTimeout,
}

impl LifetimeArgs {
    /// As the engine takes it.
    pub fn lifetime(&self) -> Option<Lifetime> {
        self.timeout.map(|time| Lifetime { time, then: self.on_timeout })
    }
}
