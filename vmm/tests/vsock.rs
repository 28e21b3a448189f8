//! Streams between host clients and a guest driver, without a guest: the driver's rings are written by the test.

use forkd_vmm::devices::virtio::mmio::{Transport, Window};
use forkd_vmm::devices::virtio::vsock::backend::Backend;
use forkd_vmm::devices::virtio::vsock::{GUEST_CID, HOST_CID, Vsock};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const RX: u64 = 0;
const TX: u64 = 1;
const EVENT: u64 = 2;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
const RST: u16 = 3;
const SHUTDOWN: u16 = 4;
const RW: u16 = 5;

/// A driver with 16 receive buffers of 4 KiB.
struct Driver {
    device: Arc<Mutex<Transport<Vsock>>>,
    ram: GuestMemoryMmap,
    received: u16,
    sent: u16,
}

#[derive(Debug)]
struct Packet {
    host_port: u32,
    op: u16,
    payload: Vec<u8>,
}

impl Driver {
    fn new() -> Driver {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let interrupt = EventFd::new(rustix::fs::OFlags::NONBLOCK.bits() as i32).unwrap();
        let mut transport = Transport::new(Vsock::default(), ram.clone(), interrupt);
        let write = |transport: &mut Transport<Vsock>, register: u32, value: u32| {
            transport.write(register.into(), &value.to_le_bytes());
        };
        for queue in 0..3_u32 {
            let base = 0x1000 + queue * 0x1000;
            write(&mut transport, reg::VIRTIO_MMIO_QUEUE_SEL, queue);
            write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NUM, 16);
            write(&mut transport, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            write(&mut transport, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
            write(&mut transport, reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
            write(&mut transport, reg::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        write(&mut transport, reg::VIRTIO_MMIO_STATUS, 15);
        for buffer in 0..16_u64 {
            let descriptor = 0x1000 + buffer * 16;
            ram.write_obj(0x1_0000 + buffer * 0x1000, GuestAddress(descriptor)).unwrap();
            ram.write_obj(0x1000_u32, GuestAddress(descriptor + 8)).unwrap();
            ram.write_obj(2_u16, GuestAddress(descriptor + 12)).unwrap();
            ram.write_obj(buffer as u16, GuestAddress(0x1404 + buffer * 2)).unwrap();
        }
        ram.write_obj(16_u16, GuestAddress(0x1402)).unwrap();
        Driver { device: Arc::new(Mutex::new(transport)), ram, received: 0, sent: 0 }
    }

    fn notify(&self, queue: u64) {
        let bytes = (queue as u32).to_le_bytes();
        self.device.lock().unwrap().write(reg::VIRTIO_MMIO_QUEUE_NOTIFY.into(), &bytes);
    }

    /// The next packet from the host, its buffer given back.
    fn receive(&mut self) -> Packet {
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.ram.read_obj::<u16>(GuestAddress(0x1802)).unwrap() == self.received {
            assert!(Instant::now() < deadline, "the host sends nothing");
            std::thread::sleep(Duration::from_millis(1));
        }
        let slot = u64::from(self.received % 16);
        let head: u32 = self.ram.read_obj(GuestAddress(0x1804 + slot * 8)).unwrap();
        let at = 0x1_0000 + u64::from(head) * 0x1000;
        let length: u32 = self.ram.read_obj(GuestAddress(at + 24)).unwrap();
        let mut payload = vec![0; length as usize];
        self.ram.read_slice(&mut payload, GuestAddress(at + 44)).unwrap();
        let packet = Packet {
            host_port: self.ram.read_obj(GuestAddress(at + 16)).unwrap(),
            op: self.ram.read_obj(GuestAddress(at + 30)).unwrap(),
            payload,
        };
        self.received += 1;
        let available = 16 + self.received;
        self.ram.write_obj(head as u16, GuestAddress(0x1404 + u64::from((available - 1) % 16) * 2)).unwrap();
        self.ram.write_obj(available, GuestAddress(0x1402)).unwrap();
        self.notify(RX);
        packet
    }

    fn send(&mut self, host_port: u32, op: u16, flags: u32, payload: &[u8]) {
        self.send_in_parts(host_port, op, flags, payload, usize::MAX);
    }

    /// As Linux does: header and payload over several descriptors, of at most `part` bytes each.
    fn send_in_parts(&mut self, host_port: u32, op: u16, flags: u32, payload: &[u8], part: usize) {
        let at = GuestAddress(0x8_0000);
        let mut bytes = GUEST_CID.to_le_bytes().to_vec();
        bytes.extend(HOST_CID.to_le_bytes());
        bytes.extend(5252_u32.to_le_bytes());
        bytes.extend(host_port.to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(op.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(65536_u32.to_le_bytes());
        bytes.extend(0_u32.to_le_bytes());
        bytes.extend(payload);
        self.ram.write_slice(&bytes, at).unwrap();
        let parts = bytes.len().div_ceil(part);
        for number in 0..parts {
            let descriptor = 0x2000 + number as u64 * 16;
            let start = number * part.min(bytes.len());
            let length = part.min(bytes.len() - start) as u32;
            let flags = u16::from(number + 1 < parts);
            self.ram.write_obj(at.0 + start as u64, GuestAddress(descriptor)).unwrap();
            self.ram.write_obj(length, GuestAddress(descriptor + 8)).unwrap();
            self.ram.write_obj(flags, GuestAddress(descriptor + 12)).unwrap();
            self.ram.write_obj(number as u16 + 1, GuestAddress(descriptor + 14)).unwrap();
        }
        self.ram.write_obj(0_u16, GuestAddress(0x2404 + u64::from(self.sent % 16) * 2)).unwrap();
        self.sent += 1;
        self.ram.write_obj(self.sent, GuestAddress(0x2402)).unwrap();
        self.notify(TX);
    }
}

impl Driver {
    /// A buffer for an event, the `number`th.
    fn offer_event_buffer(&self, number: u16) {
        self.ram.write_obj(0x2_8000_u64, GuestAddress(0x3000)).unwrap();
        self.ram.write_obj(4_u32, GuestAddress(0x3008)).unwrap();
        self.ram.write_obj(2_u16, GuestAddress(0x300c)).unwrap();
        self.ram.write_obj(0_u16, GuestAddress(0x3404 + u64::from((number - 1) % 16) * 2)).unwrap();
        self.ram.write_obj(number, GuestAddress(0x3402)).unwrap();
        self.notify(EVENT);
    }

    fn events(&self) -> u16 {
        self.ram.read_obj(GuestAddress(0x3802)).unwrap()
    }

    fn packets(&self) -> u16 {
        self.ram.read_obj(GuestAddress(0x1802)).unwrap()
    }
}

#[test]
fn a_copy_is_asked_for_streams_once_it_has_ended_those_of_the_original() {
    // The original's client stays: its device would go on to write into this memory.
    let (mut driver, _original, _) = connected();
    driver.offer_event_buffer(1);
    let saved = driver.device.lock().unwrap().save();
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let interrupt = EventFd::new(rustix::fs::OFlags::NONBLOCK.bits() as i32).unwrap();
    let mut transport = Transport::new(Vsock::default(), driver.ram.clone(), interrupt);
    transport.restore(&saved).unwrap();
    driver.device = Arc::new(Mutex::new(transport));
    let backend = Backend::new(UnixListener::bind(&socket).unwrap(), driver.device.clone()).unwrap();
    std::thread::spawn(move || backend.run());
    driver.device.lock().unwrap().resume();
    assert_eq!(driver.events(), 1, "the copy does not hear that its streams have ended");
    // It ends all streams that it has, when it comes to it: a new one would be among them.
    let before = driver.packets();
    let mut client = UnixStream::connect(&socket).unwrap();
    client.write_all(b"CONNECT 5252\n").unwrap();
    std::thread::sleep(Duration::from_millis(100));
    driver.notify(EVENT);
    assert_eq!(driver.packets(), before, "it is asked for a stream that it is about to end");
    driver.offer_event_buffer(2);
    driver.received = before;
    assert_eq!(driver.receive().op, REQUEST);
}

/// A driver, and a client that has reached port 5252 of it, with the stream's host port.
fn connected() -> (Driver, UnixStream, u32) {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vsock");
    let mut driver = Driver::new();
    let backend = Backend::new(UnixListener::bind(&socket).unwrap(), driver.device.clone()).unwrap();
    std::thread::spawn(move || backend.run());
    let mut client = UnixStream::connect(&socket).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    client.write_all(b"CONNECT 5252\n").unwrap();
    let request = driver.receive();
    assert_eq!(request.op, REQUEST);
    driver.send(request.host_port, RESPONSE, 0, b"");
    let mut greeting = [0; 64];
    let length = client.read(&mut greeting).unwrap();
    assert_eq!(greeting[..length], *format!("OK {}\n", request.host_port).as_bytes());
    (driver, client, request.host_port)
}

#[test]
fn bytes_go_both_ways() {
    let (mut driver, mut client, port) = connected();
    client.write_all(b"to the guest").unwrap();
    let packet = driver.receive();
    assert_eq!((packet.op, &packet.payload[..]), (RW, &b"to the guest"[..]));
    driver.send(port, RW, 0, b"to the host");
    let mut bytes = [0; 11];
    client.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
}

#[test]
fn a_payload_in_several_descriptors_arrives_whole() {
    let (mut driver, mut client, host_port) = connected();
    let payload: Vec<u8> = (0..60_000_u32).flat_map(u32::to_le_bytes).take(64 << 10).collect();
    driver.send_in_parts(host_port, RW, 0, &payload, 20_000);
    driver.send_in_parts(host_port, RW, 0, b"and on", 44);
    let mut received = vec![0; payload.len() + 6];
    client.read_exact(&mut received).unwrap();
    assert!(received.starts_with(&payload) && received.ends_with(b"and on"));
}

#[test]
fn a_client_that_closes_at_once_still_delivers_its_last_bytes() {
    let (mut driver, mut client, _) = connected();
    client.write_all(b"last words").unwrap();
    drop(client);
    let mut payload = Vec::new();
    loop {
        let packet = driver.receive();
        match packet.op {
            RW => payload.extend(packet.payload),
            RST => break,
            SHUTDOWN => {}
            op => panic!("operation {op}"),
        }
    }
    assert_eq!(payload, b"last words");
}

#[test]
fn a_slow_client_gets_everything_though_the_guest_has_forgotten_the_stream() {
    let (mut driver, mut client, port) = connected();
    // More than the socket holds by itself, within the stream's credit.
    let block = vec![7; 60_000];
    let mut total = 0;
    for _ in 0..8 {
        driver.send(port, RW, 0, &block);
        total += block.len();
        if total > 400_000 {
            break;
        }
    }
    driver.send(port, RST, 0, b"");
    std::thread::sleep(Duration::from_millis(50));
    let mut bytes = Vec::new();
    client.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), total);
}
