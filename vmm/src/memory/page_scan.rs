//! Which pages of another process are its own, and which of those it has written to, as the kernel tells: PAGEMAP_SCAN of
//! Documentation/admin-guide/mm/pagemap.rst (Linux 6.7).

use super::add_run;
use rustix::fd::AsRawFd;
use std::fs::File;
use std::io;
use std::ops::Range;

/// PAGEMAP_SCAN of linux/fs.h: `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;
/// Flags: write-protect what matches, and fail where that is not tracked.
const WP_MATCHING: u64 = 1 << 0;
const CHECK_WPASYNC: u64 = 1 << 1;
/// Categories of pages.
const WRITTEN: u64 = 1 << 1;
const OF_FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const ZERO: u64 = 1 << 5;
/// Ranges taken at once.
const REGIONS: usize = 4096;

/// `struct pm_scan_arg`.
#[repr(C)]
struct ScanArguments {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// What lies in a process's memory at one address. Pages are its own when they are neither a file's nor the zero page;
/// ranges are in bytes from that address, sorted. One that was given back since [`PageScan::own_from_now`] may still count
/// as its own, unwritten: the kernel has kept the note that it was protected.
#[derive(Debug)]
pub struct PageScan {
    pagemap: File,
    memory: Range<u64>,
}

impl PageScan {
    /// Of `bytes` at `address` in the process `pid`.
    pub fn open(pid: i32, address: u64, bytes: u64) -> io::Result<PageScan> {
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(PageScan { pagemap, memory: address..address.saturating_add(bytes) })
    }

    /// Its own pages. [`io::ErrorKind::Unsupported`] where the kernel cannot tell.
    pub fn own(&self) -> io::Result<Vec<Range<u64>>> {
        self.scan(0, 0)
    }

    /// Its own pages; [`PageScan::written`] tells which of them are written to from now on. Fails where that is not
    /// tracked ([`crate::uffd::Uffd::track_writes`]).
    pub fn own_from_now(&self) -> io::Result<Vec<Range<u64>>> {
        self.scan(WP_MATCHING | CHECK_WPASYNC, 0)
    }

    /// Its own pages that were written to since they were told by [`PageScan::own_from_now`], or have become its own.
    pub fn written(&self) -> io::Result<Vec<Range<u64>>> {
        self.scan(0, WRITTEN)
    }

    fn scan(&self, flags: u64, more: u64) -> io::Result<Vec<Range<u64>>> {
        let mut regions = vec![PageRegion::default(); REGIONS];
        let mut runs: Vec<Range<u64>> = Vec::new();
        let Range { mut start, end } = self.memory;
        while start < end {
            let mut arguments = ScanArguments {
                size: size_of::<ScanArguments>() as u64,
                flags,
                start,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: OF_FILE | ZERO,
                category_mask: OF_FILE | ZERO | more,
                category_anyof_mask: PRESENT | SWAPPED,
                // Ranges of one kind are told apart by nothing.
                return_mask: 0,
            };
            // SAFETY: PAGEMAP_SCAN reads and writes this struct, which has the kernel's layout, and writes at most `vec_len`
            // regions to `vec`, which has as many.
            let found = unsafe { libc::ioctl(self.pagemap.as_raw_fd(), PAGEMAP_SCAN, &raw mut arguments) };
            let Ok(found) = usize::try_from(found) else {
                let error = io::Error::last_os_error();
                let known = error.raw_os_error() != Some(libc::ENOTTY);
                return Err(if known { error } else { io::ErrorKind::Unsupported.into() });
            };
            for PageRegion { start, end, .. } in &regions[..found.min(REGIONS)] {
                let run = start.saturating_sub(self.memory.start)..end.saturating_sub(self.memory.start);
                add_run(&mut runs, run);
            }
            if arguments.walk_end <= start {
                return Err(io::ErrorKind::InvalidData.into());
            }
            start = arguments.walk_end;
        }
        Ok(runs)
    }
}

#[cfg(test)]
#[allow(clippy::single_range_in_vec_init, reason = "one range is meant")]
mod tests {
    use super::*;
    use crate::memory::{Mapping, PAGE_BYTES as PAGE, Sharing, create_image};
    use crate::uffd::{Uffd, UffdDevice};
    use std::os::unix::fs::FileExt;

    fn write(mapping: &Mapping, page: u64) {
        let file = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
        file.write_all_at(&[9; 8], mapping.range(page * PAGE, PAGE)).unwrap();
    }

    fn read(mapping: &Mapping, page: u64) {
        let file = File::open("/proc/self/mem").unwrap();
        file.read_exact_at(&mut [0; 8], mapping.range(page * PAGE, PAGE)).unwrap();
    }

    #[test]
    fn own_pages_and_those_written_to_are_told_apart_from_the_image() {
        let image = create_image("test", 16 * PAGE).unwrap();
        rustix::io::pwrite(&image, &[7; 16 * PAGE as usize], 0).unwrap();
        let mapping = Mapping::of_file(&image, 16 * PAGE, Sharing::Private).unwrap();
        // Anonymous memory in the midst of it, as where an image is zero.
        mapping.overlay_zero(&[8 * PAGE..12 * PAGE]).unwrap();
        let scan = PageScan::open(std::process::id() as i32, mapping.address(), 16 * PAGE).unwrap();
        (0..16).for_each(|page| read(&mapping, page));
        match scan.own() {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return,
            own => assert_eq!(own.unwrap(), [], "what was only read is nobody's"),
        }
        [1, 2, 5, 9].into_iter().for_each(|page| write(&mapping, page));
        let own = [PAGE..3 * PAGE, 5 * PAGE..6 * PAGE, 9 * PAGE..10 * PAGE];
        assert_eq!(scan.own().unwrap(), own);
        assert!(scan.own_from_now().is_err(), "nothing is tracked yet");

        let uffd = Uffd::from_device(&UffdDevice::open().unwrap()).unwrap();
        for (start, end) in [(0, 8), (8, 12), (12, 16)] {
            uffd.track_writes(mapping.address() + start * PAGE, (end - start) * PAGE, false).unwrap();
        }
        assert_eq!(scan.own_from_now().unwrap(), own);
        assert_eq!(scan.written().unwrap(), []);
        [2, 4, 9, 11].into_iter().for_each(|page| write(&mapping, page));
        let written = [2 * PAGE..3 * PAGE, 4 * PAGE..5 * PAGE, 9 * PAGE..10 * PAGE, 11 * PAGE..12 * PAGE];
        assert_eq!(scan.written().unwrap(), written);
        // What is given back is not its own any more, and comes again when it is written to.
        mapping.discard(PAGE, 2 * PAGE).unwrap();
        let own = scan.own().unwrap();
        assert!(!own.iter().any(|run| run.contains(&(2 * PAGE))), "{own:?}");
        write(&mapping, 1);
        assert_eq!(scan.written().unwrap()[0], PAGE..2 * PAGE);
        assert_eq!(scan.own_from_now().unwrap().len(), 4);
        assert_eq!(scan.written().unwrap(), []);
    }
}
