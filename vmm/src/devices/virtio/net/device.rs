//! The virtqueue side of the network device: frames from the guest are written to the wire as they come, in the vCPU's
//! thread; frames from the wire are put into the receive queue as it has room. While the wire has no room, the guest's
//! frames stay in its queue; while the queue has none, the wire's frames stay there. Constants: virtio 1.2, section 5.1.

use super::checksum;
use super::{FRAME_MAX, HEADER, Link};
use crate::devices::virtio::device::{
    DeviceState, VirtioDevice, VirtioError, read_config_bytes, wants_interrupt,
};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use std::io::{Read, Write};
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MAC, VIRTIO_NET_F_MRG_RXBUF,
    VIRTIO_NET_F_STATUS, VIRTIO_NET_HDR_F_DATA_VALID, VIRTIO_NET_HDR_F_NEEDS_CSUM, VIRTIO_NET_S_LINK_UP,
};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const RX: usize = 0;
const TX: usize = 1;
/// Sizes of the queues. Few: the guest's driver fills the receive queue when the device is switched on, and each buffer
/// costs kernel instructions, which kvm_pvm emulates. But Linux fills it again only when 32 are used: the rest must take
/// the longest frame, in buffers of 1.5 KiB.
const QUEUE_SIZES: [u16; 2] = [128, 64];
/// The Ethernet address of a device without a link: locally administered, as nobody else sees it.
const UNLINKED_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
/// Where `csum_start`, `csum_offset` and `num_buffers` lie in a frame's header; `flags` are its first byte.
const CSUM_START: usize = 6;
const CSUM_OFFSET: usize = 8;
const NUM_BUFFERS: usize = 10;

/// The device.
#[derive(Debug)]
pub struct Net {
    link: Option<Link>,
    /// The wire may have frames.
    readable: bool,
    /// A frame of the guest waits for room on the wire.
    blocked: bool,
    /// What the driver of a restored machine takes the link for.
    driver_has_link: bool,
    /// The driver takes a frame in several buffers.
    merges_buffers: bool,
    /// The driver believes the device that a frame's checksum is right.
    believes_checksums: bool,
    /// A frame of the guest, with its header.
    sent: Vec<u8>,
    /// A frame of the wire, with its header.
    received: Vec<u8>,
    /// How long that is, bytes, while it waits for buffers; 0 when none does.
    waiting: usize,
}

impl Net {
    /// A device with a link or without. The wire must be non-blocking.
    pub fn new(link: Option<Link>) -> Net {
        let driver_has_link = link.is_some();
        Net {
            link,
            readable: true,
            blocked: false,
            driver_has_link,
            merges_buffers: false,
            believes_checksums: false,
            sent: Vec::new(),
            received: Vec::new(),
            waiting: 0,
        }
    }

    /// The wire, to be waited for.
    pub fn wire(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(|link| link.wire.as_fd())
    }

    /// The wire has frames again, or room. Moves what waits for that; returns whether to interrupt the guest.
    pub fn on_wire_ready(
        &mut self,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        self.readable = true;
        let mut interrupt = false;
        if std::mem::take(&mut self.blocked)
            && let Some(queue) = queues.get_mut(TX).filter(|queue| queue.ready())
        {
            interrupt = self.take_from_guest(queue, ram)?;
        }
        Ok(self.pump(queues, ram)? | interrupt)
    }

