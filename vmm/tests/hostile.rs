//! Drivers that mean harm: random registers, rings, descriptors and packets against every virtio device. Nothing may
//! panic, hang or reach outside of guest memory (which vm-memory would turn into a panic of this test).

use forkd_vmm::devices::serial::{CONSOLE_MAX, Console};
use forkd_vmm::devices::virtio::VirtioDevice;
use forkd_vmm::devices::virtio::balloon::Balloon;
use forkd_vmm::devices::virtio::block::{Block, ScratchDisk};
use forkd_vmm::devices::virtio::console::VirtioConsole;
use forkd_vmm::devices::virtio::mmio::{Transport, Window};
use forkd_vmm::devices::virtio::net::{FRAME_MAX, HEADER, Link, Net};
use forkd_vmm::devices::virtio::pmem::Pmem;
use forkd_vmm::devices::virtio::rng::Rng;
use forkd_vmm::devices::virtio::vsock::Vsock;
use forkd_vmm::memory::{GuestMemory, Mapping, MemoryLayout, Sharing, create_image};
use proptest::prelude::*;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use virtio_bindings::virtio_mmio as reg;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const RAM: u64 = 1 << 20;

/// A descriptor with fields that are often, not always, plausible.
fn descriptor() -> impl Strategy<Value = [u8; 16]> {
    let address = prop_oneof![8 => 0..RAM, 1 => any::<u64>(), 1 => Just(RAM - 8)];
    let length = prop_oneof![8 => 0..8192_u32, 1 => any::<u32>(), 1 => Just(44)];
    let flags = prop_oneof![8 => 0..4_u16, 1 => any::<u16>(), 1 => Just(4)];
    let next = prop_oneof![8 => 0..16_u16, 1 => any::<u16>()];
    (address, length, flags, next).prop_map(|(address, length, flags, next)| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    })
}

/// A vsock header from the guest; half of them name the stream that the host has asked for.
fn packet() -> impl Strategy<Value = Vec<u8>> {
    let port = prop_oneof![1 => Just(1_u32 << 30), 1 => any::<u32>()];
    let length = prop_oneof![4 => 0..5000_u32, 1 => any::<u32>()];
    (port, length, 0..9_u16, 0..4_u32, any::<u32>(), any::<u32>()).prop_map(
        |(port, length, op, flags, buffer, forwarded)| {
            let mut bytes = 3_u64.to_le_bytes().to_vec();
            bytes.extend(2_u64.to_le_bytes());
            bytes.extend(5252_u32.to_le_bytes());
            bytes.extend(port.to_le_bytes());
            bytes.extend(length.to_le_bytes());
            bytes.extend(1_u16.to_le_bytes());
            bytes.extend(op.to_le_bytes());
            bytes.extend(flags.to_le_bytes());
            bytes.extend(buffer.to_le_bytes());
            bytes.extend(forwarded.to_le_bytes());
            bytes
        },
    )
}

