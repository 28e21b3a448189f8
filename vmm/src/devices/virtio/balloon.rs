//! virtio-balloon (virtio 1.2, section 5.5) with free page reporting: a guest tells which of its memory holds
//! nothing, and while a snapshot is being built that memory is given back, so that it does not travel in packs.
//!
//! Only a machine that was booted gives memory back: its RAM is an image of its own, mapped shared, and a hole in it
//! reads as zero. In a fork the page would be another copy of what the snapshot has there, or a fault to the pager;
//! reports are answered there and change nothing.
//!
//! A kernel that relies on the content of free pages (poisoned, or zeroed when freed) does not report without
//! `VIRTIO_BALLOON_F_PAGE_POISON`, which is not offered.

use super::device::{DeviceState, VirtioDevice, VirtioError, read_config_bytes, wants_interrupt};
use crate::memory::{GuestMemory, PAGE_BYTES};
use std::ops::Range;
use virtio_bindings::virtio_ids::VIRTIO_ID_BALLOON;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestMemoryMmap};

/// `VIRTIO_BALLOON_F_REPORTING`.
const F_REPORTING: u64 = 5;

const INFLATE: usize = 0;
/// Queues are counted without those of features that are not offered, as Linux counts them.
const REPORTING: usize = 2;
/// Most ranges that one report names: Linux' `PAGE_REPORTING_CAPACITY`, and so the least size of the queue.
const REPORT_RANGES: usize = 32;
/// Most pages that are taken from one inflate buffer; the rest stay as they are. Linux sends 256 at a time.
const INFLATE_PAGES: usize = 1024;
/// Offset of the field that the driver writes: the number of pages in its balloon.
const ACTUAL: u64 = 4;

/// The device.
#[derive(Debug)]
pub struct Balloon {
    gives_back: Option<GuestMemory>,
    /// Little endian, as the driver wrote it.
    actual: [u8; 4],
}

impl Balloon {
    /// A balloon that gives memory back, or one that leaves all as it is.
    pub fn new(gives_back: Option<GuestMemory>) -> Balloon {
        Balloon { gives_back, actual: [0; 4] }
    }

    fn give_back(&self, range: Range<u64>) {
        let Some(memory) = &self.gives_back else { return };
        // A driver may name any address. What is not RAM is nobody's loss.
        if let Err(error) = memory.discard(range.clone()) {
            tracing::debug!(?range, %error, "memory was not given back");
        }
    }

    fn inflate(&self, buffer: &[u8]) {
        let mut run = 0..0;
        for page in buffer.chunks_exact(4) {
            let page = page.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte));
            // Linux takes pages from the top down.
            if page + 1 == run.start {
                run.start = page;
            } else if page == run.end {
                run.end = page + 1;
            } else {
                self.give_back(run.start * PAGE_BYTES..run.end * PAGE_BYTES);
                run = page..page + 1;
            }
        }
        self.give_back(run.start * PAGE_BYTES..run.end * PAGE_BYTES);
    }
}

impl VirtioDevice for Balloon {
    fn id(&self) -> u32 {
        VIRTIO_ID_BALLOON
    }

    fn features(&self) -> u64 {
        1 << F_REPORTING
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 16, REPORT_RANGES as u16]
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        // The host never asks for pages: the first field stays 0.
        let mut config = [0; 8];
        config[ACTUAL as usize..].copy_from_slice(&self.actual);
        read_config_bytes(&config, offset, into);
    }

    fn write_config(&mut self, offset: u64, bytes: &[u8]) {
        if offset == ACTUAL
            && let Ok(actual) = bytes.try_into()
        {
            self.actual = actual;
        }
    }

    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        let position = queue;
        let Some(queue) = queues.get_mut(queue) else { return Ok(false) };
        let chains: Vec<_> = queue.iter(ram)?.collect();
        let used = !chains.is_empty();
        for chain in chains {
            let head = chain.head_index();
            match position {
                INFLATE => {
                    for buffer in chain.readable().take(1) {
                        let mut pages = vec![0; (buffer.len() as usize).min(INFLATE_PAGES * 4)];
                        ram.read_slice(&mut pages, buffer.addr())?;
                        self.inflate(&pages);
                    }
                }
                REPORTING => {
                    for free in chain.writable().take(REPORT_RANGES) {
                        let start = free.addr().0;
                        self.give_back(start..start.saturating_add(free.len().into()));
                    }
                }
                // Pages that leave the balloon come back as holes.
                _ => {}
            }
            queue.add_used(ram, head, 0)?;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }

    fn reset(&mut self) {
        self.actual = [0; 4];
    }

    fn save(&self) -> DeviceState {
        DeviceState::Balloon { actual: self.actual }
    }

    fn restore(&mut self, state: &DeviceState) {
        if let DeviceState::Balloon { actual } = state {
            self.actual = *actual;
        }
    }
}
