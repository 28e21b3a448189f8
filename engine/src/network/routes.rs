//! What the host's routing table says of an address.

use forkd_abi::netlink::{self, NetlinkError, RouteKind};
use rustix::fd::OwnedFd;
use std::cell::RefCell;
use std::net::Ipv4Addr;

/// See the module's description. Asks the kernel each time: addresses come and go.
#[derive(Debug)]
pub(super) struct HostRoutes {
    socket: RefCell<OwnedFd>,
}

impl HostRoutes {
    /// The table of this thread's network namespace.
    pub(super) fn new() -> Result<HostRoutes, NetlinkError> {
        Ok(HostRoutes { socket: RefCell::new(netlink::socket()?) })
    }

    /// Whether packets to it go to the host itself, or to everybody near it. What cannot be found out counts as such.
    pub(super) fn is_own(&self, address: Ipv4Addr) -> bool {
        let answer = netlink::route_kind(&*self.socket.borrow(), address);
        match answer {
            Ok(kind) => kind == RouteKind::Local,
            Err(error) => {
                tracing::warn!(%error, %address, "which way packets would go cannot be told");
                // Its answer may still come, and would be taken for that to the next question.
                if let Ok(fresh) = netlink::socket() {
                    self.socket.replace(fresh);
                }
                true
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hosts_own_addresses_are_known() {
        let routes = HostRoutes::new().unwrap();
        assert!(routes.is_own(Ipv4Addr::LOCALHOST) && routes.is_own(Ipv4Addr::new(127, 1, 2, 3)));
        assert!(!routes.is_own(Ipv4Addr::new(192, 0, 2, 77)));
        // Each answer belongs to its question.
        assert!(routes.is_own(Ipv4Addr::LOCALHOST));
    }
}
