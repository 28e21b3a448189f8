//! What makes a virtio device of a transport, and what of it survives a snapshot.

use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// The devices that a machine can have, in the order of their windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DeviceKind {
    /// Streams between host and guest.
    Vsock,
    /// Random bytes.
    Rng,
    /// The root disk.
    Pmem,
    /// The scratch disk.
    Block,
    /// Free memory is given back.
    Balloon,
    /// The second console.
    Console,
    /// A network.
    Net,
}

/// What of a device survives a snapshot besides its registers and queues. New kinds come last: the position is the tag.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DeviceState {
    /// Nothing.
    Stateless,
    /// Streams do not survive, but the guest must hear that they ended.
    Vsock {
        /// There were streams.
        had_streams: bool,
        /// Port of the next stream that the host opens.
        next_host_port: u32,
    },
    /// The content of a disk does not survive.
    Block {
        /// Its capacity.
        sectors: u64,
    },
    /// The balloon.
    Balloon {
        /// Its size in pages, little endian, as the driver wrote it.
        actual: [u8; 4],
    },
    /// Frames do not survive.
    Net {
        /// The driver has seen a link.
        had_link: bool,
    },
}

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
    /// The driver writes to the configuration space. Most have nothing to be written.
    fn write_config(&mut self, _offset: u64, _bytes: &[u8]) {}
    /// The driver is set up; `features` are those that both sides have. Called again after a restore.
    fn activate(&mut self, _features: u64) {}
    /// The driver added buffers to a queue. Returns whether it is to be interrupted.
    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError>;
    /// The driver reset the device.
    fn reset(&mut self) {}
    /// What survives a snapshot besides registers and queues.
    fn save(&self) -> DeviceState {
        DeviceState::Stateless
    }
    /// Takes back what [`VirtioDevice::save`] returned; state of another device is ignored, as it may be anybody's.
    fn restore(&mut self, _state: &DeviceState) {}
    /// Whether the configuration space is another than the one that the driver in the restored snapshot has read.
    fn is_reconfigured(&self) -> bool {
        false
    }
    /// The machine is about to go on from a snapshot: what the driver must hear of that. Returns whether to interrupt
    /// it.
    fn resume(&mut self, _queues: &mut [Queue], _ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        Ok(false)
    }
}

/// Copies the part of a configuration structure that was asked for.
pub(crate) fn read_config_bytes(config: &[u8], offset: u64, into: &mut [u8]) {
    for (position, byte) in into.iter_mut().enumerate() {
        let at = offset.saturating_add(position as u64);
        *byte = usize::try_from(at).ok().and_then(|at| config.get(at)).copied().unwrap_or(0);
    }
}

/// Whether the driver wants to hear of used buffers. It often does not, and each interrupt costs it kernel instructions.
pub(crate) fn wants_interrupt(queue: &mut Queue, ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
    // Its barrier lies between the used index and the flags.
    let needed = queue.needs_notification(ram)?;
    let flags: u16 = ram.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed)?;
    Ok(needed && u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT == 0)
}
