//! The frames on a child's wire: what the gateway takes of them, and the packets it puts into them.
//!
//! The child's address and its gateway's are alone on the wire. Whatever has other addresses is nobody's.

use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    ArpOperation, ArpPacket, ArpRepr, EthernetAddress, EthernetFrame, EthernetProtocol, EthernetRepr,
    Icmpv4DstUnreachable, Icmpv4Message, Icmpv4Packet, Icmpv4Repr, IpAddress, IpProtocol, Ipv4Packet,
    Ipv4Repr, TcpPacket, UdpPacket, UdpRepr,
};
use std::net::Ipv4Addr;

/// Longest packet on the wire, bytes: a frame with it still fits into a device's. Long ones, as each costs a guest's
/// kernel the same, and that may be emulated.
pub const MTU: u16 = 65520;
/// An Ethernet frame's header, bytes.
pub const ETHERNET_HEADER: usize = 14;
/// How many routers a packet of the gateway may pass: it meets none.
const HOP_LIMIT: u8 = 64;

/// Both ends of a child's wire.
#[derive(Debug, Clone, Copy)]
pub struct Wire {
    /// The child's Ethernet address.
    pub child_mac: [u8; 6],
    /// The gateway's.
    pub gateway_mac: [u8; 6],
    /// The child's address.
    pub child: Ipv4Addr,
    /// The gateway's.
    pub gateway: Ipv4Addr,
}

/// A connection or a flow of datagrams, as the child sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Flow {
    /// The child's port.
    pub from_port: u16,
    /// Whom it is for.
    pub to: (Ipv4Addr, u16),
}

/// What a frame of the child is.
#[derive(Debug, PartialEq, Eq)]
pub enum Incoming<'a> {
    /// It asks for the gateway's Ethernet address: the answer, a frame.
    Arp(Vec<u8>),
    /// A segment of a connection.
    Tcp {
        /// Which.
        flow: Flow,
        /// It asks for a new one.
        opens: bool,
        /// The IP packet.
        packet: &'a [u8],
    },
    /// A datagram.
    Udp {
        /// From and to.
        flow: Flow,
        /// What it says.
        payload: &'a [u8],
        /// The IP packet.
        packet: &'a [u8],
    },
    /// ICMP for the gateway itself.
    Ping(&'a [u8]),
    /// A packet that has no way out of here.
    Other {
        /// Its protocol and destination, for people.
        what: String,
        /// The IP packet.
        packet: &'a [u8],
    },
    /// Nobody's.
    Nobodys,
}

