//! userfaultfd as outcomes instead of errnos. Callers: `pager.rs` (filling and waking), `process.rs`
//! (registering a child's mappings), `jail.rs` (the device, while it can be opened). Semantics: ioctl_userfaultfd(2).

use crate::memory::{Mapping, PAGE_BYTES};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::os::raw::c_void;
use userfaultfd::{Event, RegisterMode, UffdBuilder};

/// A userfaultfd operation failed.
#[derive(Debug, thiserror::Error)]
pub enum UffdError {
    /// No userfaultfd may be created here.
    #[error("userfaultfd is not available (needs root or access to /dev/userfaultfd)")]
    Unavailable(#[source] userfaultfd::Error),
    /// The device, or the kernel behind it, said no.
    #[error("userfaultfd is not available (needs root or access to /dev/userfaultfd)")]
    Refused(#[source] io::Error),
    /// Pages could not be put into a range.
    #[error("filling {bytes} bytes at offset {offset:#x} of an image failed")]
    Fill {
        /// Offset of the range in its mapping.
        offset: u64,
        /// Length of the range.
        bytes: u64,
        /// Why.
        #[source]
        source: userfaultfd::Error,
    },
    /// Another operation was refused.
    #[error("{operation} on a userfaultfd failed")]
    Operation {
        /// What was tried.
        operation: &'static str,
        /// Why.
        #[source]
        source: userfaultfd::Error,
    },
}

/// USERFAULTFD_IOC_NEW, UFFDIO_API and UFFD_API of linux/userfaultfd.h.
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
const UFFD_API: u64 = 0xaa;
/// The device that makes userfaultfds for those who may open it.
const DEVICE: &str = "/dev/userfaultfd";

/// `struct uffdio_api` of linux/userfaultfd.h.
#[repr(C)]
struct Handshake {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// An open /dev/userfaultfd, for processes that cannot reach it.
#[derive(Debug)]
pub struct UffdDevice {
    /// `None` where the kernel has no such device (before Linux 6.1): there the system call is the only way.
    file: Option<OwnedFd>,
}

impl UffdDevice {
    /// Opens the device.
    pub fn open() -> Result<UffdDevice, UffdError> {
        match rustix::fs::open(DEVICE, OFlags::RDWR | OFlags::CLOEXEC, rustix::fs::Mode::empty()) {
            Ok(file) => Ok(UffdDevice { file: Some(file) }),
            Err(Errno::NOENT) => Ok(UffdDevice { file: None }),
            Err(errno) => Err(UffdError::Refused(errno.into())),
        }
    }
}

/// Where a thread waits for a page: an address in the address space the descriptor was created in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Faulting address.
    pub address: u64,
}

/// A userfaultfd and the address space it watches.
#[derive(Debug)]
pub struct Uffd {
    inner: userfaultfd::Uffd,
}

impl Uffd {
    /// A descriptor for this process's address space, non-blocking, that also catches faults made by KVM.
    pub fn new() -> Result<Uffd, UffdError> {
        let inner = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(false)
            .create()
            .map_err(UffdError::Unavailable)?;
        Ok(Uffd { inner })
    }

    /// As [`Uffd::new`], from a device that was opened before: this process need not reach its path.
    pub fn from_device(device: &UffdDevice) -> Result<Uffd, UffdError> {
        let Some(device) = &device.file else { return Uffd::new() };
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        // SAFETY: USERFAULTFD_IOC_NEW takes its flags by value and reads no memory.
        let raw = unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) };
        if raw < 0 {
            return Err(UffdError::Refused(io::Error::last_os_error()));
        }
        // SAFETY: the kernel has just made this descriptor, and nobody else owns it.
        let inner = unsafe { userfaultfd::Uffd::from_raw_fd(raw) };
        let mut api = Handshake { api: UFFD_API, features: 0, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes this struct, which has the kernel's layout, and nothing else.
        if unsafe { libc::ioctl(raw, UFFDIO_API, &raw mut api) } < 0 {
            return Err(UffdError::Refused(io::Error::last_os_error()));
        }
        Ok(Uffd { inner })
    }

    /// A descriptor received from the process it watches.
    pub fn from_fd(fd: OwnedFd) -> Uffd {
        // SAFETY: the descriptor is owned and handed over; a descriptor that is no userfaultfd makes later ioctls
        // fail with ENOTTY, nothing more.
        Uffd { inner: unsafe { userfaultfd::Uffd::from_raw_fd(fd.into_raw_fd()) } }
    }

    /// Asks for an event wherever a page of `mapping` is missing.
    pub fn register(&self, mapping: &Mapping) -> Result<(), UffdError> {
        self.inner
            .register_with_mode(
                mapping.address() as *mut c_void,
                mapping.bytes() as usize,
                RegisterMode::MISSING,
            )
            .map(|_| ())
            .map_err(|source| UffdError::Operation { operation: "registering a mapping", source })
    }

    /// Ends the watch over a range, waking whoever waits in it.
    pub fn unregister(&self, address: u64, bytes: u64) -> Result<(), UffdError> {
        self.inner
            .unregister(address as *mut c_void, bytes as usize)
            .map_err(|source| UffdError::Operation { operation: "unregistering a mapping", source })
    }

    /// Wakes whoever waits in a range of the watched address space.
    pub fn wake(&self, address: u64, bytes: u64) -> Result<(), UffdError> {
        self.inner
            .wake(address as *mut c_void, bytes as usize)
            .map_err(|source| UffdError::Operation { operation: "waking a mapping", source })
    }

    /// The faults that arrived since the last call, at most 64; none means that nobody waits any more.
    pub fn faults(&self, into: &mut Vec<Fault>) -> Result<(), UffdError> {
        let mut buffer = userfaultfd::EventBuffer::new(64);
        // The flag belongs to the description that the watched process shares: it could have cleared it to hang us.
        let _ = rustix::fs::fcntl_setfl(self, OFlags::RDWR | OFlags::NONBLOCK);
        let failed = |source| UffdError::Operation { operation: "reading faults", source };
        for event in self.inner.read_events(&mut buffer).map_err(failed)? {
            if let Event::Pagefault { addr, .. } = event.map_err(failed)? {
                into.push(Fault { address: addr as u64 });
            }
        }
        Ok(())
    }

    /// Puts whole pages into `image` at `offset`. Pages that are there already stay as they are.
    ///
    /// `bytes` must be a multiple of the page size and `image` a registered mapping of this process.
    pub fn copy(&self, image: &Mapping, offset: u64, bytes: &[u8]) -> Result<(), UffdError> {
        assert!(
            (bytes.len() as u64).is_multiple_of(PAGE_BYTES) && offset.is_multiple_of(PAGE_BYTES),
            "whole pages only"
        );
        let base = image.range(offset, bytes.len() as u64);
        self.fill(offset, bytes.len() as u64, |done| {
            let rest = &bytes[done as usize..];
            // SAFETY: `range` checked that base..base+len lies in the live mapping `image`, and `rest` is readable;
            // UFFDIO_COPY only ever adds pages where none is, so no reference can see memory change under it.
            unsafe { self.inner.copy(rest.as_ptr().cast(), (base + done) as *mut c_void, rest.len(), true) }
        })
    }

    /// Puts zero pages into `image`, as [`Uffd::copy`] puts data.
    pub fn zero(&self, image: &Mapping, offset: u64, bytes: u64) -> Result<(), UffdError> {
        assert!(bytes.is_multiple_of(PAGE_BYTES) && offset.is_multiple_of(PAGE_BYTES), "whole pages only");
        let base = image.range(offset, bytes);
        self.fill(offset, bytes, |done| {
            // SAFETY: as in `copy`: in bounds of a live mapping, and only absent pages are added.
            unsafe { self.inner.zeropage((base + done) as *mut c_void, (bytes - done) as usize, true) }
        })
    }

    fn fill(
        &self,
        offset: u64,
        bytes: u64,
        mut step: impl FnMut(u64) -> userfaultfd::Result<usize>,
    ) -> Result<(), UffdError> {
        let mut done = 0;
        while done < bytes {
            match step(done).map_err(Outcome::from) {
                Ok(filled) => done += filled as u64,
                Err(Outcome::Partial(filled)) => done += filled,
                Err(Outcome::PageExists) => done += PAGE_BYTES,
                Err(Outcome::Failed(source)) => {
                    return Err(UffdError::Fill { offset: offset + done, bytes: bytes - done, source });
                }
            }
        }
        Ok(())
    }
}

enum Outcome {
    Partial(u64),
    PageExists,
    Failed(userfaultfd::Error),
}

impl From<userfaultfd::Error> for Outcome {
    fn from(error: userfaultfd::Error) -> Outcome {
        use userfaultfd::Error as E;
        let errno = match &error {
            // The crate casts a negative count (nothing done: the address space was changing) to usize.
            E::PartiallyCopied(count) => return Outcome::Partial((*count as i64).max(0) as u64),
            E::CopyFailed(errno) | E::ZeropageFailed(errno) => *errno as i32,
            _ => 0,
        };
        match Errno::from_raw_os_error(errno) {
            Errno::EXIST => Outcome::PageExists,
            Errno::AGAIN => Outcome::Partial(0),
            _ => Outcome::Failed(error),
        }
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        let raw: RawFd = std::os::fd::AsRawFd::as_raw_fd(&self.inner);
        // SAFETY: the descriptor stays open as long as `self`, which the borrow is bound to.
        unsafe { BorrowedFd::borrow_raw(raw) }
    }
}
