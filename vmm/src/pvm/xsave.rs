//! XSAVE and XRSTOR of the guest's kernel, carried out on its registers and memory. KVM's emulator, which runs that
//! kernel on `kvm_pvm`, does not know them, and without them two tasks of a guest share their vector registers.

use super::exception::Exception;
use super::instruction::{XsaveInstruction, XsaveOperation};
use super::page_table::{AddressSpace, MemoryAccess, PhysicalPiece, TranslationError};
use super::xsave_area::{self, FIXED, RefusedImage, XSTATE_BV, XsaveLayout};
use kvm_bindings::{kvm_regs, kvm_sregs};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const CR0_TS: u64 = 1 << 3;
const CR4_OSXSAVE: u64 = 1 << 18;
/// An area begins at a multiple of this, bytes.
const ALIGNMENT: u64 = 64;

/// The guest uses state that cannot be saved here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest's kernel saves the processor state components {components:#x}, which KVM does not pass on"
)]
pub struct UnknownState {
    /// Bits of XCR0.
    pub components: u64,
}

/// What came of an instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum XsaveOutcome {
    /// It is done.
    Done,
    /// It raises an exception, and has changed nothing.
    Raises(Exception),
    /// It has changed nothing and is to be executed again.
    Again,
}

/// A vCPU as the instruction finds it.
#[derive(Debug, Clone, Copy)]
pub struct XsaveRegisters<'a> {
    /// General registers.
    pub general: &'a kvm_regs,
    /// Control and segment registers.
    pub special: &'a kvm_sregs,
    /// The components that the guest has enabled.
    pub xcr0: u64,
}

impl From<TranslationError> for XsaveOutcome {
    fn from(untranslated: TranslationError) -> XsaveOutcome {
        match untranslated {
            TranslationError::NotCanonical => XsaveOutcome::Raises(Exception::GeneralProtection),
            TranslationError::Fault { address, error_code } => {
                XsaveOutcome::Raises(Exception::PageFault { address, error_code })
            }
            TranslationError::Changed => XsaveOutcome::Again,
        }
    }
}

impl From<RefusedImage> for XsaveOutcome {
    fn from(_: RefusedImage) -> XsaveOutcome {
        XsaveOutcome::Raises(Exception::GeneralProtection)
    }
}

/// Carries out `instruction` between the guest's RAM and `state`, the image that KVM passes. RAM is changed only by a
/// save that is done; `state` is to be given back to the vCPU only after a restore that is done.
pub fn execute(
    instruction: &XsaveInstruction,
    registers: XsaveRegisters<'_>,
    ram: &GuestMemoryMmap,
    layout: &XsaveLayout,
    state: &mut [u8],
) -> Result<XsaveOutcome, UnknownState> {
    let XsaveRegisters { general, special, xcr0 } = registers;
    if special.cr4 & CR4_OSXSAVE == 0 {
        return Ok(XsaveOutcome::Raises(Exception::InvalidOpcode));
    }
    if special.cr0 & CR0_TS != 0 {
        return Ok(XsaveOutcome::Raises(Exception::DeviceNotAvailable));
    }
    if !instruction.address.is_multiple_of(ALIGNMENT) {
        return Ok(XsaveOutcome::Raises(Exception::GeneralProtection));
    }
    let components = (general.rdx << 32 | general.rax & 0xffff_ffff) & xcr0;
    let unknown = components & !layout.within(state.len());
    if unknown != 0 || state.len() < FIXED {
        return Err(UnknownState { components: unknown });
    }
    let area = Area { space: AddressSpace::new(ram, general, special), ram, address: instruction.address };
    let done = match instruction.operation {
        XsaveOperation::Save => area.save(layout, state, components, instruction.wide),
        XsaveOperation::Restore => area.restore(layout, state, components, xcr0, instruction.wide),
    };
    Ok(done.map_or_else(|other| other, |()| XsaveOutcome::Done))
}

/// The instruction's operand.
struct Area<'a> {
    space: AddressSpace<'a>,
    ram: &'a GuestMemoryMmap,
    address: u64,
}

