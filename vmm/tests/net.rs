//! Frames between a guest driver and the host's end, without a guest: the driver's rings are written by the test, and a
//! pair of datagram sockets stands where a wire is, which keeps frames apart in the same way. `tests/linux_net.rs` of the
//! root crate goes through real taps.

use forkd_vmm::devices::virtio::mmio::{Transport, Window};
use forkd_vmm::devices::virtio::net::backend::Backend;
use forkd_vmm::devices::virtio::net::{FRAME_MAX, HEADER, Link, Net};
use std::os::unix::net::UnixDatagram;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use virtio_bindings::virtio_mmio as reg;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_CSUM, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_MRG_RXBUF};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const RX: u64 = 0;
const TX: u64 = 1;
const MAC: [u8; 6] = [2, 1, 2, 3, 4, 5];
const CONFIG: u64 = 0x100;

/// A device, and the other end of its wire.
fn linked() -> (Net, UnixDatagram) {
    let (ours, theirs) = UnixDatagram::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    (Net::new(Some(Link { wire: ours.into(), mac: MAC })), theirs)
}

/// A driver that has not given the device any buffer yet.
struct Driver {
    device: Arc<Mutex<Transport<Net>>>,
    ram: GuestMemoryMmap,
    interrupt: EventFd,
    available: [u16; 2],
    used: [u16; 2],
}

impl Driver {
    fn new(device: Net) -> Driver {
        Driver::agreeing(device, 0)
    }

