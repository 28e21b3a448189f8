//! A tiny guest for tests: a few instructions in ring 3 with I/O privilege, identity-mapped memory, no kernel. It
//! starts in two milliseconds and needs none of kvm_pvm's quirks.
#![allow(dead_code)]

use forkd_vmm::devices::bus::Peripherals;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::devices::virtio::block::ScratchDisk;
use forkd_vmm::kvm::{Hypervisor, KvmKind};
use forkd_vmm::machine::{AfterRing, Machine, MachineShape, StopReason};
use forkd_vmm::memory::{GuestMemory, Mapping, MemoryLayout, Sharing, create_image};
use forkd_vmm::vmstate::MachineState;
use kvm_bindings::{KVM_MP_STATE_RUNNABLE, kvm_mp_state, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use rustix::fd::{AsFd, OwnedFd};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use vm_memory::{Bytes, GuestAddress};

/// Where the code lies.
pub const CODE: u64 = 0x1_0000;
/// The word that [`COUNTER`] increases.
pub const WORD: u64 = 0x20_0000;

/// Rings "snapshot here" and, as its very next instruction but one, "resumed"; adds 5 to the word; prints it; rings
/// "ready"; loops.
pub const COUNTER: &[u8] = &[
    0x48, 0xc7, 0xc3, 0x00, 0x00, 0x20, 0x00, // mov rbx, WORD
    0x66, 0xba, 0x00, 0xfd, // mov dx, 0xfd00
    0xb0, 0x01, 0xee, // mov al, 1; out dx, al
    0xb0, 0x02, 0xee, // mov al, 2; out dx, al
    0x83, 0x03, 0x05, // add dword [rbx], 5
    0x8b, 0x03, // mov eax, [rbx]
    0x66, 0xba, 0xf8, 0x03, 0xee, // mov dx, 0x3f8; out dx, al
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, // mov dx, 0xfd00; mov al, 3; out dx, al
    0xeb, 0xfe, // jmp $
];

/// Rings "snapshot here" and "resumed"; adds the first words of all pages from WORD to 6 MiB; prints the sum; rings
/// "ready"; loops.
pub const SUM: &[u8] = &[
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x01, 0xee, 0xb0, 0x02, 0xee, // ring 1, ring 2
    0x48, 0xc7, 0xc6, 0x00, 0x00, 0x20, 0x00, // mov rsi, 2 MiB
    0x31, 0xc0, // xor eax, eax
    0x03, 0x06, // L: add eax, [rsi]
    0x48, 0x81, 0xc6, 0x00, 0x10, 0x00, 0x00, // add rsi, 4096
    0x48, 0x81, 0xfe, 0x00, 0x00, 0x60, 0x00, // cmp rsi, 6 MiB
    0x72, 0xee, // jb L
    0x66, 0xba, 0xf8, 0x03, 0xef, // mov dx, 0x3f8; out dx, eax
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, // ring 3
    0xeb, 0xfe,
];

/// Reads 8 bytes of the record with `rep insb` into WORD, prints them, rings "ready".
pub const READ_RECORD: &[u8] = &[
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x10, 0xee, // mov dx, 0xfd00; mov al, 0x10; out dx, al
    0x66, 0xba, 0x04, 0xfd, // mov dx, 0xfd04
    0x48, 0xc7, 0xc7, 0x00, 0x00, 0x20, 0x00, // mov rdi, WORD
    0xb9, 0x08, 0x00, 0x00, 0x00, 0xf3, 0x6c, // mov ecx, 8; rep insb
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0x48, 0xc7, 0xc6, 0x00, 0x00, 0x20, 0x00, // mov rsi, WORD
    0xb9, 0x08, 0x00, 0x00, 0x00, 0xf3, 0x6e, // mov ecx, 8; rep outsb
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, // ring 3
    0xeb, 0xfe,
];

/// Rings "snapshot here" and "resumed"; folds all words of all 8 MiB, its own code and page tables too, into one
/// (times [`HASH_FACTOR`], plus the word); prints it; rings "ready"; loops. The factor is odd, so a single word that differs,
/// or two pages that are swapped, give another result.
pub const HASH: &[u8] = &[
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x01, 0xee, 0xb0, 0x02, 0xee, // ring 1, ring 2
    0x31, 0xf6, // xor esi, esi
    0x31, 0xc0, // xor eax, eax
    0x48, 0xb9, 0x15, 0x7c, 0x4a, 0x7f, 0xb9, 0x79, 0x37, 0x9e, // mov rcx, HASH_FACTOR
    0x48, 0x0f, 0xaf, 0xc1, // L: imul rax, rcx
    0x48, 0x03, 0x06, // add rax, [rsi]
    0x48, 0x83, 0xc6, 0x08, // add rsi, 8
    0x48, 0x81, 0xfe, 0x00, 0x00, 0x80, 0x00, // cmp rsi, 8 MiB
    0x72, 0xec, // jb L
    0x66, 0xba, 0xf8, 0x03, 0xef, // mov dx, 0x3f8; out dx, eax
    0x48, 0xc1, 0xe8, 0x20, 0xef, // shr rax, 32; out dx, eax
    0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee, // ring 3
    0xeb, 0xfe,
];
/// See [`HASH`].
pub const HASH_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A machine that hashes all of its memory, saved before it does: its memory, its state and what it will print. Of its
/// sixteen 64 KiB stretches a megabyte three are zero, the others have noise wherever the guest has nothing of its own.
pub fn hashing_machine() -> (OwnedFd, MachineState, u64) {
    let full = image(HASH);
    let ram = layout().ram_bytes();
    for page in 0..ram / 4096 {
        let own = page < 4 || page * 4096 == CODE;
        if !own && (page / 16) % 5 != 3 {
            let noise: Vec<u8> = (0..512).flat_map(|word| noise(page * 512 + word).to_le_bytes()).collect();
            rustix::io::pwrite(&full, &noise, page * 4096).unwrap();
        }
    }
    // Accessed and dirty already: the CPU must not write to what is hashed.
    let entries = [(0x1000, 0x2067), (0x2000, 0x3067)];
    let pages = (0..4_u64).map(|page| (0x3000 + page * 8, page << 21 | 0xe7));
    for (at, entry) in entries.into_iter().chain(pages) {
        rustix::io::pwrite(&full, &u64::to_le_bytes(entry), at).unwrap();
    }
    let (mut original, _console) = machine(&full, Vec::new());
    run_until(&mut original, Ring::SnapshotHere);
    let state = original.save().unwrap();
    let mut bytes = vec![0; ram as usize];
    assert_eq!(rustix::io::pread(&full, &mut bytes, 0).unwrap(), bytes.len());
    let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
    let hash = words.fold(0_u64, |hash, word| hash.wrapping_mul(HASH_FACTOR).wrapping_add(word));
    (full, state, hash)
}

/// Numbers that look random and are the same in every run.
pub fn noise(of: u64) -> u64 {
    let mixed = (of + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    (mixed ^ mixed >> 29).wrapping_mul(0x94d0_49bb_1331_11eb) ^ mixed >> 32
}

/// Offsets of the pages that an image has and that are not what `full` has there.
pub fn wrong_pages(image: impl AsFd, full: &OwnedFd) -> Vec<u64> {
    let (mut wrong, mut at) = (Vec::new(), 0);
    let (mut page, mut right) = ([0; 4096], [0; 4096]);
    while let Ok(data) = rustix::fs::seek(&image, rustix::fs::SeekFrom::Data(at)) {
        let hole = rustix::fs::seek(&image, rustix::fs::SeekFrom::Hole(data)).unwrap();
        for offset in (data..hole).step_by(4096) {
            rustix::io::pread(&image, &mut page, offset).unwrap();
            rustix::io::pread(full, &mut right, offset).unwrap();
            if page != right {
                wrong.push(offset);
            }
        }
        at = hole;
    }
    wrong
}

/// Eight megabytes, no root disk.
pub fn layout() -> MemoryLayout {
    MemoryLayout::new(8, 0).unwrap()
}

/// An image with the guest's page tables and code.
pub fn image(code: &[u8]) -> OwnedFd {
    let layout = layout();
    let file = create_image("test-ram", layout.ram_bytes()).unwrap();
    let mapping = Mapping::of_file(&file, layout.ram_bytes(), Sharing::Shared).unwrap();
    let memory = GuestMemory::new(&layout, vec![mapping]).unwrap();
    let ram = memory.ram();
    // PML4 at 0x1000, one table below it, 2 MiB pages; present, writable, user.
    ram.write_obj(0x2007_u64, GuestAddress(0x1000)).unwrap();
    ram.write_obj(0x3007_u64, GuestAddress(0x2000)).unwrap();
    for page in 0..4_u64 {
        ram.write_obj(page << 21 | 0x87, GuestAddress(0x3000 + page * 8)).unwrap();
    }
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    file
}

/// An open /dev/kvm; its absence fails the test with the reason.
pub fn hypervisor() -> Hypervisor {
    Hypervisor::open(KvmKind::detect()).expect("these tests need /dev/kvm")
}

/// A machine about to run an image's code, its memory shared with the image.
pub fn machine(image: &OwnedFd, record: Vec<u8>) -> (Machine, File) {
    machine_of(MachineShape { layout: layout(), vcpus: 1 }, image, record)
}

/// The same with a shape of the test's own; only the first vCPU is about to run.
pub fn machine_of(shape: MachineShape, image: &OwnedFd, record: Vec<u8>) -> (Machine, File) {
    let mapping = Mapping::of_file(image, shape.layout.ram_bytes(), Sharing::Shared).unwrap();
    let memory = GuestMemory::new(&shape.layout, vec![mapping]).unwrap();
    let (peripherals, console) = peripherals(record);
    let machine = Machine::new(hypervisor(), shape, memory, peripherals).unwrap();
    enter_ring3(machine.vcpu(), CODE, 0);
    (machine, console)
}

/// A console in a temporary file, and a handle to read it.
pub fn peripherals(record: Vec<u8>) -> (Peripherals, File) {
    let console = tempfile::tempfile().unwrap();
    let scratch = tempfile::tempfile().unwrap();
    scratch.set_len(1 << 20).unwrap();
    let scratch = Some(ScratchDisk { file: scratch, bytes: 1 << 20 });
    let console_file = Some(console.try_clone().unwrap());
    let peripherals =
        Peripherals { console: console_file, record, scratch, link: None, second_console: true };
    (peripherals, console)
}

/// Runs until the guest rings `wanted`; returns everything it rang.
pub fn run_until(machine: &mut Machine, wanted: Ring) -> Vec<Ring> {
    let mut rung = Vec::new();
    let stop = machine.run(|ring| {
        rung.push(ring);
        if ring == wanted { AfterRing::Stop } else { AfterRing::Continue }
    });
    assert_eq!(stop.expect("the guest runs"), StopReason::Asked);
    rung
}

/// What the guest printed.
pub fn printed(mut console: File) -> Vec<u8> {
    let mut bytes = Vec::new();
    console.seek(SeekFrom::Start(0)).unwrap();
    console.read_to_end(&mut bytes).unwrap();
    bytes
}

/// Has a vCPU run the code at `entry` with `argument` in RDI.
pub fn enter_ring3(vcpu: &VcpuFd, entry: u64, argument: u64) {
    vcpu.set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE }).unwrap();
    let mut sregs = vcpu.get_sregs().unwrap();
    sregs.cr3 = 0x1000;
    sregs.cr4 = 0x620;
    sregs.cr0 = 0x8005_0033;
    sregs.efer = 0xd01;
    let code = kvm_segment {
        limit: 0xffff_ffff,
        selector: 0x33,
        type_: 11,
        present: 1,
        dpl: 3,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 0x2b, type_: 3, l: 0, db: 1, ..code };
    sregs.cs = code;
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    vcpu.set_sregs(&sregs).unwrap();
    // Interrupts off, I/O privilege level 3.
    let regs = kvm_regs { rip: entry, rdi: argument, rsp: 0x2_0000, rflags: 0x3002, ..Default::default() };
    vcpu.set_regs(&regs).unwrap();
}
