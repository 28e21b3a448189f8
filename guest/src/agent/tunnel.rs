//! Connections that the host forwards to TCP ports of the machine's own loopback: raw bytes both ways.
//!
//! However many there are, the agent's loop waits for one descriptor: they have an epoll of their own, edge-triggered, so
//! that one that is idle costs nothing and one that is not costs no call but its reads and writes. What one side does not
//! take stays with the other, up to one buffer: that is the back-pressure. There is no epoll before the first of them.

use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use forkd_abi::protocol::{Response, write_control};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Ipv4Addr, Ipv6Addr, SendFlags, Shutdown, SocketAddrV4, SocketAddrV6, SocketFlags,
    SocketType, connect, send, shutdown, socket_with, sockopt,
};

/// Tunnels at a time: what the monitor's vsock allows (256 streams), less what the agent keeps for requests
/// (`MAX_CONNECTIONS`).
pub const MAX_TUNNELS: usize = 192;
/// Events taken at once; what is left comes with the next round.
const EVENTS: usize = 64;
/// Buffers that one direction passes on before others have their turn.
const ROUNDS: usize = 16;
const INTEREST: EventFlags =
    EventFlags::IN.union(EventFlags::OUT).union(EventFlags::RDHUP).union(EventFlags::ET);

/// All tunnels.
#[derive(Default)]
pub struct Tunnels {
    epoll: Option<OwnedFd>,
    slots: Vec<Option<Tunnel>>,
    events: Vec<epoll::Event>,
}

struct Tunnel {
    host: OwnedFd,
    local: OwnedFd,
    /// The port has not accepted yet: it is tried on this kind of address.
    connecting: Option<Attempt>,
    to_local: Direction,
    to_host: Direction,
}

/// An address that is being tried.
#[derive(Clone, Copy)]
struct Attempt {
    port: u16,
    six: bool,
}

/// One direction: what is known of its source, and what its sink has not taken yet.
#[derive(Default)]
struct Direction {
    /// Read, and still to be written.
    waiting: Vec<u8>,
    /// The source may have more.
    readable: bool,
    /// The source has announced its end: a read that gives less than was asked for is not the last one.
    ending: bool,
    /// The source's end was read.
    ended: bool,
    /// The sink has been told.
    closed: bool,
}

/// A tunnel that cannot go on; both its sides are reset.
struct Broken;

/// What came of passing bytes on.
#[derive(PartialEq, Eq)]
enum Passed {
    /// All there was, or all that was taken: the next event tells when to go on.
    AllForNow,
    /// There may be more, and no event will say so.
    More,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Host,
    Local,
}