impl Area<'_> {
    fn save(
        &self,
        layout: &XsaveLayout,
        state: &mut [u8],
        components: u64,
        wide: bool,
    ) -> Result<(), XsaveOutcome> {
        let pieces = self.pieces(layout.bytes(components), MemoryAccess::Write)?;
        let mut before = [0; 8];
        self.read(&pieces, XSTATE_BV.start, &mut before)?;
        xsave_area::save(state, components, u64::from_le_bytes(before), wide);
        for range in layout.saved(components) {
            for (at, address, bytes) in parts(&pieces, range.start, range.len()) {
                self.ram.write_slice(&state[at..at + bytes], address).map_err(|_| not_ram())?;
            }
        }
        Ok(())
    }

    fn restore(
        &self,
        layout: &XsaveLayout,
        state: &mut [u8],
        components: u64,
        available: u64,
        wide: bool,
    ) -> Result<(), XsaveOutcome> {
        let mut image = vec![0; FIXED];
        self.read(&self.pieces(FIXED, MemoryAccess::Read)?, 0, &mut image)?;
        // What the image does not have is not read.
        let there = components & xsave_area::present(&image);
        let bytes = layout.bytes(there);
        image.resize(layout.bytes(components), 0);
        if bytes > FIXED {
            let pieces = self.pieces(bytes, MemoryAccess::Read)?;
            self.read(&pieces, FIXED, &mut image[FIXED..bytes])?;
        }
        Ok(layout.restore(&image, state, components, available, wide)?)
    }

    fn pieces(&self, bytes: usize, access: MemoryAccess) -> Result<Vec<PhysicalPiece>, XsaveOutcome> {
        let end = self.address.checked_add(bytes as u64).ok_or(TranslationError::NotCanonical)?;
        let pieces = self.space.pieces(self.address..end, access)?;
        let in_ram = pieces.iter().all(|piece| self.ram.check_range(piece.start, piece.bytes));
        if in_ram { Ok(pieces) } else { Err(not_ram()) }
    }

    fn read(&self, pieces: &[PhysicalPiece], offset: usize, into: &mut [u8]) -> Result<(), XsaveOutcome> {
        for (at, address, bytes) in parts(pieces, offset, into.len()) {
            let part = &mut into[at - offset..at - offset + bytes];
            self.ram.read_slice(part, address).map_err(|_| not_ram())?;
        }
        Ok(())
    }
}

/// What lies outside of RAM (the root disk, a device) is no place for an area: Linux ends the program that gave it one.
fn not_ram() -> XsaveOutcome {
    XsaveOutcome::Raises(Exception::GeneralProtection)
}

/// Where the `bytes` of an area from `offset` on lie: offset in the area, address, bytes.
fn parts(
    pieces: &[PhysicalPiece],
    offset: usize,
    bytes: usize,
) -> impl Iterator<Item = (usize, GuestAddress, usize)> {
    let end = offset + bytes;
    let starts = pieces.iter().scan(0, |next, piece| {
        let start = *next;
        *next += piece.bytes;
        Some((start, piece))
    });
    starts.filter_map(move |(start, piece)| {
        let (from, to) = (offset.max(start), end.min(start + piece.bytes));
        (from < to).then(|| (from, GuestAddress(piece.start.0 + (from - start) as u64), to - from))
    })
}

#[cfg(test)]
mod tests {
    use super::super::xsave_area::amd_leaf;
    use super::*;
    use kvm_bindings::kvm_segment;

    const RAM: usize = 4 << 20;
    const ROOT: u64 = 0x1000;
    /// Linear address that lies one page before the end of what is mapped.
    const AREA: u64 = 0x20_0000;
    const STATE: usize = 4096;
    const WRITABLE: u64 = 3;
    const READ_ONLY: u64 = 1;

    struct Bed {
        ram: GuestMemoryMmap,
        general: kvm_regs,
        special: kvm_sregs,
        state: Vec<u8>,
    }

    impl Bed {
        /// A kernel with two pages for areas, which lie apart in RAM and have these bits.
        fn new(bits: [u64; 2]) -> Bed {
            let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap();
            for (table, index, entry) in [
                (ROOT, 0, 0x2000 | WRITABLE),
                (0x2000, 0, 0x3000 | WRITABLE),
                (0x3000, 1, 0x4000 | WRITABLE),
                (0x4000, 0, 0x10_0000 | bits[0]),
                (0x4000, 1, 0x30_0000 | bits[1]),
            ] {
                ram.write_obj::<u64>(entry, GuestAddress(table + index * 8)).unwrap();
            }
            let general = kvm_regs { rax: 0xffff_ffff, rdx: 0xffff_ffff, ..Default::default() };
            let ss = kvm_segment::default();
            let special = kvm_sregs { cr3: ROOT, cr0: 1 << 16, cr4: CR4_OSXSAVE, ss, ..Default::default() };
            let mut state: Vec<u8> = (0..STATE).map(|at| at as u8 | 1).collect();
            state[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
            state[28..32].copy_from_slice(&0x2_ffff_u32.to_le_bytes());
            state[512..576].fill(0);
            state[512] = 0xe7;
            Bed { ram, general, special, state }
        }

        fn run(&mut self, operation: XsaveOperation, address: u64) -> Result<XsaveOutcome, UnknownState> {
            let instruction = XsaveInstruction { operation, wide: true, address, length: 4 };
            let registers = XsaveRegisters { general: &self.general, special: &self.special, xcr0: 0xe7 };
            execute(&instruction, registers, &self.ram, &XsaveLayout::new(amd_leaf), &mut self.state)
        }

        /// A page's bytes.
        fn page(&self, at: u64) -> Vec<u8> {
            let mut page = vec![0; 4096];
            self.ram.read_slice(&mut page, GuestAddress(at)).unwrap();
            page
        }
    }

