//! virtio-rng (virtio 1.2, section 5.4): the host's random bytes.

use super::device::{VirtioDevice, VirtioError, wants_interrupt};
use rustix::rand::{GetRandomFlags, getrandom};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

/// Most bytes given for one request: a hostile guest cannot keep its vCPU's thread busy with one.
const REQUEST_MAX: usize = 4096;

/// The device.
#[derive(Debug)]
pub struct Rng;

impl VirtioDevice for Rng {
    fn id(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn read_config(&self, _offset: u64, into: &mut [u8]) {
        into.fill(0);
    }

    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let chains: Vec<_> = queue.iter(ram)?.collect();
        let used = !chains.is_empty();
        for chain in chains {
            let head = chain.head_index();
            let mut written = 0;
            if let Some(buffer) = chain.writable().next() {
                let mut bytes = vec![0; (buffer.len() as usize).min(REQUEST_MAX)];
                // Only a signal can make it short, and then what is there is given.
                let filled = getrandom(&mut bytes[..], GetRandomFlags::empty()).unwrap_or(0);
                ram.write_slice(&bytes[..filled], buffer.addr())?;
                written = filled as u32;
            }
            queue.add_used(ram, head, written)?;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }
}
