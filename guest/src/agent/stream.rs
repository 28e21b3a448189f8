//! One connection's bytes: buffered reading and writing of frames on a non-blocking socket.

use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use forkd_abi::protocol::{
    FrameKind, HEADER_LEN, ProtocolError, Response, decode_header, encode_control, encode_header,
};
use rustix::io::Errno;

/// Bytes waiting to be sent from which on a connection's sources are read no further.
pub const BACKLOG_LIMIT: usize = 256 << 10;

/// A connection and what was read from it but not understood yet, or is still to be sent.
pub struct Stream {
    fd: OwnedFd,
    inbound: Vec<u8>,
    outbound: Vec<u8>,
    sent: usize,
    /// The last frame has been queued: close once it is out.
    finishing: bool,
    /// The peer will neither send nor take anything more.
    gone: bool,
}

impl Stream {
    pub fn new(fd: OwnedFd) -> Self {
        Self { fd, inbound: Vec::new(), outbound: Vec::new(), sent: 0, finishing: false, gone: false }
    }

    /// The connection itself, for a request after which there are no frames.
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// The connection, for somebody else to serve on.
    pub fn fd(&self) -> &OwnedFd {
        &self.fd
    }

    pub fn raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }

    /// Bytes queued and not yet taken by the socket.
    pub fn backlog(&self) -> usize {
        self.outbound.len() - self.sent
    }

    pub fn is_finishing(&self) -> bool {
        self.finishing
    }

    /// Whether the connection is to be closed now.
    pub fn is_over(&self) -> bool {
        self.gone || (self.finishing && self.backlog() == 0)
    }

    /// Gives the connection up.
    pub fn abandon(&mut self) {
        self.gone = true;
    }

    /// Reads once, at most `scratch` bytes. `false` when the peer has ended its side.
    pub fn fill(&mut self, scratch: &mut [u8]) -> bool {
        match rustix::io::read(&self.fd, &mut *scratch) {
            Ok(0) => false,
            Ok(n) => {
                self.inbound.extend_from_slice(&scratch[..n]);
                true
            }
            Err(Errno::AGAIN | Errno::INTR) => true,
            Err(_) => false,
        }
    }

    /// The bytes received and not yet consumed; for the caller to parse with [`next_frame`] and hand back what is left.
    pub fn take_inbound(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.inbound)
    }

    /// Hands back the bytes after `consumed`, keeping the buffer's memory.
    pub fn return_inbound(&mut self, mut inbound: Vec<u8>, consumed: usize) {
        inbound.drain(..consumed);
        self.inbound = inbound;
    }

    /// Queues one frame, sending at once what the socket takes.
    pub fn send(&mut self, kind: FrameKind, payload: &[u8]) {
        let Ok(header) = encode_header(kind, payload.len()) else {
            // Every caller stays far below the limit; should one not, its connection ends rather than lies.
            self.gone = true;
            return;
        };
        let mut written = 0;
        if self.backlog() == 0 && !self.gone {
            match rustix::io::writev(&self.fd, &[IoSlice::new(&header), IoSlice::new(payload)]) {
                Ok(n) => written = n,
                Err(Errno::AGAIN | Errno::INTR) => {}
                Err(_) => self.gone = true,
            }
        }
        if self.gone {
            return;
        }
        if written < HEADER_LEN {
            self.outbound.extend_from_slice(&header[written..]);
        }
        self.outbound.extend_from_slice(&payload[written.saturating_sub(HEADER_LEN)..]);
    }

    /// Queues one response.
    pub fn reply(&mut self, response: &Response) {
        match encode_control(response) {
            Ok(json) => self.send(FrameKind::Control, &json),
            Err(_) => self.gone = true,
        }
    }

    /// Queues the last response of this connection.
    pub fn finish(&mut self, response: &Response) {
        self.reply(response);
        self.finishing = true;
    }

    /// Queues an error as the last response.
    pub fn fail(&mut self, message: impl Into<String>) {
        self.finish(&Response::error(message));
    }

    /// Sends what is queued, as far as the socket takes it.
    pub fn flush(&mut self) {
        while self.backlog() > 0 && !self.gone {
            match rustix::io::write(&self.fd, &self.outbound[self.sent..]) {
                Ok(n) => self.sent += n,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => break,
                Err(_) => self.gone = true,
            }
        }
        if self.backlog() == 0 {
            self.outbound.clear();
            self.sent = 0;
        } else if self.sent > BACKLOG_LIMIT {
            self.outbound.drain(..self.sent);
            self.sent = 0;
        }
    }
}

/// The first whole frame in `bytes`: its kind and where its payload lies; `None` when more bytes are needed.
pub fn next_frame(bytes: &[u8]) -> Result<Option<(FrameKind, Range<usize>)>, ProtocolError> {
    let Some(header) = bytes.first_chunk::<HEADER_LEN>() else { return Ok(None) };
    let (kind, len) = decode_header(*header)?;
    let end = HEADER_LEN + len;
    Ok((bytes.len() >= end).then_some((kind, HEADER_LEN..end)))
}
