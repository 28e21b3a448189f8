//! A child's end of its TCP connections: smoltcp, which acts for every host that the child talks to.

use super::frame::{Flow, MTU, Wire};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp::{self, State};
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpListenEndpoint};
use std::collections::VecDeque;
use std::task::{Context, Poll};
use std::time::Duration;

/// What one connection may hold back in each direction, bytes: two segments of the longest.
const BUFFER: usize = 128 << 10;
/// Frames that wait for the child, and their bytes; with more, smoltcp keeps its data.
const OUTGOING_MAX: usize = 128;
const OUTGOING_BYTES_MAX: usize = 512 << 10;
/// How long an acknowledgement waits for company.
const ACK_DELAY: smoltcp::time::Duration = smoltcp::time::Duration::from_millis(2);

/// See the module's description.
pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    queues: Queues,
    start: std::time::Instant,
}

/// Packets from and frames to the child.
struct Queues {
    wire: Wire,
    incoming: VecDeque<Vec<u8>>,
    outgoing: Frames,
}

/// Frames that wait for the child.
#[derive(Default)]
struct Frames {
    waiting: VecDeque<Vec<u8>>,
    bytes: usize,
}

impl Frames {
    fn has_room(&self) -> bool {
        self.waiting.len() < OUTGOING_MAX && self.bytes < OUTGOING_BYTES_MAX
    }

    /// Whether there is room for an answer to what came. That is bounded by what comes: twice the room is more than a turn
    /// makes.
    fn has_room_for_answer(&self) -> bool {
        self.waiting.len() < 2 * OUTGOING_MAX && self.bytes < 2 * OUTGOING_BYTES_MAX
    }

    fn push(&mut self, frame: Vec<u8>) {
        self.bytes += frame.len();
        self.waiting.push_back(frame);
    }

    fn pop(&mut self) {
        self.bytes -= self.waiting.pop_front().map_or(0, |frame| frame.len());
    }
}

impl Stack {
    /// A stack at the gateway's end of a wire.
    pub fn new(wire: Wire) -> Stack {
        let mut queues = Queues { wire, incoming: VecDeque::new(), outgoing: Frames::default() };
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut queues, Instant::ZERO);
        interface.update_ip_addrs(|addresses| {
            // There is room for one.
            let _ = addresses.push(IpCidr::new(IpAddress::Ipv4(wire.gateway), 30));
        });
        // Packets to others are for it, too, as they go through its own address.
        interface.set_any_ip(true);
        let _ = interface.routes_mut().add_default_ipv4_route(wire.gateway);
        Stack { interface, sockets: SocketSet::new(Vec::new()), queues, start: std::time::Instant::now() }
    }

    fn now(&self) -> Instant {
        Instant::from_micros(i64::try_from(self.start.elapsed().as_micros()).unwrap_or(i64::MAX))
    }

    /// Takes an IP packet of the child.
    pub fn take(&mut self, packet: &[u8]) {
        self.queues.incoming.push_back(packet.to_vec());
    }

    /// Puts a ready frame on the way to the child. When too many wait, it is lost, as on any network.
    pub fn send(&mut self, frame: Vec<u8>) {
        if self.queues.outgoing.has_room() {
            self.queues.outgoing.push(frame);
        }
    }

    /// Does what is to be done now. Returns when to come again, if nothing happens before.
    pub fn work(&mut self) -> Option<Duration> {
        let now = self.now();
        self.interface.poll(now, &mut self.queues, &mut self.sockets);
        let delay = self.interface.poll_delay(now, &self.sockets)?;
        Some(Duration::from_micros(delay.total_micros()))
    }

    /// The next frame for the child.
    pub fn next_frame(&self) -> Option<&[u8]> {
        self.queues.outgoing.waiting.front().map(Vec::as_slice)
    }

    /// That frame is sent.
    pub fn frame_sent(&mut self) {
        self.queues.outgoing.pop();
    }

    /// Answers the packet that opens `flow`. Nobody else listens at its address at this moment.
    pub fn accept(&mut self, flow: Flow, packet: &[u8]) -> Option<SocketHandle> {
        let buffer = || tcp::SocketBuffer::new(vec![0; BUFFER]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(Some(ACK_DELAY));
        let (address, port) = flow.to;
        socket.listen(IpListenEndpoint { addr: Some(IpAddress::Ipv4(address)), port }).ok()?;
        // What came before it is for others.
        self.work();
        let handle = self.sockets.add(socket);
        self.take(packet);
        self.work();
        if self.socket(handle).state() == State::Listen {
            // It was no packet that opens anything.
            self.sockets.remove(handle);
            return None;
        }
        Some(handle)
    }

    /// A connection.
    pub fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Forgets a connection; one that is not over is reset.
    pub fn remove(&mut self, handle: SocketHandle) {
        let over = [State::Closed, State::TimeWait].contains(&self.socket(handle).state());
        if !over {
            self.socket(handle).abort();
            self.work();
        }
        self.sockets.remove(handle);
    }

    /// Ready once the child's side is there, with whether it is.
    pub fn poll_established(&mut self, handle: SocketHandle, context: &Context<'_>) -> Poll<bool> {
        let socket = self.socket(handle);
        match socket.state() {
            State::SynReceived => {
                socket.register_recv_waker(context.waker());
                Poll::Pending
            }
            // It has taken its question back: nobody is to come in by this.
            State::Closed | State::Listen | State::SynSent => Poll::Ready(false),
            _ => Poll::Ready(true),
        }
    }
}

impl Device for Queues {
    type RxToken<'a> = Packet;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Packet, Outgoing<'_>)> {
        // An answer may follow at once, whether there is room or not.
        let packet = self.incoming.pop_front()?;
        Some((Packet(packet), Outgoing { wire: &self.wire, queue: &mut self.outgoing }))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        let room = self.outgoing.has_room();
        room.then_some(Outgoing { wire: &self.wire, queue: &mut self.outgoing })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = usize::from(MTU);
        capabilities
    }
}

struct Packet(Vec<u8>);

impl RxToken for Packet {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Outgoing<'a> {
    wire: &'a Wire,
    queue: &'a mut Frames,
}

impl TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let (frame, filled) = self.wire.packet(len, fill);
        if self.queue.has_room_for_answer() {
            self.queue.push(frame);
        }
        filled
    }
}
