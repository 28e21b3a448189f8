//! virtio 1.x devices over MMIO (OASIS virtio 1.2, section 4.2).

pub mod balloon;
pub mod block;
pub mod console;
mod device;
pub mod mmio;
pub mod net;
pub mod pmem;
pub mod rng;
pub mod vsock;

pub use device::{DeviceKind, DeviceState, VirtioDevice, VirtioError};
