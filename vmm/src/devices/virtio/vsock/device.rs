//! The virtqueue side of vsock: packets from the guest are handled as they come, packets for the guest are put into its
//! receive queue as it has room. Constants: virtio 1.2, section 5.10.6.

use super::connection::{Connection, Verdict};
use super::packet::{GuestPacket, PAYLOAD_MAX};
use super::{CONNECTIONS_MAX, GUEST_CID, HOST_CID, STREAM_BUFFER};
use crate::devices::virtio::device::{
    DeviceState, VirtioDevice, VirtioError, read_config_bytes, wants_interrupt,
};
use std::collections::{BTreeMap, VecDeque};
use std::num::Wrapping;
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use virtio_vsock::packet::{PKT_HEADER_SIZE, VsockPacket};
use vm_memory::{Bytes, GuestMemoryMmap};

const RX: usize = 0;
const TX: usize = 1;
const EVENT: usize = 2;

const OP_REQUEST: u16 = 1;
const OP_RESPONSE: u16 = 2;
const OP_RST: u16 = 3;
const OP_SHUTDOWN: u16 = 4;
const OP_RW: u16 = 5;
const OP_CREDIT_UPDATE: u16 = 6;
const OP_CREDIT_REQUEST: u16 = 7;
const TYPE_STREAM: u16 = 1;
const SHUTDOWN_RECEIVE: u32 = 1;
const SHUTDOWN_SEND: u32 = 2;
/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`.
const TRANSPORT_RESET: u32 = 0;

/// Most control packets that wait for the guest to make room; a guest that never does gets no more answers.
const CONTROL_MAX: usize = 4 * CONNECTIONS_MAX;
/// First port on the host side, beyond what programs use.
const HOST_PORT_START: u32 = 1 << 30;

/// Both ends of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct StreamKey {
    /// Port on the host side.
    pub host_port: u32,
    /// Port in the guest.
    pub guest_port: u32,
}

#[derive(Debug, Clone, Copy)]
struct Control {
    key: StreamKey,
    op: u16,
    flags: u32,
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    connections: BTreeMap<StreamKey, Connection>,
    control: VecDeque<Control>,
    next_host_port: u32,
    reset_owed: bool,
    /// The guest has been told that its streams ended, and may still be ending them: also those that it is asked for now.
    reset: Option<UnheardReset>,
    ended: Vec<StreamKey>,
}

/// A reset that the guest has not acted upon yet.
#[derive(Debug)]
struct UnheardReset {
    /// Buffers that it had offered for events: it offers the reset's own again when it has done what the reset says.
    offered: Wrapping<u16>,
    /// Streams that wait for that.
    waiting: Vec<StreamKey>,
}

impl Default for Vsock {
    fn default() -> Vsock {
        Vsock {
            connections: BTreeMap::new(),
            control: VecDeque::new(),
            next_host_port: HOST_PORT_START,
            reset_owed: false,
            reset: None,
            ended: Vec::new(),
        }
    }
}

impl Vsock {
    /// A host client asks for `guest_port`. Gives the stream back when there are too many.
    pub fn connect(&mut self, stream: UnixStream, guest_port: u32) -> Result<StreamKey, UnixStream> {
        if self.connections.len() >= CONNECTIONS_MAX {
            return Err(stream);
        }
        let key = StreamKey { host_port: self.next_host_port, guest_port };
        self.next_host_port = self.next_host_port.checked_add(1).unwrap_or(HOST_PORT_START);
        self.connections.insert(key, Connection::new(stream));
        match &mut self.reset {
            Some(reset) => reset.waiting.push(key),
            None => self.send_control(key, OP_REQUEST, 0),
        }
        Ok(key)
    }

    /// The socket of a stream, to be waited for.
    pub fn stream(&self, key: StreamKey) -> Option<&UnixStream> {
        self.connections.get(&key).map(Connection::stream)
    }

    /// The host client's socket can be read, written, or is gone.
    pub fn host_event(&mut self, key: StreamKey, readable: bool, writable: bool, gone: bool) {
        let Some(connection) = self.connections.get_mut(&key) else { return };
        if readable {
            connection.set_readable();
        }
        let mut verdict = if gone { connection.hang_up() } else { Verdict::Keep };
        if writable && verdict == Verdict::Keep {
            verdict = connection.flush();
        }
        self.conclude(key, verdict);
    }

    /// Streams that ended since the last call; their sockets are closed.
    pub fn take_ended(&mut self) -> Vec<StreamKey> {
        std::mem::take(&mut self.ended)
    }

    /// Gives the guest what waits for it, as far as it has room. Returns whether to interrupt it.
    pub fn pump(&mut self, queues: &mut [Queue], ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        let mut interrupt = false;
        if let Some(queue) = queues.get_mut(EVENT).filter(|queue| queue.ready()) {
            interrupt |= self.announce_reset(queue, ram)?;
            self.hear_of_reset(queue, ram)?;
        }
        if let Some(queue) = queues.get_mut(RX).filter(|queue| queue.ready()) {
            interrupt |= self.fill_receive_queue(queue, ram)?;
        }
        Ok(interrupt)
    }

    fn announce_reset(&mut self, queue: &mut Queue, ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        if !self.reset_owed {
            return Ok(false);
        }
        let Some(chain) = queue.pop_descriptor_chain(ram) else { return Ok(false) };
        let head = chain.head_index();
        let mut written = 0;
        if let Some(buffer) = chain.writable().next().filter(|buffer| buffer.len() >= 4) {
            ram.write_obj(TRANSPORT_RESET, buffer.addr())?;
            written = 4;
        }
        self.reset_owed = false;
        if let Some(reset) = &mut self.reset {
            reset.offered = queue.avail_idx(ram, Ordering::Acquire)?;
        }
        queue.add_used(ram, head, written)?;
        wants_interrupt(queue, ram)
    }

    /// Asks for the streams that waited, once the guest has ended the old ones.
    fn hear_of_reset(&mut self, queue: &Queue, ram: &GuestMemoryMmap) -> Result<(), VirtioError> {
        let Some(UnheardReset { offered, .. }) = &self.reset else { return Ok(()) };
        if !self.reset_owed && queue.avail_idx(ram, Ordering::Acquire)? != *offered {
            for key in self.reset.take().map(|reset| reset.waiting).unwrap_or_default() {
                if self.connections.contains_key(&key) {
                    self.send_control(key, OP_REQUEST, 0);
                }
            }
        }
        Ok(())
    }

    fn fill_receive_queue(&mut self, queue: &mut Queue, ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        let mut used = false;
        while !self.control.is_empty()
            || self.connections.values().any(|c| c.wants_to_send() || c.owes_credit())
        {
            let Some(mut chain) = queue.pop_descriptor_chain(ram) else { break };
            let head = chain.head_index();
            let written = match VsockPacket::from_rx_virtq_chain(ram, &mut chain, u32::MAX) {
                Ok(mut packet) => match self.next_packet(&mut packet) {
                    Some(bytes) => PKT_HEADER_SIZE as u32 + bytes,
                    None => {
                        // Nothing to say after all: the buffer is kept for later.
                        queue.go_to_previous_position();
                        continue;
                    }
                },
                Err(error) => {
                    tracing::debug!(%error, "vsock: unusable receive buffer");
                    0
                }
            };
            queue.add_used(ram, head, written)?;
            used = true;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }

    /// Writes the next packet for the guest; returns its payload's length.
    fn next_packet<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        packet: &mut VsockPacket<'_, B>,
    ) -> Option<u32> {
        if let Some(control) = self.control.pop_front() {
            self.write_header(packet, control, 0);
            return Some(0);
        }
        let owing =
            self.connections.iter().find(|(_, connection)| connection.owes_credit()).map(|(key, _)| *key);
        if let Some(key) = owing {
            self.write_header(packet, Control { key, op: OP_CREDIT_UPDATE, flags: 0 }, 0);
            return Some(0);
        }
        let (key, connection) =
            self.connections.iter_mut().find(|(_, connection)| connection.wants_to_send())?;
        let key = *key;
        let room = packet.data_slice().map_or(0, |slice| slice.len()).min(PAYLOAD_MAX as usize);
        if room == 0 {
            self.conclude(key, Verdict::Reset);
            return None;
        }
        let bytes = connection.take_from_host(room)?;
        if bytes.is_empty() {
            if connection.is_abandoned() {
                self.conclude(key, Verdict::Reset);
                return None;
            }
            self.write_header(packet, Control { key, op: OP_SHUTDOWN, flags: SHUTDOWN_SEND }, 0);
            return Some(0);
        }
        if let Some(slice) = packet.data_slice().and_then(|slice| slice.subslice(0, bytes.len()).ok()) {
            slice.copy_from(&bytes);
        }
        self.write_header(packet, Control { key, op: OP_RW, flags: 0 }, bytes.len() as u32);
        Some(bytes.len() as u32)
    }

    fn write_header<B: vm_memory::bitmap::BitmapSlice>(
        &mut self,
        packet: &mut VsockPacket<'_, B>,
        control: Control,
        payload: u32,
    ) {
        let forwarded = self.connections.get_mut(&control.key).map_or(0, Connection::announce);
        packet
            .set_src_cid(HOST_CID)
            .set_dst_cid(GUEST_CID)
            .set_src_port(control.key.host_port)
            .set_dst_port(control.key.guest_port)
            .set_len(payload)
            .set_type(TYPE_STREAM)
            .set_op(control.op)
            .set_flags(control.flags)
            .set_buf_alloc(STREAM_BUFFER)
            .set_fwd_cnt(forwarded);
    }

    fn take_from_guest(&mut self, queue: &mut Queue, ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        let mut used = false;
        while let Some(chain) = queue.pop_descriptor_chain(ram) {
            let head = chain.head_index();
            match GuestPacket::read(ram, chain) {
                Ok(packet) => self.handle_packet(&packet),
                Err(error) => tracing::debug!(%error, "vsock: unusable packet"),
            }
            queue.add_used(ram, head, 0)?;
            used = true;
        }
        Ok(used && wants_interrupt(queue, ram)?)
    }

    fn handle_packet(&mut self, packet: &GuestPacket) {
        let key = StreamKey { host_port: packet.dst_port, guest_port: packet.src_port };
        let known = packet.dst_cid == HOST_CID && packet.kind == TYPE_STREAM;
        let connection = self.connections.get_mut(&key).filter(|_| known);
        let Some(connection) = connection else {
            // Also the answer to a guest that wants to connect out: nobody listens on the host.
            if packet.op != OP_RST {
                self.send_control(key, OP_RST, 0);
            }
            return;
        };
        connection.update_credit(packet.buf_alloc, packet.fwd_cnt);
        let verdict = match packet.op {
            OP_RESPONSE => connection.establish(key.host_port),
            OP_RW => connection.give_to_host(&packet.payload),
            OP_SHUTDOWN if packet.flags & SHUTDOWN_SEND == 0 => Verdict::Keep,
            OP_SHUTDOWN => connection.finish_guest(packet.flags & SHUTDOWN_RECEIVE == 0),
            OP_CREDIT_UPDATE => Verdict::Keep,
            OP_CREDIT_REQUEST => {
                self.send_control(key, OP_CREDIT_UPDATE, 0);
                Verdict::Keep
            }
            OP_RST => {
                // The guest has forgotten the stream; its last bytes may still wait for a slow host client.
                if connection.finish_guest(false) == Verdict::Reset {
                    self.end(key);
                }
                return;
            }
            _ => Verdict::Reset,
        };
        self.conclude(key, verdict);
    }

    fn conclude(&mut self, key: StreamKey, verdict: Verdict) {
        if verdict == Verdict::Reset && self.connections.contains_key(&key) {
            self.end(key);
            self.send_control(key, OP_RST, 0);
        }
    }

    fn end(&mut self, key: StreamKey) {
        self.connections.remove(&key);
        self.control.retain(|control| control.key != key);
        self.ended.push(key);
    }

    fn send_control(&mut self, key: StreamKey, op: u16, flags: u32) {
        if self.control.len() < CONTROL_MAX {
            self.control.push_back(Control { key, op, flags });
        }
    }
}

impl VirtioDevice for Vsock {
    fn id(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &'static [u16] {
        &[128, 128, 16]
    }

    fn read_config(&self, offset: u64, into: &mut [u8]) {
        read_config_bytes(&GUEST_CID.to_le_bytes(), offset, into);
    }

    fn notify(
        &mut self,
        queue: usize,
        queues: &mut [Queue],
        ram: &GuestMemoryMmap,
    ) -> Result<bool, VirtioError> {
        let mut interrupt = false;
        if queue == TX
            && let Some(queue) = queues.get_mut(TX)
        {
            interrupt |= self.take_from_guest(queue, ram)?;
        }
        Ok(self.pump(queues, ram)? | interrupt)
    }

    fn save(&self) -> DeviceState {
        let had_streams = !self.connections.is_empty() || self.reset.is_some();
        DeviceState::Vsock { had_streams, next_host_port: self.next_host_port }
    }

    fn restore(&mut self, state: &DeviceState) {
        if let DeviceState::Vsock { had_streams, next_host_port } = state {
            self.next_host_port = (*next_host_port).max(HOST_PORT_START);
            self.reset_owed = *had_streams;
            self.reset = had_streams.then(|| UnheardReset { offered: Wrapping(0), waiting: Vec::new() });
        }
    }

    /// Tells the guest about streams that ended with the snapshot.
    fn resume(&mut self, queues: &mut [Queue], ram: &GuestMemoryMmap) -> Result<bool, VirtioError> {
        self.pump(queues, ram)
    }

    fn reset(&mut self) {
        let keys: Vec<_> = self.connections.keys().copied().collect();
        keys.into_iter().for_each(|key| self.end(key));
        self.control.clear();
        (self.reset_owed, self.reset) = (false, None);
    }
}
