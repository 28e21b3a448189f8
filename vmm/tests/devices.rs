//! Scratch disk, balloon and console as a driver sees them that keeps the rules, without a guest: the test writes the rings.

use forkd_vmm::devices::serial::Console;
use forkd_vmm::devices::virtio::VirtioDevice;
use forkd_vmm::devices::virtio::balloon::Balloon;
use forkd_vmm::devices::virtio::block::{Block, SECTOR, ScratchDisk};
use forkd_vmm::devices::virtio::console::VirtioConsole;
use forkd_vmm::devices::virtio::mmio::{Transport, Window};
use forkd_vmm::memory::{GuestMemory, Mapping, MemoryLayout, Sharing, create_image};
use proptest::prelude::*;
use rustix::fd::OwnedFd;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Where buffers of requests lie; each ring takes a page from 0x1000 on.
const BUFFERS: u64 = 0x2_0000;
const RAM: usize = 1 << 20;
const RING: u16 = 16;

/// A buffer of a request.
enum Part<'a> {
    Send(&'a [u8]),
    Room(usize),
    /// A range of guest memory that the device may write to.
    At(u64, u32),
}

struct Driver<D: VirtioDevice> {
    device: Transport<D>,
    ram: GuestMemoryMmap,
    submitted: [u16; 3],
}

fn transport<D: VirtioDevice>(device: D, ram: &GuestMemoryMmap) -> Transport<D> {
    let interrupt = EventFd::new(rustix::fs::OFlags::NONBLOCK.bits() as i32).unwrap();
    Transport::new(device, ram.clone(), interrupt)
}

impl<D: VirtioDevice> Driver<D> {
    fn new(device: D) -> Driver<D> {
        Driver::on(device, GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap())
    }

