//! Loads a Linux kernel into a new machine: its image, an initramfs, command line, zero page, random seed.

use crate::arch;
use crate::kvm::KvmKind;
use crate::memory::MemoryLayout;
use crate::pvm;
use crate::sys;
use linux_loader::configurator::{BootConfigurator, BootParams, linux::LinuxBootConfigurator};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use std::fs::File;
use std::io;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

pub mod image;
pub mod initrd;

use image::ImageError;
use initrd::InitrdError;

/// `SETUP_RNG_SEED` of arch/x86/include/uapi/asm/setup_data.h.
const SETUP_RNG_SEED: u32 = 9;
const SEED_BYTES: usize = 64;
/// `E820_TYPE_RAM`.
const E820_RAM: u32 = 1;

/// What a machine boots from.
#[derive(Debug)]
pub struct BootFiles {
    /// The kernel: an ELF vmlinux or a bzImage.
    pub kernel: File,
    /// An initramfs for it, compressed in whatever way it knows.
    pub initrd: Option<File>,
}

/// A kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] ImageError),
    /// The initramfs.
    #[error(transparent)]
    Initrd(#[from] InitrdError),
    /// Too long.
    #[error("the kernel command line has {bytes} bytes, over the limit of {}", arch::COMMAND_LINE_MAX)]
    CommandLine {
        /// Its length.
        bytes: usize,
    },
    /// Guest memory is too small.
    #[error("guest memory is too small for the boot parameters")]
    Memory(#[from] GuestMemoryError),
    /// The zero page did not fit.
    #[error("the zero page could not be written")]
    ZeroPage(#[source] linux_loader::configurator::Error),
    /// No random bytes.
    #[error("there are no random bytes to be had")]
    Entropy(#[source] io::Error),
}

/// The kernel command line. Devices are found through ACPI.
pub fn command_line(kind: KvmKind, more: &str) -> String {
    let mut line = String::from(
        "console=ttyS0 8250.nr_uarts=1 reboot=k panic=-1 root=/dev/pmem0 rootfstype=erofs rootflags=dax=always ro rootwait \
         init=/forkd/agent random.trust_bootloader=on i8042.noaux i8042.nokbd pci=off",
    );
    if kind == KvmKind::Pvm {
        line.push(' ');
        line.push_str(pvm::COMMAND_LINE);
    }
    if !more.is_empty() {
        line.push(' ');
        line.push_str(more);
    }
    line
}

/// Loads kernel and boot parameters; returns the entry point.
pub fn load(
    ram: &GuestMemoryMmap,
    layout: &MemoryLayout,
    files: &mut BootFiles,
    command_line: &str,
    rsdp: GuestAddress,
) -> Result<u64, BootError> {
    let kernel = image::load(ram, &mut files.kernel)?;
    let initrd = match &mut files.initrd {
        Some(file) => initrd::load(ram, layout, &kernel, file)?,
        None => 0..0,
    };
    if command_line.len() + 1 > arch::COMMAND_LINE_MAX {
        return Err(BootError::CommandLine { bytes: command_line.len() + 1 });
    }
    ram.write_slice(command_line.as_bytes(), GuestAddress(arch::COMMAND_LINE))?;
    ram.write_obj(0_u8, GuestAddress(arch::COMMAND_LINE + command_line.len() as u64))?;
    write_seed(ram)?;

    let mut params = boot_params { hdr: kernel.header, ..Default::default() };
    // "Undefined": no number has been assigned to this boot loader.
    params.hdr.type_of_loader = 0xff;
    params.hdr.ramdisk_image = initrd.start;
    params.hdr.ramdisk_size = initrd.end - initrd.start;
    params.hdr.cmd_line_ptr = arch::COMMAND_LINE as u32;
    params.hdr.cmdline_size = command_line.len() as u32 + 1;
    params.hdr.setup_data = arch::SETUP_DATA;
    params.acpi_rsdp_addr = rsdp.0;
    let above_legacy_hole =
        layout.ram_ranges().into_iter().map(|range| range.start.max(arch::HIGH_MEMORY_START)..range.end);
    let usable: Vec<_> = std::iter::once(0..arch::LOW_MEMORY_END).chain(above_legacy_hole).collect();
    for (entry, range) in params.e820_table.iter_mut().zip(&usable) {
        *entry = boot_e820_entry { addr: range.start, size: range.end - range.start, r#type: E820_RAM };
    }
    params.e820_entries = usable.len() as u8;
    let params = BootParams::new(&params, GuestAddress(arch::ZERO_PAGE));
    LinuxBootConfigurator::write_bootparams(&params, ram).map_err(BootError::ZeroPage)?;
    Ok(kernel.entry)
}

/// Entropy from the first moment: without it a guest whose CPU random instructions are masked waits for seconds.
fn write_seed(ram: &GuestMemoryMmap) -> Result<(), BootError> {
    let seed: [u8; SEED_BYTES] = sys::random_bytes().map_err(BootError::Entropy)?;
    // struct setup_data: next (u64), type (u32), len (u32), data.
    ram.write_obj(0_u64, GuestAddress(arch::SETUP_DATA))?;
    ram.write_obj(SETUP_RNG_SEED, GuestAddress(arch::SETUP_DATA + 8))?;
    ram.write_obj(SEED_BYTES as u32, GuestAddress(arch::SETUP_DATA + 12))?;
    ram.write_slice(&seed, GuestAddress(arch::SETUP_DATA + 16))?;
    Ok(())
}
