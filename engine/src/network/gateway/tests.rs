//! The whole gateway, with smoltcp as the child and real servers of this host behind it.

use super::frame::{ETHERNET_HEADER, Flow, MTU, Wire};
use super::*;
use crate::network::policy::Refusal;
use hickory_resolver::proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_resolver::proto::rr::rdata::{A, CNAME};
use hickory_resolver::proto::rr::{Name, RData, Record, RecordType};
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::socket::tcp;
use smoltcp::time::Instant as Moment;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr, IpProtocol, Ipv4Packet, UdpPacket};
use std::io::{Read, Write};
use std::net::{TcpListener, UdpSocket};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(20);
/// What the child is called.
const HOSTNAME: &str = "forkd-a1b2c3-1";

/// A child: its end of a wire, and smoltcp on it.
struct Guest {
    /// The wire as the gateway sees it.
    wire: Wire,
    line: Line,
    interface: Interface,
    sockets: SocketSet<'static>,
    traffic: Arc<Traffic>,
    _gateway: Gateway,
    next_port: u16,
}

struct Line {
    socket: OwnedFd,
    /// The wire as the child sees it.
    swapped: Wire,
    /// Datagrams that came, each with where it was for.
    datagrams: Vec<(Flow, Vec<u8>)>,
}

impl Line {
    fn next_packet(&mut self) -> Option<Vec<u8>> {
        let mut frame = vec![0; 65536];
        let length = rustix::io::read(&self.socket, &mut frame[..]).ok().filter(|length| *length > 0)?;
        let packet = frame[ETHERNET_HEADER..length].to_vec();
        if frame[12..14] == [8, 0]
            && let Ok(ip) = Ipv4Packet::new_checked(&packet[..])
            && ip.next_header() == IpProtocol::Udp
        {
            assert!(ip.verify_checksum());
            let udp = UdpPacket::new_checked(ip.payload()).unwrap();
            let (from, to) = (ip.src_addr(), ip.dst_addr());
            assert!(udp.verify_checksum(&IpAddress::Ipv4(from), &IpAddress::Ipv4(to)));
            let flow = Flow { from_port: udp.src_port(), to: (to, udp.dst_port()) };
            self.datagrams.push((flow, udp.payload().to_vec()));
        }
        Some(packet)
    }
}

struct Taken(Vec<u8>);

impl RxToken for Taken {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(&self.0)
    }
}

struct Given<'a>(&'a Line);

impl TxToken for Given<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, fill: F) -> R {
        let (frame, filled) = self.0.swapped.packet(len, fill);
        let _ = rustix::io::write(&self.0.socket, &frame);
        filled
    }
}

impl Device for Line {
    type RxToken<'a> = Taken;
    type TxToken<'a> = Given<'a>;

    fn receive(&mut self, _: Moment) -> Option<(Taken, Given<'_>)> {
        let packet = self.next_packet()?;
        Some((Taken(packet), Given(self)))
    }

    fn transmit(&mut self, _: Moment) -> Option<Given<'_>> {
        Some(Given(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        (capabilities.medium, capabilities.max_transmission_unit) = (Medium::Ip, usize::from(MTU));
        capabilities
    }
}

impl Guest {
    fn new(options: GatewayOptions) -> Guest {
        Guest::among(options, 1)
    }

    fn among(options: GatewayOptions, children: u32) -> Guest {
        let wire = frame::tests::WIRE;
        let identity = NetworkIdentity {
            mac: wire.child_mac,
            address: wire.child,
            prefix: 30,
            gateway: Some(wire.gateway),
            mtu: None,
        };
        let gateway = Gateway::new(options, children);
        let ends = GatewayWire::new().unwrap();
        let socket = ends.child_end.try_clone().unwrap();
        let traffic = Arc::clone(&ends.traffic);
        gateway.connect(&identity, HOSTNAME, ends).unwrap();
        // The one who sends as the child reads what is for it.
        let mut line = Line { socket, swapped: frame::tests::from_child(&wire), datagrams: Vec::new() };
        let mut interface = Interface::new(Config::new(HardwareAddress::Ip), &mut line, Moment::ZERO);
        interface.update_ip_addrs(|addresses| {
            addresses.push(IpCidr::new(IpAddress::Ipv4(wire.child), 30)).unwrap();
        });
        interface.routes_mut().add_default_ipv4_route(wire.gateway).unwrap();
        let sockets = SocketSet::new(Vec::new());
        Guest { wire, line, interface, sockets, traffic, _gateway: gateway, next_port: 40_000 }
    }