    fn on(device: D, ram: GuestMemoryMmap) -> Driver<D> {
        let mut driver = Driver { device: transport(device, &ram), ram, submitted: [0; 3] };
        driver.write(reg::VIRTIO_MMIO_STATUS, 1 | 2);
        let offered = driver.read(reg::VIRTIO_MMIO_DEVICE_FEATURES);
        driver.write(reg::VIRTIO_MMIO_DRIVER_FEATURES, offered);
        for queue in 0..3_u32 {
            let base = 0x1000 + queue * 0x1000;
            driver.write(reg::VIRTIO_MMIO_QUEUE_SEL, queue);
            driver.write(reg::VIRTIO_MMIO_QUEUE_NUM, RING.into());
            driver.write(reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
            driver.write(reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
            driver.write(reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
            driver.write(reg::VIRTIO_MMIO_QUEUE_READY, 1);
        }
        driver.write(reg::VIRTIO_MMIO_STATUS, 1 | 2 | 8 | 4);
        driver
    }

    fn write(&mut self, register: u32, value: u32) {
        self.device.write(register.into(), &value.to_le_bytes());
    }

    fn read(&mut self, register: u32) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register.into(), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Submits one request; returns the length that the device gives as written, and every buffer after it.
    fn submit(&mut self, queue: usize, parts: &[Part<'_>]) -> (u32, Vec<Vec<u8>>) {
        let ring = 0x1000 + queue as u64 * 0x1000;
        let mut at = BUFFERS;
        let mut places = Vec::new();
        for (position, part) in parts.iter().enumerate() {
            let (address, length, flags) = match part {
                Part::Send(bytes) => {
                    self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
                    (at, bytes.len() as u32, 0_u16)
                }
                Part::Room(length) => (at, *length as u32, 2),
                Part::At(address, length) => (*address, *length, 2),
            };
            let descriptor = ring + position as u64 * 16;
            let next = u16::from(position + 1 < parts.len());
            self.ram.write_obj(address, GuestAddress(descriptor)).unwrap();
            self.ram.write_obj(length, GuestAddress(descriptor + 8)).unwrap();
            self.ram.write_obj(flags | next, GuestAddress(descriptor + 12)).unwrap();
            self.ram.write_obj(position as u16 + 1, GuestAddress(descriptor + 14)).unwrap();
            if !matches!(part, Part::At(..)) {
                places.push((address, length as usize));
                at += u64::from(length);
            }
        }
        let done = self.submitted[queue];
        self.ram.write_obj(0_u16, GuestAddress(ring + 0x404 + u64::from(done % RING) * 2)).unwrap();
        self.submitted[queue] = done + 1;
        self.ram.write_obj(done + 1, GuestAddress(ring + 0x402)).unwrap();
        self.write(reg::VIRTIO_MMIO_QUEUE_NOTIFY, queue as u32);
        assert_eq!(self.ram.read_obj::<u16>(GuestAddress(ring + 0x802)).unwrap(), done + 1, "no answer");
        assert_eq!(self.read(reg::VIRTIO_MMIO_INTERRUPT_STATUS), 1);
        self.write(reg::VIRTIO_MMIO_INTERRUPT_ACK, 1);
        let used = GuestAddress(ring + 0x804 + u64::from(done % RING) * 8 + 4);
        let contents = places.into_iter().map(|(address, length)| {
            let mut bytes = vec![0; length];
            self.ram.read_slice(&mut bytes, GuestAddress(address)).unwrap();
            bytes
        });
        let contents = contents.collect();
        (self.ram.read_obj(used).unwrap(), contents)
    }

    /// The same driver on a new device that takes over the old one's state.
    fn restored(self, device: D) -> Driver<D> {
        let state = self.device.save();
        let mut new = transport(device, &self.ram);
        new.restore(&state).unwrap();
        new.resume();
        assert_eq!(new.save(), state);
        Driver { device: new, ..self }
    }
}

const OK: u8 = 0;
const IO_ERROR: u8 = 1;
const UNSUPPORTED: u8 = 2;

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut bytes = kind.to_le_bytes().to_vec();
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes
}

fn disk(bytes: u64) -> (Block, File) {
    let file = tempfile::tempfile().unwrap();
    file.set_len(bytes).unwrap();
    (Block::new(Some(ScratchDisk { file: file.try_clone().unwrap(), bytes })), file)
}

impl Driver<Block> {
    /// One request with its data in `parts`; returns its status and the data that came.
    fn request(&mut self, kind: u32, sector: u64, parts: Vec<Part<'_>>) -> (u8, Vec<u8>) {
        let header = header(kind, sector);
        let mut all = vec![Part::Send(&header)];
        all.extend(parts);
        all.push(Part::Room(1));
        let rooms: Vec<_> = all.iter().map(|part| matches!(part, Part::Room(_))).collect();
        let (_, mut contents) = self.submit(0, &all);
        let status = contents.pop().unwrap()[0];
        let data = contents.into_iter().zip(rooms).filter(|(_, room)| *room).flat_map(|(bytes, _)| bytes);
        (status, data.collect())
    }

    fn erase(&mut self, kind: u32, sector: u64, sectors: u32, flags: u32) -> u8 {
        let mut segment = sector.to_le_bytes().to_vec();
        segment.extend(sectors.to_le_bytes());
        segment.extend(flags.to_le_bytes());
        self.request(kind, 0, vec![Part::Send(&segment)]).0
    }
}

#[test]
fn what_is_written_in_pieces_is_read_in_other_pieces() {
    let (device, file) = disk(64 * SECTOR);
    let mut driver = Driver::new(device);
    let data: Vec<u8> = (0..4096).map(|at| (at % 251) as u8).collect();
    let pieces = vec![Part::Send(&data[..100]), Part::Send(&data[100..101]), Part::Send(&data[101..])];
    assert_eq!(driver.request(blk::VIRTIO_BLK_T_OUT, 56, pieces).0, OK);
    let mut stored = vec![0; 4096];
    file.read_exact_at(&mut stored, 56 * SECTOR).unwrap();
    assert_eq!(stored, data);
    let rooms = vec![Part::Room(7), Part::Room(4000), Part::Room(89)];
    assert_eq!(driver.request(blk::VIRTIO_BLK_T_IN, 56, rooms), (OK, data));
    assert_eq!(driver.request(blk::VIRTIO_BLK_T_FLUSH, 0, vec![]).0, OK);
    let (status, id) = driver.request(blk::VIRTIO_BLK_T_GET_ID, 0, vec![Part::Room(20)]);
    assert_eq!((status, &id[..13]), (OK, &b"forkd-scratch"[..]));
    assert_eq!(driver.request(99, 0, vec![]).0, UNSUPPORTED);
}

#[test]
fn header_data_and_status_may_share_buffers() {
    let (device, _file) = disk(64 * SECTOR);
    let mut driver = Driver::new(device);
    let mut request = header(blk::VIRTIO_BLK_T_OUT, 1);
    request.extend([9; SECTOR as usize]);
    let (written, contents) = driver.submit(0, &[Part::Send(&request), Part::Room(1)]);
    assert_eq!((written, &contents[1][..]), (1, &[OK][..]));
    let request = header(blk::VIRTIO_BLK_T_IN, 1);
    let room = SECTOR as usize + 1;
    let parts = [Part::Send(&request[..5]), Part::Send(&request[5..]), Part::Room(room)];
    let (written, contents) = driver.submit(0, &parts);
    assert_eq!(written, room as u32);
    assert_eq!(contents[2], [&[9; SECTOR as usize][..], &[OK]].concat());
}

#[test]
fn nothing_behind_the_end_is_reached() {
    let (device, file) = disk(64 * SECTOR);
    file.set_len(128 * SECTOR).unwrap();
    file.write_all_at(&[5; SECTOR as usize], 64 * SECTOR).unwrap();
    let mut driver = Driver::new(device);
    let sector = [1; SECTOR as usize];
    for start in [63, 64, 1 << 40, u64::MAX / SECTOR, u64::MAX] {
        let two = vec![Part::Send(&sector), Part::Send(&sector)];
        assert_eq!(driver.request(blk::VIRTIO_BLK_T_OUT, start, two).0, IO_ERROR, "{start}");
        let two = vec![Part::Room(2 * SECTOR as usize)];
        assert_eq!(driver.request(blk::VIRTIO_BLK_T_IN, start, two).0, IO_ERROR, "{start}");
        for kind in [blk::VIRTIO_BLK_T_DISCARD, blk::VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(driver.erase(kind, start, 2, 0), IO_ERROR, "{start}");
        }
    }
    assert_eq!(driver.request(blk::VIRTIO_BLK_T_OUT, 0, vec![Part::Send(&sector[1..])]).0, IO_ERROR);
    let mut behind = [0; SECTOR as usize];
    file.read_exact_at(&mut behind, 64 * SECTOR).unwrap();
    assert_eq!(behind, [5; SECTOR as usize]);
}

#[test]
fn discarded_and_zeroed_sectors_read_zero_and_give_room_back() {
    use std::os::unix::fs::MetadataExt;
    let (device, file) = disk(64 * SECTOR);
    let mut driver = Driver::new(device);
    file.write_all_at(&[7; 64 * SECTOR as usize], 0).unwrap();
    let full = file.metadata().unwrap().blocks();
    assert_eq!(driver.erase(blk::VIRTIO_BLK_T_DISCARD, 8, 16, 0), OK);
    assert_eq!(driver.erase(blk::VIRTIO_BLK_T_WRITE_ZEROES, 32, 8, 1), OK);
    assert_eq!(file.metadata().unwrap().blocks(), full - 24);
    // Either the file system can, or the driver is told to do it itself.
    assert!([OK, UNSUPPORTED].contains(&driver.erase(blk::VIRTIO_BLK_T_WRITE_ZEROES, 40, 1, 0)));
    let (_, data) = driver.request(blk::VIRTIO_BLK_T_IN, 0, vec![Part::Room(40 * SECTOR as usize)]);
    let zero = |sector: usize| data[sector * SECTOR as usize..][..SECTOR as usize] == [0; SECTOR as usize];
    assert!((0..40).all(|sector| zero(sector) == ((8..24).contains(&sector) || sector >= 32)));
    assert_eq!(driver.erase(blk::VIRTIO_BLK_T_DISCARD, 0, 1, 1), UNSUPPORTED);
    assert_eq!(driver.erase(blk::VIRTIO_BLK_T_WRITE_ZEROES, 0, 1, 2), UNSUPPORTED);
    assert_eq!(driver.erase(blk::VIRTIO_BLK_T_DISCARD, 0, u32::MAX, 0), IO_ERROR);
    assert_eq!(file.metadata().unwrap().len(), 64 * SECTOR);
}

#[test]
fn a_copy_has_the_capacity_and_an_empty_disk_and_without_a_file_every_request_fails() {
    let (device, _file) = disk(64 * SECTOR);
    let mut driver = Driver::new(device);
    let sector = [1; SECTOR as usize];
    assert_eq!(driver.request(blk::VIRTIO_BLK_T_OUT, 3, vec![Part::Send(&sector)]).0, OK);
    let (device, _file) = disk(64 * SECTOR);
    let mut copy = driver.restored(device);
    assert_eq!(copy.read(reg::VIRTIO_MMIO_CONFIG), 64);
    let read = copy.request(blk::VIRTIO_BLK_T_IN, 3, vec![Part::Room(SECTOR as usize)]);
    assert_eq!(read, (OK, vec![0; SECTOR as usize]));
    // A file that is shorter than the driver believes.
    let (device, _file) = disk(4 * SECTOR);
    let mut copy = copy.restored(device);
    let read = |driver: &mut Driver<Block>, sector| {
        driver.request(blk::VIRTIO_BLK_T_IN, sector, vec![Part::Room(SECTOR as usize)]).0
    };
    assert_eq!(
        (copy.read(reg::VIRTIO_MMIO_CONFIG), read(&mut copy, 3), read(&mut copy, 4)),
        (64, OK, IO_ERROR)
    );
    let mut copy = copy.restored(Block::new(None));
    assert_eq!((copy.read(reg::VIRTIO_MMIO_CONFIG), read(&mut copy, 3)), (64, IO_ERROR));
    for kind in [blk::VIRTIO_BLK_T_OUT, blk::VIRTIO_BLK_T_FLUSH, blk::VIRTIO_BLK_T_GET_ID, 99] {
        assert_eq!(copy.request(kind, 0, vec![]).0, IO_ERROR);
    }
    assert_eq!(copy.erase(blk::VIRTIO_BLK_T_DISCARD, 0, 1, 0), IO_ERROR);
}

#[test]
fn one_notification_moves_a_bounded_amount() {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16 << 20)]).unwrap();
    let (device, _file) = disk(64 << 20);
    let mut driver = Driver::on(device, ram);
    let header = header(blk::VIRTIO_BLK_T_IN, 0);
    // Eight megabytes go, as a full ring holds them; more is refused.
    for (bytes, status) in [(8_u32 << 20, OK), ((8 << 20) + SECTOR as u32, IO_ERROR)] {
        let parts = [Part::Send(&header), Part::At(1 << 20, bytes), Part::Room(1)];
        assert_eq!(driver.submit(0, &parts).1.pop().unwrap(), [status]);
    }
}

