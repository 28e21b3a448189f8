//! XSAVE and XRSTOR in supervisor mode on the real /dev/kvm: what is saved and loaded, and the exceptions that the
//! guest gets. On kvm_pvm the monitor carries them out, elsewhere the processor does: the guest must not see a
//! difference.

mod common;

use common::{CODE, enter_ring3, image, machine, run_until};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::machine::Machine;
use kvm_bindings::{kvm_dtable, kvm_segment, kvm_xcrs};
use rustix::fd::OwnedFd;
use std::time::Instant;
use vm_memory::{Bytes, GuestAddress};

/// mov dx, 0xfd00; mov al, 3; out dx, al: rings "ready".
const RING_READY: [u8; 7] = [0x66, 0xba, 0x00, 0xfd, 0xb0, 0x03, 0xee];
/// xsave64 [rdi].
const XSAVE: [u8; 4] = [0x48, 0x0f, 0xae, 0x27];
/// xrstor64 [rdi].
const XRSTOR: [u8; 4] = [0x48, 0x0f, 0xae, 0x2f];
/// Where exceptions go: rings "booted" (mov dx, 0xfd00; mov al, 4; out dx, al).
const HANDLER: u64 = CODE + 0x1000;
const RING_BOOTED: [u8; 7] = [0x66, 0xba, 0x00, 0xfd, 0xb0, 0x04, 0xee];
const GATES: u64 = 0x5000;
const SEGMENTS: u64 = 0x6000;
const AREA: u64 = 0x30_0000;
/// Page directory entry of the last two megabytes, which are not there.
const ABSENT: u64 = 0x60_0000;
const X87_AND_SSE: u64 = 3;
const CR4_OSXSAVE: u64 = 1 << 18;

/// A kernel that is about to run `code` with RDI = `area` and EDX:EAX = x87 and SSE. None where the processor has no
/// XSAVE.
fn kernel(code: &[u8], area: u64) -> Option<(Machine, OwnedFd)> {
    let image = image(code);
    let (machine, _console) = machine(&image, Vec::new());
    let ram = machine.memory().ram();
    ram.write_slice(&RING_BOOTED, GuestAddress(HANDLER)).unwrap();
    ram.write_obj(0_u64, GuestAddress(0x3000 + (ABSENT >> 21) * 8)).unwrap();
    // One 64-bit code segment; every gate leads to the handler.
    ram.write_obj(0x00af_9b00_0000_ffff_u64, GuestAddress(SEGMENTS + 0x10)).unwrap();
    for vector in 0..32 {
        let gate = u128::from(HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | u128::from(HANDLER >> 16) << 48;
        ram.write_obj(gate, GuestAddress(GATES + vector * 16)).unwrap();
    }
    let vcpu = machine.vcpu();
    enter_ring3(vcpu, CODE, area);
    let mut sregs = vcpu.get_sregs().unwrap();
    let supervisor = |segment: kvm_segment, selector| kvm_segment { dpl: 0, selector, ..segment };
    sregs.cs = supervisor(sregs.cs, 0x10);
    let data = supervisor(sregs.ss, 0);
    (sregs.ss, sregs.ds, sregs.es, sregs.fs, sregs.gs) = (data, data, data, data, data);
    sregs.cr4 |= CR4_OSXSAVE;
    sregs.idt = kvm_dtable { base: GATES, limit: 0x1ff, ..Default::default() };
    sregs.gdt = kvm_dtable { base: SEGMENTS, limit: 0x17, ..Default::default() };
    if vcpu.set_sregs(&sregs).is_err() {
        println!("this KVM offers no XSAVE");
        return None;
    }
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0].value = X87_AND_SSE;
    vcpu.set_xcrs(&xcrs).unwrap();
    let mut regs = vcpu.get_regs().unwrap();
    (regs.rax, regs.rdx, regs.rflags) = (X87_AND_SSE, 0, 2);
    vcpu.set_regs(&regs).unwrap();
    Some((machine, image))
}

/// Gives the vCPU registers with these bytes in XMM0 to XMM15.
fn set_xmm(machine: &Machine, value: impl Fn(usize) -> u8) {
    let mut state = machine.vcpu().get_xsave().unwrap();
    let bytes: Vec<u8> = (0..256).map(value).collect();
    let words = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word));
    state.region[40..104].copy_from_slice(&words.collect::<Vec<_>>());
    // Both are there, and MXCSR has its initial value.
    (state.region[128], state.region[6]) = (X87_AND_SSE as u32, 0x1f80);
    // SAFETY: without AMX, which nobody asks for, KVM reads the 4096 bytes that `state` has.
    unsafe { machine.vcpu().set_xsave(&state) }.unwrap();
}