impl Wire {
    /// Reads a frame of the child. Believes nothing: whoever is root in the child writes what he likes.
    pub fn read<'a>(&self, frame: &'a [u8]) -> Incoming<'a> {
        let Ok(ethernet) = EthernetFrame::new_checked(frame) else { return Incoming::Nobodys };
        if ethernet.src_addr().0 != self.child_mac {
            return Incoming::Nobodys;
        }
        let to = ethernet.dst_addr();
        match ethernet.ethertype() {
            EthernetProtocol::Arp if to.is_broadcast() || to.0 == self.gateway_mac => {
                self.arp(ethernet.payload()).map_or(Incoming::Nobodys, Incoming::Arp)
            }
            EthernetProtocol::Ipv4 if to.0 == self.gateway_mac => {
                self.ip(ethernet.payload()).unwrap_or(Incoming::Nobodys)
            }
            _ => Incoming::Nobodys,
        }
    }

    fn arp(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let repr = ArpRepr::parse(&ArpPacket::new_checked(packet).ok()?).ok()?;
        let ArpRepr::EthernetIpv4 { operation, source_protocol_addr, target_protocol_addr, .. } = repr else {
            return None;
        };
        // Before it has its address a machine may ask as nobody.
        let asker = [self.child, Ipv4Addr::UNSPECIFIED].contains(&source_protocol_addr);
        if operation != ArpOperation::Request || !asker || target_protocol_addr != self.gateway {
            return None;
        }
        let reply = ArpRepr::EthernetIpv4 {
            operation: ArpOperation::Reply,
            source_hardware_addr: EthernetAddress(self.gateway_mac),
            source_protocol_addr: self.gateway,
            target_hardware_addr: EthernetAddress(self.child_mac),
            target_protocol_addr: source_protocol_addr,
        };
        let mut frame = self.frame(reply.buffer_len(), EthernetProtocol::Arp);
        reply.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_HEADER..]));
        Some(frame)
    }

    fn ip<'a>(&self, bytes: &'a [u8]) -> Option<Incoming<'a>> {
        let ip = Ipv4Packet::new_checked(bytes).ok()?;
        let whole = !ip.more_frags() && ip.frag_offset() == 0;
        if ip.version() != 4 || !whole || ip.src_addr() != self.child || !ip.verify_checksum() {
            return None;
        }
        let (packet, to) = (bytes.get(..usize::from(ip.total_len()))?, ip.dst_addr());
        if packet.len() > usize::from(MTU) {
            return None;
        }
        match ip.next_header() {
            IpProtocol::Tcp => {
                let tcp = TcpPacket::new_checked(ip.payload()).ok()?;
                let flow = Flow { from_port: tcp.src_port(), to: (to, tcp.dst_port()) };
                let opens = tcp.syn() && !tcp.ack() && !tcp.rst();
                (flow.from_port != 0).then_some(Incoming::Tcp { flow, opens, packet })
            }
            IpProtocol::Udp => {
                let udp = UdpPacket::new_checked(ip.payload()).ok()?;
                let flow = Flow { from_port: udp.src_port(), to: (to, udp.dst_port()) };
                let right = udp.verify_checksum(&IpAddress::Ipv4(self.child), &IpAddress::Ipv4(to));
                let payload = ip.payload().get(8..usize::from(udp.len()))?;
                (right && flow.from_port != 0).then_some(Incoming::Udp { flow, payload, packet })
            }
            IpProtocol::Icmp if to == self.gateway => Some(Incoming::Ping(packet)),
            IpProtocol::Icmp => {
                let echo =
                    Icmpv4Packet::new_checked(ip.payload()).ok()?.msg_type() == Icmpv4Message::EchoRequest;
                // Whoever answers errors with errors never comes to an end.
                echo.then(|| Incoming::Other { what: format!("ping {to}"), packet })
            }
            other => Some(Incoming::Other { what: format!("protocol {} {to}", u8::from(other)), packet }),
        }
    }

    /// A frame to the child, without its payload of `len` bytes.
    fn frame(&self, len: usize, ethertype: EthernetProtocol) -> Vec<u8> {
        let mut frame = vec![0; ETHERNET_HEADER + len];
        let header = EthernetRepr {
            src_addr: EthernetAddress(self.gateway_mac),
            dst_addr: EthernetAddress(self.child_mac),
            ethertype,
        };
        header.emit(&mut EthernetFrame::new_unchecked(&mut frame[..]));
        frame
    }

    /// The frame with the IP packet that `fill` writes into `len` bytes.
    pub fn packet<R>(&self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> (Vec<u8>, R) {
        let mut frame = self.frame(len, EthernetProtocol::Ipv4);
        let filled = fill(&mut frame[ETHERNET_HEADER..]);
        (frame, filled)
    }

    /// The frame with a datagram from `flow`'s other end; `None` when it is too long for one.
    pub fn datagram(&self, flow: Flow, payload: &[u8]) -> Option<Vec<u8>> {
        let udp = UdpRepr { src_port: flow.to.1, dst_port: flow.from_port };
        let payload_len = udp.header_len() + payload.len();
        let ip = self.header(flow.to.0, IpProtocol::Udp, payload_len);
        let len = ip.buffer_len() + payload_len;
        if len > usize::from(MTU) {
            return None;
        }
        let (frame, ()) = self.packet(len, |bytes| {
            ip.emit(&mut Ipv4Packet::new_unchecked(&mut *bytes), &ChecksumCapabilities::default());
            let mut packet = UdpPacket::new_unchecked(&mut bytes[ip.buffer_len()..]);
            let (from, to) = (IpAddress::Ipv4(flow.to.0), IpAddress::Ipv4(self.child));
            let write = |into: &mut [u8]| into.copy_from_slice(payload);
            udp.emit(&mut packet, &from, &to, payload.len(), write, &ChecksumCapabilities::default());
        });
        Some(frame)
    }

    /// The frame that tells the child that its `packet` has no way out of here (RFC 1812, 5.2.7.1: code 13).
    pub fn prohibited(&self, packet: &[u8]) -> Option<Vec<u8>> {
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        let header = Ipv4Repr::parse(&ip, &ChecksumCapabilities::ignored()).ok()?;
        // As much of it as RFC 792 wants.
        let data = ip.payload();
        let data = &data[..data.len().min(8)];
        let icmp = Icmpv4Repr::DstUnreachable { reason: Icmpv4DstUnreachable::CommProhibited, header, data };
        let ip = self.header(self.gateway, IpProtocol::Icmp, icmp.buffer_len());
        let (frame, ()) = self.packet(ip.buffer_len() + icmp.buffer_len(), |bytes| {
            ip.emit(&mut Ipv4Packet::new_unchecked(&mut *bytes), &ChecksumCapabilities::default());
            let mut packet = Icmpv4Packet::new_unchecked(&mut bytes[ip.buffer_len()..]);
            icmp.emit(&mut packet, &ChecksumCapabilities::default());
        });
        Some(frame)
    }

    fn header(&self, from: Ipv4Addr, next_header: IpProtocol, payload_len: usize) -> Ipv4Repr {
        Ipv4Repr { src_addr: from, dst_addr: self.child, next_header, payload_len, hop_limit: HOP_LIMIT }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub const WIRE: Wire = Wire {
        child_mac: [2, 0, 0, 0, 0, 1],
        gateway_mac: [6, 0, 0, 0, 0, 1],
        child: Ipv4Addr::new(10, 213, 0, 6),
        gateway: Ipv4Addr::new(10, 213, 0, 5),
    };

    /// A frame as the child sends it, of what the gateway would send: with both ends swapped.
    pub fn from_child(wire: &Wire) -> Wire {
        Wire {
            child_mac: wire.gateway_mac,
            gateway_mac: wire.child_mac,
            child: wire.gateway,
            gateway: wire.child,
        }
    }

    /// A datagram of the child.
    fn datagram(to: (Ipv4Addr, u16), payload: &[u8]) -> Vec<u8> {
        let swapped = Wire { child: to.0, ..from_child(&WIRE) };
        swapped.datagram(Flow { from_port: to.1, to: (WIRE.child, 4000) }, payload).unwrap()
    }

    #[test]
    fn a_datagram_is_read_as_it_was_sent() {
        let to = (Ipv4Addr::new(203, 0, 113, 1), 53);
        let frame = datagram(to, b"question");
        let flow = Flow { from_port: 4000, to };
        let packet = &frame[ETHERNET_HEADER..];
        assert_eq!(WIRE.read(&frame), Incoming::Udp { flow, payload: b"question", packet });
        let longest = usize::from(MTU) - 28;
        assert_eq!(WIRE.datagram(flow, &vec![0; longest + 1]), None);
        let frame = WIRE.datagram(flow, &vec![0; longest]).unwrap();
        assert_eq!(frame.len(), ETHERNET_HEADER + usize::from(MTU));
        let refused = WIRE.prohibited(packet).unwrap();
        assert_eq!((refused[ETHERNET_HEADER + 20], refused[ETHERNET_HEADER + 21]), (3, 13));
    }

    #[test]
    fn what_has_others_addresses_is_nobodys() {
        let good = datagram((Ipv4Addr::new(203, 0, 113, 1), 53), b"x");
        let broken = |at: usize| {
            let mut frame = good.clone();
            frame[at] ^= 1;
            frame
        };
        // Both Ethernet addresses, the version, the length, the fragment's place, the checksums, the source.
        for at in [0, 6, 14, 17, 20, 21, 24, 26, 29, 40] {
            assert_eq!(WIRE.read(&broken(at)), Incoming::Nobodys, "{at}");
        }
        for len in 0..good.len() {
            assert_eq!(WIRE.read(&good[..len]), Incoming::Nobodys, "{len}");
        }
        let mut ipv6 = good.clone();
        ipv6[12..14].copy_from_slice(&[0x86, 0xdd]);
        assert_eq!(WIRE.read(&ipv6), Incoming::Nobodys);
    }

    #[test]
    fn only_the_gateway_is_found_on_the_wire() {
        let ask = |target: Ipv4Addr, source: Ipv4Addr| {
            let request = ArpRepr::EthernetIpv4 {
                operation: ArpOperation::Request,
                source_hardware_addr: EthernetAddress(WIRE.child_mac),
                source_protocol_addr: source,
                target_hardware_addr: EthernetAddress([0; 6]),
                target_protocol_addr: target,
            };
            let mut frame = from_child(&WIRE).frame(request.buffer_len(), EthernetProtocol::Arp);
            request.emit(&mut ArpPacket::new_unchecked(&mut frame[ETHERNET_HEADER..]));
            frame
        };
        let Incoming::Arp(reply) = WIRE.read(&ask(WIRE.gateway, WIRE.child)) else { panic!() };
        assert_eq!(reply[..6], WIRE.child_mac);
        assert_eq!(reply[22..28], WIRE.gateway_mac);
        assert_eq!(WIRE.read(&ask(Ipv4Addr::new(10, 213, 0, 9), WIRE.child)), Incoming::Nobodys);
        assert_eq!(WIRE.read(&ask(WIRE.gateway, Ipv4Addr::new(10, 213, 0, 9))), Incoming::Nobodys);
    }

    proptest! {
        #[test]
        fn any_bytes_can_be_read(mut frame in proptest::collection::vec(any::<u8>(), 0..200), ours in any::<bool>(), kind in 0..4u8) {
            if ours && frame.len() > 34 {
                frame[..6].copy_from_slice(&WIRE.gateway_mac);
                frame[6..12].copy_from_slice(&WIRE.child_mac);
                frame[12..14].copy_from_slice(if kind == 0 { &[8, 6] } else { &[8, 0] });
                if kind > 0 {
                    frame[14] = 0x45;
                    frame[20..22].fill(0);
                    frame[23] = [1, 6, 17][usize::from(kind) - 1];
                    frame[26..30].copy_from_slice(&WIRE.child.octets());
                    let len = (frame.len() - 14) as u16;
                    frame[16..18].copy_from_slice(&len.to_be_bytes());
                    Ipv4Packet::new_unchecked(&mut frame[14..]).fill_checksum();
                }
            }
            if let Incoming::Udp { packet, .. } | Incoming::Tcp { packet, .. } | Incoming::Other { packet, .. } = WIRE.read(&frame) {
                prop_assert!(packet.len() <= frame.len());
                WIRE.prohibited(packet);
            }
        }
    }
}
