//! Guest memory: the memfds behind it and how they are mapped.
//!
//! A machine's memory comes from *images* (RAM, root disk). An image is one file; a machine maps it shared (while it
//! is being built) or private (a fork: its writes stay its own). The [`MemoryLayout`] says which part of which image
//! appears at which guest-physical address.

mod delta;
mod error;
mod layout;
mod page_scan;

pub use delta::{DELTA_RUNS_MAX, Delta, DeltaDraft};
pub use error::MemoryError;
pub use layout::{
    HIGH_RAM_START, ImageId, LINUX_MEMORY_MIB_MIN, LOW_RAM_END, MEMORY_MIB_MAX, MEMORY_MIB_MIN, MemoryLayout,
    MemorySlot, PAGE_BYTES, PMEM_ALIGN, ROOT_DISK_MAX,
};
pub use page_scan::PageScan;

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::MemfdFlags;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use std::ops::Range;
use std::os::raw::c_void;
use std::ptr::null_mut;
use std::sync::Arc;
use vm_memory::{GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Most separate zero runs that a child maps apart; further ones are served by the pager.
pub const ZERO_RUNS_MAX: usize = 512;

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
        self.overlay(None, runs)
    }

    /// Replaces ranges by those of a file at the same offsets, or by anonymous memory, mapped privately.
    fn overlay(&self, file: Option<BorrowedFd<'_>>, runs: &[Range<u64>]) -> Result<(), MemoryError> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        for run in runs {
            let bytes = run.end.saturating_sub(run.start);
            let address = self.range(run.start, bytes) as *mut c_void;
            // SAFETY: MAP_FIXED replaces pages inside this mapping only (`range` checked it), and nobody holds
            // references into it.
            let mapped = unsafe {
                match file {
                    Some(file) => {
                        rustix::mm::mmap(address, bytes as usize, protection, flags, file, run.start)
                    }
                    None => rustix::mm::mmap_anonymous(address, bytes as usize, protection, flags),
                }
            };
            mapped.map_err(|source| MemoryError::Map { bytes, source })?;
        }
        Ok(())
    }

    /// Gives whole pages back to the host, because the guest says that it needs their content no more.
    ///
    /// A shared mapping (a machine that is being built, whose image nobody else maps) loses them from its file: they
    /// read zero, and are not stored in a snapshot. A private one loses its own copies only: the pages read as the
    /// snapshot had them, through the pager where they are missing. It must never touch the image, which its siblings
    /// run on. So a balloon that discards through this must not promise zeros (no VIRTIO_BALLOON_F_PAGE_POISON: Linux
    /// then reports no pages when it counts on their content).
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

/// Adds a run to sorted ones, to the last of them where they touch. It begins behind the start of the last.
pub fn add_run(runs: &mut Vec<Range<u64>>, run: Range<u64>) {
    match runs.last_mut() {
        Some(last) if last.end >= run.start => last.end = last.end.max(run.end),
        _ => runs.push(run),
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