    /// A driver that accepts these of the first 32 features.
    fn agreeing(device: Net, features: u32) -> Driver {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let interrupt = EventFd::new(rustix::fs::OFlags::NONBLOCK.bits() as i32).unwrap();
        let device = Transport::new(device, ram.clone(), interrupt.try_clone().unwrap());
        let driver =
            Driver { device: Arc::new(Mutex::new(device)), ram, interrupt, available: [0; 2], used: [0; 2] };
        driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, features);
        for queue in 0..2_u32 {
            let base = 0x1000 + queue * 0x1000;
            driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
            driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, 16);
            driver.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            driver.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
            driver.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
            driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        driver.write(reg::VIRTIO_MMIO_STATUS, 15);
        driver
    }

    fn write(&self, register: u32, value: u32) {
        self.device.lock().unwrap().write(register.into(), &value.to_le_bytes());
    }

    fn config(&self) -> ([u8; 6], bool) {
        let mut bytes = [0; 8];
        self.device.lock().unwrap().read(CONFIG, &mut bytes);
        (bytes[..6].try_into().unwrap(), bytes[6] & 1 == 1)
    }

    /// Adds one buffer, in `parts`, at descriptor 0 or, for the receive queue, the next.
    fn add(&mut self, queue: u64, at: u64, parts: &[u32]) {
        let first = if queue == RX { u64::from(self.available[0]) % 8 } else { 0 };
        let mut address = at;
        for (position, length) in parts.iter().enumerate() {
            let here = if position == 0 { first } else { 7 + position as u64 };
            let descriptor = 0x1000 + queue * 0x1000 + here * 16;
            let writable = if queue == RX { 2 } else { 0 };
            let chained = u16::from(position + 1 < parts.len());
            self.ram.write_obj(address, GuestAddress(descriptor)).unwrap();
            self.ram.write_obj(*length, GuestAddress(descriptor + 8)).unwrap();
            self.ram.write_obj(writable | chained, GuestAddress(descriptor + 12)).unwrap();
            self.ram.write_obj(8 + position as u16, GuestAddress(descriptor + 14)).unwrap();
            address += u64::from(*length);
        }
        let available = &mut self.available[queue as usize];
        let ring = 0x1404 + queue * 0x1000 + u64::from(*available % 16) * 2;
        self.ram.write_obj(first as u16, GuestAddress(ring)).unwrap();
        *available += 1;
        self.ram.write_obj(*available, GuestAddress(0x1402 + queue * 0x1000)).unwrap();
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
    }

    /// The length of the next used buffer.
    fn wait_used(&mut self, queue: u64) -> u32 {
        let deadline = Instant::now() + Duration::from_secs(5);
        let used = &mut self.used[queue as usize];
        while self.ram.read_obj::<u16>(GuestAddress(0x1802 + queue * 0x1000)).unwrap() == *used {
            assert!(Instant::now() < deadline, "the device uses no buffer of queue {queue}");
            std::thread::sleep(Duration::from_millis(1));
        }
        let entry = 0x1804 + queue * 0x1000 + u64::from(*used % 16) * 8;
        *used += 1;
        self.ram.read_obj(GuestAddress(entry + 4)).unwrap()
    }

    fn send(&mut self, frame: &[u8], cuts: &[u32]) {
        self.send_behind(&[0; HEADER], frame, cuts);
    }

    fn send_behind(&mut self, header: &[u8; HEADER], frame: &[u8], cuts: &[u32]) {
        let bytes = [&header[..], frame].concat();
        self.ram.write_slice(&bytes, GuestAddress(0x8_0000)).unwrap();
        let rest = bytes.len() as u32 - cuts.iter().sum::<u32>();
        self.add(TX, 0x8_0000, &[cuts, &[rest]].concat());
        assert_eq!(self.wait_used(TX), 0);
    }

    fn bytes(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

fn served(device: Net) -> Driver {
    serve(Driver::new(device))
}

fn serve(driver: Driver) -> Driver {
    let backend = Backend::new(&driver.device).unwrap().expect("there is a link");
    std::thread::spawn(move || backend.run());
    driver
}

#[test]
fn frames_go_both_ways() {
    let (device, host) = linked();
    let mut driver = served(device);
    let frame: Vec<u8> = (0..1514).map(|at| at as u8).collect();
    for cuts in [&[][..], &[12], &[5, 700]] {
        driver.send(&frame, cuts);
        let mut received = [0; 2000];
        let length = host.recv(&mut received).unwrap();
        assert_eq!(received[..length], frame, "sent in parts of {cuts:?} bytes");
    }
    // One frame waits for a buffer, one comes when the buffer is there; the second buffer is in two parts.
    host.send(&frame).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    driver.add(RX, 0x1_0000, &[2048]);
    assert_eq!(driver.wait_used(RX), 1526);
    driver.add(RX, 0x2_0000, &[20, 2000]);
    host.send(&frame[..60]).unwrap();
    assert_eq!(driver.wait_used(RX), 72);
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(driver.bytes(0x1_0000, 1526), [&header[..], &frame].concat());
    assert_eq!(driver.bytes(0x2_0000, 72), [&header[..], &frame[..60]].concat());
    assert!(driver.interrupt.read().is_ok(), "no interrupt");
}

#[test]
fn frames_that_do_not_fit_are_lost_and_nothing_else_is() {
    let (device, host) = linked();
    let mut driver = served(device);
    // Too long by one byte; no frame behind the header; half a header.
    driver.send(&vec![1; FRAME_MAX - HEADER + 1], &[]);
    driver.send(&[], &[]);
    driver.add(TX, 0x8_0000, &[6]);
    assert_eq!(driver.wait_used(TX), 0);
    driver.send(&vec![2; FRAME_MAX - HEADER], &[]);
    let mut received = vec![0; FRAME_MAX];
    assert_eq!(host.recv(&mut received).unwrap(), FRAME_MAX - HEADER);
    assert_eq!(received[0], 2);
    host.send(&[3; 1000]).unwrap();
    host.send(&[4; 1000]).unwrap();
    driver.add(RX, 0x1_0000, &[100]);
    assert_eq!(driver.wait_used(RX), 0);
    driver.add(RX, 0x2_0000, &[2048]);
    assert_eq!(driver.wait_used(RX), 1012);
    assert_eq!(driver.bytes(0x2_0000 + HEADER as u64, 1000), [4; 1000]);
}

#[test]
fn a_long_frame_waits_for_the_buffers_that_it_takes_and_is_there_at_once() {
    let (device, host) = linked();
    let mut driver = serve(Driver::agreeing(device, 1 << VIRTIO_NET_F_MRG_RXBUF));
    let frame: Vec<u8> = (0..2500).map(|at| (at % 251) as u8).collect();
    host.send(&frame).unwrap();
    host.send(&frame[..100]).unwrap();
    for (at, parts) in [(0x1_0000, &[1000][..]), (0x2_0000, &[20, 980])] {
        driver.add(RX, at, parts);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(
            driver.ram.read_obj::<u16>(GuestAddress(0x1802)).unwrap(),
            0,
            "a part of a frame was used"
        );
    }
    driver.add(RX, 0x3_0000, &[1000]);
    assert_eq!([(); 3].map(|()| driver.wait_used(RX)), [1000, 1000, 512]);
    let header = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0];
    let parts = [(0x1_0000, 1000), (0x2_0000, 1000), (0x3_0000, 512)];
    let received = parts.map(|(at, length)| driver.bytes(at, length)).concat();
    assert_eq!(received, [&header[..], &frame].concat());
    driver.add(RX, 0x4_0000, &[1000]);
    assert_eq!(driver.wait_used(RX), 112);
    assert_eq!(driver.bytes(0x4_0000 + 10, 2), [1, 0]);
}

