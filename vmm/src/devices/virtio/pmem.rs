//! virtio-pmem (virtio 1.2, section 5.19): tells the guest where the root disk lies in its physical memory. The data
//! itself is a read-only memory slot, so there are no block requests; only flushes arrive here, and succeed, as
//! there is nothing to flush.

use super::device::{VirtioDevice, VirtioError, read_config_bytes, wants_interrupt};
use std::ops::Range;
use virtio_bindings::virtio_ids::VIRTIO_ID_PMEM;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

/// The device.
#[derive(Debug)]
pub struct Pmem {
    range: Range<u64>,
}

impl Pmem {
    /// A device for the guest-physical `range`.
    pub fn new(range: Range<u64>) -> Pmem {
        Pmem { range }
    }
}

impl VirtioDevice for Pmem {
    fn id(&self) -> u32 {
        VIRTIO_ID_PMEM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[64]
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        let mut config = [0; 16];
        config[..8].copy_from_slice(&self.range.start.to_le_bytes());
        config[8..].copy_from_slice(&(self.range.end - self.range.start).to_le_bytes());
        read_config_bytes(&config, offset, into);
    }

    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let mut used = false;
        let heads: Vec<_> =
            queue.iter(ram)?.map(|chain| (chain.head_index(), chain.writable().next())).collect();
        for (head, response) in heads {
            let mut written = 0;
            if let Some(response) = response.filter(|response| response.len() >= 4) {
                ram.write_obj(0_u32, response.addr())?;
                written = 4;
            }
            queue.add_used(ram, head, written)?;
            used = true;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }
}
