//! The guest's page tables, read as its processor reads them: four or five levels, pages of 4 KiB, 2 MiB and 1 GiB
//! (Intel SDM volume 3, "4-Level Paging and 5-Level Paging"). For the instructions that `pvm.rs` carries out.
//!
//! Nothing here trusts the tables: every address in them is looked up in the guest's RAM, and a walk has as many steps
//! as there are levels. Protection keys are not looked at: the guest's kernel is told that there are none.

use crate::memory::PAGE_BYTES;
use kvm_bindings::{kvm_regs, kvm_sregs};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileMemory};

/// Bits of an entry, and of a page fault's error code (SDM volume 3, "Page-Fault Exceptions").
const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
/// The entry maps a page of 2 MiB or 1 GiB.
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Of a large page's entry: the memory type, which is no part of its address.
const LARGE_PAT: u64 = 1 << 12;

const FAULT_PRESENT: u32 = 1 << 0;
const FAULT_WRITE: u32 = 1 << 1;
const FAULT_USER: u32 = 1 << 2;
const FAULT_RESERVED: u32 = 1 << 3;

const CR0_WP: u64 = 1 << 16;
const CR4_LA57: u64 = 1 << 12;
const CR4_SMAP: u64 = 1 << 21;
const RFLAGS_AC: u64 = 1 << 18;
/// Bits of an address that one level of tables translates.
const LEVEL_BITS: u32 = 9;
/// Bits of an address within the smallest page.
const PAGE_BITS: u32 = 12;

/// What memory is reached for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryAccess {
    /// To read it.
    Read,
    /// To write it.
    Write,
}

/// Why an address has no translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TranslationError {
    /// It is not canonical: the processor raises a general protection exception.
    NotCanonical,
    /// The processor raises a page fault.
    Fault {
        /// The address that goes to CR2.
        address: u64,
        /// The error code that goes to the handler's stack.
        error_code: u32,
    },
    /// Another vCPU changed an entry during the walk: the instruction is to be executed again.
    Changed,
}

/// A contiguous piece of guest-physical memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PhysicalPiece {
    /// Where it begins.
    pub start: GuestAddress,
    /// Its length, bytes.
    pub bytes: usize,
}

/// The address space that a vCPU is in.
#[derive(Debug)]
pub struct AddressSpace<'a> {
    ram: &'a GuestMemoryMmap,
    root: u64,
    levels: u32,
    /// Supervisor writes heed read-only pages (CR0.WP).
    write_protect: bool,
    /// Supervisor accesses to user pages are refused.
    user_pages_closed: bool,
    user_mode: bool,
}