    fn turn(&mut self) {
        let now = Moment::now();
        self.interface.poll(now, &mut self.line, &mut self.sockets);
        std::thread::sleep(Duration::from_micros(200));
    }

    fn until<R>(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> Option<R>) -> R {
        let start = Instant::now();
        loop {
            if let Some(result) = done(self) {
                return result;
            }
            assert!(start.elapsed() < LIMIT, "{what}");
            self.turn();
        }
    }

    fn socket(&mut self, handle: SocketHandle) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(handle)
    }

    /// Tries to connect; whether that came to something.
    fn connect(&mut self, to: (Ipv4Addr, u16)) -> Option<SocketHandle> {
        let buffer = || tcp::SocketBuffer::new(vec![0; 64 << 10]);
        let mut socket = tcp::Socket::new(buffer(), buffer());
        self.next_port += 1;
        socket.connect(self.interface.context(), (IpAddress::Ipv4(to.0), to.1), self.next_port).unwrap();
        let handle = self.sockets.add(socket);
        self.until("a connection is decided", |guest| match guest.socket(handle).state() {
            tcp::State::SynSent => None,
            tcp::State::Closed => Some(None),
            _ => Some(Some(handle)),
        })
    }

    fn send_all(&mut self, handle: SocketHandle, mut bytes: &[u8]) {
        self.until("everything is sent", |guest| {
            if !bytes.is_empty() && guest.socket(handle).can_send() {
                let sent = guest.socket(handle).send_slice(bytes).unwrap();
                bytes = &bytes[sent..];
            }
            bytes.is_empty().then_some(())
        });
    }

    fn read_to_end(&mut self, handle: SocketHandle) -> Vec<u8> {
        let mut all = Vec::new();
        self.until("everything is read", |guest| {
            let socket = guest.socket(handle);
            if socket.can_recv() {
                let more = socket.recv(|bytes| (bytes.len(), bytes.to_vec())).unwrap();
                all.extend(more);
            }
            (!socket.may_recv()).then_some(())
        });
        all
    }

    /// Sends a datagram, and waits for one back.
    fn ask(&mut self, to: (Ipv4Addr, u16), payload: &[u8]) -> Option<Vec<u8>> {
        self.next_port += 1;
        self.throw(to, self.next_port, payload);
        let port = self.next_port;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(3) {
            let at = self.line.datagrams.iter().position(|(flow, _)| flow.to == (self.wire.child, port));
            if let Some(at) = at {
                return Some(self.line.datagrams.remove(at).1);
            }
            self.turn();
        }
        None
    }

    fn throw(&self, to: (Ipv4Addr, u16), from_port: u16, payload: &[u8]) {
        // As the child writes it: from its own address to another's.
        let sender = Wire { child: to.0, ..self.line.swapped };
        let flow = Flow { from_port: to.1, to: (self.wire.child, from_port) };
        let frame = sender.datagram(flow, payload).unwrap();
        // The gateway may have much before it.
        while rustix::io::write(&self.line.socket, &frame) == Err(rustix::io::Errno::AGAIN) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    fn refusals(&self) -> Vec<(String, Refusal)> {
        self.traffic.refusals().into_iter().map(|refused| (refused.what, refused.why)).collect()
    }
}

fn options(allow: &[&str]) -> GatewayOptions {
    let allow = allow.iter().map(|rule| rule.parse().unwrap()).collect();
    GatewayOptions { policy: Policy { allow, deny: Vec::new() }, ..GatewayOptions::default() }
}

/// A server that gives everything back when it has it all.
fn returning() -> (Ipv4Addr, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || {
                let (mut stream, mut all) = (stream.unwrap(), Vec::new());
                stream.read_to_end(&mut all).unwrap();
                let _ = stream.write_all(&all);
            });
        }
    });
    (Ipv4Addr::LOCALHOST, port)
}

#[test]
fn a_connection_carries_both_ways_and_ends_in_halves() {
    let mut guest = Guest::new(options(&["127.0.0.1"]));
    let bytes: Vec<u8> = (0..1u32 << 20).map(|number| (number % 251) as u8).collect();
    let handle = guest.connect(returning()).unwrap();
    guest.send_all(handle, &bytes);
    guest.socket(handle).close();
    assert!(guest.read_to_end(handle) == bytes);
    guest.until("the connection is over", |guest| (guest.traffic.counts().open == 0).then_some(()));
    let counts = guest.traffic.counts();
    assert_eq!((counts.connections, counts.refused, counts.dropped), (1, 0, 0));
    assert!(counts.bytes_sent > 1 << 20 && counts.bytes_received > 1 << 20);
}

