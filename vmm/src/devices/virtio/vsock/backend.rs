//! The thread that waits for vsock's host side: the listening Unix socket, clients that still say which port they want,
//! and streams. It only ever holds the device's lock for non-blocking work.

use super::CONNECTIONS_MAX;
use super::device::{StreamKey, Vsock};
use crate::devices::virtio::mmio::Transport;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, PoisonError};

/// Longest `CONNECT <port>\n`, bytes.
const REQUEST_MAX: usize = 32;
const LISTENER: u64 = 0;

/// See the module's description.
pub struct Backend {
    listener: UnixListener,
    epoll: OwnedFd,
    device: Arc<Mutex<Transport<Vsock>>>,
    next_token: u64,
    clients: HashMap<u64, Client>,
}

enum Client {
    Asking { stream: UnixStream, request: Vec<u8> },
    Streaming(StreamKey),
}

impl Backend {
    /// A backend for clients of `listener`.
    pub fn new(listener: UnixListener, device: Arc<Mutex<Transport<Vsock>>>) -> io::Result<Backend> {
        listener.set_nonblocking(true)?;
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&epoll, &listener, EventData::new_u64(LISTENER), EventFlags::IN)?;
        Ok(Backend { listener, epoll, device, next_token: LISTENER + 1, clients: HashMap::new() })
    }

    /// Serves clients for as long as the process lives.
    pub fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        loop {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => {
                    tracing::error!(%errno, "vsock: the host side cannot be waited for any more");
                    return;
                }
            }
            for event in &events {
                let flags = event.flags;
                match event.data.u64() {
                    LISTENER => self.accept(),
                    token => self.client_event(token, flags),
                }
            }
        }
    }

    fn accept(&mut self) {
        // Clients of streams that the guest ended meanwhile make room.
        self.with_device(|_| ());
        while let Ok((stream, _)) = self.listener.accept() {
            if self.clients.len() >= CONNECTIONS_MAX || stream.set_nonblocking(true).is_err() {
                continue;
            }
            let token = self.next_token;
            let interest = EventFlags::IN | EventFlags::OUT | EventFlags::RDHUP | EventFlags::ET;
            if epoll::add(&self.epoll, &stream, EventData::new_u64(token), interest).is_ok() {
                self.next_token += 1;
                self.clients.insert(token, Client::Asking { stream, request: Vec::new() });
            }
        }
    }

    fn client_event(&mut self, token: u64, flags: EventFlags) {
        match self.clients.remove(&token) {
            Some(Client::Asking { stream, request }) => {
                if let Some(client) = self.read_request(token, stream, request) {
                    self.clients.insert(token, client);
                }
            }
            Some(Client::Streaming(key)) => {
                let readable = flags.intersects(EventFlags::IN | EventFlags::RDHUP);
                let gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
                let writable = flags.contains(EventFlags::OUT);
                self.clients.insert(token, Client::Streaming(key));
                self.with_device(|device| device.host_event(key, readable, writable, gone));
            }
            None => {}
        }
    }

    /// Reads on until the request is whole, then hands the stream to the device. `None` ends the client.
    fn read_request(&mut self, token: u64, stream: UnixStream, mut request: Vec<u8>) -> Option<Client> {
        let mut byte = [0];
        // Byte by byte: what follows the line belongs to the guest.
        while request.len() < REQUEST_MAX {
            match (&stream).read(&mut byte) {
                Ok(1) if byte == *b"\n" => {
                    let Some(port) = parse_request(&request) else {
                        let _ = (&stream).write_all(b"ERROR expected: CONNECT <port>\n");
                        return None;
                    };
                    let connected = self.with_device(|device| device.connect(stream, port));
                    return connected.ok().map(Client::Streaming).inspect(|_| {
                        tracing::trace!(token, port, "vsock: stream requested");
                    });
                }
                Ok(1) => request.push(byte[0]),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Some(Client::Asking { stream, request });
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                _ => return None,
            }
        }
        None
    }

    fn with_device<R>(&mut self, work: impl FnOnce(&mut Vsock) -> R) -> R {
        let mut transport = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        let (result, ended) = transport.with_device(|device, queues, ram| {
            let result = work(device);
            let outcome = device.pump(queues, ram);
            ((result, device.take_ended()), outcome)
        });
        drop(transport);
        if !ended.is_empty() {
            self.clients.retain(|_, client| !matches!(client, Client::Streaming(key) if ended.contains(key)));
        }
        result
    }
}

fn parse_request(line: &[u8]) -> Option<u32> {
    let text = std::str::from_utf8(line).ok()?.trim_end_matches('\r');
    text.strip_prefix("CONNECT ")?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests() {
        assert_eq!(parse_request(b"CONNECT 5252"), Some(5252));
        assert_eq!(parse_request(b"CONNECT 5252\r"), Some(5252));
        for bad in [&b"CONNECT"[..], b"CONNECT -1", b"CONNECT 99999999999", b"connect 1", b"\xff\xfe"] {
            assert_eq!(parse_request(bad), None, "{bad:?}");
        }
    }
}
