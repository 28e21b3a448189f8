//! What a Linux guest needs on `kvm_pvm` and nowhere else. Switched on by detection; machines on hardware
//! virtualisation use none of it.
//!
//! kvm_pvm runs user code natively and emulates supervisor code instruction by instruction. Two things are
//! missing there, each found by measurement:
//! - the emulator does not know some instructions: the command line keeps the kernel from using them, and those
//!   that remain (`fwait`, `int3`, `xsave`, `xrstor`) are carried out here;
//! - SYSCALL from user mode arrives at LSTAR still in user mode, so that fetching its first instruction faults: a stub
//!   before the guest's page fault handler recognises that fault and goes on at LSTAR.

use crate::kvm::{KvmError, XsaveBuffer, internal_suberror, ioctl};
use crate::memory::PAGE_BYTES;
use crate::sys;
use exception::Exception;
use instruction::{LONGEST, XsaveInstruction, XsaveOperation};
use kvm_bindings::{
    KVM_CAP_X86_USER_SPACE_MSR, KVM_MSR_EXIT_REASON_FILTER, Msrs, kvm_enable_cap, kvm_msr_entry, kvm_regs,
    kvm_sregs,
};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VcpuFd, VmFd};
use page_table::{AddressSpace, MemoryAccess, TranslationError};
use std::sync::LazyLock;
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use xsave::{UnknownState, XsaveOutcome, XsaveRegisters};
use xsave_area::XsaveLayout;

pub mod exception;
pub mod instruction;
pub mod page_table;
pub mod xsave;
pub mod xsave_area;

/// Extra kernel command line. Of the XSAVE family the kernel may use what is carried out here. User programs see the
/// host's CPUID whatever is cleared, so that all the state they can use (AVX, AVX-512) has to be saved. The rest (tiles
/// of AMX, protection keys, MPX) they can only use when the kernel has enabled it.
pub const COMMAND_LINE: &str = "nopti mitigations=off clocksource=kvm-clock no_timer_check lpj=2300000 \
     clearcpuid=popcnt,smap,smep,umip,fsgsbase,pcid,invpcid,erms,fsrm,cx16,rdpid,rdrand,rdseed,\
     xsaveopt,xsavec,xsaves,xgetbv1,pku,amx_tile,mpx";

/// KVM_FEATURE_PV_UNHALT, KVM_FEATURE_PV_SEND_IPI and KVM_FEATURE_PV_SCHED_YIELD: a guest that is shown them makes
/// hypercalls. KVM's emulator answers one by writing the processor's own instruction for it over the one that is there.
/// That faults as soon as the guest's kernel has made its code read-only.
pub const HYPERCALLS: u32 = 1 << 7 | 1 << 11 | 1 << 13;

const MSR_LSTAR: u32 = 0xc000_0082;
/// `KVM_INTERNAL_ERROR_EMULATION`.
const EMULATION_FAILED: u32 = 1;
const PAGE_FAULT_VECTOR: u64 = 14;
const INT3: u8 = 0xcc;
const FWAIT: u8 = 0x9b;
/// Padding that the stub needs, bytes; some is left free on both sides.
const PADDING: usize = 40;
/// How far behind the handler padding is looked for, bytes.
const SEARCH: usize = 16 << 20;

/// The guest did what cannot be mended.
#[derive(Debug, thiserror::Error)]
pub enum PvmError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory could not be read or written.
    #[error("guest memory could not be reached while mending an instruction")]
    Memory(#[from] GuestMemoryError),
    /// An instruction that nobody knows.
    #[error(
        "kvm_pvm cannot emulate the instruction at {address:#x} (bytes {bytes:02x?}); \
         a guest kernel for it must not use this instruction in supervisor mode"
    )]
    Instruction {
        /// Where.
        address: u64,
        /// What is there.
        bytes: Vec<u8>,
    },
    /// State of the processor that cannot be saved.
    #[error(transparent)]
    State(#[from] UnknownState),
    /// Something else than emulation failed.
    #[error("KVM reports an internal error (sub-error {suberror}) at {address:#x}")]
    Internal {
        /// Linux' KVM_INTERNAL_ERROR_* number.
        suberror: u32,
        /// Where.
        address: u64,
    },
    /// The guest's code cannot be read.
    #[error("kvm_pvm cannot emulate the instruction at {address:#x}, whose bytes cannot be read")]
    Unreadable {
        /// Where.
        address: u64,
    },
    /// The kernel has no room for the stub.
    #[error(
        "the guest kernel has no {PADDING} bytes of padding behind its page fault handler at {handler:#x}"
    )]
    NoPadding {
        /// Address of the handler.
        handler: u64,
    },
}

