//! The virtqueue side of the network device: frames from the guest are written to the tap as they come, in the vCPU's
//! thread; frames from the tap are put into the receive queue as it has room. Constants: virtio 1.2, section 5.1.

use super::{FRAME_MAX, HEADER, Link};
use crate::devices::virtio::device::{DeviceState, VirtioDevice, VirtioError, read_config_bytes};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use std::io::{Read, Write};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MAC, VIRTIO_NET_F_STATUS, VIRTIO_NET_S_LINK_UP};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;

const RX: usize = 0;
const TX: usize = 1;
/// Few: the guest's driver fills the receive queue with buffers of 2 KiB when the device is switched on, and each costs
/// kernel instructions, which kvm_pvm emulates.
const QUEUE_SIZE: u16 = 64;
/// The Ethernet address of a device without a link: locally administered, as nobody else sees it.
const UNLINKED_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Where `num_buffers` lies in a frame's header. It is always 1.
const NUM_BUFFERS: usize = 10;

/// The device.
#[derive(Debug)]
pub struct Net {
    link: Option<Link>,
    /// The tap may have frames.
    readable: bool,
    /// What the driver of a restored machine takes the link for.
    driver_has_link: bool,
    frame: Vec<u8>,
}

impl Net {
    /// A device with a link or without. The tap must be non-blocking.
    pub fn new(link: Option<Link>) -> Net {
        let driver_has_link = link.is_some();
        Net { link, readable: true, driver_has_link, frame: Vec::new() }
    }

    /// The tap, to be waited for.
    pub fn tap(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(|link| link.tap.as_fd())
    }

    /// The tap has frames again.
    pub fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Gives the guest what the tap has, as far as there is room. Returns whether to interrupt it.
    pub fn pump(&mut self, queues: &mut [Queue], ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        let Some(queue) = queues.get_mut(RX).filter(|queue| queue.ready()) else { return Ok(false) };
        let mut used = false;
        while self.readable && self.link.is_some() {
            let Some(chain) = queue.pop_descriptor_chain(ram) else { break };
            let head = chain.head_index();
            let Some(length) = self.take_from_tap() else {
                // The buffer is kept for later.
                queue.go_to_previous_position();
                break;
            };
            let mut writer = chain.writer(ram)?;
            // A buffer that is too small costs the frame: drivers know how long frames are.
            let fits = writer.available_bytes() >= length && writer.write_all(&self.frame[..length]).is_ok();
            queue.add_used(ram, head, if fits { length as u32 } else { 0 })?;
            used = true;
        }
        Ok(used && queue.needs_notification(ram)?)
    }

    /// Reads a frame behind a fresh header; returns both their length. `None` when the tap has none now.
    fn take_from_tap(&mut self) -> Option<usize> {
        let tap = &self.link.as_ref()?.tap;
        self.frame.resize(FRAME_MAX, 0);
        self.frame[..HEADER].fill(0);
        self.frame[NUM_BUFFERS] = 1;
        loop {
            match rustix::io::read(tap, &mut self.frame[HEADER..]) {
                Ok(bytes) if bytes > 0 => return Some(HEADER + bytes),
                Err(Errno::INTR) => {}
                outcome => {
                    if outcome != Err(Errno::AGAIN) {
                        tracing::debug!(?outcome, "the tap cannot be read");
                    }
                    self.readable = false;
                    return None;
                }
            }
        }
    }

    fn take_from_guest(&mut self, queue: &mut Queue, ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        let mut used = false;
        // A driver that adds frames while others are sent rings again for them.
        for _ in 0..queue.size() {
            let Some(chain) = queue.pop_descriptor_chain(ram) else { break };
            let head = chain.head_index();
            let mut reader = chain.reader(ram)?;
            let length = reader.available_bytes();
            if (HEADER + 1..=FRAME_MAX).contains(&length) {
                self.frame.resize(FRAME_MAX, 0);
                if reader.read_exact(&mut self.frame[..length]).is_ok() {
                    self.give_to_tap(length);
                }
            }
            queue.add_used(ram, head, 0)?;
            used = true;
        }
        Ok(used && queue.needs_notification(ram)?)
    }

    /// Frames may be lost on any network, so also here: when the tap has no room, or does not like one.
    fn give_to_tap(&self, length: usize) {
        let Some(link) = &self.link else { return };
        while let Err(errno) = rustix::io::write(&link.tap, &self.frame[HEADER..length]) {
            if errno != Errno::INTR {
                tracing::trace!(%errno, length, "a frame was dropped");
                return;
            }
        }
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC | 1 << VIRTIO_NET_F_STATUS
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.link.as_ref().map_or(UNLINKED_MAC, |link| link.mac));
        let status = if self.link.is_some() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[6..].copy_from_slice(&status.to_le_bytes());
        read_config_bytes(&config, offset, into);
    }

    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        match (queue, queues.get_mut(queue)) {
            (TX, Some(queue)) => self.take_from_guest(queue, ram),
            (RX, Some(_)) => self.pump(queues, ram),
            _ => Ok(false),
        }
    }

    fn save(&self) -> DeviceState {
        DeviceState::Net { had_link: self.link.is_some() }
    }

    fn restore(&mut self, state: &DeviceState) {
        if let DeviceState::Net { had_link } = state {
            self.driver_has_link = *had_link;
        }
    }

    fn is_reconfigured(&self) -> bool {
        self.driver_has_link != self.link.is_some()
    }

    fn resume(&mut self, queues: &mut [Queue], ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        self.pump(queues, ram)
    }
}
