//! virtio-net (virtio 1.2, section 5.1): Ethernet frames between the guest and a tap device of the host. Without a tap
//! there is no link. Frames go through one by one: no checksum or segmentation is left to the other side.

pub mod backend;
pub mod device;

pub use device::Net;

use rustix::fd::OwnedFd;

/// Longest frame either way, bytes with the header before it: what 64 KiB of IP take.
pub const FRAME_MAX: usize = 65550;
/// Length of the header before each frame (`struct virtio_net_hdr_v1`), bytes.
pub const HEADER: usize = 12;

/// What a machine's network device is connected to.
#[derive(Debug)]
pub struct Link {
    /// A tap device without headers (`IFF_TAP | IFF_NO_PI`).
    pub tap: OwnedFd,
    /// The Ethernet address that the device shows. A driver that read another before a snapshot must be told by other
    /// means.
    pub mac: [u8; 6],
}