#[test]
fn what_the_rules_do_not_name_is_reset_and_noted() {
    let mut guest = Guest::new(options(&["public"]));
    let (address, port) = returning();
    assert_eq!(guest.connect((address, port)), None);
    assert_eq!(guest.connect((Ipv4Addr::new(169, 254, 169, 254), 80)), None);
    assert_eq!(guest.connect((guest.wire.gateway, 22)), None);
    assert_eq!(guest.ask((Ipv4Addr::new(10, 0, 0, 1), 53), b"x"), None);
    let expected = [
        ("udp 10.0.0.1:53".to_owned(), Refusal::Inside),
        (format!("tcp {}:22", guest.wire.gateway), Refusal::Host),
        ("tcp 169.254.169.254:80".to_owned(), Refusal::Inside),
        (format!("tcp 127.0.0.1:{port}"), Refusal::Host),
    ];
    assert_eq!(guest.refusals(), expected);
}

#[test]
fn a_port_where_nobody_listens_is_refused_as_the_host_does() {
    let mut guest = Guest::new(options(&["127.0.0.1"]));
    let free = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    assert_eq!(guest.connect((Ipv4Addr::LOCALHOST, free)), None);
    assert_eq!(guest.traffic.counts().refused, 0);
}

#[test]
fn datagrams_go_and_come_back() {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let port = server.local_addr().unwrap().port();
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((length, from)) = server.recv_from(&mut bytes) {
            bytes[..length].make_ascii_uppercase();
            server.send_to(&bytes[..length], from).unwrap();
        }
    });
    let mut guest = Guest::new(options(&["127.0.0.1"]));
    assert_eq!(guest.ask((Ipv4Addr::LOCALHOST, port), b"hello").unwrap(), b"HELLO");
    assert_eq!(guest.traffic.counts().connections, 1);
}

#[test]
fn a_child_has_its_own_table_and_cannot_go_beyond() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = (Ipv4Addr::LOCALHOST, listener.local_addr().unwrap().port());
    // As one of very many: each has the least that there is.
    let mut guest = Guest::among(options(&["127.0.0.1"]), u32::MAX);
    let open: Vec<_> = (0..FLOWS.0).map(|_| guest.connect(to).unwrap()).collect();
    assert_eq!(guest.connect(to), None);
    assert_eq!(guest.refusals()[0].1, Refusal::TooMany);
    guest.socket(open[0]).abort();
    guest.until("there is room again", |guest| (guest.traffic.counts().open < FLOWS.0 as u64).then_some(()));
    assert!(guest.connect(to).is_some());
}

#[test]
fn a_rate_holds() {
    let rate = Some("1MB/s".parse().unwrap());
    let mut guest = Guest::new(GatewayOptions { rate, ..options(&["127.0.0.1"]) });
    let bytes = vec![7; 600 << 10];
    let handle = guest.connect(returning()).unwrap();
    let start = Instant::now();
    guest.send_all(handle, &bytes);
    guest.socket(handle).close();
    assert_eq!(guest.read_to_end(handle).len(), bytes.len());
    // 0.6 MB there and 0.6 MB back, less what may go at once.
    let took = start.elapsed();
    assert!(took > Duration::from_millis(900), "{took:?}");
}