impl Tunnels {
    /// What to wait for; nothing while there is no tunnel.
    pub fn raw_fd(&self) -> Option<RawFd> {
        self.epoll.as_ref().filter(|_| !self.slots.is_empty()).map(AsRawFd::as_raw_fd)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Connects `host` to a port. `early`: what the host has sent behind its request.
    pub fn open(&mut self, host: OwnedFd, port: u16, early: Vec<u8>, scratch: &mut [u8]) {
        if self.len() >= MAX_TUNNELS {
            return refuse(&host, format!("the agent already forwards {MAX_TUNNELS} connections"));
        }
        let (local, attempt, established) = match start(Attempt { port, six: false }) {
            Ok(started) => started,
            Err(message) => return refuse(&host, message),
        };
        if established && answer(&host, &Response::Ok).is_err() {
            return;
        }
        // Their first events say whether there is something to read.
        let to_local = Direction { waiting: early, ..Direction::default() };
        let connecting = (!established).then_some(attempt);
        let tunnel = Tunnel { host, local, connecting, to_local, to_host: Direction::default() };
        let slot = self.slots.iter().position(Option::is_none).unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        if self.watch(slot, &tunnel).is_err() {
            // Without memory for two more descriptors there is none to say so either.
            tunnel.reset();
        } else {
            self.slots[slot] = Some(tunnel);
        }
        self.go_on(slot, scratch);
    }

    fn watch(&mut self, slot: usize, tunnel: &Tunnel) -> Result<(), Errno> {
        let epoll = match &mut self.epoll {
            Some(epoll) => epoll,
            none => none.insert(epoll::create(epoll::CreateFlags::CLOEXEC)?),
        };
        epoll::add(&*epoll, &tunnel.host, data(slot, Side::Host), INTEREST)?;
        epoll::add(&*epoll, &tunnel.local, data(slot, Side::Local), INTEREST)
    }

    /// Serves those that have something to do.
    pub fn on_ready(&mut self, scratch: &mut [u8]) {
        let Some(epoll) = &self.epoll else { return };
        let mut events = std::mem::take(&mut self.events);
        events.clear();
        events.reserve(EVENTS);
        let no_time = Timespec { tv_sec: 0, tv_nsec: 0 };
        if epoll::wait(epoll, rustix::buffer::spare_capacity(&mut events), Some(&no_time)).is_ok() {
            for event in &events {
                let (slot, side) = of(event.data);
                self.on_event(slot, side, event.flags, scratch);
            }
        }
        self.events = events;
    }

    fn on_event(&mut self, slot: usize, side: Side, flags: EventFlags, scratch: &mut [u8]) {
        let Some(tunnel) = self.slots.get_mut(slot).and_then(Option::as_mut) else { return };
        match tunnel.on_event(side, flags) {
            Ok(Connected::AsBefore) => self.go_on(slot, scratch),
            Ok(Connected::Elsewhere) => {
                // The first attempt's socket has left the epoll with its end.
                let added = match &self.epoll {
                    Some(epoll) => epoll::add(epoll, &tunnel.local, data(slot, Side::Local), INTEREST),
                    None => Ok(()),
                };
                match added {
                    Ok(()) => self.go_on(slot, scratch),
                    Err(_) => self.reset(slot),
                }
            }
            Err(Broken) => self.reset(slot),
        }
    }

    /// Passes on what there is, and forgets a tunnel that is over.
    fn go_on(&mut self, slot: usize, scratch: &mut [u8]) {
        let Some(tunnel) = &mut self.slots[slot] else { return self.forget_if_last() };
        match tunnel.pass(scratch) {
            Ok((host, local)) => {
                if tunnel.to_local.closed && tunnel.to_host.closed {
                    self.slots[slot] = None;
                    return self.forget_if_last();
                }
                let again = [(host, &tunnel.host, Side::Host), (local, &tunnel.local, Side::Local)];
                for (passed, fd, side) in again {
                    // To be told once more of what is known, after others had their turn.
                    if let (Passed::More, Some(epoll)) = (passed, &self.epoll) {
                        let _ = epoll::modify(epoll, fd, data(slot, side), INTEREST);
                    }
                }
            }
            Err(Broken) => self.reset(slot),
        }
    }

    fn reset(&mut self, slot: usize) {
        if let Some(tunnel) = self.slots[slot].take() {
            tunnel.reset();
        }
        self.forget_if_last();
    }

    /// Breaks all of them off.
    pub fn reset_all(&mut self) {
        self.slots.drain(..).flatten().for_each(Tunnel::reset);
        *self = Tunnels::default();
    }

    fn forget_if_last(&mut self) {
        if self.len() == 0 {
            self.slots.clear();
        }
    }
}

/// Whether a tunnel's local socket is another one than before.
enum Connected {
    AsBefore,
    Elsewhere,
}

impl Tunnel {
    /// Notes what an event says.
    fn on_event(&mut self, side: Side, flags: EventFlags) -> Result<Connected, Broken> {
        let ends = flags.intersects(EventFlags::RDHUP | EventFlags::HUP | EventFlags::ERR);
        let readable = ends || flags.contains(EventFlags::IN);
        if side == Side::Host {
            if self.to_local.ended && ends && is_gone(&self.host, self.to_host.closed) {
                return Err(Broken);
            }
            self.to_local.readable |= readable;
            self.to_local.ending |= ends;
            if self.connecting.is_some() && flags.intersects(EventFlags::HUP | EventFlags::ERR) {
                return Err(Broken);
            }
            return Ok(Connected::AsBefore);
        }
        if let Some(attempt) = self.connecting {
            return if ends || flags.contains(EventFlags::OUT) {
                self.conclude(attempt)
            } else {
                Ok(Connected::AsBefore)
            };
        }
        if self.to_host.ended && flags.contains(EventFlags::ERR) {
            return Err(Broken);
        }
        self.to_host.readable |= readable;
        self.to_host.ending |= ends;
        Ok(Connected::AsBefore)
    }

    /// An attempt has come to its end: answers the host, or tries the other address.
    fn conclude(&mut self, attempt: Attempt) -> Result<Connected, Broken> {
        match sockopt::socket_error(&self.local).unwrap_or_else(Err) {
            Ok(()) => {
                self.connecting = None;
                answer(&self.host, &Response::Ok)?;
                Ok(Connected::AsBefore)
            }
            Err(error) if attempt.six => {
                refuse(&self.host, failure(attempt.port, error));
                Err(Broken)
            }
            Err(error) => {
                let other = Attempt { six: true, ..attempt };
                let Ok((local, established)) = connect_to(other) else {
                    refuse(&self.host, failure(attempt.port, error));
                    return Err(Broken);
                };
                self.local = local;
                self.connecting = (!established).then_some(other);
                if established {
                    answer(&self.host, &Response::Ok)?;
                }
                Ok(Connected::Elsewhere)
            }
        }
    }

    /// Passes on both ways; says of each side whether it has more.
    fn pass(&mut self, scratch: &mut [u8]) -> Result<(Passed, Passed), Broken> {
        if self.connecting.is_some() {
            return Ok((Passed::AllForNow, Passed::AllForNow));
        }
        let (host, local, deaf) = (&self.host, &self.local, self.to_host.closed);
        // A host that has not ended its side but closed: whoever serves the port is to know, and not take it for an end.
        let inwards = self.to_local.pass(host, local, scratch, || is_gone(host, deaf))?;
        let outwards = self.to_host.pass(local, host, scratch, || false)?;
        Ok((inwards, outwards))
    }