    #[test]
    fn an_area_over_two_pages_comes_back() {
        let mut bed = Bed::new([WRITABLE, WRITABLE]);
        let saved = bed.state.clone();
        let at = AREA + 4096 - 640;
        assert_eq!(bed.run(XsaveOperation::Save, at), Ok(XsaveOutcome::Done));
        assert_eq!(bed.page(0x10_0000)[4096 - 64..], saved[576..640]);
        assert_eq!(bed.page(0x30_0000)[..0x980 - 640], saved[640..0x980]);
        assert!(bed.page(0x30_0000)[0x980 - 640..].iter().all(|byte| *byte == 0), "written behind the area");
        let software = &bed.page(0x10_0000)[4096 - 640 + 416..4096 - 640 + 512];
        assert!(software.iter().all(|byte| *byte == 0), "the part for software is not the processor's");
        bed.state[32..416].fill(9);
        bed.state[576..0x980].fill(9);
        assert_eq!(bed.run(XsaveOperation::Restore, at), Ok(XsaveOutcome::Done));
        assert_eq!(bed.state, saved);
    }

    #[test]
    fn a_fault_in_the_second_page_changes_nothing() {
        for (bits, code) in [(0, 2), (READ_ONLY, 3)] {
            let mut bed = Bed::new([WRITABLE, bits]);
            let fault = Exception::PageFault { address: AREA + 4096, error_code: code };
            assert_eq!(bed.run(XsaveOperation::Save, AREA + 4096 - 640), Ok(XsaveOutcome::Raises(fault)));
            assert!(bed.page(0x10_0000).iter().all(|byte| *byte == 0), "half of it was written");
        }
        let mut bed = Bed::new([WRITABLE, 0]);
        bed.ram.write_obj(0xe7_u64, GuestAddress(0x10_0000 + 4096 - 640 + 512)).unwrap();
        let before = bed.state.clone();
        let fault = Exception::PageFault { address: AREA + 4096, error_code: 0 };
        assert_eq!(bed.run(XsaveOperation::Restore, AREA + 4096 - 640), Ok(XsaveOutcome::Raises(fault)));
        assert_eq!(bed.state, before);
        // What the image does not have is not read.
        bed.ram.write_obj(3_u64, GuestAddress(0x10_0000 + 4096 - 640 + 512)).unwrap();
        assert_eq!(bed.run(XsaveOperation::Restore, AREA + 4096 - 640), Ok(XsaveOutcome::Done));
    }

    #[test]
    fn what_the_processor_refuses_raises_its_exception() {
        let general_protection = Ok(XsaveOutcome::Raises(Exception::GeneralProtection));
        let mut bed = Bed::new([WRITABLE, WRITABLE]);
        for address in [AREA + 1, AREA + 32, 1 << 63, !63] {
            assert_eq!(bed.run(XsaveOperation::Save, address), general_protection, "{address:#x}");
        }
        bed.ram.write_obj(0x100_u64, GuestAddress(0x10_0000 + 512)).unwrap();
        assert_eq!(
            bed.run(XsaveOperation::Restore, AREA),
            general_protection,
            "a component that is not enabled"
        );
        bed.special.cr0 |= CR0_TS;
        assert_eq!(
            bed.run(XsaveOperation::Save, AREA),
            Ok(XsaveOutcome::Raises(Exception::DeviceNotAvailable))
        );
        bed.special.cr4 = 0;
        assert_eq!(bed.run(XsaveOperation::Save, AREA), Ok(XsaveOutcome::Raises(Exception::InvalidOpcode)));
    }

    #[test]
    fn memory_that_is_not_ram_is_no_place_for_an_area() {
        let mut bed = Bed::new([WRITABLE, WRITABLE]);
        bed.ram.write_obj(1_u64 << 40 | WRITABLE, GuestAddress(0x4000 + 8)).unwrap();
        let refused = Ok(XsaveOutcome::Raises(Exception::GeneralProtection));
        assert_eq!(bed.run(XsaveOperation::Save, AREA + 4096 - 640), refused);
        assert!(bed.page(0x10_0000).iter().all(|byte| *byte == 0), "half of it was written");
        bed.ram.write_obj(0xe7_u64, GuestAddress(0x10_0000 + 4096 - 640 + 512)).unwrap();
        assert_eq!(bed.run(XsaveOperation::Restore, AREA + 4096 - 640), refused);
    }

    #[test]
    fn state_that_kvm_does_not_pass_is_named() {
        let mut bed = Bed::new([WRITABLE, WRITABLE]);
        bed.state.truncate(1024);
        assert_eq!(bed.run(XsaveOperation::Save, AREA), Err(UnknownState { components: 0xc0 }));
        bed.general.rax = 7;
        bed.general.rdx = 0;
        assert_eq!(
            bed.run(XsaveOperation::Save, AREA),
            Ok(XsaveOutcome::Done),
            "what is not asked for does not matter"
        );
    }
}
