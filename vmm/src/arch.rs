//! x86-64 facts of a forkd machine: guest-physical addresses, interrupt lines, and the register state in which a Linux
//! kernel is entered.
//!
//! Boot state: Documentation/arch/x86/boot.rst of Linux, "64-bit Boot Protocol".

use crate::kvm::{KvmError, ioctl};
use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// Global descriptor table of the boot loader.
const GDT: u64 = 0x500;
/// Random bytes for the guest kernel (`setup_data`).
pub const SETUP_DATA: u64 = 0x6000;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Top-level page table of the boot loader; two more levels follow page by page.
const PML4: u64 = 0x9000;
/// Kernel command line.
pub const COMMAND_LINE: u64 = 0x2_0000;
/// Longest command line that x86 Linux reads, bytes with the terminating zero.
pub const COMMAND_LINE_MAX: usize = 2048;
/// End of conventional memory below the legacy hole.
pub const LOW_MEMORY_END: u64 = 0x9_fc00;
/// First address after the legacy hole.
pub const HIGH_MEMORY_START: u64 = 0x10_0000;

/// Guest-physical page with the machine's generation ID (see `acpi.rs`): RAM that no kernel takes for its own.
pub const GENERATION_PAGE: u64 = 0xe_0000;
/// ACPI tables, behind it and below [`HIGH_MEMORY_START`].
pub const ACPI_TABLES: u64 = 0xe_1000;
/// Most vCPUs of a machine.
pub const VCPUS_MAX: u8 = 8;

/// First virtio-mmio window.
pub const MMIO_START: u64 = 0xd000_0000;
/// Length of one window, bytes.
pub const MMIO_WINDOW: u64 = 0x1000;

/// I/O port of the first serial port (8250), eight ports.
pub const SERIAL_PORT: u16 = 0x3f8;
/// Its interrupt line.
pub const SERIAL_IRQ: u32 = 4;
/// Interrupt line that announces a new generation.
pub const GENERATION_IRQ: u32 = 9;
/// Interrupt lines of virtio devices, in slot order: the lines of the legacy controller that nothing else uses.
pub const VIRTIO_IRQS: [u32; 8] = [5, 10, 11, 12, 7, 6, 3, 14];
/// Guest-physical address of a vCPU's interrupt controller (Intel SDM volume 3, "APIC Register Address Map").
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Guest-physical address of the I/O interrupt controller that KVM emulates.
pub const IO_APIC: u32 = 0xfec0_0000;

/// Puts the vCPU where a 64-bit Linux kernel expects to be entered, at `entry`.
pub fn enter_linux(vcpu: &VcpuFd, ram: &GuestMemoryMmap, entry: u64) -> Result<(), EnterError> {
    write_tables(ram)?;
    let mut sregs = vcpu.get_sregs().map_err(ioctl("KVM_GET_SREGS"))?;
    sregs.gdt.base = GDT;
    sregs.gdt.limit = 4 * 8 - 1;
    sregs.cr3 = PML4;
    // PAE; then PE, MP, ET, NE, WP, AM, PG; then LME and LMA.
    sregs.cr4 |= 1 << 5;
    sregs.cr0 = 0x8005_0033;
    sregs.efer = 0x500;
    let code = segment(0x10, 11, true);
    let data = segment(0x18, 3, false);
    sregs.cs = code;
    for target in [&mut sregs.ds, &mut sregs.es, &mut sregs.ss, &mut sregs.fs, &mut sregs.gs] {
        *target = data;
    }
    vcpu.set_sregs(&sregs).map_err(ioctl("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rip: entry, rsi: ZERO_PAGE, rflags: 2, ..Default::default() };
    vcpu.set_regs(&regs).map_err(ioctl("KVM_SET_REGS"))?;
    Ok(())
}

/// The entry state could not be set.
#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    /// KVM refused.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Guest memory is too small for the loader's tables.
    #[error("guest memory has no room for the boot loader's tables")]
    Memory(#[from] GuestMemoryError),
}

fn segment(selector: u16, type_: u8, long_mode: bool) -> kvm_segment {
    kvm_segment {
        limit: 0xffff_ffff,
        selector,
        type_,
        present: 1,
        s: 1,
        l: u8::from(long_mode),
        db: u8::from(!long_mode),
        g: 1,
        ..Default::default()
    }
}

/// A flat GDT and an identity map of the first gigabyte in 2 MiB pages.
fn write_tables(ram: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let gdt: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    for (position, entry) in gdt.iter().enumerate() {
        ram.write_obj(*entry, GuestAddress(GDT + position as u64 * 8))?;
    }
    let (pdpt, directory) = (PML4 + 0x1000, PML4 + 0x2000);
    ram.write_obj(pdpt | 3, GuestAddress(PML4))?;
    ram.write_obj(directory | 3, GuestAddress(pdpt))?;
    for page in 0..512_u64 {
        // Present, writable, 2 MiB.
        ram.write_obj((page << 21) | 0x83, GuestAddress(directory + page * 8))?;
    }
    Ok(())
}