fn xmm(machine: &Machine) -> Vec<u8> {
    let state = machine.vcpu().get_xsave().unwrap();
    state.region[40..104].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn area(machine: &Machine) -> Vec<u8> {
    let mut area = vec![0; 576];
    machine.memory().ram().read_slice(&mut area, GuestAddress(AREA)).unwrap();
    area
}

#[test]
fn registers_go_to_memory_and_come_back() {
    let code = [&XSAVE[..], &RING_READY, &XRSTOR, &RING_READY].concat();
    let Some((mut machine, _image)) = kernel(&code, AREA) else { return };
    machine.memory().ram().write_slice(&[0xee; 576], GuestAddress(AREA)).unwrap();
    machine.memory().ram().write_slice(&[0; 64], GuestAddress(AREA + 512)).unwrap();
    set_xmm(&machine, |at| at as u8 ^ 0x5a);
    run_until(&mut machine, Ring::Ready);
    let saved = area(&machine);
    assert!(saved[160..416].iter().enumerate().all(|(at, byte)| *byte == at as u8 ^ 0x5a), "{saved:02x?}");
    assert!(saved[416..512].iter().all(|byte| *byte == 0xee), "the part for software was written");
    assert_eq!(saved[512] & 2, 2, "SSE state is said to be there");
    // The guest's second instruction loads what is in memory now.
    let changed: Vec<u8> = saved[160..416].iter().map(|byte| !byte).collect();
    machine.memory().ram().write_slice(&changed, GuestAddress(AREA + 160)).unwrap();
    set_rax(&machine, X87_AND_SSE);
    run_until(&mut machine, Ring::Ready);
    assert_eq!(xmm(&machine), changed);
}

fn set_rax(machine: &Machine, value: u64) {
    let mut regs = machine.vcpu().get_regs().unwrap();
    (regs.rax, regs.rdx) = (value, 0);
    machine.vcpu().set_regs(&regs).unwrap();
}

/// Where the exception pushed its error code and instruction pointer.
fn pushed(machine: &Machine) -> [u64; 2] {
    let rsp = machine.vcpu().get_regs().unwrap().rsp;
    [0, 8].map(|at| machine.memory().ram().read_obj(GuestAddress(rsp + at)).unwrap())
}

#[test]
fn exceptions_reach_the_guest_with_address_error_code_and_instruction() {
    // Instruction, operand, CR2 and error code. The pages there are: 2 MiB each, from 0 to ABSENT.
    let cases = [
        (XSAVE, ABSENT, Some(ABSENT), 2),
        (XSAVE, ABSENT - 512, Some(ABSENT), 2),
        (XRSTOR, ABSENT, Some(ABSENT), 0),
        (XSAVE, AREA + 8, None, 0),
        (XRSTOR, AREA, None, 0),
    ];
    for (instruction, operand, address, code) in cases {
        let Some((mut machine, _image)) = kernel(&[&instruction[..], &RING_READY].concat(), operand) else {
            return;
        };
        // XRSTOR of a header that no processor takes.
        machine.memory().ram().write_obj(u64::MAX, GuestAddress(AREA + 512)).unwrap();
        assert_eq!(run_until(&mut machine, Ring::Booted), [Ring::Booted], "{instruction:02x?} {operand:#x}");
        assert_eq!(pushed(&machine), [code, CODE], "{instruction:02x?} {operand:#x}");
        if let Some(address) = address {
            assert_eq!(machine.vcpu().get_sregs().unwrap().cr2, address, "{instruction:02x?}");
        }
    }
}

/// What one costs; `cargo test --release -p forkd-vmm --test xsave -- --ignored --nocapture`.
#[test]
#[ignore = "prints times"]
fn cost() {
    const TIMES: u32 = 2000;
    for (name, instruction) in [("nothing", None), ("xsave", Some(XSAVE)), ("xrstor", Some(XRSTOR))] {
        // mov ecx, TIMES; L: INSTRUCTION; dec ecx; jnz L
        let body = instruction.map_or(Vec::new(), Vec::from);
        let back = (body.len() as u8 + 4).wrapping_neg();
        let code =
            [&[0xb9][..], &TIMES.to_le_bytes(), &body, &[0xff, 0xc9, 0x75, back], &RING_READY].concat();
        let Some((mut machine, _image)) = kernel(&code, AREA) else { return };
        let began = Instant::now();
        run_until(&mut machine, Ring::Ready);
        println!("{name}: {:.2} us", began.elapsed().as_secs_f64() * 1e6 / f64::from(TIMES));
    }
}
