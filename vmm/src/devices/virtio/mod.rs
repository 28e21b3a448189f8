//! virtio 1.x devices over MMIO (OASIS virtio 1.2, section 4.2). Callers: `machine.rs`.

pub mod mmio;
pub mod pmem;
pub mod rng;
pub mod vsock;

use virtio_queue::Queue;
use vm_memory::{GuestMemoryError, GuestMemoryMmap};

/// A queue could not be served. The device then asks the driver to reset it; nothing else is harmed.
#[derive(Debug, thiserror::Error)]
pub enum VirtioError {
    /// The ring itself is broken: addresses outside of RAM, impossible indexes.
    #[error("the driver's virtqueue is broken")]
    Queue(#[from] virtio_queue::Error),
    /// A buffer lies outside of RAM.
    #[error("a buffer of the driver lies outside of guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// What makes a device of a transport.
pub trait VirtioDevice: Send {
    /// Device ID (virtio 1.2, section 5).
    fn id(&self) -> u32;
    /// Device-specific feature bits.
    fn features(&self) -> u64 {
        0
    }
    /// Largest size of each queue.
    fn queue_sizes(&self) -> &'static [u16];
    /// Reads the configuration space; what lies behind it reads as zero.
    fn read_config(&self, offset: u64, into: &mut [u8]);
    /// The driver added buffers to a queue. Returns whether it is to be interrupted.
    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError>;
    /// The driver reset the device.
    fn reset(&mut self) {}
}

/// Copies the part of a configuration structure that was asked for.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, into: &mut [u8]) {
    for (position, byte) in into.iter_mut().enumerate() {
        let at = offset.saturating_add(position as u64);
        *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
    }
}