/// A disk request's header and, behind it, what may be the range of a discard.
fn request() -> impl Strategy<Value = Vec<u8>> {
    let kind = prop_oneof![8 => 0..15_u32, 1 => any::<u32>()];
    let sector = || prop_oneof![8 => 0..80_u64, 1 => any::<u64>()];
    let sectors = prop_oneof![8 => 0..80_u32, 1 => any::<u32>()];
    (kind, sector(), sector(), sectors, 0..4_u32).prop_map(|(kind, sector, start, sectors, flags)| {
        let mut bytes = kind.to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(sector.to_le_bytes());
        bytes.extend(start.to_le_bytes());
        bytes.extend(sectors.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    })
}

/// Page numbers for a balloon.
fn page_numbers() -> impl Strategy<Value = Vec<u8>> {
    let number = prop_oneof![8 => 0..300_u32, 1 => any::<u32>()];
    proptest::collection::vec(number, 1..40)
        .prop_map(|numbers| numbers.iter().flat_map(|number| number.to_le_bytes()).collect())
}

#[derive(Debug, Clone)]
enum Act {
    Register(u32, u32),
    Descriptor(u64, [u8; 16]),
    Packet(u64, Vec<u8>),
    Available(u64, u16, [u16; 8]),
    Notify(u32),
    Read(u64, usize),
    Configure(u64, Vec<u8>),
    Reset,
    SaveAndRestore,
}

/// `packet` is what this device's driver writes into its buffers.
fn acts(packet: impl Strategy<Value = Vec<u8>>) -> impl Strategy<Value = Vec<Act>> {
    let offsets = prop_oneof![4 => (0..0x40_u32).prop_map(|word| word * 4), 1 => any::<u32>()];
    let act = prop_oneof![
        1 => (offsets, any::<u32>()).prop_map(|(offset, value)| Act::Register(offset, value)),
        4 => (0..48_u64, descriptor()).prop_map(|(at, bytes)| Act::Descriptor(at, bytes)),
        3 => (0..RAM - 64, packet).prop_map(|(at, bytes)| Act::Packet(at, bytes)),
        3 => (0..3_u64, any::<u16>(), any::<[u16; 8]>()).prop_map(|(q, index, ring)| Act::Available(q, index % 32, ring.map(|r| r % 20))),
        4 => (0..4_u32).prop_map(Act::Notify),
        1 => (0..0x200_u64, 0..9_usize).prop_map(|(offset, length)| Act::Read(offset, length)),
        1 => (0x100..0x180_u64, proptest::collection::vec(any::<u8>(), 0..9)).prop_map(|(offset, bytes)| Act::Configure(offset, bytes)),
        1 => Just(Act::Reset),
        1 => Just(Act::SaveAndRestore),
    ];
    proptest::collection::vec(act, 1..40)
}

fn write(window: &mut dyn Window, register: u32, value: u32) {
    window.write(register.into(), &value.to_le_bytes());
}

/// Queue `q` has its descriptors at 0x1000 + q * 0x1000, its available ring 0x400 behind them, its used ring 0x800.
fn activate(window: &mut dyn Window) {
    for status in [1, 3] {
        write(window, reg::VIRTIO_MMIO_STATUS, status);
    }
    for queue in 0..3_u32 {
        let base = 0x1000 + queue * 0x1000;
        write(window, reg::VIRTIO_MMIO_QUEUE_SEL, queue);
        write(window, reg::VIRTIO_MMIO_QUEUE_NUM, 16);
        write(window, reg::VIRTIO_MMIO_QUEUE_DESC_LOW, base);
        write(window, reg::VIRTIO_MMIO_QUEUE_AVAIL_LOW, base + 0x400);
        write(window, reg::VIRTIO_MMIO_QUEUE_USED_LOW, base + 0x800);
        write(window, reg::VIRTIO_MMIO_QUEUE_READY, 1);
    }
    write(window, reg::VIRTIO_MMIO_STATUS, 15);
}

fn ram() -> GuestMemoryMmap {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
}

fn attack(device: impl VirtioDevice, ram: &GuestMemoryMmap, acts: &[Act]) {
    attack_beside(device, ram, acts, |_| ());
}

/// The host's side of the device does something after each act.
fn attack_beside<D: VirtioDevice>(
    device: D,
    ram: &GuestMemoryMmap,
    acts: &[Act],
    mut beside: impl FnMut(&mut Transport<D>),
) {
    let mut transport = Transport::new(device, ram.clone(), EventFd::new(libc_nonblock()).unwrap());
    activate(&mut transport);
    for act in acts {
        match act {
            Act::Register(register, value) => write(&mut transport, *register, *value),
            Act::Descriptor(at, bytes) => {
                let address = 0x1000 + (at / 16) * 0x1000 + (at % 16) * 16;
                ram.write_slice(bytes, GuestAddress(address)).unwrap();
            }
            Act::Packet(at, bytes) => {
                let room = bytes.len().min((RAM - at) as usize);
                ram.write_slice(&bytes[..room], GuestAddress(*at)).unwrap();
            }
            Act::Available(queue, index, ring) => {
                let base = 0x1400 + queue * 0x1000;
                ram.write_obj(*index, GuestAddress(base + 2)).unwrap();
                for (position, head) in ring.iter().enumerate() {
                    ram.write_obj(*head, GuestAddress(base + 4 + position as u64 * 2)).unwrap();
                }
            }
            Act::Notify(queue) => write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, *queue),
            Act::Read(offset, length) => transport.read(*offset, &mut vec![0; *length]),
            Act::Configure(offset, bytes) => transport.write(*offset, bytes),
            Act::Reset => {
                write(&mut transport, reg::VIRTIO_MMIO_STATUS, 0);
                activate(&mut transport);
            }
            Act::SaveAndRestore => {
                let state = transport.save();
                if transport.restore(&state).is_ok() {
                    assert_eq!(transport.save(), state);
                }
            }
        }
        beside(&mut transport);
    }
}