    /// Ends both sides so that they do not take it for an end in good order.
    fn reset(self) {
        let _ = sockopt::set_socket_linger(&self.local, Some(Duration::ZERO));
    }
}

impl Direction {
    /// Passes bytes on, and the end, unless `broken` says then that it is none.
    fn pass(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        scratch: &mut [u8],
        broken: impl Fn() -> bool,
    ) -> Result<Passed, Broken> {
        for _ in 0..ROUNDS {
            if !self.waiting.is_empty() {
                let taken = write(to, &self.waiting)?;
                self.waiting.drain(..taken);
                if !self.waiting.is_empty() {
                    return Ok(Passed::AllForNow);
                }
                // Most never need it again.
                self.waiting = Vec::new();
            }
            if self.ended {
                if !std::mem::replace(&mut self.closed, true) {
                    // A sink that is gone will be noticed by the other direction.
                    let _ = shutdown(to, Shutdown::Write);
                }
                return Ok(Passed::AllForNow);
            }
            if !self.readable {
                return Ok(Passed::AllForNow);
            }
            match rustix::io::read(from, &mut *scratch) {
                Ok(0) if broken() => return Err(Broken),
                Ok(0) => self.ended = true,
                Ok(count) => {
                    // A stream that gives less than was asked for has no more, and will say when it has.
                    self.readable = count == scratch.len() || self.ending;
                    let taken = write(to, &scratch[..count])?;
                    self.waiting.extend_from_slice(&scratch[taken..count]);
                }
                Err(Errno::AGAIN) => self.readable = false,
                Err(Errno::INTR) => {}
                Err(_) => return Err(Broken),
            }
        }
        Ok(Passed::More)
    }
}

/// Whether the host takes nothing more. It cannot be told when we have ended that direction ourselves (`deaf`).
fn is_gone(host: &OwnedFd, deaf: bool) -> bool {
    !deaf && send(host, &[], SendFlags::NOSIGNAL).is_err_and(|error| error != Errno::AGAIN)
}

/// Writes once; how much was taken.
fn write(to: &OwnedFd, bytes: &[u8]) -> Result<usize, Broken> {
    match rustix::io::retry_on_intr(|| rustix::io::write(to, bytes)) {
        Ok(taken) => Ok(taken),
        Err(Errno::AGAIN) => Ok(0),
        Err(_) => Err(Broken),
    }
}

/// Begins to connect: the socket, what is being tried, and whether it is connected already, as a port of the loopback mostly
/// is. Without IPv6, or when nothing listens there either, the error is that of IPv4.
fn start(attempt: Attempt) -> Result<(OwnedFd, Attempt, bool), String> {
    match (connect_to(attempt), attempt.six) {
        (Ok((fd, established)), _) => Ok((fd, attempt, established)),
        (Err(error), true) => Err(failure(attempt.port, error)),
        (Err(error), false) => {
            let other = Attempt { six: true, ..attempt };
            let (fd, established) = connect_to(other).map_err(|_| failure(attempt.port, error))?;
            Ok((fd, other, established))
        }
    }
}

fn connect_to(attempt: Attempt) -> Result<(OwnedFd, bool), Errno> {
    let family = if attempt.six { AddressFamily::INET6 } else { AddressFamily::INET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(family, SocketType::STREAM, flags, None)?;
    // What comes in one piece goes on in one piece.
    sockopt::set_tcp_nodelay(&fd, true)?;
    let connected = match attempt.six {
        true => connect(&fd, &SocketAddrV6::new(Ipv6Addr::LOCALHOST, attempt.port, 0, 0)),
        false => connect(&fd, &SocketAddrV4::new(Ipv4Addr::LOCALHOST, attempt.port)),
    };
    match connected {
        Ok(()) => Ok((fd, true)),
        Err(Errno::INPROGRESS) => Ok((fd, false)),
        Err(error) => Err(error),
    }
}

fn failure(port: u16, error: Errno) -> String {
    match error {
        Errno::CONNREFUSED => format!("nothing listens on TCP port {port} of the machine's loopback"),
        error => format!("cannot connect to TCP port {port} of the machine's loopback: {error}"),
    }
}

/// Sends one frame; on a connection on which nothing was sent yet there is room for it.
fn answer(host: &OwnedFd, response: &Response) -> Result<(), Broken> {
    let mut frame = Vec::new();
    write_control(&mut frame, response).map_err(|_| Broken)?;
    if write(host, &frame)? == frame.len() { Ok(()) } else { Err(Broken) }
}

fn refuse(host: &OwnedFd, message: String) {
    // A host that does not hear it sees the connection closed.
    let _ = answer(host, &Response::Error { message, code: None });
}

fn data(slot: usize, side: Side) -> EventData {
    EventData::new_u64(2 * slot as u64 + u64::from(side == Side::Local))
}

fn of(data: EventData) -> (usize, Side) {
    let number = data.u64();
    ((number / 2) as usize, if number.is_multiple_of(2) { Side::Host } else { Side::Local })
}
