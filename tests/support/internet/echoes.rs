//! Servers that send back what they get, and remember who came.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::namespace::Namespace;

/// How often the servers look whether they are to end.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// How long a connection may be silent.
const SILENCE: Duration = Duration::from_secs(120);

/// One thread for the listening sockets of a namespace, and one for each connection.
pub struct Echoes {
    visitors: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
    server: Option<JoinHandle<()>>,
}

impl Echoes {
    /// Serves at these addresses with ports.
    pub fn start(namespace: &Namespace, tcp: &[&str], udp: &[&str]) -> Echoes {
        let (listeners, sockets) = namespace.inside(|| {
            let listen =
                |at: &&str| TcpListener::bind(at).unwrap_or_else(|error| panic!("listen at {at}: {error}"));
            let bind = |at: &&str| UdpSocket::bind(at).unwrap_or_else(|error| panic!("bind {at}: {error}"));
            (tcp.iter().map(listen).collect::<Vec<_>>(), udp.iter().map(bind).collect::<Vec<_>>())
        });
        let (visitors, over) = (Arc::default(), Arc::default());
        let server = {
            let (visitors, over) = (Arc::clone(&visitors), Arc::clone(&over));
            std::thread::spawn(move || serve(&listeners, &sockets, &visitors, &over))
        };
        Echoes { visitors, over, server: Some(server) }
    }

    /// `tcp 203.0.113.2:40000 > 203.0.113.10:22`, `udp 203.0.113.2:40000 > 203.0.113.10:7`, in the order of their coming.
    pub fn visitors(&self) -> Vec<String> {
        self.visitors.lock().unwrap().clone()
    }
}

impl Drop for Echoes {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(server) = self.server.take() {
            let _ = server.join();
        }
    }
}

fn serve(tcp: &[TcpListener], udp: &[UdpSocket], visitors: &Mutex<Vec<String>>, over: &AtomicBool) {
    let came = |line: String| visitors.lock().unwrap().push(line);
    while !over.load(Ordering::Relaxed) {
        let mut all: Vec<_> = tcp.iter().map(|socket| PollFd::new(socket, PollFlags::IN)).collect();
        all.extend(udp.iter().map(|socket| PollFd::new(socket, PollFlags::IN)));
        if poll(&mut all, Some(&LOOK)).is_err() {
            continue;
        }
        let ready: Vec<bool> = all.iter().map(|one| !one.revents().is_empty()).collect();
        for listener in tcp.iter().zip(&ready).filter_map(|(socket, ready)| ready.then_some(socket)) {
            let Ok((stream, peer)) = listener.accept() else { continue };
            came(format!("tcp {} > {}", plain(peer), plain(stream.local_addr().unwrap())));
            std::thread::spawn(move || echo(stream));
        }
        for socket in
            udp.iter().zip(&ready[tcp.len()..]).filter_map(|(socket, ready)| ready.then_some(socket))
        {
            let mut bytes = vec![0; 65_536];
            let Ok((length, peer)) = socket.recv_from(&mut bytes) else { continue };
            came(format!("udp {} > {}", plain(peer), plain(socket.local_addr().unwrap())));
            let _ = socket.send_to(&bytes[..length], peer);
        }
    }
}

/// A version 4 address as such, also where it came by a socket of both versions.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn echo(stream: TcpStream) {
    let _ = stream.set_read_timeout(Some(SILENCE));
    let _ = io::copy(&mut &stream, &mut &stream);
}