fn libc_nonblock() -> i32 {
    rustix::fs::OFlags::NONBLOCK.bits() as i32
}

/// A vsock device that has asked the guest for port 5252 on behalf of a client.
fn vsock() -> (Vsock, UnixStream) {
    let (client, ours) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    client.set_nonblocking(true).unwrap();
    let mut device = Vsock::default();
    device.connect(ours, 5252).unwrap();
    (device, client)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn vsock_survives(acts in acts(packet())) {
        let (device, client) = vsock();
        attack(device, &ram(), &acts);
        drop(client);
    }

    #[test]
    fn net_survives(acts in acts(packet())) {
        let (ours, host) = UnixDatagram::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        host.set_nonblocking(true).unwrap();
        let device = Net::new(Some(Link { wire: ours.into(), mac: [2; 6] }));
        let (mut turn, mut frame) = (0, vec![0; 2 * FRAME_MAX]);
        attack_beside(device, &ram(), &acts, |transport| {
            turn += 1;
            // One that fits, one that does not; the socket may be full.
            let _ = host.send(&frame[..[60, 9000][turn % 2]]);
            transport.with_device(|device, queues, ram| ((), device.on_wire_ready(queues, ram)));
            while let Ok(length) = host.recv(&mut frame) {
                assert!((1..=FRAME_MAX - HEADER).contains(&length), "the guest sent {length} bytes");
            }
        });
    }

    #[test]
    fn rng_survives(acts in acts(packet())) {
        attack(Rng, &ram(), &acts);
    }

    #[test]
    fn pmem_survives(acts in acts(packet())) {
        attack(Pmem::new(1 << 32..2 << 32), &ram(), &acts);
    }

    /// And nothing behind the disk's end is written, though the file goes on.
    #[test]
    fn block_survives(acts in acts(request())) {
        let file = tempfile::tempfile().unwrap();
        let (bytes, behind) = (32 << 10, [5; 4096]);
        file.write_all_at(&behind, bytes).unwrap();
        let disk = ScratchDisk { file: file.try_clone().unwrap(), bytes };
        attack(Block::new(Some(disk)), &ram(), &acts);
        let mut found = [0; 4096];
        file.read_exact_at(&mut found, bytes).unwrap();
        prop_assert!(found == behind);
        prop_assert_eq!(file.metadata().unwrap().len(), bytes + behind.len() as u64);
    }

    #[test]
    fn block_without_a_file_survives(acts in acts(request())) {
        attack(Block::new(None), &ram(), &acts);
    }

    /// And the memory behind RAM, which is another's, stays.
    #[test]
    fn balloon_survives(acts in acts(page_numbers())) {
        let layout = MemoryLayout::new(RAM >> 20, 0).unwrap();
        let image = create_image("test", 2 * RAM).unwrap();
        rustix::io::pwrite(&image, &[5; 4096], RAM).unwrap();
        let mapping = Mapping::of_file(&image, RAM, Sharing::Shared).unwrap();
        let memory = GuestMemory::new(&layout, vec![mapping]).unwrap();
        attack(Balloon::new(Some(memory.clone())), memory.ram(), &acts);
        let mut found = [0; 4096];
        rustix::io::pread(&image, &mut found, RAM).unwrap();
        prop_assert!(found == [5; 4096]);
    }

    #[test]
    fn console_survives(acts in acts(packet())) {
        let file = tempfile::tempfile().unwrap();
        attack(VirtioConsole::new(Console::new(Some(file.try_clone().unwrap()))), &ram(), &acts);
        prop_assert!(file.metadata().unwrap().len() < CONSOLE_MAX + 100);
    }
}
