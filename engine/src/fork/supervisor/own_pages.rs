//! The pages of a machine that its image has not, told by the newest way that the kernel has.

use crate::fork::pagemap::Pagemap;
use forkd_vmm::memory::PageScan;
use std::io;
use std::ops::Range;

/// What of a machine's RAM is its own; ranges are in bytes from its start, sorted.
pub(super) struct OwnPages {
    scan: PageScan,
    /// For kernels before Linux 6.7.
    pagemap: Pagemap,
    address: u64,
    bytes: u64,
}

impl OwnPages {
    /// Of the process `pid`, which has `bytes` of RAM at `address`.
    pub(super) fn open(pid: i32, address: u64, bytes: u64) -> io::Result<OwnPages> {
        let (scan, pagemap) = (PageScan::open(pid, address, bytes)?, Pagemap::open(pid)?);
        Ok(OwnPages { scan, pagemap, address, bytes })
    }

    /// All of them.
    pub(super) fn all(&self) -> io::Result<Vec<Range<u64>>> {
        match self.scan.own() {
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                self.pagemap.own(self.address, self.bytes)
            }
            own => own,
        }
    }

    /// All of them; [`OwnPages::written`] tells of writes from now on.
    pub(super) fn track(&self) -> io::Result<Vec<Range<u64>>> {
        self.scan.own_from_now()
    }

    /// Those that were written to since, or have become its own.
    pub(super) fn written(&self) -> io::Result<Vec<Range<u64>>> {
        self.scan.written()
    }
}