#[derive(Debug, Clone)]
enum Disk {
    Write(u64, u64, u8),
    Read(u64, u64),
    Erase(u32, u64, u64),
    Restore,
}

fn disk_act() -> impl Strategy<Value = Disk> {
    let range = || (0..40_u64, 1..20_u64);
    prop_oneof![
        4 => (range(), any::<u8>()).prop_map(|((at, length), byte)| Disk::Write(at, length, byte)),
        4 => range().prop_map(|(at, length)| Disk::Read(at, length)),
        2 => (prop_oneof![Just(blk::VIRTIO_BLK_T_DISCARD), Just(blk::VIRTIO_BLK_T_WRITE_ZEROES)], range())
            .prop_map(|(kind, (at, length))| Disk::Erase(kind, at, length)),
        1 => Just(Disk::Restore),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the order of requests, the disk is what an array of sectors would be.
    #[test]
    fn a_disk_is_an_array_of_sectors(acts in proptest::collection::vec(disk_act(), 1..30)) {
        const SECTORS: u64 = 48;
        let (device, file) = disk(SECTORS * SECTOR);
        let mut driver = Driver::new(device);
        let mut expected = vec![0_u8; (SECTORS * SECTOR) as usize];
        for act in acts {
            let (at, length) = match act {
                Disk::Write(at, length, _) | Disk::Read(at, length) | Disk::Erase(_, at, length) => (at, length),
                Disk::Restore => (0, 0),
            };
            let status = if at + length <= SECTORS { OK } else { IO_ERROR };
            let bytes = (length * SECTOR) as usize;
            let place = expected.get_mut((at * SECTOR) as usize..).and_then(|rest| rest.get_mut(..bytes));
            match act {
                Disk::Write(_, _, byte) => {
                    let data = vec![byte; bytes];
                    let done = driver.request(blk::VIRTIO_BLK_T_OUT, at, vec![Part::Send(&data)]);
                    prop_assert_eq!(done.0, status);
                    if let Some(place) = place { place.fill(byte) }
                }
                Disk::Read(..) => {
                    let (found, data) = driver.request(blk::VIRTIO_BLK_T_IN, at, vec![Part::Room(bytes)]);
                    prop_assert_eq!(found, status);
                    if let Some(place) = place { prop_assert!(data == *place) }
                }
                Disk::Erase(kind, ..) => {
                    let unmap = u32::from(kind == blk::VIRTIO_BLK_T_WRITE_ZEROES);
                    prop_assert_eq!(driver.erase(kind, at, length as u32, unmap), status);
                    if let Some(place) = place { place.fill(0) }
                }
                Disk::Restore => {
                    let file = file.try_clone().unwrap();
                    driver = driver.restored(Block::new(Some(ScratchDisk { file, bytes: SECTORS * SECTOR })));
                }
            }
        }
    }
}

fn memory(sharing: Sharing, image: &OwnedFd) -> GuestMemory {
    let layout = MemoryLayout::new(1, 0).unwrap();
    let mapping = Mapping::of_file(image, layout.ram_bytes(), sharing).unwrap();
    GuestMemory::new(&layout, vec![mapping]).unwrap()
}

/// First bytes of the pages from 0x8_0000 on.
fn pages(memory: &GuestMemory) -> [u8; 4] {
    [0x80_u64, 0x81, 0x82, 0x83].map(|page| memory.ram().read_obj(GuestAddress(page << 12)).unwrap())
}

#[test]
fn a_balloon_gives_back_what_is_free_and_nothing_in_a_copy() {
    let image = create_image("test", RAM as u64).unwrap();
    let original = memory(Sharing::Shared, &image);
    let mut driver = Driver::on(Balloon::new(Some(original.clone())), original.ram().clone());
    assert_eq!(driver.read(reg::VIRTIO_MMIO_DEVICE_FEATURES), 1 << 5);
    let fill = |memory: &GuestMemory| {
        memory.ram().write_slice(&[1; 4 << 12], GuestAddress(0x8_0000)).unwrap();
    };
    fill(&original);
    driver.submit(2, &[Part::At(0x8_0000, 0x1000), Part::At(0x8_2000, 0x1000), Part::At(1 << 40, 0x1000)]);
    assert_eq!(pages(&original), [0, 1, 0, 1]);
    fill(&original);
    let numbers: Vec<u8> = [0x83_u32, 0x82, 0x80, u32::MAX, 0].iter().flat_map(|n| n.to_le_bytes()).collect();
    driver.submit(0, &[Part::Send(&numbers[..16])]);
    assert_eq!(pages(&original), [0, 1, 0, 0]);
    driver.submit(1, &[Part::Send(&numbers[..12])]);
    driver.write(reg::VIRTIO_MMIO_CONFIG + 4, 3);

    fill(&original);
    let mut copy = driver.restored(Balloon::new(None));
    assert_eq!((copy.read(reg::VIRTIO_MMIO_CONFIG), copy.read(reg::VIRTIO_MMIO_CONFIG + 4)), (0, 3));
    copy.submit(2, &[Part::At(0x8_0000, 0x4000)]);
    copy.submit(0, &[Part::Send(&numbers[..16])]);
    assert_eq!(pages(&original), [1; 4]);
}

#[test]
fn what_is_given_back_leaves_the_image() {
    let image = create_image("test", RAM as u64).unwrap();
    let memory = memory(Sharing::Shared, &image);
    memory.ram().write_slice(&vec![1; 64 << 12], GuestAddress(0x8_0000)).unwrap();
    let stored = || rustix::fs::fstat(&image).unwrap().st_blocks as u64 * 512;
    let mut driver = Driver::on(Balloon::new(Some(memory.clone())), memory.ram().clone());
    let before = stored();
    driver.submit(2, &[Part::At(0x8_0000, 64 << 12)]);
    // One page of that may have come for the ring.
    assert!(stored() + (63 << 12) <= before, "{before} -> {}", stored());
}

#[test]
fn console_output_goes_to_the_file_of_the_serial_port() {
    let mut file = tempfile::tempfile().unwrap();
    let mut serial = Console::new(Some(file.try_clone().unwrap()));
    let mut driver = Driver::new(VirtioConsole::new(serial.clone()));
    serial.write_all(b"kernel, ").unwrap();
    driver.submit(1, &[Part::Send(b"prog"), Part::Send(b"ram, ")]);
    serial.write_all(b"kernel, ").unwrap();
    let mut copy = driver.restored(VirtioConsole::new(serial));
    copy.submit(1, &[Part::Send(b"copy")]);
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "kernel, program, kernel, copy");
}