/// How long a restored guest has before its timer's first interrupt: one period of its tick, which it does not miss.
const TIMER_PAUSE_MS: u64 = 10;

/// The same in ticks of a time stamp counter of `khz`. KVM does not put the counter back here, so that every timer of a
/// snapshot is overdue, and its handler, 1 ms of emulated code, would run before the first instruction.
pub fn timer_pause(khz: u32) -> u64 {
    TIMER_PAUSE_MS * u64::from(khz)
}

/// How long the calling thread, a vCPU's, runs before another has its turn.
const TURN: Duration = Duration::from_millis(50);

/// A guest that was away for longer than its timer's period has a tick to serve when its turn comes, 2.4 ms of emulated
/// code: most of what the host gives to each of many busy threads by itself.
pub fn lengthen_turns() {
    if let Err(error) = sys::set_time_slice(TURN) {
        tracing::debug!(%error, "guests' turns stay as short as they are");
    }
}

/// Asks for an exit when the guest sets LSTAR, the moment at which the stub can be installed.
pub fn watch_syscall_entry(vm: &VmFd) -> Result<(), KvmError> {
    let mut cap = kvm_enable_cap { cap: KVM_CAP_X86_USER_SPACE_MSR, ..Default::default() };
    cap.args[0] = KVM_MSR_EXIT_REASON_FILTER.into();
    vm.enable_cap(&cap).map_err(ioctl("KVM_CAP_X86_USER_SPACE_MSR"))?;
    let range =
        MsrFilterRange { flags: MsrFilterRangeFlags::WRITE, base: MSR_LSTAR, msr_count: 1, bitmap: &[0] };
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &[range]).map_err(ioctl("KVM_X86_SET_MSR_FILTER"))
}

/// Carries out a filtered MSR write; for LSTAR also installs the SYSCALL stub.
pub fn write_msr(vcpu: &VcpuFd, ram: &GuestMemoryMmap, index: u32, value: u64) -> Result<(), PvmError> {
    let entry = kvm_msr_entry { index, data: value, ..Default::default() };
    if let Ok(msrs) = Msrs::from_entries(&[entry]) {
        vcpu.set_msrs(&msrs).map_err(ioctl("KVM_SET_MSRS"))?;
    }
    if index == MSR_LSTAR { install_syscall_stub(vcpu, ram, value) } else { Ok(()) }
}

/// Mends the instructions of one vCPU that the emulator does not know.
#[derive(Debug, Default)]
pub struct InstructionMender {
    /// Made for the first XSAVE or XRSTOR.
    state: Option<XsaveBuffer>,
}

impl InstructionMender {
    /// Mends the instruction that KVM_EXIT_INTERNAL_ERROR stopped at, or says why not.
    pub fn mend(&mut self, vm: &VmFd, vcpu: &mut VcpuFd, ram: &GuestMemoryMmap) -> Result<(), PvmError> {
        let suberror = internal_suberror(vcpu);
        let mut regs = vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
        let address = regs.rip;
        if suberror != EMULATION_FAILED {
            return Err(PvmError::Internal { suberror, address });
        }
        let sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
        let bytes = match fetch(&AddressSpace::new(ram, &regs, &sregs), ram, address) {
            // It is executed again.
            Err(TranslationError::Changed) => {
                return Ok(vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?);
            }
            Ok(bytes) if !bytes.is_empty() => bytes,
            _ => return Err(PvmError::Unreadable { address }),
        };
        let (length, exception) = match bytes[0] {
            FWAIT => (1, None),
            INT3 => (1, Some(Exception::Breakpoint)),
            _ => {
                let decoded = XsaveInstruction::decode(&bytes, &regs).filter(|_| sregs.cs.l != 0);
                let instruction = decoded.ok_or(PvmError::Instruction { address, bytes })?;
                self.carry_out(&instruction, vm, vcpu, ram, (&regs, &sregs))?
            }
        };
        regs.rip = regs.rip.wrapping_add(length);
        // Also forgets the invalid opcode that KVM would raise for what it could not emulate.
        vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
        Ok(exception.map_or(Ok(()), |exception| exception.raise(vcpu))?)
    }