/// Knows `many.test` with forty addresses, `short.test` with one, and nothing else. Returns how often it was asked.
fn name_server() -> (SocketAddr, Arc<std::sync::atomic::AtomicU32>) {
    let server = UdpSocket::bind("127.0.0.1:0").unwrap();
    let address = server.local_addr().unwrap();
    let asked = Arc::<std::sync::atomic::AtomicU32>::default();
    let count = Arc::clone(&asked);
    std::thread::spawn(move || {
        let mut bytes = [0; 2048];
        while let Ok((length, from)) = server.recv_from(&mut bytes) {
            count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let question = Message::from_vec(&bytes[..length]).unwrap();
            let query = question.queries[0].clone();
            let mut reply = Message::response(question.metadata.id, OpCode::Query);
            let addresses = match query.name().to_lowercase().to_ascii().as_str() {
                "many.test." => 40,
                "short.test." | "alias.test." => 1,
                // Its client waits.
                name if name.ends_with(".slow.test.") => continue,
                _ => 0,
            };
            if query.name().to_ascii() == "alias.test." {
                let target = CNAME(Name::from_ascii("hidden.evil.test.").unwrap());
                reply.add_answer(Record::from_rdata(query.name().clone(), 60, RData::CNAME(target)));
            }
            for number in 0..addresses {
                let data = RData::A(A(Ipv4Addr::new(203, 0, 113, number)));
                reply.add_answer(Record::from_rdata(query.name().clone(), 60, data));
            }
            if addresses == 0 {
                reply.metadata.response_code = ResponseCode::NXDomain;
            }
            let mut edns = Edns::new();
            edns.set_max_payload(1232);
            reply.add_query(query).set_edns(edns);
            server.send_to(&reply.to_vec().unwrap(), from).unwrap();
        }
    });
    (address, asked)
}

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut question = Message::new(77, MessageType::Query, OpCode::Query);
    question.metadata.recursion_desired = true;
    question.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    question.to_vec().unwrap()
}

#[test]
fn names_are_answered_as_far_as_the_rules_go() {
    let (server, asked) = name_server();
    let allow = options(&["short.test:443", "many.test", "gone.test"]);
    let mut guest = Guest::new(GatewayOptions { name_servers: vec![server], ..allow });
    let (to, own_address) = ((guest.wire.gateway, 53), guest.wire.child);
    let mut ask = |name: &str, kind: RecordType| {
        Message::from_vec(&guest.ask(to, &question(name, kind)).unwrap()).unwrap()
    };
    let own = ask(&HOSTNAME.to_uppercase(), RecordType::A);
    assert_eq!(own.answers[0].data, RData::A(A(own_address)));
    let other = ask(HOSTNAME, RecordType::AAAA);
    assert_eq!((other.metadata.response_code, other.answers.len()), (ResponseCode::NoError, 0));
    let short = ask("Short.Test.", RecordType::A);
    assert_eq!((short.metadata.id, short.answers.len(), short.queries.len()), (77, 1, 1));
    let ipv6 = ask("short.test.", RecordType::AAAA);
    assert_eq!((ipv6.metadata.response_code, ipv6.answers.len()), (ResponseCode::NoError, 0));
    assert_eq!(ask("gone.test.", RecordType::A).metadata.response_code, ResponseCode::NXDomain);
    let many = ask("many.test.", RecordType::A);
    assert_eq!((many.metadata.truncation, many.answers.len()), (true, 0));
    let upstream = asked.load(std::sync::atomic::Ordering::Relaxed);
    // A name can carry a secret out, whatever the kind of question.
    for kind in [RecordType::A, RecordType::TXT, RecordType::AAAA] {
        let refused = ask("c2VjcmV0.evil.test.", kind);
        assert_eq!(refused.metadata.response_code, ResponseCode::NXDomain);
    }
    assert_eq!(asked.load(std::sync::atomic::Ordering::Relaxed), upstream);
    // What does not fit into a datagram comes by a connection.
    let handle = guest.connect(to).unwrap();
    let long = question("many.test.", RecordType::A);
    guest.send_all(handle, &[&(long.len() as u16).to_be_bytes()[..], &long].concat());
    guest.socket(handle).close();
    let answer = guest.read_to_end(handle);
    assert_eq!(Message::from_vec(&answer[2..]).unwrap().answers.len(), 40);
    assert_eq!(guest.refusals(), [("name c2vjcmv0.evil.test".to_owned(), Refusal::NotAllowed)]);
    assert_eq!(guest.traffic.refusals()[0].count, 3);
}

#[test]
fn a_denied_name_is_not_found_by_an_alias() {
    let (server, _) = name_server();
    let policy = Policy { allow: Vec::new(), deny: vec!["*.evil.test".parse().unwrap()] };
    let mut guest = Guest::new(GatewayOptions { policy, name_servers: vec![server], rate: None });
    let to = (guest.wire.gateway, 53);
    let mut ask = |name: &str| {
        let reply = Message::from_vec(&guest.ask(to, &question(name, RecordType::A)).unwrap()).unwrap();
        (reply.metadata.response_code, reply.answers.len())
    };
    assert_eq!(ask("short.test."), (ResponseCode::NoError, 1));
    assert_eq!(ask("alias.test."), (ResponseCode::NXDomain, 0));
    assert_eq!(guest.refusals(), [("name hidden.evil.test".to_owned(), Refusal::Denied)]);
}

