//! Machines with several vCPUs: all run, all stop for a snapshot, and all go on in a fork. And machines of every size.

mod common;

use common::{
    CODE, WORD, enter_ring3, hypervisor, image, layout, machine_of, peripherals, printed, run_until,
};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::{Machine, MachineError, MachineShape};
use forkd_vmm::memory::{GuestMemory, MEMORY_MIB_MAX, Mapping, MemoryLayout, Sharing, create_image};
use forkd_vmm::vmstate::MachineState;
use vm_memory::{Bytes, GuestAddress};

/// Where the other vCPUs' code lies.
const COUNTING: u64 = CODE + 0x1000;
/// Bytes between two vCPUs' counters: a cache line.
const STRIDE: u32 = 64;

/// Waits until each of the other vCPUs' counters has passed a thousand.
fn wait_for_counters(vcpus: u8) -> Vec<u8> {
    let wait = |number: u32| {
        // L: cmp qword [rbx + offset], 1000; jb L
        let mut code = vec![0x48, 0x81, 0xbb];
        code.extend((number * STRIDE).to_le_bytes());
        code.extend(1000_u32.to_le_bytes());
        code.extend([0x72, 0xf3]);
        code
    };
    (1..u32::from(vcpus)).flat_map(wait).collect()
}

/// Waits for the counters, rings "snapshot here" and "resumed", sets them to zero, waits again, prints "k", rings "ready".
fn conductor(vcpus: u8) -> Vec<u8> {
    // mov rbx, WORD
    let mut code = vec![0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x00];
    code.extend(wait_for_counters(vcpus));
    // mov dx, 0xfd00; mov al, 1; out dx, al; mov al, 2; out dx, al
    code.extend([0x66, 0xba, 0x00, 0xfd, 0xb0, 0x01, 0xee, 0xb0, 0x02, 0xee]);
    for number in 1..u32::from(vcpus) {
        // mov qword [rbx + offset], 0
        code.extend([0x48, 0xc7, 0x83]);
        code.extend((number * STRIDE).to_le_bytes());
        code.extend([0; 4]);
    }
    code.extend(wait_for_counters(vcpus));
    // mov dx, 0x3f8; mov al, 'k'; out dx, al; mov dx, 0xfd00; mov al, 3; out dx, al; jmp $
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xb0, b'k', 0xee]);
    code.extend([0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, 0xeb, 0xfe]);
    code
}

#[test]
fn all_vcpus_stop_for_a_snapshot_and_go_on_in_forks() {
    for vcpus in [2, 4, 8] {
        let image = image(&conductor(vcpus));
        // L: inc qword [rdi]; jmp L
        rustix::io::pwrite(&image, &[0x48, 0xff, 0x07, 0xeb, 0xfb], COUNTING).unwrap();
        let (mut original, _console) =
            machine_of(MachineShape { layout: layout(), vcpus }, &image, Vec::new());
        for (number, vcpu) in original.vcpus().iter().enumerate().skip(1) {
            enter_ring3(vcpu, COUNTING, WORD + number as u64 * u64::from(STRIDE));
        }
        run_until(&mut original, Ring::SnapshotHere);
        let counters = |machine: &Machine| -> Vec<u64> {
            let ram = machine.memory().ram();
            let at = |number: u64| GuestAddress(WORD + number * u64::from(STRIDE));
            (1..u64::from(vcpus)).map(|number| ram.read_obj(at(number)).unwrap()).collect()
        };
        let stopped = counters(&original);
        std::thread::sleep(std::time::Duration::from_millis(5));
        assert_eq!(counters(&original), stopped, "a vCPU of {vcpus} ran on after the machine had stopped");
        let state = original.save().unwrap().encode().unwrap();
        drop(original);
        for _ in 0..2 {
            let state = MachineState::decode(&state).unwrap();
            let mapping = Mapping::of_file(&image, layout().ram_bytes(), Sharing::Private).unwrap();
            let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
            let (peripherals, console) = peripherals(Vec::new());
            let mut child = Machine::restore(hypervisor(), &state, memory, peripherals).unwrap();
            assert_eq!(run_until(&mut child, Ring::Ready), [Ring::Resumed, Ring::Ready]);
            assert_eq!(printed(console), b"k");
        }
    }
}