    /// Carries an XSAVE or XRSTOR out on the vCPU. Returns how far its instruction pointer goes on, and what it raises.
    fn carry_out(
        &mut self,
        instruction: &XsaveInstruction,
        vm: &VmFd,
        vcpu: &VcpuFd,
        ram: &GuestMemoryMmap,
        (general, special): (&kvm_regs, &kvm_sregs),
    ) -> Result<(u64, Option<Exception>), PvmError> {
        static LAYOUT: LazyLock<XsaveLayout> = LazyLock::new(XsaveLayout::of_host);
        let enabled = vcpu.get_xcrs().map_err(ioctl("KVM_GET_XCRS"))?;
        let xcr0 = enabled.xcrs.iter().take(enabled.nr_xcrs as usize).find(|register| register.xcr == 0);
        let registers = XsaveRegisters { general, special, xcr0: xcr0.map_or(0, |register| register.value) };
        let state = match &mut self.state {
            Some(state) => state,
            none => none.insert(XsaveBuffer::new(vm)?),
        };
        state.save(vcpu)?;
        match xsave::execute(instruction, registers, ram, &LAYOUT, state.image())? {
            XsaveOutcome::Done => {
                if instruction.operation == XsaveOperation::Restore {
                    state.restore(vcpu)?;
                }
                Ok((instruction.length as u64, None))
            }
            XsaveOutcome::Raises(exception) => Ok((0, Some(exception))),
            XsaveOutcome::Again => Ok((0, None)),
        }
    }
}

/// The bytes at `address`, up to the longest instruction; fewer when it ends before a page that cannot be read.
fn fetch(space: &AddressSpace<'_>, ram: &GuestMemoryMmap, address: u64) -> Result<Vec<u8>, TranslationError> {
    let end = address.saturating_add(LONGEST as u64);
    let next_page = (address | (PAGE_BYTES - 1)).saturating_add(1).min(end);
    let mut bytes = Vec::with_capacity(LONGEST);
    for range in [address..next_page, next_page..end] {
        let pieces = match space.pieces(range, MemoryAccess::Read) {
            Err(error) if bytes.is_empty() => return Err(error),
            // What is needed may end before this page.
            pieces => pieces.unwrap_or_default(),
        };
        for piece in pieces {
            let mut part = vec![0; piece.bytes];
            if ram.read_slice(&mut part, piece.start).is_err() {
                return Ok(bytes);
            }
            bytes.extend(part);
        }
    }
    Ok(bytes)
}

/// A 64-bit interrupt gate (Intel SDM volume 3, "64-Bit IDT Gate Descriptors").
#[derive(Clone, Copy)]
struct Gate(u128);

impl Gate {
    fn handler(self) -> u64 {
        let (low, middle) = (self.0 as u64 & 0xffff, (self.0 >> 48) as u64 & 0xffff);
        low | middle << 16 | ((self.0 >> 64) as u64 & 0xffff_ffff) << 32
    }

    fn with_handler(self, handler: u64) -> Gate {
        let mask = 0xffff_u128 | 0xffff_u128 << 48 | 0xffff_ffff_u128 << 64;
        let handler = u128::from(handler);
        let spread =
            (handler & 0xffff) | (handler >> 16 & 0xffff) << 48 | (handler >> 32 & 0xffff_ffff) << 64;
        Gate(self.0 & !mask | spread)
    }
}

