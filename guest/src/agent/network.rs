//! The machine's network device: switched on before the snapshot, given a copy's own addresses after it.
//!
//! Before the snapshot the device has no link and no address.

use std::fs;
use std::os::fd::OwnedFd;

use forkd_abi::generation::NetworkIdentity;
use forkd_abi::netlink::{self, NetlinkError, Requests};

/// The kernel's number of the first Ethernet device.
const INDEX_FILE: &str = "/sys/class/net/eth0/ifindex";

/// What its driver and the device have agreed on: a 0 or a 1 for each feature, the first first.
const FEATURES_FILE: &str = "/sys/class/net/eth0/device/features";
/// The driver takes a frame in several buffers, so one of any length (`VIRTIO_NET_F_MRG_RXBUF`, virtio 1.2, 5.1.3).
const MERGED_BUFFERS: usize = 15;

/// The first Ethernet device.
pub struct Network {
    socket: OwnedFd,
    index: u32,
    takes_long_frames: bool,
}

impl Network {
    /// The device switched on; `None` where there is none.
    pub fn open() -> Result<Option<Self>, NetlinkError> {
        let index = fs::read_to_string(INDEX_FILE).ok().and_then(|text| text.trim().parse().ok());
        let Some(index) = index else { return Ok(None) };
        let features = fs::read(FEATURES_FILE).unwrap_or_default();
        let takes_long_frames = features.get(MERGED_BUFFERS) == Some(&b'1');
        let network = Self { socket: netlink::socket()?, index, takes_long_frames };
        network.rehearse()?;
        Ok(Some(network))
    }

    /// Asks for what is so already, by the way that [`Network::take_on`] goes.
    pub fn rehearse(&self) -> Result<(), NetlinkError> {
        let mut requests = Requests::new();
        requests.link_up(self.index);
        requests.send(&self.socket)
    }

    /// Gives the device a copy's own addresses.
    pub fn take_on(&self, identity: &NetworkIdentity) -> Result<(), NetlinkError> {
        let mut requests = Requests::new();
        requests.set_mac(self.index, identity.mac);
        if let Some(mtu) = identity.mtu.filter(|_| self.takes_long_frames) {
            requests.set_mtu(self.index, mtu);
        }
        requests.add_address(self.index, identity.address, identity.prefix);
        if let Some(gateway) = identity.gateway {
            requests.default_route(self.index, gateway);
        }
        requests.send(&self.socket)
    }
}
