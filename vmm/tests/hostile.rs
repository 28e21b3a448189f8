//! Drivers that mean harm: random registers, rings, descriptors and packets against every virtio device. Nothing may
//! panic, hang or reach outside of guest memory (which vm-memory would turn into a panic of this test).

use forkd_vmm::devices::virtio::VirtioDevice;
use forkd_vmm::devices::virtio::mmio::{Transport, Window};
use forkd_vmm::devices::virtio::pmem::Pmem;
use forkd_vmm::devices::virtio::rng::Rng;
use forkd_vmm::devices::virtio::vsock::Vsock;
use proptest::prelude::*;
use std::os::unix::net::UnixStream;
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

#[derive(Debug, Clone)]
enum Act {
    Register(u32, u32),
    Descriptor(u64, [u8; 16]),
    Packet(u64, Vec<u8>),
    Available(u64, u16, [u16; 8]),
    Notify(u32),
    Read(u64, usize),
    SaveAndRestore,
}

fn act() -> impl Strategy<Value = Act> {
    let offsets = prop_oneof![4 => (0..0x40_u32).prop_map(|word| word * 4), 1 => any::<u32>()];
    prop_oneof![
        1 => (offsets, any::<u32>()).prop_map(|(offset, value)| Act::Register(offset, value)),
        4 => (0..48_u64, descriptor()).prop_map(|(at, bytes)| Act::Descriptor(at, bytes)),
        3 => (0..RAM - 64, packet()).prop_map(|(at, bytes)| Act::Packet(at, bytes)),
        3 => (0..3_u64, any::<u16>(), any::<[u16; 8]>()).prop_map(|(q, index, ring)| Act::Available(q, index % 32, ring.map(|r| r % 20))),
        4 => (0..4_u32).prop_map(Act::Notify),
        1 => (0..0x200_u64, 0..9_usize).prop_map(|(offset, length)| Act::Read(offset, length)),
        1 => Just(Act::SaveAndRestore),
    ]
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

fn attack(device: impl VirtioDevice, acts: &[Act]) {
    let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
    let mut transport = Transport::new(device, ram.clone(), EventFd::new(libc_nonblock()).unwrap());
    activate(&mut transport);
    for act in acts {
        match act {
            Act::Register(register, value) => write(&mut transport, *register, *value),
            Act::Descriptor(at, bytes) => {
                let address = 0x1000 + (at / 16) * 0x1000 + (at % 16) * 16;
                ram.write_slice(bytes, GuestAddress(address)).unwrap();
            }
            Act::Packet(at, bytes) => ram.write_slice(bytes, GuestAddress(*at)).unwrap(),
            Act::Available(queue, index, ring) => {
                let base = 0x1400 + queue * 0x1000;
                ram.write_obj(*index, GuestAddress(base + 2)).unwrap();
                for (position, head) in ring.iter().enumerate() {
                    ram.write_obj(*head, GuestAddress(base + 4 + position as u64 * 2)).unwrap();
                }
            }
            Act::Notify(queue) => write(&mut transport, reg::VIRTIO_MMIO_QUEUE_NOTIFY, *queue),
            Act::Read(offset, length) => transport.read(*offset, &mut vec![0; *length]),
            Act::SaveAndRestore => {
                let state = transport.save();
                if transport.restore(&state).is_ok() {
                    assert_eq!(transport.save(), state);
                }
            }
        }
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
    fn vsock_survives(acts in proptest::collection::vec(act(), 1..40)) {
        let (device, client) = vsock();
        attack(device, &acts);
        drop(client);
    }

    #[test]
    fn rng_survives(acts in proptest::collection::vec(act(), 1..40)) {
        attack(Rng, &acts);
    }

    #[test]
    fn pmem_survives(acts in proptest::collection::vec(act(), 1..40)) {
        attack(Pmem::new(1 << 32..2 << 32), &acts);
    }
}
