//! What crosses the wire between the host and the internet, one line a packet.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::num::NonZeroU32;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::io::{Errno, read};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, socket_with};

use super::namespace::Namespace;

/// `ETH_P_ALL` of linux/if_ether.h in network byte order, as packet(7) wants it.
const EVERYTHING: NonZeroU32 = NonZeroU32::new((3_u16).to_be() as u32).unwrap();

/// Reads all frames of a namespace until it is dropped.
pub struct Wire {
    packets: Arc<Mutex<Vec<String>>>,
    over: Arc<AtomicBool>,
    reader: Option<JoinHandle<()>>,
}

impl Wire {
    pub fn tap(namespace: &Namespace) -> Wire {
        let everything = Some(Protocol::from_raw(EVERYTHING));
        let socket = namespace.inside(|| {
            socket_with(AddressFamily::PACKET, SocketType::RAW, SocketFlags::CLOEXEC, everything).unwrap()
        });
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(100))).unwrap();
        let (packets, over) = (Arc::default(), Arc::default());
        let reader = {
            let (packets, over) = (Arc::clone(&packets), Arc::clone(&over));
            std::thread::spawn(move || record(&socket, &packets, &over))
        };
        Wire { packets, over, reader: Some(reader) }
    }

    /// How many there have been.
    pub fn count(&self) -> usize {
        self.packets.lock().unwrap().len()
    }

    /// Those after the first `count`: `tcp 203.0.113.2:40000 > 203.0.113.10:80`, `icmp 203.0.113.2 > 203.0.113.10`,
    /// `ip-47 ...` for protocol 47, `arp`, and so on.
    pub fn since(&self, count: usize) -> Vec<String> {
        self.packets.lock().unwrap()[count..].to_vec()
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        if let Some(reader) = self.reader.take() {
            let _ = reader.join();
        }
    }
}

fn record(socket: &OwnedFd, packets: &Mutex<Vec<String>>, over: &AtomicBool) {
    let mut frame = vec![0; 65_536];
    while !over.load(Ordering::Relaxed) {
        match read(socket.as_fd(), &mut frame) {
            Ok(length) => packets.lock().unwrap().push(describe(&frame[..length])),
            Err(Errno::AGAIN | Errno::INTR) => {}
            // The device went away with its namespace.
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

fn describe(frame: &[u8]) -> String {
    let kind = frame.get(12..14).map_or(0, |kind| u16::from_be_bytes([kind[0], kind[1]]));
    let body = frame.get(14..).unwrap_or_default();
    let said = match kind {
        0x0800 => version4(body),
        0x86dd => version6(body),
        0x0806 => Some("arp".to_owned()),
        _ => Some(format!("ether-{kind:04x}")),
    };
    said.unwrap_or_else(|| "short".to_owned())
}

fn version4(packet: &[u8]) -> Option<String> {
    let address = |at: usize| <[u8; 4]>::try_from(packet.get(at..at + 4)?).ok().map(Ipv4Addr::from);
    let header = usize::from(packet.first()? & 15) * 4;
    let (from, to) = (address(12)?.to_string(), address(16)?.to_string());
    Some(line(*packet.get(9)?, &from, &to, packet.get(header..)?))
}

fn version6(packet: &[u8]) -> Option<String> {
    let address = |at: usize| <[u8; 16]>::try_from(packet.get(at..at + 16)?).ok().map(Ipv6Addr::from);
    let (from, to) = (format!("[{}]", address(8)?), format!("[{}]", address(24)?));
    Some(line(*packet.get(6)?, &from, &to, packet.get(40..)?))
}

fn line(protocol: u8, from: &str, to: &str, rest: &[u8]) -> String {
    let kind = match protocol {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmp6".to_owned(),
        other => format!("ip-{other}"),
    };
    match rest {
        [a, b, c, d, ..] if matches!(protocol, 6 | 17) => {
            let (source, target) = (u16::from_be_bytes([*a, *b]), u16::from_be_bytes([*c, *d]));
            format!("{kind} {from}:{source} > {to}:{target}")
        }
        _ => format!("{kind} {from} > {to}"),
    }
}