    /// Gives the guest what the wire has, as far as there is room. Returns whether to interrupt it.
    pub fn pump(&mut self, queues: &mut [Queue], ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        let Some(queue) = queues.get_mut(RX).filter(|queue| queue.ready()) else { return Ok(false) };
        let mut used = false;
        while self.link.is_some() && (self.readable || self.waiting > 0) {
            let Some(first) = queue.pop_descriptor_chain(ram) else { break };
            if self.waiting == 0 && !self.take_from_wire() {
                // The buffer is kept for later.
                queue.go_to_previous_position();
                break;
            }
            if !self.give_to_guest(first, queue, ram)? {
                break;
            }
            used = true;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }

    /// Puts the frame that was received into buffers: into `first` alone, or into as many as it takes. `false` when the
    /// driver has not given enough of them yet; the frame then waits.
    fn give_to_guest(
        &mut self,
        first: DescriptorChain<&GuestMemoryMmap>,
        queue: &mut Queue,
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        let length = self.waiting;
        let buffers_max = if self.merges_buffers { usize::from(queue.size()) } else { 1 };
        let (mut buffers, mut room) = (Vec::new(), 0_usize);
        let mut next = Some(first);
        while let Some(chain) = next {
            let head = chain.head_index();
            let writer = chain.writer(ram)?;
            room = room.saturating_add(writer.available_bytes());
            buffers.push((head, writer));
            let wants_more = room < length && buffers.len() < buffers_max;
            next = if wants_more { queue.pop_descriptor_chain(ram) } else { None };
        }
        if room < length && buffers.len() < buffers_max {
            buffers.iter().for_each(|_| queue.go_to_previous_position());
            return Ok(false);
        }
        // At most the queue's size.
        self.received[NUM_BUFFERS..HEADER].copy_from_slice(&(buffers.len() as u16).to_le_bytes());
        // Buffers that are too small cost the frame: drivers know how long frames are.
        let mut rest = if room < length { &[] } else { &self.received[..length] };
        let mut used = Vec::with_capacity(buffers.len());
        for (head, mut writer) in buffers {
            let (part, more) = rest.split_at(rest.len().min(writer.available_bytes()));
            let written = writer.write_all(part).map_or(0, |()| part.len());
            used.push([u32::from(head).to_le(), (written as u32).to_le()]);
            rest = more;
        }
        self.waiting = 0;
        add_used_at_once(queue, ram, &used)?;
        Ok(true)
    }

    /// Reads a frame behind a fresh header. `false` when the wire has none now.
    fn take_from_wire(&mut self) -> bool {
        let Some(link) = &self.link else { return false };
        self.received.resize(FRAME_MAX, 0);
        self.received[..HEADER].fill(0);
        let outcome = loop {
            match rustix::io::read(&link.wire, &mut self.received[HEADER..]) {
                Err(Errno::INTR) => {}
                outcome => break outcome,
            }
        };
        match outcome {
            Ok(bytes) if bytes > 0 => {
                self.waiting = HEADER + bytes;
                if self.believes_checksums && checksum::is_right(&self.received[HEADER..self.waiting]) {
                    self.received[0] = VIRTIO_NET_HDR_F_DATA_VALID as u8;
                }
                return true;
            }
            Err(Errno::AGAIN) => {}
            outcome => tracing::debug!(?outcome, "the wire cannot be read"),
        }
        self.readable = false;
        false
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
                self.sent.resize(FRAME_MAX, 0);
                if reader.read_exact(&mut self.sent[..length]).is_ok() && !self.give_to_wire(length) {
                    // It is kept until there is room.
                    queue.go_to_previous_position();
                    self.blocked = true;
                    break;
                }
            }
            queue.add_used(ram, head, 0)?;
            used = true;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }

    /// `false` when the wire has no room now. Frames may be lost on any network, so also here: when the wire does not like
    /// one.
    fn give_to_wire(&mut self, length: usize) -> bool {
        let Some(link) = &self.link else { return true };
        let (header, frame) = self.sent[..length].split_at_mut(HEADER);
        if header[0] & VIRTIO_NET_HDR_F_NEEDS_CSUM as u8 != 0 {
            let field = |at: usize| usize::from(u16::from_le_bytes([header[at], header[at + 1]]));
            checksum::complete(frame, field(CSUM_START), field(CSUM_OFFSET));
        }
        while let Err(errno) = rustix::io::write(&link.wire, &*frame) {
            match errno {
                Errno::INTR => {}
                Errno::AGAIN => return false,
                _ => {
                    tracing::trace!(%errno, length, "a frame was dropped");
                    return true;
                }
            }
        }
        true
    }
}

impl VirtioDevice for Net {
    fn id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_NET_F_MAC
            | 1 << VIRTIO_NET_F_STATUS
            | 1 << VIRTIO_NET_F_MRG_RXBUF
            | 1 << VIRTIO_NET_F_CSUM
            | 1 << VIRTIO_NET_F_GUEST_CSUM
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        let mut config = [0; 8];
        config[..6].copy_from_slice(&self.link.as_ref().map_or(UNLINKED_MAC, |link| link.mac));
        let status = if self.link.is_some() { VIRTIO_NET_S_LINK_UP as u16 } else { 0 };
        config[6..].copy_from_slice(&status.to_le_bytes());
        read_config_bytes(&config, offset, into);
    }

    fn activate(&mut self, features: u64) {
        self.merges_buffers = features & 1 << VIRTIO_NET_F_MRG_RXBUF != 0;
        self.believes_checksums = features & 1 << VIRTIO_NET_F_GUEST_CSUM != 0;
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

/// Uses several buffers, each its number and its bytes. The driver sees either none of them or all: a frame's later
/// buffers must be there when it finds the first (virtio 1.2, section 5.1.6.4).
fn add_used_at_once(queue: &mut Queue, ram: &GuestMemoryMmap, used: &[[u32; 2]]) -> Result<(), VirtioError> {
    let mut next = queue.next_used();
    for element in used {
        let slot = u64::from(next % queue.size());
        // flags and idx, 2 bytes each, come before the elements of 8 bytes (virtio 1.2, section 2.7.8).
        ram.write_obj(*element, GuestAddress(queue.used_ring().saturating_add(4 + slot * 8)))?;
        next = next.wrapping_add(1);
    }
    queue.set_next_used(next);
    ram.store(next.to_le(), GuestAddress(queue.used_ring().saturating_add(2)), Ordering::Release)?;
    Ok(())
}
