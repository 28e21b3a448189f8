//! A machine as the pager knows it, and what its process is not allowed to do. Callers: `pager.rs`, `pager/faults.rs`.

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

/// What a machine's process did that no honest one does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Misconduct {
    /// It handed over some other descriptor.
    #[error("what it handed over is not a userfaultfd")]
    NotUserfaultfd,
    /// Its userfaultfd tells of more than faults: copies of its process would fill the pager's descriptor table.
    #[error("its userfaultfd has the features {features:#x}")]
    Features {
        /// As the kernel shows them.
        features: u64,
    },
    /// It cannot have mapped the images there.
    #[error("it says that it mapped the images at impossible addresses")]
    Bases,
    /// It handed over a second userfaultfd.
    #[error("it attached to the pager twice")]
    Twice,
    /// It made its userfaultfd blocking, so that reading it would hang.
    #[error("it changed the flags of its userfaultfd")]
    Flags,
    /// Its userfaultfd told of something that was not asked for.
    #[error("its userfaultfd told of event {event:#x}")]
    Event {
        /// The kernel's number.
        event: u8,
    },
    /// It watches memory that is no image, or lied about where the images are.
    #[error("it faulted at {address:#x}, outside of every image")]
    Outside {
        /// In its address space.
        address: u64,
    },
    /// It faults again and again on pages that are there: what it watches is not the image.
    #[error("it faulted {faults} times on pages that are there")]
    Spinning {
        /// How often.
        faults: u64,
    },
}

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

    /// Counts a fault whose page was there already. It can only have raced with the filling of its chunk, and once it is
    /// mapped it does not fault again: there are fewer of them than pages.
    pub(super) fn may_fault_on_present(&mut self) -> Result<(), Misconduct> {
        self.on_present += 1;
        if self.on_present > self.on_present_max {
            return Err(Misconduct::Spinning { faults: self.on_present });
        }
        Ok(())
    }
}
