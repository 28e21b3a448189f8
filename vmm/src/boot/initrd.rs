//! The initramfs: where it lies in guest memory.

use super::image::Image;
use crate::memory::{MemoryLayout, PAGE_BYTES};
use std::fs::File;
use std::io::{self, Seek};
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

/// An initramfs could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum InitrdError {
    /// It cannot be read.
    #[error("the initramfs cannot be read")]
    Read(#[source] io::Error),
    /// There is no room for it.
    #[error(
        "the initramfs of {bytes} bytes does not fit into the {room} bytes of memory that the kernel leaves"
    )]
    Room {
        /// Its size.
        bytes: u64,
        /// What there is.
        room: u64,
    },
    /// It became shorter, or reading it failed.
    #[error("the initramfs could not be copied into guest memory")]
    Copy(#[from] GuestMemoryError),
}

/// Puts the initramfs as high as this kernel reaches, out of the way of everything that unpacks; says where.
pub fn load(
    ram: &GuestMemoryMmap,
    layout: &MemoryLayout,
    kernel: &Image,
    file: &mut File,
) -> Result<Range<u32>, InitrdError> {
    let bytes = file.metadata().map_err(InitrdError::Read)?.len();
    let range = place(layout, kernel, bytes)?;
    file.rewind().map_err(InitrdError::Read)?;
    ram.read_exact_volatile_from(GuestAddress(range.start.into()), file, bytes as usize)?;
    Ok(range)
}

fn place(layout: &MemoryLayout, kernel: &Image, bytes: u64) -> Result<Range<u32>, InitrdError> {
    let low_end = layout.ram_ranges().first().map_or(0, |range| range.end);
    let top = low_end.min(u64::from(kernel.initrd_address_max) + 1) / PAGE_BYTES * PAGE_BYTES;
    let bottom = kernel.end.checked_next_multiple_of(PAGE_BYTES).unwrap_or(u64::MAX);
    let room = top.saturating_sub(bottom);
    let no_room = InitrdError::Room { bytes, room };
    let Some(taken) = bytes.checked_next_multiple_of(PAGE_BYTES).filter(|taken| *taken <= room) else {
        return Err(no_room);
    };
    // The zero page has 32 bits for each; RAM below the device windows ends under 4 GiB.
    let start = top - taken;
    match (u32::try_from(start), u32::try_from(start + bytes)) {
        (Ok(start), Ok(end)) => Ok(start..end),
        _ => Err(no_room),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn kernel(end: u64, initrd_address_max: u32) -> Image {
        Image { entry: 0, end, initrd_address_max, header: Default::default() }
    }

    #[test]
    fn it_lies_as_high_as_memory_and_kernel_allow() {
        let small = MemoryLayout::new(64, 0).unwrap();
        let kernel = kernel(0x200_0123, 0x7fff_ffff);
        assert_eq!(place(&small, &kernel, 5000).unwrap(), 0x3ff_e000..0x3ff_e000 + 5000);
        for mib in [2048, 4096, 16384] {
            let large = MemoryLayout::new(mib, 0).unwrap();
            assert_eq!(place(&large, &kernel, 4096).unwrap(), 0x7fff_f000..0x8000_0000);
        }
    }

    #[test]
    fn the_kernel_keeps_its_room() {
        let layout = MemoryLayout::new(64, 0).unwrap();
        let kernel = kernel(0x3f0_0001, 0x7fff_ffff);
        let room = 0xf_f000;
        assert_eq!(place(&layout, &kernel, room).unwrap(), 0x3f0_1000..0x400_0000);
        for bytes in [room + 1, 4 << 30, u64::MAX] {
            let result = place(&layout, &kernel, bytes);
            assert!(matches!(result, Err(InitrdError::Room { room: 0xf_f000, .. })), "{result:?}");
        }
        let nothing = place(&layout, &self::kernel(u64::MAX - 5000, 0), 1);
        assert!(matches!(nothing, Err(InitrdError::Room { room: 0, .. })));
    }

    #[test]
    fn its_bytes_arrive() {
        let layout = MemoryLayout::new(64, 0).unwrap();
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 64 << 20)]).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"070701 and so on").unwrap();
        let range = load(&ram, &layout, &kernel(0x200_0000, u32::MAX), &mut file).unwrap();
        let mut found = [0; 16];
        ram.read_slice(&mut found, GuestAddress(range.start.into())).unwrap();
        assert_eq!((&found, range.len()), (b"070701 and so on", 16));
    }
}
