//! A network for each child: its addresses, and what the wire of its network device leads to.
//!
//! With [`NetworkMode::Isolated`] that is a tap device in a namespace of its own. Nothing has a name outside of the
//! namespace, and the namespace has none either: it lives as long as the tap's descriptor, which the machine's process
//! holds, or the supervisor's. So nothing is left however they end. There is no way out of the namespace unless somebody
//! adds one. With [`NetworkMode::Nat`] it is the fork's gateway.

use super::gateway::{Gateway, GatewayOptions, GatewayWire, MTU};
use super::traffic::{RefusedTraffic, Traffic, TrafficCounts};
use forkd_abi::generation::NetworkIdentity;
use forkd_abi::netlink::{self, NetlinkError, Requests};
use forkd_vmm::sys;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

/// The host's end of the wire, in the child's namespace.
const TAP: &str = "tap0";
/// Children's addresses come from here: four for each child, the second the host's end, the third the child's.
const NETWORK: [u8; 2] = [10, 213];
const PREFIX: u8 = 30;
/// What a new namespace inherits of the host or does by itself: it forwards nothing unless somebody wants it to, and
/// does not wake the child with IPv6's announcements.
const SETTINGS: [(&str, &str); 3] = [
    ("/proc/sys/net/ipv4/ip_forward", "0"),
    ("/proc/sys/net/ipv6/conf/all/disable_ipv6", "1"),
    ("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1"),
];

/// A child's network could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// A step of it.
    #[error("{doing} for a child's network failed")]
    Io {
        /// What was tried.
        doing: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its devices.
    #[error("a child's network cannot be set up")]
    Netlink(#[from] NetlinkError),
    /// More children than addresses.
    #[error("there is no network address for child {number}")]
    Full {
        /// Which child.
        number: u64,
    },
}

/// What a child's network device is connected to.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum NetworkMode {
    /// Nothing: it has no link.
    #[default]
    None,
    /// The host's end in a namespace of its own, and nothing behind it.
    Isolated,
    /// The fork's gateway, which leads out as far as its policy says.
    Nat(GatewayOptions),
}

/// A child's network, as `forkd ps --json` and `forkd fork --json` show it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkStatus {
    /// The child's Ethernet address.
    pub mac: String,
    /// Its IPv4 address.
    pub address: Ipv4Addr,
    /// The host's end.
    pub host_address: Ipv4Addr,
    /// The namespace with the host's end, for setns(2), `nsenter --net=` and `ip link set ... netns`; where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub namespace: Option<String>,
    /// What went through its gateway; where there is one.
    #[serde(flatten)]
    pub traffic: Option<TrafficCounts>,
}

/// A child's way out, as `forkd net` shows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayStatus {
    /// Its addresses and counts.
    #[serde(flatten)]
    pub network: NetworkStatus,
    /// How it gets out.
    #[serde(flatten)]
    pub options: GatewayOptions,
    /// What was refused, the latest first.
    pub refusals: Vec<RefusedTraffic>,
}

/// A child's network.
#[derive(Debug)]
pub struct ChildNetwork {
    /// The child's end.
    pub identity: NetworkIdentity,
    host_end: HostEnd,
}

/// What the wire leads to.
#[derive(Debug)]
enum HostEnd {
    /// A tap, and the namespace in which its other end is.
    Namespace { tap: OwnedFd, namespace: File },
    /// The fork's gateway.
    Gateway { wire: GatewayWire, gateway: Arc<Gateway> },
}

impl ChildNetwork {
    /// What the machine's process reads frames from and writes them to.
    pub fn wire(&self) -> BorrowedFd<'_> {
        match &self.host_end {
            HostEnd::Namespace { tap, .. } => tap.as_fd(),
            HostEnd::Gateway { wire, .. } => wire.child_end.as_fd(),
        }
    }

    /// The child runs as `hostname`, and has its end of the wire: connects the other. What is left is what is known of it.
    pub fn connect(self, hostname: &str) -> Result<KeptNetwork, NetworkError> {
        let identity = self.identity;
        let end = match self.host_end {
            HostEnd::Namespace { namespace, .. } => KeptEnd::Namespace(namespace),
            HostEnd::Gateway { wire, gateway } => {
                let traffic = Arc::clone(&wire.traffic);
                gateway.connect(&identity, hostname, wire).map_err(failed("starting the gateway"))?;
                KeptEnd::Gateway { traffic, gateway }
            }
        };
        Ok(KeptNetwork { identity, end })
    }
}

/// What is known of the network of a child that runs.
#[derive(Debug)]
pub struct KeptNetwork {
    identity: NetworkIdentity,
    end: KeptEnd,
}

#[derive(Debug)]
enum KeptEnd {
    /// Kept for others to enter.
    Namespace(File),
    Gateway {
        traffic: Arc<Traffic>,
        gateway: Arc<Gateway>,
    },
}

impl KeptNetwork {
    /// As it is shown.
    pub fn status(&self) -> NetworkStatus {
        let mac: Vec<_> = self.identity.mac.iter().map(|byte| format!("{byte:02x}")).collect();
        let (namespace, traffic) = match &self.end {
            KeptEnd::Namespace(namespace) => {
                (Some(format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())), None)
            }
            KeptEnd::Gateway { traffic, .. } => (None, Some(traffic.counts())),
        };
        NetworkStatus {
            mac: mac.join(":"),
            address: self.identity.address,
            host_address: self.identity.gateway.unwrap_or(Ipv4Addr::UNSPECIFIED),
            namespace,
            traffic,
        }
    }

    /// Its way out, if it has one.
    pub fn gateway_status(&self) -> Option<GatewayStatus> {
        let KeptEnd::Gateway { traffic, gateway } = &self.end else { return None };
        let (network, refusals) = (self.status(), traffic.refusals());
        Some(GatewayStatus { network, options: gateway.options().clone(), refusals })
    }
}