#[test]
fn a_frame_that_the_whole_queue_does_not_hold_is_lost_and_the_next_is_not() {
    let (device, host) = linked();
    let mut driver = serve(Driver::agreeing(device, 1 << VIRTIO_NET_F_MRG_RXBUF));
    host.send(&[5; 2000]).unwrap();
    host.send(&[6; 50]).unwrap();
    for at in 0..16 {
        driver.add(RX, 0x1_0000 + at * 0x1000, &[100]);
    }
    assert_eq!([(); 16].map(|()| driver.wait_used(RX)), [0; 16]);
    driver.add(RX, 0x4_0000, &[100]);
    assert_eq!(driver.wait_used(RX), 62);
}

#[test]
fn checksums_are_completed_and_checked_for_a_driver_that_leaves_them_to_the_device() {
    let (device, host) = linked();
    let mut driver = serve(Driver::agreeing(device, 1 << VIRTIO_NET_F_CSUM | 1 << VIRTIO_NET_F_GUEST_CSUM));
    // A datagram of IPv4 with one byte, by RFC 768: from 10.0.0.1:1 to 10.0.0.2:2.
    let mut frame = vec![0; 14];
    frame[12] = 8;
    frame.extend([0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    // The sum of the pseudo header: 0a00 + 0001 + 0a00 + 0002 + 17 + 9.
    frame.extend([0, 1, 0, 2, 0, 9, 0x14, 0x1d, 7]);
    let needs_checksum = [1, 0, 0, 0, 0, 0, 34, 0, 6, 0, 0, 0];
    driver.send_behind(&needs_checksum, &frame, &[]);
    let mut completed = vec![0; 43];
    assert_eq!(host.recv(&mut completed).unwrap(), 43);
    // !(141d + 1 + 2 + 9 + 0700)
    assert_eq!(completed[40..42], [0xe4, 0xd6]);
    for (frame, flags) in [(&completed, 2), (&frame, 0)] {
        host.send(frame).unwrap();
        driver.add(RX, 0x1_0000, &[2048]);
        assert_eq!(driver.wait_used(RX), 55);
        assert_eq!(driver.bytes(0x1_0000, 1), [flags]);
    }
}

#[test]
fn a_driver_that_wants_no_interrupt_gets_none() {
    let (device, host) = linked();
    let mut driver = served(device);
    for (quiet, interrupted) in [(1_u16, false), (0, true)] {
        driver.ram.write_obj(quiet, GuestAddress(0x1400)).unwrap();
        host.send(&[1; 100]).unwrap();
        driver.add(RX, 0x1_0000, &[2048]);
        assert_eq!(driver.wait_used(RX), 112);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(driver.interrupt.read().is_ok(), interrupted);
    }
}

#[test]
fn without_a_tap_there_is_no_link_and_sending_is_in_vain() {
    let mut driver = Driver::new(Net::new(None));
    assert!(!driver.config().1, "the link is up");
    assert!(Backend::new(&driver.device).unwrap().is_none());
    driver.send(&[1; 60], &[]);
    driver.add(RX, 0x1_0000, &[2048]);
    assert_eq!(driver.ram.read_obj::<u16>(GuestAddress(0x1802)).unwrap(), 0, "a frame came from nowhere");
}

#[test]
fn a_restored_driver_hears_of_its_new_link_and_uses_its_old_rings() {
    let mut before = Driver::new(Net::new(None));
    before.add(RX, 0x1_0000, &[2048]);
    let saved = before.device.lock().unwrap().save();
    let (device, host) = linked();
    host.send(&[9; 100]).unwrap();
    let interrupt = EventFd::new(rustix::fs::OFlags::NONBLOCK.bits() as i32).unwrap();
    let mut after = Transport::new(device, before.ram.clone(), interrupt);
    after.restore(&saved).unwrap();
    after.resume();
    let mut status = [0; 4];
    after.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS.into(), &mut status);
    assert_eq!(status[0], 3, "both the configuration and a buffer have changed");
    assert_eq!(before.wait_used(RX), 112);
    before.device = Arc::new(Mutex::new(after));
    assert_eq!(before.config(), (MAC, true));
    before.send(&[8; 60], &[]);
    let mut received = [0; 100];
    assert_eq!(host.recv(&mut received).unwrap(), 60);
    // Back to a machine without: the driver hears that, too. And nothing is said where nothing is new.
    let mut device = before.device.lock().unwrap();
    device.write(reg::VIRTIO_MMIO_INTERRUPT_ACK.into(), &3_u32.to_le_bytes());
    let saved = device.save();
    drop(device);
    for (device, said) in [(Net::new(None), true), (linked().0, false)] {
        let interrupt = EventFd::new(rustix::fs::OFlags::NONBLOCK.bits() as i32).unwrap();
        let mut again = Transport::new(device, before.ram.clone(), interrupt.try_clone().unwrap());
        again.restore(&saved).unwrap();
        again.resume();
        assert_eq!(interrupt.read().is_ok(), said);
    }
}
