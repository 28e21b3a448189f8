//! The socket of one flow of datagrams.

use super::frame::Flow;
use rustix::net::SendFlags;
use std::cell::Cell;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket as StdSocket};
use std::time::Instant;
use tokio::net::UdpSocket;

/// One flow's socket.
pub struct DatagramFlow {
    /// Connected to the other end.
    pub socket: UdpSocket,
    /// When something last went through.
    pub last: Cell<Instant>,
}

impl DatagramFlow {
    /// To be called in the gateway's runtime.
    pub fn open(flow: Flow) -> io::Result<DatagramFlow> {
        let socket = StdSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_nonblocking(true)?;
        let (address, port) = flow.to;
        socket.connect(SocketAddrV4::new(address, port))?;
        Ok(DatagramFlow { socket: UdpSocket::from_std(socket)?, last: Cell::new(Instant::now()) })
    }

    /// Sends a datagram on; one that finds no room is lost.
    pub fn send(&self, payload: &[u8]) {
        self.last.set(Instant::now());
        // Not by tokio, which would wait to be told that a new socket has room.
        let _ = rustix::net::send(&self.socket, payload, SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
    }
}