#[test]
fn impossible_numbers_of_vcpus_are_refused() {
    for vcpus in [0, 9, 255] {
        let mapping = Mapping::of_file(image(&[]), layout().ram_bytes(), Sharing::Shared).unwrap();
        let memory = GuestMemory::new(&layout(), vec![mapping]).unwrap();
        let refused = Machine::new(
            hypervisor(),
            MachineShape { layout: layout(), vcpus },
            memory,
            peripherals(Vec::new()).0,
        );
        assert!(matches!(refused, Err(MachineError::Vcpus { .. })), "{vcpus}");
    }
}

/// Copies the word at each of three addresses to the one behind it, prints the byte it reads in the hole, rings "ready".
fn touch(addresses: &[u64], hole: u64) -> Vec<u8> {
    let load = |address: u64| {
        // mov rbx, address
        let mut code = vec![0x48, 0xbb];
        code.extend(address.to_le_bytes());
        code
    };
    let mut code = Vec::new();
    for address in addresses {
        code.extend(load(*address));
        // mov rax, [rbx]; mov [rbx + 8], rax
        code.extend([0x48, 0x8b, 0x03, 0x48, 0x89, 0x43, 0x08]);
    }
    code.extend(load(hole));
    // mov al, [rbx]; mov dx, 0x3f8; out dx, al; ring 3; jmp $
    code.extend([0x8a, 0x03, 0x66, 0xba, 0xf8, 0x03, 0xee]);
    code.extend([0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, 0xeb, 0xfe]);
    code
}

#[test]
fn machines_of_every_size_have_their_memory_where_it_belongs() {
    const HOLE: u64 = 0xd800_0000;
    for memory_mib in [128, 1024, 3072, 4096, 6144, MEMORY_MIB_MAX] {
        let layout = MemoryLayout::new(memory_mib, 0).unwrap();
        let file = create_image("test-ram", layout.ram_bytes()).unwrap();
        let mapping = Mapping::of_file(&file, layout.ram_bytes(), Sharing::Shared).unwrap();
        let memory = GuestMemory::new(&layout, vec![mapping]).unwrap();
        let ram = memory.ram();
        let ends: Vec<_> =
            layout.ram_ranges().iter().flat_map(|range| [range.start, range.end - 16]).collect();
        let addresses: Vec<_> = ends.into_iter().map(|address| address.max(WORD)).collect();
        // PML4 at 0x1000, the next table at 0x2000, then one a gigabyte; present, writable, user.
        ram.write_obj(0x2007_u64, GuestAddress(0x1000)).unwrap();
        for (number, address) in addresses.iter().chain(&[CODE, HOLE]).enumerate() {
            let slot = GuestAddress(0x2000 + (address >> 30) * 8);
            let directory = match ram.read_obj::<u64>(slot).unwrap() & !0xfff {
                0 => 0x3000 + number as u64 * 0x1000,
                there => there,
            };
            ram.write_obj(directory | 7, slot).unwrap();
            let entry = GuestAddress(directory + (address >> 21 & 511) * 8);
            ram.write_obj(address >> 21 << 21 | 0x87, entry).unwrap();
        }
        ram.write_slice(&touch(&addresses, HOLE), GuestAddress(CODE)).unwrap();
        for address in &addresses {
            ram.write_obj(*address ^ 0x5a5a, GuestAddress(*address)).unwrap();
        }
        let (mut machine, console) = machine_of(MachineShape { layout, vcpus: 1 }, &file, Vec::new());
        run_until(&mut machine, Ring::Ready);
        for address in &addresses {
            let copied: u64 = ram.read_obj(GuestAddress(address + 8)).unwrap();
            assert_eq!(copied, address ^ 0x5a5a, "{memory_mib} MiB at {address:#x}");
        }
        assert_eq!(printed(console), [0xff], "{memory_mib} MiB: something is where devices belong");
    }
}
