//! The kernel's image: an ELF `vmlinux`, entered where it says, or a `bzImage`, entered at its 64-bit entry point,
//! where it unpacks itself.
//!
//! Documentation/arch/x86/boot.rst of Linux, "The Real-Mode Kernel Header" and "64-bit Boot Protocol".

use crate::arch;
use linux_loader::loader::bootparam::{XLF_KERNEL_64, setup_header};
use linux_loader::loader::{self, KernelLoader, bzimage::BzImage, elf::Elf};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// First bytes of an ELF file.
const ELF_MAGIC: [u8; 4] = *b"\x7fELF";
/// `boot_flag` of a setup header.
const BOOT_FLAG: u16 = 0xaa55;
/// "HdrS".
const HEADER_MAGIC: u32 = 0x5372_6448;
/// Boot protocol 2.12, the first whose header has `xloadflags`.
const VERSION_MIN: u16 = 0x020c;
/// Where the 64-bit entry point lies in the loaded part of a bzImage.
const ENTRY_64: u64 = 0x200;
/// What a kernel without a header of its own can be expected to reach: the limit that bzImages state.
const INITRD_ADDRESS_MAX: u32 = 0x7fff_ffff;

/// A kernel image could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be read.
    #[error("the kernel cannot be read")]
    Read(#[source] io::Error),
    /// Neither format, cut off, or too large for guest memory.
    #[error("the kernel is not a 64-bit ELF image (vmlinux) or bzImage that fits into guest memory")]
    Format(#[source] loader::Error),
    /// A bzImage without the entry point that machines start at.
    #[error(
        "the kernel is a bzImage of boot protocol {}.{:02}{}; it has no 64-bit entry point",
        version >> 8,
        version & 0xff,
        if *version < VERSION_MIN { ", 2.12 is needed" } else { "" }
    )]
    No64BitEntry {
        /// Its boot protocol.
        version: u16,
    },
    /// A bzImage has no room to unpack itself.
    #[error("the kernel needs guest memory up to {needed:#x} to unpack itself, there is {available:#x}")]
    Room {
        /// End of what it needs.
        needed: u64,
        /// End of guest memory below the device windows.
        available: u64,
    },
}

/// A kernel in guest memory.
#[derive(Debug)]
pub struct Image {
    /// Address of its first instruction.
    pub entry: u64,
    /// Behind everything that it takes before it knows of an initramfs.
    pub end: u64,
    /// Last address that an initramfs may have.
    pub initrd_address_max: u32,
    /// To be completed and put into the zero page.
    pub header: setup_header,
}

/// Loads an image of either format.
pub fn load(ram: &GuestMemoryMmap, kernel: &mut File) -> Result<Image, ImageError> {
    let mut magic = [0; 4];
    kernel.read_exact_at(&mut magic, 0).map_err(ImageError::Read)?;
    if magic == ELF_MAGIC { load_elf(ram, kernel) } else { load_bzimage(ram, kernel) }
}

fn load_elf(ram: &GuestMemoryMmap, kernel: &mut File) -> Result<Image, ImageError> {
    let start = Some(GuestAddress(arch::HIGH_MEMORY_START));
    let loaded = Elf::load(ram, None, kernel, start).map_err(ImageError::Format)?;
    let header = setup_header { boot_flag: BOOT_FLAG, header: HEADER_MAGIC, ..Default::default() };
    let entry = loaded.kernel_load.0;
    Ok(Image { entry, end: loaded.kernel_end, initrd_address_max: INITRD_ADDRESS_MAX, header })
}