#[test]
fn questions_that_nobody_answers_are_few() {
    let (server, asked) = name_server();
    let mut guest = Guest::new(GatewayOptions { name_servers: vec![server], ..options(&[]) });
    let to = (guest.wire.gateway, 53);
    for number in 0..200 {
        guest.throw(to, 5000, &question(&format!("{number}.slow.test."), RecordType::A));
        guest.turn();
    }
    // Those beyond the limit are answered at once; others are answered, too.
    guest.until("most are refused", |guest| {
        (guest.line.datagrams.len() >= 200 - child::QUESTIONS_MAX).then_some(())
    });
    assert!(asked.load(std::sync::atomic::Ordering::Relaxed) as usize <= 2 * child::QUESTIONS_MAX);
}

#[test]
fn more_than_was_offered_harms_nobody() {
    // What a window does not allow, and then some: smoltcp before 0.13 panicked on it.
    let mut guest = Guest::new(options(&["127.0.0.1"]));
    let handle = guest.connect(returning()).unwrap();
    guest.send_all(handle, &[1; 20_000]);
    for _ in 0..50 {
        guest.turn();
    }
    let local = guest.socket(handle).local_endpoint().unwrap();
    let remote = guest.socket(handle).remote_endpoint().unwrap();
    let (frame, ()) = guest.line.swapped.packet(50_040, |packet| {
        packet[..4].copy_from_slice(&[0x45, 0, 0xc3, 0x78]);
        (packet[8], packet[9]) = (64, 6);
        packet[12..16].copy_from_slice(&guest.wire.child.octets());
        packet[16..20].copy_from_slice(&[127, 0, 0, 1]);
        Ipv4Packet::new_unchecked(&mut *packet).fill_checksum();
        packet[20..22].copy_from_slice(&local.port.to_be_bytes());
        packet[22..24].copy_from_slice(&remote.port.to_be_bytes());
        packet[32] = 0x50;
    });
    rustix::io::write(&guest.line.socket, &frame).unwrap();
    guest.socket(handle).close();
    assert_eq!(guest.read_to_end(handle).len(), 20_000);
    assert_eq!(guest.traffic.counts().dropped, 0, "the stack has not seen it");
}

#[test]
fn rubbish_is_survived() {
    let mut guest = Guest::new(options(&["127.0.0.1"]));
    let mut random = vec![0; 1500];
    for round in 0..2000 {
        getrandom_into(&mut random);
        let wire = guest.wire;
        if round % 2 == 0 {
            random[..6].copy_from_slice(&wire.gateway_mac);
            random[6..12].copy_from_slice(&wire.child_mac);
            random[12..14].copy_from_slice(&[8, 0]);
            let (frame, ()) = guest.line.swapped.packet(600, |packet| {
                packet.copy_from_slice(&random[14..614]);
                packet[..4].copy_from_slice(&[0x45, 0, 2, 88]);
                packet[6..8].fill(0);
                packet[9] = [1, 6, 17][round % 3];
                packet[12..16].copy_from_slice(&wire.child.octets());
                if round % 4 == 0 {
                    packet[16..20].copy_from_slice(&[127, 0, 0, 1]);
                }
                smoltcp::wire::Ipv4Packet::new_unchecked(packet).fill_checksum();
            });
            let _ = rustix::io::write(&guest.line.socket, &frame);
        } else {
            let _ = rustix::io::write(&guest.line.socket, &random[..1 + round % 1499]);
        }
        let mut reply = [0; 2048];
        while rustix::io::read(&guest.line.socket, &mut reply[..]).is_ok_and(|length| length > 0) {}
    }
    for bytes in [&b""[..], b"x", &[0xff; 500]] {
        assert_eq!(guest.ask((guest.wire.gateway, 53), bytes), None);
    }
    let handle = guest.connect(returning()).unwrap();
    guest.send_all(handle, b"still there");
    guest.socket(handle).close();
    assert_eq!(guest.read_to_end(handle), b"still there");
}

fn getrandom_into(bytes: &mut [u8]) {
    rustix::rand::getrandom(bytes, rustix::rand::GetRandomFlags::empty()).unwrap();
}
