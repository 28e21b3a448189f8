//! Where guest memory lies: which part of which image appears at which guest-physical address, and how large either
//! may be.

use super::error::MemoryError;
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// x86-64 page size, bytes.
pub const PAGE_BYTES: u64 = 4096;
/// virtio-pmem regions must be aligned to and a multiple of this (sparse memory subsection of Linux), bytes.
pub const PMEM_ALIGN: u64 = 2 << 20;
/// Where RAM stops below 4 GiB, to leave room for device windows.
pub const LOW_RAM_END: u64 = 3 << 30;
/// Where RAM goes on.
pub const HIGH_RAM_START: u64 = 4 << 30;
/// Most guest RAM, MiB.
pub const MEMORY_MIB_MAX: u64 = 16 * 1024;
/// Least guest RAM, MiB.
pub const MEMORY_MIB_MIN: u64 = 1;
/// Least guest RAM with which a Linux guest is started, MiB.
pub const LINUX_MEMORY_MIB_MIN: u64 = 64;
/// Largest root disk, bytes.
pub const ROOT_DISK_MAX: u64 = 64 << 30;

/// The images of a machine, in the order in which they are passed around.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ImageId {
    /// Guest RAM (`memory.bin` of a snapshot).
    Ram,
    /// The read-only root disk (`rootfs.erofs` of a snapshot).
    RootDisk,
}

impl ImageId {
    /// All of them, in order.
    pub const ALL: [ImageId; 2] = [ImageId::Ram, ImageId::RootDisk];

    /// Position in [`ImageId::ALL`].
    pub fn index(self) -> usize {
        self as usize
    }

    /// Name of a memory file that holds it, by which the mappings of a process tell it.
    pub fn file_name(self) -> &'static str {
        match self {
            ImageId::Ram => "forkd-Ram",
            ImageId::RootDisk => "forkd-RootDisk",
        }
    }
}

/// One part of an image at one guest-physical address: a KVM memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySlot {
    /// Guest-physical address of its first byte.
    pub guest_address: u64,
    /// Image that backs it.
    pub image: ImageId,
    /// Offset in the image, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub bytes: u64,
    /// The guest may only read it.
    pub read_only: bool,
}

/// Sizes that decide the guest-physical layout.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryLayout {
    /// Guest RAM, MiB.
    pub memory_mib: u64,
    /// Root disk region, bytes: a multiple of [`PMEM_ALIGN`]; 0 for none.
    pub root_disk_bytes: u64,
}

impl MemoryLayout {
    /// A layout for RAM and a root disk file of `root_disk_file_bytes`, padded as the device needs.
    pub fn new(memory_mib: u64, root_disk_file_bytes: u64) -> Result<MemoryLayout, MemoryError> {
        check_size("a root disk", root_disk_file_bytes, 0, ROOT_DISK_MAX)?;
        let layout =
            MemoryLayout { memory_mib, root_disk_bytes: root_disk_file_bytes.next_multiple_of(PMEM_ALIGN) };
        layout.check()?;
        Ok(layout)
    }

    /// Refuses sizes that a machine cannot have (layouts also come from snapshots, which may be hostile).
    pub fn check(&self) -> Result<(), MemoryError> {
        check_size("guest memory (MiB)", self.memory_mib, MEMORY_MIB_MIN, MEMORY_MIB_MAX)?;
        let aligned =
            if self.root_disk_bytes.is_multiple_of(PMEM_ALIGN) { self.root_disk_bytes } else { u64::MAX };
        check_size("a root disk region", aligned, 0, ROOT_DISK_MAX)
    }

    /// Guest RAM, bytes.
    pub fn ram_bytes(&self) -> u64 {
        self.memory_mib << 20
    }

    /// Length of an image, bytes.
    pub fn image_bytes(&self, image: ImageId) -> u64 {
        match image {
            ImageId::Ram => self.ram_bytes(),
            ImageId::RootDisk => self.root_disk_bytes,
        }
    }

    /// Guest-physical ranges of RAM, lowest first.
    pub fn ram_ranges(&self) -> Vec<Range<u64>> {
        let low_end = self.ram_bytes().min(LOW_RAM_END);
        let high = self.ram_bytes() - low_end;
        let low = std::iter::once(0..low_end);
        low.chain((high > 0).then_some(HIGH_RAM_START..HIGH_RAM_START + high)).collect()
    }

    /// Guest-physical range of the root disk; empty when there is none.
    pub fn root_disk_range(&self) -> Range<u64> {
        let ram_end = self.ram_ranges().last().map_or(0, |range| range.end).max(HIGH_RAM_START);
        // One gigabyte steps keep the region clear of RAM whatever memory section size the guest uses.
        let start = ram_end.next_multiple_of(1 << 30);
        start..start + self.root_disk_bytes
    }

    /// Every memory slot of the machine.
    pub fn slots(&self) -> Vec<MemorySlot> {
        let mut slots = Vec::new();
        let mut offset = 0;
        for range in self.ram_ranges() {
            let bytes = range.end - range.start;
            slots.push(MemorySlot {
                guest_address: range.start,
                image: ImageId::Ram,
                offset,
                bytes,
                read_only: false,
            });
            offset += bytes;
        }
        let disk = self.root_disk_range();
        if !disk.is_empty() {
            slots.push(MemorySlot {
                guest_address: disk.start,
                image: ImageId::RootDisk,
                offset: 0,
                bytes: disk.end - disk.start,
                read_only: true,
            });
        }
        slots
    }
}

fn check_size(what: &'static str, bytes: u64, min: u64, max: u64) -> Result<(), MemoryError> {
    if (min..=max).contains(&bytes) { Ok(()) } else { Err(MemoryError::Size { what, bytes, min, max }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_ram_is_one_slot_and_the_disk_lies_above_four_gigabytes() {
        let layout = MemoryLayout::new(512, 5).unwrap();
        let slots = layout.slots();
        assert_eq!(slots.len(), 2);
        assert_eq!((slots[0].guest_address, slots[0].bytes), (0, 512 << 20));
        assert_eq!((slots[1].guest_address, slots[1].bytes), (4 << 30, PMEM_ALIGN));
        assert!(slots[1].read_only);
    }

    #[test]
    fn large_ram_leaves_the_device_window_free() {
        let layout = MemoryLayout::new(16 * 1024, 1).unwrap();
        let slots = layout.slots();
        assert_eq!(slots[0].bytes + slots[1].bytes, 16 << 30);
        assert_eq!(slots[1].guest_address, HIGH_RAM_START);
        assert_eq!(slots[1].offset, slots[0].bytes);
        assert!(slots[2].guest_address >= slots[1].guest_address + slots[1].bytes);
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(MemoryLayout::new(0, 0).is_err());
        assert!(MemoryLayout::new(MEMORY_MIB_MAX + 1, 0).is_err());
        assert!(MemoryLayout::new(1, ROOT_DISK_MAX + 1).is_err());
        assert!(MemoryLayout { memory_mib: 1, root_disk_bytes: 4096 }.check().is_err());
    }
}