fn load_bzimage(ram: &GuestMemoryMmap, kernel: &mut File) -> Result<Image, ImageError> {
    let start = GuestAddress(arch::HIGH_MEMORY_START);
    let loaded = BzImage::load(ram, Some(start), kernel, Some(start)).map_err(ImageError::Format)?;
    let header = loaded.setup_header.unwrap_or_default();
    let version = header.version;
    if version < VERSION_MIN || header.xloadflags & XLF_KERNEL_64 == 0 {
        return Err(ImageError::No64BitEntry { version });
    }
    // It moves itself to the preferred address and unpacks itself in `init_size` bytes from there.
    let base = { header.pref_address }.max(loaded.kernel_load.0);
    let end = base.saturating_add({ header.init_size }.into()).max(loaded.kernel_end);
    let available = low_ram_end(ram);
    if end > available {
        return Err(ImageError::Room { needed: end, available });
    }
    let entry = loaded.kernel_load.0 + ENTRY_64;
    Ok(Image { entry, end, initrd_address_max: header.initrd_addr_max, header })
}

/// End of the RAM that starts at 0.
fn low_ram_end(ram: &GuestMemoryMmap) -> u64 {
    use vm_memory::GuestMemoryRegion;
    ram.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use vm_memory::{ByteValued, Bytes};

    const HEADER_AT: usize = 0x1f1;
    const SETUP_BYTES: usize = 2 * 512;
    const TEXT: [u8; 4] = [0xf4, 1, 2, 3];

    fn ram(mib: usize) -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), mib << 20)]).unwrap()
    }

    fn header() -> setup_header {
        setup_header {
            setup_sects: 1,
            boot_flag: BOOT_FLAG,
            header: HEADER_MAGIC,
            version: 0x020f,
            loadflags: 1,
            code32_start: arch::HIGH_MEMORY_START as u32,
            initrd_addr_max: 0x7fff_ffff,
            xloadflags: XLF_KERNEL_64,
            pref_address: 16 << 20,
            init_size: 8 << 20,
            ..Default::default()
        }
    }

    fn bzimage(header: setup_header) -> File {
        let mut bytes = vec![0; SETUP_BYTES];
        bytes[HEADER_AT..HEADER_AT + size_of::<setup_header>()].copy_from_slice(header.as_slice());
        bytes.resize(SETUP_BYTES + ENTRY_64 as usize, 0);
        bytes.extend(TEXT);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn a_bzimage_is_entered_at_its_64_bit_entry_and_keeps_its_header() {
        let ram = ram(32);
        let image = load(&ram, &mut bzimage(header())).unwrap();
        let found: [u8; 4] = ram.read_obj(GuestAddress(image.entry)).unwrap();
        assert_eq!(found, TEXT);
        assert_eq!((image.end, image.initrd_address_max), (24 << 20, 0x7fff_ffff));
        assert_eq!(({ image.header.version }, { image.header.init_size }), (0x020f, 8 << 20));
    }

    #[test]
    fn bzimages_that_cannot_be_started_are_refused_by_name() {
        let old = setup_header { version: 0x020b, ..header() };
        let result = load(&ram(32), &mut bzimage(old));
        assert!(matches!(result, Err(ImageError::No64BitEntry { version: 0x020b })), "{result:?}");
        let narrow = setup_header { xloadflags: 0, ..header() };
        let result = load(&ram(32), &mut bzimage(narrow));
        assert!(matches!(result, Err(ImageError::No64BitEntry { version: 0x020f })), "{result:?}");
        let result = load(&ram(23), &mut bzimage(header()));
        let (needed, available) = (24 << 20, 23 << 20);
        assert!(
            matches!(result, Err(ImageError::Room { needed: n, available: a }) if (n, a) == (needed, available))
        );
        let far = setup_header { pref_address: u64::MAX - 5, ..header() };
        assert!(matches!(load(&ram(32), &mut bzimage(far)), Err(ImageError::Room { needed: u64::MAX, .. })));
    }

    #[test]
    fn other_files_are_refused() {
        for bytes in [&b"\x7fELF"[..], b"#!/bin/sh\n", &[0; 4096]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(bytes).unwrap();
            assert!(matches!(load(&ram(32), &mut file), Err(ImageError::Format(_))));
        }
        assert!(matches!(load(&ram(32), &mut tempfile::tempfile().unwrap()), Err(ImageError::Read(_))));
    }
}