/// The networks of one fork's children.
#[derive(Debug)]
pub struct ChildNetworks {
    kind: NetworksKind,
    /// Middle of the children's Ethernet addresses, so that two forks do not share any.
    salt: [u8; 3],
}

#[derive(Debug)]
enum NetworksKind {
    None,
    Isolated,
    Nat(Arc<Gateway>),
}

impl ChildNetworks {
    /// Networks of this kind for so many children.
    pub fn new(mode: &NetworkMode, children: u32) -> Result<ChildNetworks, NetworkError> {
        let mut salt = [0; 3];
        getrandom(&mut salt, GetRandomFlags::empty()).map_err(failed("getrandom"))?;
        let kind = match mode {
            NetworkMode::None => NetworksKind::None,
            NetworkMode::Isolated => NetworksKind::Isolated,
            NetworkMode::Nat(options) => NetworksKind::Nat(Arc::new(Gateway::new(options.clone(), children))),
        };
        Ok(ChildNetworks { kind, salt })
    }

    /// The network of child `number`, counted from 1, if it is to have one.
    pub fn of_child(&self, number: u64) -> Result<Option<ChildNetwork>, NetworkError> {
        let host_end = match &self.kind {
            NetworksKind::None => return Ok(None),
            NetworksKind::Isolated => {
                let identity = self.identity(number)?;
                // A thread of its own is in the new namespace, and gone before anything else can be done there.
                let made = std::thread::scope(|scope| scope.spawn(|| make(&identity)).join());
                let (tap, namespace) = made.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
                HostEnd::Namespace { tap, namespace }
            }
            NetworksKind::Nat(gateway) => {
                let wire = GatewayWire::new().map_err(failed("a wire"))?;
                HostEnd::Gateway { wire, gateway: Arc::clone(gateway) }
            }
        };
        Ok(Some(ChildNetwork { identity: self.identity(number)?, host_end }))
    }

    fn identity(&self, number: u64) -> Result<NetworkIdentity, NetworkError> {
        let full = || NetworkError::Full { number };
        let number16 = u16::try_from(number).map_err(|_| full())?;
        let [high, low] = number16.checked_mul(4).ok_or_else(full)?.to_be_bytes();
        let end = |offset| Ipv4Addr::new(NETWORK[0], NETWORK[1], high, low + offset);
        let ([first, second], [a, b, c]) = (number16.to_be_bytes(), self.salt);
        // 2: locally administered, for one device.
        let mac = [2, a, b, c, first, second];
        // The tap of an isolated child may be joined to networks that take no longer packets than Ethernet's.
        let mtu = matches!(self.kind, NetworksKind::Nat(_)).then_some(MTU);
        Ok(NetworkIdentity { mac, address: end(2), prefix: PREFIX, gateway: Some(end(1)), mtu })
    }
}

fn failed<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> NetworkError {
    move |source| NetworkError::Io { doing, source: source.into() }
}

/// A namespace with a tap device that has the host's address. Moves this thread there.
fn make(identity: &NetworkIdentity) -> Result<(OwnedFd, File), NetworkError> {
    sys::leave_network().map_err(failed("a network namespace"))?;
    let namespace = File::open("/proc/thread-self/ns/net").map_err(failed("opening a network namespace"))?;
    for (setting, value) in SETTINGS {
        // A host may be without IPv6, or have a /proc of its own ideas.
        if let Err(error) = fs::write(setting, value) {
            tracing::debug!(setting, %error, "a setting of a child's network stays as it is");
        }
    }
    let tap = sys::create_tap(TAP).map_err(failed("/dev/net/tun"))?;
    let socket = netlink::socket()?;
    let index = rustix::net::netdevice::name_to_index(&socket, TAP).map_err(failed("finding the tap"))?;
    let mut requests = Requests::new();
    if let Some(address) = identity.gateway {
        requests.add_address(index, address, identity.prefix);
    }
    requests.link_up(index);
    requests.send(&socket)?;
    Ok((tap, namespace))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thousand_children_have_addresses_of_their_own() {
        let networks = ChildNetworks::new(&NetworkMode::Isolated, 1000).unwrap();
        let all: Vec<_> = (1..=1000).map(|number| networks.identity(number).unwrap()).collect();
        let mut macs: Vec<_> = all.iter().map(|identity| identity.mac).collect();
        let mut addresses: Vec<_> = all.iter().map(|identity| identity.address).collect();
        macs.sort_unstable();
        macs.dedup();
        addresses.sort_unstable();
        addresses.dedup();
        assert_eq!((macs.len(), addresses.len()), (1000, 1000));
        for identity in &all {
            let (address, gateway) = (u32::from(identity.address), u32::from(identity.gateway.unwrap()));
            assert_eq!((address / 4, address % 4, gateway % 4), (gateway / 4, 2, 1), "{identity:?}");
        }
        assert!(matches!(networks.identity(20_000), Err(NetworkError::Full { number: 20_000 })));
    }

    #[test]
    fn without_a_mode_nothing_is_made() {
        assert!(ChildNetworks::new(&NetworkMode::None, 1).unwrap().of_child(1).unwrap().is_none());
    }
}
