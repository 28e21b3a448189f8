//! A machine as the pager knows it.

use super::error::Misconduct;
use super::image::Image;
use crate::memory::PAGE_BYTES;
use crate::uffd::Uffd;
use rustix::fd::OwnedFd;
use rustix::fs::OFlags;
use std::sync::Arc;

/// End of the addresses that a process can have on x86-64 with four page table levels, and the least with five.
const ADDRESSES_END: u64 = 1 << 47;
/// Faults on pages that were there already, that every machine may have; see [`Client::may_fault_on_present`].
const ON_PRESENT_MIN: u64 = 1 << 16;

pub(super) struct Client {
    pub(super) uffd: Arc<Uffd>,
    pub(super) bases: Vec<u64>,
    /// Its process has ended. The descriptor stays open all the same: KVM resolves faults on a kernel worker that can
    /// outlive the process, and were the last descriptor closed while one waits, the kernel would give it a zero page
    /// of the *shared* image, for every sibling to read.
    pub(super) ended: bool,
    /// It is not served any more.
    pub(super) refused: bool,
    on_present: u64,
    on_present_max: u64,
}

impl Client {
    /// Checks what a machine's process handed over.
    pub(super) fn new(uffd: OwnedFd, bases: Vec<u64>, images: &[Image]) -> Result<Client, Misconduct> {
        let uffd = Uffd::from_fd(uffd);
        uffd.tells_of_faults_only().map_err(|features| match features {
            Some(features) => Misconduct::Features { features },
            None => Misconduct::NotUserfaultfd,
        })?;
        // Without it poll(2) says "error" whether or not there is a fault.
        rustix::fs::fcntl_setfl(&uffd, OFlags::RDWR | OFlags::NONBLOCK).map_err(|_| Misconduct::Flags)?;
        let possible = |(image, base): (&Image, &u64)| {
            base.is_multiple_of(PAGE_BYTES)
                && *base > 0
                && base.checked_add(image.shape.bytes).is_some_and(|end| end <= ADDRESSES_END)
        };
        if bases.len() != images.len() || !images.iter().zip(&bases).all(possible) {
            return Err(Misconduct::Bases);
        }
        let pages = images.iter().map(|image| image.shape.bytes / PAGE_BYTES).sum::<u64>();
        Ok(Client {
            uffd: Arc::new(uffd),
            bases,
            ended: false,
            refused: false,
            on_present: 0,
            on_present_max: pages.max(ON_PRESENT_MIN),
        })
    }

    /// Counts a fault whose page was there already. It can only have raced with the filling of its chunk, and once it
    /// is mapped it does not fault again: there are fewer of them than pages.
    pub(super) fn may_fault_on_present(&mut self) -> Result<(), Misconduct> {
        self.on_present += 1;
        if self.on_present > self.on_present_max {
            return Err(Misconduct::Spinning { faults: self.on_present });
        }
        Ok(())
    }
}
