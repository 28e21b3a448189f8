//! Guest memory: where it lies, the memfds behind it and how they are mapped.
//!
//! A machine's memory comes from *images* (RAM, root disk). An image is one file; a machine maps it shared (while it
//! is being built) or private (a fork: its writes stay its own). The layout says which part of which image appears
//! at which guest-physical address. Callers: `process.rs`, `machine.rs`, `pager.rs`.

use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use serde::{Deserialize, Serialize};
use std::ops::Range;
use std::os::raw::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

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
/// Largest root disk, bytes.
pub const ROOT_DISK_MAX: u64 = 64 << 30;
/// Most separate zero runs that a child maps apart; further ones are served by the pager.
pub const ZERO_RUNS_MAX: usize = 512;

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

/// Memory could not be arranged.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// A size is outside of what a machine can have.
    #[error("{what} of {bytes} bytes is not possible: it must be between {min} and {max}")]
    Size {
        /// Which size.
        what: &'static str,
        /// What was asked for.
        bytes: u64,
        /// Least.
        min: u64,
        /// Most.
        max: u64,
    },
    /// A memfd could not be made.
    #[error("creating a memory file of {bytes} bytes failed")]
    Create {
        /// Its size.
        bytes: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// mmap(2) refused.
    #[error("mapping {bytes} bytes of guest memory failed")]
    Map {
        /// Length of the mapping.
        bytes: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// madvise(2) refused.
    #[error("giving back {bytes} bytes at offset {offset:#x} of guest memory failed")]
    Discard {
        /// Where.
        offset: u64,
        /// How many.
        bytes: u64,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The parts overlap or overflow.
    #[error("guest memory regions do not fit together")]
    Layout(#[source] vm_memory::GuestRegionCollectionError),
    /// Memory that is not there, or not in one piece, was to be given back.
    #[error("guest memory has no range {start:#x} to {end:#x} to be given back")]
    Absent {
        /// First guest-physical address.
        start: u64,
        /// Address behind the last.
        end: u64,
        /// Why.
        #[source]
        source: vm_memory::GuestMemoryError,
    },
    /// vm-memory refused a region.
    #[error("a guest memory region is not usable")]
    Region(#[source] vm_memory::mmap::MmapRegionError),
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

/// An empty memory file; its pages come into being when written or filled.
pub fn create_image(name: &str, bytes: u64) -> Result<OwnedFd, MemoryError> {
    let failed = |source| MemoryError::Create { bytes, source };
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).map_err(failed)?;
    rustix::fs::ftruncate(&fd, bytes).map_err(failed)?;
    Ok(fd)
}

/// How a file is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sharing {
    /// Writes reach the file.
    Shared,
    /// Writes stay in this mapping.
    Private,
}

/// A readable and writable mapping of this process; unmapped when dropped.
#[derive(Debug)]
pub struct Mapping {
    base: *mut u8,
    bytes: u64,
    sharing: Sharing,
}

// SAFETY: the mapping is plain memory that is unmapped only by Drop; all access goes through vm-memory's volatile
// operations or the kernel, which are sound from any thread.
unsafe impl Send for Mapping {}
// SAFETY: as for Send; no method hands out references into the memory.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps the first `bytes` of a file.
    pub fn of_file(file: impl AsFd, bytes: u64, sharing: Sharing) -> Result<Mapping, MemoryError> {
        let flags = match sharing {
            Sharing::Shared => MapFlags::SHARED,
            Sharing::Private => MapFlags::PRIVATE,
        };
        // SAFETY: a new mapping at an address of the kernel's choice overlaps nothing that exists.
        let base = unsafe {
            rustix::mm::mmap(
                null_mut(),
                bytes as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                flags | MapFlags::NORESERVE,
                file,
                0,
            )
        };
        let base = base.map_err(|source| MemoryError::Map { bytes, source })?;
        Ok(Mapping { base: base.cast(), bytes, sharing })
    }

    /// Address of the first byte.
    pub fn address(&self) -> u64 {
        self.base as u64
    }

    /// Length, bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Address of `offset`, after checking that the range lies within.
    ///
    /// # Panics
    /// When it does not: callers check ranges that come from outside before.
    pub fn range(&self, offset: u64, bytes: u64) -> u64 {
        let end = offset.checked_add(bytes);
        assert!(end.is_some_and(|end| end <= self.bytes), "range outside of the mapping");
        self.address() + offset
    }

    /// Replaces ranges that are known to be zero by anonymous memory: no fault ever leaves this process for them, and
    /// a write costs one page instead of an image page and its copy.
    pub fn overlay_zero(&self, runs: &[Range<u64>]) -> Result<(), MemoryError> {
        for run in runs {
            let bytes = run.end.saturating_sub(run.start);
            let address = self.range(run.start, bytes);
            // SAFETY: MAP_FIXED replaces pages inside this mapping only (`range` checked it), and nobody holds
            // references into it.
            let mapped = unsafe {
                rustix::mm::mmap_anonymous(
                    address as *mut c_void,
                    bytes as usize,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                )
            };
            mapped.map_err(|source| MemoryError::Map { bytes, source })?;
        }
        Ok(())
    }

    /// Gives whole pages back to the host, because the guest says that it needs their content no more.
    ///
    /// A shared mapping (a machine that is being built, whose image nobody else maps) loses them from its file: they read zero, and
    /// are not stored in a snapshot. A private one loses its own copies only: the pages read as the snapshot had them, through
    /// the pager where they are missing. It must never touch the image, which its siblings run on. So a balloon that discards
    /// through this must not promise zeros (no VIRTIO_BALLOON_F_PAGE_POISON: Linux then reports no pages when it
    /// counts on their content).
    pub fn discard(&self, offset: u64, bytes: u64) -> Result<(), MemoryError> {
        let address = self.range(offset, bytes);
        let advice = match self.sharing {
            Sharing::Shared => Advice::LinuxRemove,
            Sharing::Private => Advice::LinuxDontNeed,
        };
        // SAFETY: the range lies in this mapping (`range` checked it), which holds plain guest memory that nobody has
        // references into; it stays mapped.
        unsafe { rustix::mm::madvise(address as *mut c_void, bytes as usize, advice) }
            .map_err(|source| MemoryError::Discard { offset, bytes, source })
    }

    fn region(&self, offset: u64, bytes: u64) -> Result<MmapRegion, MemoryError> {
        let address = self.range(offset, bytes);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: the range lies in this mapping, which `GuestMemory` keeps alive as long as the region.
        unsafe { MmapRegion::build_raw(address as *mut u8, bytes as usize, prot, libc::MAP_NORESERVE) }
            .map_err(MemoryError::Region)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: base and bytes are those of mmap; every user of the memory holds this value alive.
        let unmapped = unsafe { rustix::mm::munmap(self.base.cast(), self.bytes as usize) };
        debug_assert!(unmapped.is_ok(), "unmapping guest memory: {unmapped:?}");
    }
}

/// A machine's memory as devices and the boot loader see it: guest-physical RAM. The root disk is not in it, so
/// no device can be made to write there.
#[derive(Debug, Clone)]
pub struct GuestMemory {
    ram: GuestMemoryMmap,
    mappings: Arc<Vec<Mapping>>,
}

impl GuestMemory {
    /// Puts mapped images (in [`ImageId::ALL`] order, of the layout's sizes) at their guest-physical addresses.
    pub fn new(layout: &MemoryLayout, mappings: Vec<Mapping>) -> Result<GuestMemory, MemoryError> {
        let mut regions = Vec::new();
        for slot in layout.slots().iter().filter(|slot| slot.image == ImageId::Ram) {
            let region = mappings[slot.image.index()].region(slot.offset, slot.bytes)?;
            if let Some(region) = GuestRegionMmap::new(region, GuestAddress(slot.guest_address)) {
                regions.push(region);
            }
        }
        let ram = GuestMemoryMmap::from_regions(regions).map_err(MemoryError::Layout)?;
        Ok(GuestMemory { ram, mappings: Arc::new(mappings) })
    }

    /// Guest-physical RAM.
    pub fn ram(&self) -> &GuestMemoryMmap {
        &self.ram
    }

    /// [`Mapping::discard`] of the whole pages in a guest-physical range of RAM.
    pub fn discard(&self, range: Range<u64>) -> Result<(), MemoryError> {
        let end = range.end & !(PAGE_BYTES - 1);
        let start = range.start.checked_next_multiple_of(PAGE_BYTES).unwrap_or(end);
        let Some(ram) = self.mapping(ImageId::Ram).filter(|_| start < end) else { return Ok(()) };
        let bytes = (end - start) as usize;
        let slice = self.ram.get_slice(GuestAddress(start), bytes);
        let slice = slice.map_err(|source| MemoryError::Absent { start, end, source })?;
        ram.discard(slice.ptr_guard_mut().as_ptr() as u64 - ram.address(), bytes as u64)
    }

    /// The mapping of an image, if the machine has it.
    pub fn mapping(&self, image: ImageId) -> Option<&Mapping> {
        self.mappings.get(image.index())
    }
}

/// The longest runs among `runs` (sorted by start), at most [`ZERO_RUNS_MAX`], still sorted.
pub fn longest_runs(mut runs: Vec<Range<u64>>) -> Vec<Range<u64>> {
    if runs.len() > ZERO_RUNS_MAX {
        runs.sort_by_key(|run| std::cmp::Reverse(run.end - run.start));
        runs.truncate(ZERO_RUNS_MAX);
        runs.sort_by_key(|run| run.start);
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::Bytes;

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

    #[test]
    fn private_mappings_do_not_reach_the_file_and_overlays_read_zero() {
        let image = create_image("test", 4 * PAGE_BYTES).unwrap();
        rustix::io::pwrite(&image, &[7; 4 * PAGE_BYTES as usize], 0).unwrap();
        let mapping = Mapping::of_file(&image, 4 * PAGE_BYTES, Sharing::Private).unwrap();
        let second_page = PAGE_BYTES..2 * PAGE_BYTES;
        mapping.overlay_zero(std::slice::from_ref(&second_page)).unwrap();
        // A megabyte layout needs a megabyte mapping; here the region is looked at directly.
        let region = mapping.region(0, 4 * PAGE_BYTES).unwrap();
        let slice = vm_memory::VolatileMemory::get_slice(&region, 0, 4 * PAGE_BYTES as usize).unwrap();
        let mut seen = vec![0_u8; 4 * PAGE_BYTES as usize];
        slice.copy_to(&mut seen);
        assert_eq!((seen[0], seen[4096], seen[8192]), (7, 0, 7));
        slice.copy_from(&[9_u8; 16]);
        let mut file = [0; 1];
        rustix::io::pread(&image, &mut file, 0).unwrap();
        assert_eq!(file, [7]);
    }

    fn bytes_of_pages(mapping: &Mapping) -> Vec<u8> {
        let region = mapping.region(0, mapping.bytes()).unwrap();
        let slice = vm_memory::VolatileMemory::get_slice(&region, 0, mapping.bytes() as usize).unwrap();
        let mut seen = vec![0_u8; mapping.bytes() as usize];
        slice.copy_to(&mut seen);
        seen.into_iter().step_by(PAGE_BYTES as usize).collect()
    }

    #[test]
    fn discarded_pages_read_zero_where_they_were_built_and_as_the_image_has_them_in_a_fork() {
        let image = create_image("test", 4 * PAGE_BYTES).unwrap();
        rustix::io::pwrite(&image, &[7; 4 * PAGE_BYTES as usize], 0).unwrap();
        let fork = Mapping::of_file(&image, 4 * PAGE_BYTES, Sharing::Private).unwrap();
        let zero = 2 * PAGE_BYTES..3 * PAGE_BYTES;
        fork.overlay_zero(std::slice::from_ref(&zero)).unwrap();
        let region = fork.region(0, 4 * PAGE_BYTES).unwrap();
        let slice = vm_memory::VolatileMemory::get_slice(&region, 0, 4 * PAGE_BYTES as usize).unwrap();
        slice.copy_from(&[9_u8; 4 * PAGE_BYTES as usize]);
        fork.discard(PAGE_BYTES, 2 * PAGE_BYTES).unwrap();
        assert_eq!(bytes_of_pages(&fork), [9, 7, 0, 9]);

        let built = Mapping::of_file(&image, 4 * PAGE_BYTES, Sharing::Shared).unwrap();
        assert_eq!(bytes_of_pages(&built), [7; 4], "a fork has changed its siblings' image");
        built.discard(PAGE_BYTES, PAGE_BYTES).unwrap();
        let hole = rustix::fs::seek(&image, rustix::fs::SeekFrom::Hole(0)).unwrap();
        let next = rustix::fs::seek(&image, rustix::fs::SeekFrom::Data(hole)).unwrap();
        assert_eq!((hole, next), (PAGE_BYTES, 2 * PAGE_BYTES), "the file still has the page");
        assert_eq!(bytes_of_pages(&built), [7, 0, 7, 7]);
    }

    #[test]
    fn whole_pages_of_ram_are_given_back_and_nothing_else() {
        let layout = MemoryLayout::new(1, 0).unwrap();
        let image = create_image("test", layout.ram_bytes()).unwrap();
        let mapping = Mapping::of_file(&image, layout.ram_bytes(), Sharing::Shared).unwrap();
        let memory = GuestMemory::new(&layout, vec![mapping]).unwrap();
        memory.ram().write_slice(&[7; 4 * PAGE_BYTES as usize], GuestAddress(0)).unwrap();
        // The pages that are only touched in part stay.
        memory.discard(1..3 * PAGE_BYTES - 1).unwrap();
        // Before anybody reads: that brings the pages back, as zeros.
        let stored = rustix::fs::fstat(&image).unwrap().st_blocks as u64 * 512;
        assert_eq!(stored, 3 * PAGE_BYTES);
        let first_bytes =
            [0, 1, 2, 3].map(|page| memory.ram().read_obj::<u8>(GuestAddress(page * PAGE_BYTES)).unwrap());
        assert_eq!(first_bytes, [7, 0, 7, 7]);
        memory.discard(5..5).unwrap();
        for absent in [0..(1 << 20) + PAGE_BYTES, 1 << 40..(1 << 40) + PAGE_BYTES, 0..u64::MAX] {
            assert!(matches!(memory.discard(absent), Err(MemoryError::Absent { .. })));
        }
    }

    #[test]
    fn only_the_longest_runs_are_kept() {
        let runs: Vec<_> = (0..ZERO_RUNS_MAX as u64 + 10).map(|i| i * 100..i * 100 + 1 + (i % 50)).collect();
        let kept = longest_runs(runs.clone());
        assert_eq!(kept.len(), ZERO_RUNS_MAX);
        assert!(kept.windows(2).all(|pair| pair[0].start < pair[1].start));
        let shortest = kept.iter().map(|run| run.end - run.start).min().unwrap();
        assert!(runs.iter().filter(|run| run.end - run.start > shortest).all(|run| kept.contains(run)));
    }
}
