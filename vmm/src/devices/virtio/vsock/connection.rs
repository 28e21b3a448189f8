//! One stream between a host client and the guest: credit, the buffer towards a slow client, shutdown.

use super::STREAM_BUFFER;
use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::num::Wrapping;
use std::os::unix::net::UnixStream;

/// What to do after an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing special.
    Keep,
    /// The stream is over: tell the guest and forget it.
    Reset,
}

/// See the module's description.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    established: bool,
    /// The host client may have bytes for the guest.
    readable: bool,
    /// The host client will send no more.
    host_done: bool,
    /// The host client has closed its end; what it sent before may still be unread.
    host_gone: bool,
    /// The guest will send no more.
    guest_done: bool,
    /// The guest will not receive either: the stream is over once it is flushed.
    closing: bool,
    to_host: VecDeque<u8>,
    /// Bytes taken from the guest and delivered to the host client.
    forwarded: Wrapping<u32>,
    /// `forwarded` as the guest last heard it.
    announced: Wrapping<u32>,
    /// Bytes sent to the guest.
    sent: Wrapping<u32>,
    peer_buffer: u32,
    peer_forwarded: Wrapping<u32>,
}

impl Connection {
    /// A stream whose request is about to be sent to the guest. `stream` must be non-blocking.
    pub(super) fn new(stream: UnixStream) -> Connection {
        Connection {
            stream,
            established: false,
            readable: false,
            host_done: false,
            host_gone: false,
            guest_done: false,
            closing: false,
            to_host: VecDeque::new(),
            forwarded: Wrapping(0),
            announced: Wrapping(0),
            sent: Wrapping(0),
            peer_buffer: 0,
            peer_forwarded: Wrapping(0),
        }
    }

    /// The host client's socket.
    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// The guest accepted; tells the host client.
    pub(super) fn establish(&mut self, host_port: u32) -> Verdict {
        if self.established {
            return Verdict::Reset;
        }
        self.established = true;
        self.readable = true;
        self.to_host.extend(format!("OK {host_port}\n").bytes());
        // The greeting does not count against the guest's credit.
        let greeting = self.to_host.len() as u32;
        self.forwarded -= greeting;
        let verdict = self.flush();
        self.announced = self.forwarded;
        verdict
    }

    /// Credit that came with a packet of the guest.
    pub(super) fn update_credit(&mut self, buffer: u32, forwarded: u32) {
        self.peer_buffer = buffer;
        self.peer_forwarded = Wrapping(forwarded);
    }

    /// The host client closed its end. Its last bytes still go to the guest; then the stream is over.
    pub(super) fn hang_up(&mut self) -> Verdict {
        self.host_gone = true;
        self.readable = true;
        if self.host_done || !self.established { Verdict::Reset } else { Verdict::Keep }
    }

    /// Whether a stream at whose end [`Connection::take_from_host`] has arrived is over for both sides.
    pub(super) fn is_abandoned(&self) -> bool {
        self.host_gone && self.host_done
    }

    /// The host's socket may be read again.
    pub(super) fn set_readable(&mut self) {
        self.readable = true;
    }

    /// Whether bytes may be sent to the guest now.
    pub(super) fn wants_to_send(&self) -> bool {
        self.established && self.readable && !self.host_done && self.credit() > 0
    }

    fn credit(&self) -> u32 {
        let in_flight = (self.sent - self.peer_forwarded).0;
        self.peer_buffer.saturating_sub(in_flight)
    }

    /// Takes up to `room` bytes from the host client for the guest. `None` when it has none now; empty at its end.
    pub(super) fn take_from_host(&mut self, room: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; room.min(self.credit() as usize)];
        match (&self.stream).read(&mut bytes) {
            Ok(count) => {
                bytes.truncate(count);
                self.sent += count as u32;
                self.host_done = count == 0;
                Some(bytes)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                self.readable = false;
                None
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(_) => {
                self.host_done = true;
                Some(Vec::new())
            }
        }
    }

    /// Bytes of the guest for the host client; more than its credit ends the stream.
    pub(super) fn give_to_host(&mut self, bytes: &[u8]) -> Verdict {
        let over = self.to_host.len() + bytes.len() > STREAM_BUFFER as usize;
        if !self.established || self.guest_done || over {
            return Verdict::Reset;
        }
        self.to_host.extend(bytes);
        self.flush()
    }

    /// Writes what waits for the host client, as far as it takes it.
    pub(super) fn flush(&mut self) -> Verdict {
        while !self.to_host.is_empty() {
            let (front, _) = self.to_host.as_slices();
            match (&self.stream).write(front) {
                Ok(count) => {
                    self.to_host.drain(..count);
                    self.forwarded += count as u32;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Verdict::Keep,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return Verdict::Reset,
            }
        }
        if self.closing {
            // No end of one direction first: the client is to see that both are over, at once.
            return Verdict::Reset;
        }
        if self.guest_done {
            // The client may have closed already.
            let _ = self.stream.shutdown(Shutdown::Write);
        }
        Verdict::Keep
    }

    /// The guest will send no more; the host client sees the end after what is buffered.
    pub(super) fn finish_guest(&mut self, receives: bool) -> Verdict {
        self.guest_done = true;
        self.closing = !receives;
        self.flush()
    }

    /// Whether the guest should hear how much room there is again.
    pub(super) fn owes_credit(&self) -> bool {
        self.established && (self.forwarded - self.announced).0 >= STREAM_BUFFER / 4
    }

    /// The value for a packet's `fwd_cnt`; the guest has heard it then.
    pub(super) fn announce(&mut self) -> u32 {
        self.announced = self.forwarded;
        self.forwarded.0
    }
}
