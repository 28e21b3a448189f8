//! Arguments about the network of copies.

use clap::{Args, ValueEnum};
use forkd_engine::network::gateway::{DNS_PORT, GatewayOptions};
use forkd_engine::network::policy::Policy;
use forkd_engine::network::rate::NetRate;
use forkd_engine::network::rule::Rule;
use forkd_engine::network::wire::NetworkMode;
use std::net::{IpAddr, SocketAddr};

/// What a network device is connected to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Net {
    /// Nothing
    None,
    /// A network namespace of the copy's own, and no further
    Isolated,
    /// Out, as far as --allow and --deny say
    Nat,
}

/// The network of `forkd fork`.
#[derive(Debug, Args)]
pub struct NetArgs {
    /// What each copy's network device is connected to
    #[arg(long, value_name = "MODE", default_value = "none", value_enum)]
    pub net: Net,
    /// With --net nat: where copies may go, and nowhere else: `public`, an address, a network, a name, *.NAME, each with
    /// :PORT or :PORT-PORT, or :PORT alone (repeatable) [default: public]
    #[arg(long, value_name = "RULE")]
    pub allow: Vec<Rule>,
    /// With --net nat: where copies may not go, whatever is allowed (repeatable)
    #[arg(long, value_name = "RULE")]
    pub deny: Vec<Rule>,
    /// With --net nat: the name server that answers for copies (repeatable) [default: this host's]
    #[arg(long, value_name = "ADDR[:PORT]", value_parser = parse_name_server)]
    pub dns: Vec<SocketAddr>,
    /// With --net nat: what each copy may send, and receive: 10mbit, 1MB/s, 500pps, or both with a comma
    #[arg(long, value_name = "RATE")]
    pub net_rate: Option<NetRate>,
}

impl NetArgs {
    /// As the engine takes it; a complaint where options do not belong together.
    pub fn mode(&self) -> Result<NetworkMode, &'static str> {
        let gateway = [
            (!self.allow.is_empty(), "--allow"),
            (!self.deny.is_empty(), "--deny"),
            (!self.dns.is_empty(), "--dns"),
            (self.net_rate.is_some(), "--net-rate"),
        ];
        let unused = gateway.into_iter().find(|(given, _)| *given).map(|(_, option)| option);
        match (self.net, unused) {
            (Net::Nat, _) => Ok(NetworkMode::Nat(GatewayOptions {
                policy: Policy { allow: self.allow.clone(), deny: self.deny.clone() },
                name_servers: self.dns.clone(),
                rate: self.net_rate,
            })),
            (_, Some(option)) => Err(option),
            (Net::None, None) => Ok(NetworkMode::None),
            (Net::Isolated, None) => Ok(NetworkMode::Isolated),
        }
    }
}

fn parse_name_server(text: &str) -> Result<SocketAddr, String> {
    let address = text.parse::<IpAddr>().map(|address| SocketAddr::new(address, DNS_PORT));
    address
        .or_else(|_| text.parse())
        .map_err(|_| "a name server is an address, with :PORT if it is not 53".to_owned())
}

/// `forkd net`.
#[derive(Debug, Args)]
pub struct NetworkArgs {
    /// The child, as `forkd ps` names it
    pub id: String,
}