impl<'a> AddressSpace<'a> {
    /// The address space of a vCPU with these registers, in 64-bit mode.
    pub fn new(ram: &'a GuestMemoryMmap, regs: &kvm_regs, sregs: &kvm_sregs) -> AddressSpace<'a> {
        AddressSpace {
            ram,
            root: sregs.cr3 & ADDRESS,
            levels: if sregs.cr4 & CR4_LA57 == 0 { 4 } else { 5 },
            write_protect: sregs.cr0 & CR0_WP != 0,
            user_pages_closed: sregs.cr4 & CR4_SMAP != 0 && regs.rflags & RFLAGS_AC == 0,
            user_mode: sregs.ss.dpl == 3,
        }
    }

    /// Where the bytes of `range` lie, from the first page to the last, all of which allow `access`. Marks them as
    /// accessed, and as dirty when they are to be written.
    pub fn pieces(
        &self,
        range: Range<u64>,
        access: MemoryAccess,
    ) -> Result<Vec<PhysicalPiece>, TranslationError> {
        let mut pieces = Vec::new();
        let mut address = range.start;
        while address < range.end {
            let bytes = (PAGE_BYTES - address % PAGE_BYTES).min(range.end - address);
            pieces.push(PhysicalPiece { start: self.translate(address, access)?, bytes: bytes as usize });
            address += bytes;
        }
        Ok(pieces)
    }

    /// The guest-physical address of `address`.
    pub fn translate(&self, address: u64, access: MemoryAccess) -> Result<GuestAddress, TranslationError> {
        let address_bits = PAGE_BITS + LEVEL_BITS * self.levels;
        let upper = (address as i64) >> (address_bits - 1);
        if upper != 0 && upper != -1 {
            return Err(TranslationError::NotCanonical);
        }
        let mut table = self.root;
        let mut allowed = WRITABLE | USER;
        for level in (0..self.levels).rev() {
            let shift = PAGE_BITS + LEVEL_BITS * level;
            let index = address >> shift & ((1 << LEVEL_BITS) - 1);
            let entry_at = GuestAddress(table + index * 8);
            // What is not in RAM is no table.
            let entry: u64 = self.ram.load(entry_at, Ordering::Relaxed).unwrap_or(0);
            if entry & PRESENT == 0 {
                return Err(self.fault(address, access, 0));
            }
            allowed &= entry;
            let large = level > 0 && entry & LARGE != 0;
            let offset_bits = (1 << shift) - 1;
            if large && (level > 2 || entry & ADDRESS & offset_bits & !LARGE_PAT != 0) {
                return Err(self.fault(address, access, FAULT_PRESENT | FAULT_RESERVED));
            }
            if level > 0 && !large {
                self.mark(entry_at, entry, ACCESSED)?;
                table = entry & ADDRESS;
                continue;
            }
            if !self.allows(allowed, access) {
                return Err(self.fault(address, access, FAULT_PRESENT));
            }
            let dirty = if access == MemoryAccess::Write { DIRTY } else { 0 };
            self.mark(entry_at, entry, ACCESSED | dirty)?;
            return Ok(GuestAddress(entry & ADDRESS & !offset_bits | address & offset_bits));
        }
        Err(self.fault(address, access, 0))
    }

    fn allows(&self, allowed: u64, access: MemoryAccess) -> bool {
        let (user_page, writable) = (allowed & USER != 0, allowed & WRITABLE != 0);
        if self.user_mode {
            user_page && (writable || access == MemoryAccess::Read)
        } else {
            let reachable = !(user_page && self.user_pages_closed);
            reachable && (writable || access == MemoryAccess::Read || !self.write_protect)
        }
    }

    fn fault(&self, address: u64, access: MemoryAccess, cause: u32) -> TranslationError {
        let write = if access == MemoryAccess::Write { FAULT_WRITE } else { 0 };
        let user = if self.user_mode { FAULT_USER } else { 0 };
        TranslationError::Fault { address, error_code: cause | write | user }
    }

    fn mark(&self, entry_at: GuestAddress, entry: u64, bits: u64) -> Result<(), TranslationError> {
        if entry & bits == bits {
            return Ok(());
        }
        let slice = self.ram.get_slice(entry_at, 8).map_err(|_| TranslationError::Changed)?;
        let shared = slice.get_atomic_ref::<AtomicU64>(0).map_err(|_| TranslationError::Changed)?;
        let marked = shared.compare_exchange(entry, entry | bits, Ordering::AcqRel, Ordering::Relaxed);
        marked.map(|_| ()).map_err(|_| TranslationError::Changed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvm_bindings::kvm_segment;
    use proptest::prelude::*;

    const RAM: u64 = 1 << 20;
    const ROOT: u64 = 0x1000;

    fn ram() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap()
    }

    /// Registers of a supervisor, or of a user program, with paging of four levels.
    fn registers(user_mode: bool) -> (kvm_regs, kvm_sregs) {
        let ss = kvm_segment { dpl: if user_mode { 3 } else { 0 }, ..Default::default() };
        (kvm_regs::default(), kvm_sregs { cr3: ROOT, cr0: CR0_WP, ss, ..Default::default() })
    }

    /// Maps `address` to `physical` by an entry at `level` (0: a page of 4 KiB), every entry with `bits`. Tables lie
    /// from `ROOT` on, one page for each level.
    fn map(
        ram: &GuestMemoryMmap,
        levels: u32,
        level: u32,
        address: u64,
        physical: u64,
        bits: u64,
    ) -> GuestAddress {
        let mut table = ROOT;
        for at in (level..levels).rev() {
            let entry_at = GuestAddress(table + (address >> (PAGE_BITS + LEVEL_BITS * at) & 511) * 8);
            let leaf = at == level;
            let large = if leaf && level > 0 { LARGE } else { 0 };
            table += PAGE_BYTES;
            ram.write_obj(if leaf { physical | bits | large } else { table | bits }, entry_at).unwrap();
            if leaf {
                return entry_at;
            }
        }
        unreachable!("a level of {levels}")
    }

    proptest! {
        #[test]
        fn pages_of_every_size_lead_where_they_should(
            level in 0_u32..3, five in any::<bool>(), address in any::<u64>(), frame in any::<u64>(), write in any::<bool>(),
        ) {
            let levels = if five { 5 } else { 4 };
            let used = 64 - PAGE_BITS - LEVEL_BITS * levels;
            let address = ((address << used) as i64 >> used) as u64;
            let offset = (1_u64 << (PAGE_BITS + LEVEL_BITS * level)) - 1;
            let physical = frame & ADDRESS & !offset;
            let ram = ram();
            let leaf = map(&ram, levels, level, address, physical, PRESENT | WRITABLE);
            let (regs, mut sregs) = registers(false);
            sregs.cr4 = if five { CR4_LA57 } else { 0 };
            let space = AddressSpace::new(&ram, &regs, &sregs);
            let access = if write { MemoryAccess::Write } else { MemoryAccess::Read };
            prop_assert_eq!(space.translate(address, access), Ok(GuestAddress(physical | address & offset)));
            let entry: u64 = ram.read_obj(leaf).unwrap();
            prop_assert_eq!(entry & ACCESSED, ACCESSED);
            prop_assert_eq!(entry & DIRTY != 0, write);
        }

        #[test]
        fn no_table_is_too_wild(words in proptest::collection::vec(any::<u64>(), 64), address in any::<u64>(), write in any::<bool>()) {
            let ram = ram();
            for (index, word) in words.iter().enumerate() {
                // Half of them lead to other tables.
                let word = if index % 2 == 0 { *word & 0x7ff8_0fff | 1 } else { *word };
                for page in 0..16 {
                    ram.write_obj(word, GuestAddress(page * PAGE_BYTES + index as u64 * 64)).unwrap();
                }
            }
            let (regs, sregs) = registers(false);
            let access = if write { MemoryAccess::Write } else { MemoryAccess::Read };
            let space = AddressSpace::new(&ram, &regs, &sregs);
            let _ = space.pieces(address..address.saturating_add(3 * PAGE_BYTES), access);
        }
    }

    #[test]
    fn what_is_not_there_or_not_allowed_faults_as_the_processor_would() {
        const AT: u64 = 0x12_3456_7000;
        let all = PRESENT | WRITABLE | USER;
        // Bits of the entries, user mode, write, CR0.WP, SMAP, and the error code if it faults.
        let cases: [(u64, bool, bool, bool, bool, Option<u32>); 14] = [
            (all, true, true, true, false, None),
            (all, false, true, true, false, None),
            (0, false, false, true, false, Some(0)),
            (0, true, true, true, false, Some(FAULT_WRITE | FAULT_USER)),
            (PRESENT, false, false, true, false, None),
            (PRESENT, false, true, true, false, Some(FAULT_PRESENT | FAULT_WRITE)),
            (PRESENT, false, true, false, false, None),
            (PRESENT | WRITABLE, false, true, true, true, None),
            (PRESENT | WRITABLE, true, false, true, false, Some(FAULT_PRESENT | FAULT_USER)),
            (PRESENT | WRITABLE, true, true, true, false, Some(FAULT_PRESENT | FAULT_WRITE | FAULT_USER)),
            (PRESENT | USER, true, false, true, false, None),
            (PRESENT | USER, true, true, true, false, Some(FAULT_PRESENT | FAULT_WRITE | FAULT_USER)),
            (PRESENT | USER, true, true, false, false, Some(FAULT_PRESENT | FAULT_WRITE | FAULT_USER)),
            (all, false, false, true, true, Some(FAULT_PRESENT)),
        ];
        for level in 0..3 {
            for (bits, user_mode, write, write_protect, smap, code) in cases {
                let ram = ram();
                map(&ram, 4, level, AT, 0x4000_0000, bits);
                let (regs, mut sregs) = registers(user_mode);
                sregs.cr0 = if write_protect { CR0_WP } else { 0 };
                sregs.cr4 = if smap { CR4_SMAP } else { 0 };
                let access = if write { MemoryAccess::Write } else { MemoryAccess::Read };
                let seen = AddressSpace::new(&ram, &regs, &sregs).translate(AT, access);
                let fault = code.map(|error_code| TranslationError::Fault { address: AT, error_code });
                assert_eq!(
                    seen.err(),
                    fault,
                    "level {level}: {bits:#x} {user_mode} {write} {write_protect} {smap}"
                );
            }
        }
    }

    #[test]
    fn smap_is_lifted_by_the_flag_for_it() {
        let ram = ram();
        map(&ram, 4, 0, 0x5000, 0x6000, PRESENT | WRITABLE | USER);
        let (mut regs, mut sregs) = registers(false);
        sregs.cr4 = CR4_SMAP;
        regs.rflags = RFLAGS_AC;
        let space = AddressSpace::new(&ram, &regs, &sregs);
        assert_eq!(space.translate(0x5008, MemoryAccess::Write), Ok(GuestAddress(0x6008)));
    }

    #[test]
    fn large_pages_that_are_not_aligned_and_large_roots_are_reserved() {
        let reserved = FAULT_PRESENT | FAULT_RESERVED;
        for (level, physical) in [(1, 0x4000_2000), (2, 0x4020_0000), (3, 0)] {
            let ram = ram();
            map(&ram, 4, level, 0x7000, physical, PRESENT | WRITABLE);
            let (regs, sregs) = registers(false);
            let seen = AddressSpace::new(&ram, &regs, &sregs).translate(0x7000, MemoryAccess::Read);
            assert_eq!(
                seen,
                Err(TranslationError::Fault { address: 0x7000, error_code: reserved }),
                "level {level}"
            );
        }
    }

    #[test]
    fn addresses_that_are_not_canonical_are_told_apart() {
        let ram = ram();
        let (regs, sregs) = registers(false);
        let space = AddressSpace::new(&ram, &regs, &sregs);
        for address in [1 << 47, 0xffff_7fff_ffff_ffff, 1 << 63] {
            assert_eq!(space.translate(address, MemoryAccess::Read), Err(TranslationError::NotCanonical));
        }
        let top = 0xffff_ffff_ffff_f000;
        let fault = TranslationError::Fault { address: top, error_code: 0 };
        assert_eq!(space.pieces(top..u64::MAX, MemoryAccess::Read), Err(fault), "the last page");
    }

    #[test]
    fn a_range_over_two_pages_has_two_pieces_and_the_fault_of_the_second() {
        let ram = ram();
        let (regs, sregs) = registers(false);
        let space = AddressSpace::new(&ram, &regs, &sregs);
        map(&ram, 4, 0, 0x8000, 0x2_0000, PRESENT | WRITABLE);
        let missing = TranslationError::Fault { address: 0x9000, error_code: FAULT_WRITE };
        assert_eq!(space.pieces(0x8f00..0x9100, MemoryAccess::Write), Err(missing));
        map(&ram, 4, 0, 0x9000, 0x3_0000, PRESENT | WRITABLE);
        let piece = |start, bytes| PhysicalPiece { start: GuestAddress(start), bytes };
        let both = vec![piece(0x2_0f00, 0x100), piece(0x3_0000, 0x100)];
        assert_eq!(space.pieces(0x8f00..0x9100, MemoryAccess::Write), Ok(both));
    }
}