fn install_syscall_stub(vcpu: &VcpuFd, ram: &GuestMemoryMmap, lstar: u64) -> Result<(), PvmError> {
    let regs = vcpu.get_regs().map_err(ioctl("KVM_GET_REGS"))?;
    let sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    let space = AddressSpace::new(ram, &regs, &sregs);
    let translate = |address| {
        let unmapped = PvmError::Internal { suberror: EMULATION_FAILED, address };
        space.translate(address, MemoryAccess::Read).map_err(|_| unmapped)
    };
    let gate_at = translate(sregs.idt.base.wrapping_add(PAGE_FAULT_VECTOR * 16))?;
    let gate = Gate(ram.read_obj(gate_at)?);
    let handler = gate.handler();
    let handler_at = translate(handler)?;
    let start = stub_start(lstar);
    let mut there = vec![0; start.len()];
    ram.read_slice(&mut there, handler_at)?;
    if there == start {
        // Every vCPU sets LSTAR, and all share one table of gates.
        return Ok(());
    }
    let offset = find_padding(ram, handler_at)?.ok_or(PvmError::NoPadding { handler })?;
    let stub_address = handler.wrapping_add(offset as u64);
    let stub = syscall_stub(stub_address, lstar, handler);
    ram.write_slice(&stub, GuestAddress(handler_at.0 + offset as u64))?;
    ram.write_obj(gate.with_handler(stub_address).0, gate_at)?;
    tracing::debug!(lstar, handler, stub_address, "SYSCALL stub installed");
    Ok(())
}

/// Offset behind `start` of padding that the stub fits into, a few bytes inside of it.
fn find_padding(ram: &GuestMemoryMmap, start: GuestAddress) -> Result<Option<usize>, GuestMemoryError> {
    let mut text = vec![0; SEARCH];
    let read = ram.read(&mut text, start)?;
    let found = text[..read].windows(PADDING).position(|window| window.iter().all(|byte| *byte == INT3));
    Ok(found.map(|position| position + 8))
}

/// ```text
/// cmp qword [rsp+8], lstar     ; the faulting instruction pointer (after the error code)
/// jne original
/// mov rsp, [rsp+32]            ; the user's stack pointer, as SYSCALL would have left it
/// jmp lstar
/// original: jmp handler
/// ```
fn syscall_stub(at: u64, lstar: u64, handler: u64) -> Vec<u8> {
    let mut code = stub_start(lstar);
    code.extend([0x75, 0x0a]);
    code.extend([0x48, 0x8b, 0x64, 0x24, 0x20]);
    for target in [lstar, handler] {
        code.push(0xe9);
        let next = at.wrapping_add(code.len() as u64 + 4);
        code.extend((target.wrapping_sub(next) as u32).to_le_bytes());
    }
    code
}

/// The stub's comparison, by which it is known again.
fn stub_start(lstar: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0x81, 0x7c, 0x24, 0x08];
    code.extend((lstar as u32).to_le_bytes());
    code
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_keep_everything_but_the_handler() {
        let gate = Gate(0xffff_ffff_8180_8e00_0010_0f30_u128 | 0x1234 << 96);
        let moved = gate.with_handler(0xffff_ffff_8200_1238);
        assert_eq!(moved.handler(), 0xffff_ffff_8200_1238);
        assert_eq!(moved.with_handler(gate.handler()).0, gate.0);
    }

    #[test]
    fn the_stub_jumps_where_it_should() {
        let (at, lstar, handler) = (0xffff_ffff_8100_1000, 0xffff_ffff_8180_0000, 0xffff_ffff_8180_0f30);
        let stub = syscall_stub(at, lstar, handler);
        assert_eq!(stub.len(), 26);
        let jump = |offset: usize| {
            assert_eq!(stub[offset], 0xe9);
            let relative = i32::from_le_bytes(stub[offset + 1..offset + 5].try_into().unwrap());
            at.wrapping_add(offset as u64 + 5).wrapping_add(i64::from(relative) as u64)
        };
        assert_eq!((jump(16), jump(21)), (lstar, handler));
        // jne skips to the second jump.
        assert_eq!(11 + usize::from(stub[10]), 21);
    }

    #[test]
    fn padding_is_found_and_missed() {
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        assert_eq!(find_padding(&ram, GuestAddress(0x1000)).unwrap(), None);
        ram.write_slice(&[INT3; PADDING], GuestAddress(0x2003)).unwrap();
        assert_eq!(find_padding(&ram, GuestAddress(0x1000)).unwrap(), Some(0x1003 + 8));
    }
}
