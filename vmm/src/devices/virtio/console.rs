//! virtio-console (virtio 1.2, section 5.3), one port, `/dev/hvc0` in a Linux guest: what is written there goes where
//! the serial port's output goes, a page at a time instead of a byte. There is no input.

use super::device::{VirtioDevice, VirtioError, wants_interrupt};
use crate::devices::serial::Console;
use std::io::Write;
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

const TRANSMIT: usize = 1;
/// Most bytes that are taken from one buffer; Linux sends a page at most. The rest is dropped.
const BUFFER_MAX: usize = 4096;
/// Most buffers of one chain that are looked at.
const BUFFERS_MAX: usize = 16;

/// The device.
#[derive(Debug)]
pub struct VirtioConsole {
    output: Console,
}

impl VirtioConsole {
    /// A console that writes to `output`.
    pub fn new(output: Console) -> VirtioConsole {
        VirtioConsole { output }
    }
}

impl VirtioDevice for VirtioConsole {
    fn id(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    fn queue_sizes(&self) -> &'static [u16] {
        // Linux fills the receive queue with a page a descriptor, for input that never comes.
        &[2, 64]
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
        // Receive buffers stay in their queue.
        let Some(queue) = queues.get_mut(queue).filter(|_| queue == TRANSMIT) else { return Ok(false) };
        let chains: Vec<_> = queue.iter(ram)?.collect();
        let used = !chains.is_empty();
        for chain in chains {
            let head = chain.head_index();
            for buffer in chain.readable().take(BUFFERS_MAX) {
                let mut bytes = vec![0; (buffer.len() as usize).min(BUFFER_MAX)];
                ram.read_slice(&mut bytes, buffer.addr())?;
                if let Err(error) = self.output.write_all(&bytes) {
                    tracing::debug!(%error, "console output is lost");
                }
            }
            queue.add_used(ram, head, 0)?;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }
}
