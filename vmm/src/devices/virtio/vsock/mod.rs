//! virtio-vsock (virtio 1.2, section 5.10), host side as in Firecracker: a Unix socket on which a client writes
//! `CONNECT <port>\n`, reads `OK <host port>\n`, and then talks to whoever listens on that port in the guest.
//!
//! `device` is the virtqueue side (called with the transport's lock held), `connection` the state of one stream, and
//! `backend` the thread that waits for the host's sockets.

pub mod backend;
mod connection;
mod device;
mod packet;

pub use device::Vsock;

/// The guest's context ID. Every machine has its own device, so all can be the same.
pub const GUEST_CID: u64 = 3;
/// The host's context ID (`VMADDR_CID_HOST`).
pub const HOST_CID: u64 = 2;
/// Most streams at a time, counted with those that still shake hands.
pub const CONNECTIONS_MAX: usize = 256;
/// What one stream may hold back for a slow host client, bytes; announced to the guest as its credit.
pub const STREAM_BUFFER: u32 = 256 * 1024;
