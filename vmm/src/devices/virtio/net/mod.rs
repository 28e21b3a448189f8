//! virtio-net (virtio 1.2, section 5.1): Ethernet frames between the guest and a wire of the host: a tap device, or a
//! socket that keeps messages apart. Without a wire there is no link. The device completes and checks checksums for the
//! guest, whose kernel may be slow; a frame on the wire has its own. Frames are as long as the guest's MTU makes them,
//! with no segmentation.

pub mod backend;
mod checksum;
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
    /// A tap device without headers (`IFF_TAP | IFF_NO_PI`), or a socket with a frame a message.
    pub wire: OwnedFd,
    /// The Ethernet address that the device shows. A driver that read another before a snapshot must be told by other
    /// means.
    pub mac: [u8; 6],
}
