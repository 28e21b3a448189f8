//! The way out of a fork's children: a router in user space, one for all of them.
//!
//! Each child's frames come over a socket of its own. The gateway answers for every host that the child talks to: TCP
//! ends in it, and what was said goes on by an ordinary socket of this process, if the [`Policy`] lets it. So nothing of
//! the host's network is changed, nothing is left when this process ends however it ends, and no privilege is needed.
//! A child that fills its table, its buffers or its rate fills its own.

mod child;
mod connection;
mod datagrams;
mod dispatch;
mod flow;
mod frame;
mod link;
mod name_servers;
mod resolver;
mod stack;

pub use self::child::DNS_PORT;
use self::child::{ChildGateway, Shared};
pub use self::frame::MTU;
use self::frame::Wire;
use self::link::Link;
use self::name_servers::NameServers;
use super::policy::Policy;
use super::rate::NetRate;
use super::routes::HostRoutes;
use super::traffic::Traffic;
use forkd_abi::generation::NetworkIdentity;
use rustix::fd::OwnedFd;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Resource, getrlimit};
use serde::{Deserialize, Serialize};
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::LocalSet;

/// Fewest and most connections and flows that a child may have.
const FLOWS: (usize, usize) = (16, 512);
/// Descriptors that are left to the rest of this process: so many, and so many for each child.
const DESCRIPTORS_KEPT: (u64, u64) = (128, 8);

/// How children get out.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatewayOptions {
    /// Where they may go.
    pub policy: Policy,
    /// The name servers to ask; without any, the host's.
    pub name_servers: Vec<SocketAddr>,
    /// What each may send and receive.
    pub rate: Option<NetRate>,
}

/// A child that gets a way out.
struct Attachment {
    wire: Wire,
    hostname: String,
    socket: OwnedFd,
    traffic: Arc<Traffic>,
}

/// The gateway of a fork. It ends when this is dropped, and all connections with it.
#[derive(Debug)]
pub struct Gateway {
    options: GatewayOptions,
    children: u32,
    attachments: OnceLock<UnboundedSender<Attachment>>,
}

/// The child's end of its wire, and what the gateway counts.
#[derive(Debug)]
pub struct GatewayWire {
    /// Ethernet frames, one a message.
    pub child_end: OwnedFd,
    /// The gateway's end.
    gateway_end: OwnedFd,
    /// What goes through.
    pub traffic: Arc<Traffic>,
}

impl GatewayWire {
    /// A wire that leads nowhere yet.
    pub fn new() -> io::Result<GatewayWire> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let (child_end, gateway_end) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        Ok(GatewayWire { child_end, gateway_end, traffic: Arc::default() })
    }
}

impl Gateway {
    /// A gateway for so many children. It does nothing before the first is connected.
    pub fn new(options: GatewayOptions, children: u32) -> Gateway {
        Gateway { options, children, attachments: OnceLock::new() }
    }

    /// How children get out.
    pub fn options(&self) -> &GatewayOptions {
        &self.options
    }

    /// Connects a child. Its frames wait until then, so that this may come after the child's start. The child's end is
    /// given up: whoever has a copy of it is the child. `hostname` is answered with the child's own address.
    pub fn connect(&self, identity: &NetworkIdentity, hostname: &str, wire: GatewayWire) -> io::Result<()> {
        let GatewayWire { child_end, gateway_end, traffic } = wire;
        drop(child_end);
        let [_, a, b, c, d, e] = identity.mac;
        let wire = Wire {
            child_mac: identity.mac,
            // Locally administered, as the child's, and different from it.
            gateway_mac: [6, a, b, c, d, e],
            child: identity.address,
            gateway: identity.gateway.unwrap_or(Ipv4Addr::UNSPECIFIED),
        };
        let attachments = match self.attachments.get() {
            Some(attachments) => attachments,
            None => {
                let started = self.start()?;
                self.attachments.get_or_init(|| started)
            }
        };
        attachments
            .send(Attachment { wire, hostname: hostname.to_owned(), socket: gateway_end, traffic })
            .map_err(|_| io::Error::other("the gateway's thread has ended"))
    }

    fn start(&self) -> io::Result<UnboundedSender<Attachment>> {
        let (sender, attachments) = unbounded_channel();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (options, flows_max) = (self.options.clone(), flows_max(self.children));
        let serve = move || {
            let tasks = LocalSet::new();
            runtime.block_on(tasks.run_until(serve(options, flows_max, attachments)));
        };
        std::thread::Builder::new().name("gateway".to_owned()).spawn(serve)?;
        Ok(sender)
    }
}

/// How many connections each child may have, so that all of them together leave this process its descriptors.
fn flows_max(children: u32) -> usize {
    let children = u64::from(children.max(1));
    let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    let left = limit.saturating_sub(DESCRIPTORS_KEPT.0 + DESCRIPTORS_KEPT.1 * children) / children;
    usize::try_from(left).unwrap_or(usize::MAX).clamp(FLOWS.0, FLOWS.1)
}

/// Serves all children until there can be no more, and those that are there are gone with this.
async fn serve(options: GatewayOptions, flows_max: usize, mut attachments: UnboundedReceiver<Attachment>) {
    let routes = match HostRoutes::new() {
        Ok(routes) => routes,
        Err(error) => {
            tracing::error!(%error, "children have no network: which addresses are the host's own cannot be told");
            return;
        }
    };
    let name_servers = NameServers::new(&options.name_servers);
    let shared = Rc::new(Shared { policy: options.policy, name_servers, routes, flows_max });
    while let Some(Attachment { wire, hostname, socket, traffic }) = attachments.recv().await {
        match Link::new(socket, options.rate) {
            Ok(link) => {
                let child = ChildGateway::new(wire, hostname, Rc::clone(&shared), traffic);
                tokio::task::spawn_local(link.run(child));
            }
            Err(error) => tracing::error!(%error, "a child has no network: its wire cannot be watched"),
        }
    }
}

#[cfg(test)]
mod tests;
