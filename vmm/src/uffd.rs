//! userfaultfd as outcomes instead of errnos. Semantics: ioctl_userfaultfd(2).

use crate::memory::{Mapping, PAGE_BYTES};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::OFlags;
use rustix::io::{Errno, ReadWriteFlags};
use std::io::{self, IoSliceMut};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, RawFd};
use std::os::raw::c_void;
use std::time::Duration;
use userfaultfd::{RegisterMode, UffdBuilder};

/// Size of the kernel's `struct uffd_msg`, bytes.
const MESSAGE_BYTES: usize = 32;
/// Messages read at a time.
const MESSAGES_MAX: usize = 64;
/// `UFFD_EVENT_PAGEFAULT`.
const EVENT_PAGEFAULT: u8 = 0x12;
/// Set by the kernel once the interface is agreed on (Linux 5.15), after which features cannot change.
const FEATURE_INITIALIZED: u64 = 1 << 31;
/// `UFFD_FEATURE_EVENT_{FORK,REMAP,REMOVE,UNMAP}`.
const FEATURES_EVENTS: u64 = 1 << 1 | 1 << 2 | 1 << 3 | 1 << 6;
/// What is needed to have the kernel note which pages are written to: `UFFD_FEATURE_{PAGEFAULT_FLAG_WP,
/// WP_HUGETLBFS_SHMEM, WP_ASYNC}` (Linux 6.7). None of them tells of anything.
const FEATURES_TRACKING: u64 = 1 << 0 | 1 << 12 | 1 << 15;
/// How often filling is tried again while the kernel says that the address space is changing, and the pause between.
const CHANGING_TRIES: u32 = 5000;
const CHANGING_PAUSE: Duration = Duration::from_micros(200);

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
    /// The descriptor cannot be read any more.
    #[error("reading faults failed")]
    Read(#[source] Errno),
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

/// What a userfaultfd told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdEvent {
    /// A thread waits for a page.
    Fault {
        /// Faulting address, in the address space the descriptor was created in.
        address: u64,
    },
    /// Something that was not asked for.
    Other {
        /// The kernel's number for it.
        event: u8,
    },
}

/// How a descriptor that others share can be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdReads {
    /// A read never blocks, whatever the descriptor's flags are (Linux 6.10).
    NeverBlocks,
    /// A read blocks when whoever shares the description clears O_NONBLOCK and is faster at reading.
    MayBlock,
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
        // A kernel that does not know a feature says so, and then takes another offer.
        let agreed = [FEATURES_TRACKING, 0].into_iter().any(|features| {
            let mut api = Handshake { api: UFFD_API, features, ioctls: 0 };
            // SAFETY: UFFDIO_API reads and writes this struct, which has the kernel's layout, and nothing else.
            unsafe { libc::ioctl(raw, UFFDIO_API, &raw mut api) >= 0 }
        });
        if agreed { Ok(Uffd { inner }) } else { Err(UffdError::Refused(io::Error::last_os_error())) }
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

    /// Has the kernel note from now on which pages of a range are written to, without an event. A range in which missing
    /// pages are watched for must be named as such, or that watch ends.
    pub fn track_writes(&self, address: u64, bytes: u64, missing: bool) -> Result<(), UffdError> {
        let mode = RegisterMode::WRITE_PROTECT;
        let mode = if missing { mode | RegisterMode::MISSING } else { mode };
        let tracked = self.inner.register_with_mode(address as *mut c_void, bytes as usize, mode);
        let failed = |source| UffdError::Operation { operation: "tracking writes to a mapping", source };
        tracked.map(drop).map_err(failed)
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

    /// How descriptors of this kernel can be read; `self` must have no faults to tell of.
    pub fn reading(&self) -> UffdReads {
        match self.read(&mut [0; MESSAGE_BYTES], ReadWriteFlags::NOWAIT) {
            Ok(_) | Err(Errno::AGAIN) => UffdReads::NeverBlocks,
            Err(_) => UffdReads::MayBlock,
        }
    }

    /// Whether this is a userfaultfd that tells of faults and of nothing else, now and for ever; if not, its features.
    pub fn tells_of_faults_only(&self) -> Result<(), Option<u64>> {
        let raw = self.as_fd().as_raw_fd();
        let link = std::fs::read_link(format!("/proc/self/fd/{raw}")).map_err(|_| None)?;
        if link.as_os_str() != "anon_inode:[userfaultfd]" {
            return Err(None);
        }
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{raw}")).map_err(|_| None)?;
        // API:	version:features in use:features and ioctls there are
        let mut api =
            info.lines().filter_map(|line| line.strip_prefix("API:")).flat_map(|api| api.split(':'));
        let features = api.nth(1).and_then(|features| u64::from_str_radix(features, 16).ok()).ok_or(None)?;
        let settled = features & FEATURE_INITIALIZED != 0 && features & FEATURES_EVENTS == 0;
        if settled { Ok(()) } else { Err(Some(features)) }
    }

    /// Whether the description has O_NONBLOCK, without which poll(2) says nothing but "error".
    pub fn is_nonblocking(&self) -> bool {
        rustix::fs::fcntl_getfl(self).is_ok_and(|flags| flags.contains(OFlags::NONBLOCK))
    }

    /// The messages that arrived since the last call, at most 64; none means that nobody waits any more.
    pub fn messages(&self, reading: UffdReads, into: &mut Vec<UffdEvent>) -> Result<(), UffdError> {
        let mut buffer = [0; MESSAGE_BYTES * MESSAGES_MAX];
        let flags = match reading {
            UffdReads::NeverBlocks => ReadWriteFlags::NOWAIT,
            UffdReads::MayBlock => ReadWriteFlags::empty(),
        };
        let bytes = match self.read(&mut buffer, flags) {
            Ok(bytes) => bytes,
            Err(Errno::AGAIN | Errno::INTR) => 0,
            Err(errno) => return Err(UffdError::Read(errno)),
        };
        for message in buffer[..bytes].chunks_exact(MESSAGE_BYTES) {
            into.push(UffdEvent::parse(message));
        }
        Ok(())
    }

    fn read(&self, buffer: &mut [u8], flags: ReadWriteFlags) -> Result<usize, Errno> {
        // The position means nothing here: u64::MAX stands for "as read(2)".
        rustix::io::preadv2(self, &mut [IoSliceMut::new(buffer)], u64::MAX, flags)
    }

    /// Puts whole pages into `image` at `offset`. Pages that are there already stay as they are; their offsets are
    /// returned, for whoever put them there may have had other content.
    ///
    /// `bytes` must be a multiple of the page size and `image` a registered mapping of this process.
    pub fn copy(&self, image: &Mapping, offset: u64, bytes: &[u8]) -> Result<Vec<u64>, UffdError> {
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
    pub fn zero(&self, image: &Mapping, offset: u64, bytes: u64) -> Result<Vec<u64>, UffdError> {
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
    ) -> Result<Vec<u64>, UffdError> {
        let (mut done, mut changing, mut existing) = (0, 0, Vec::new());
        while done < bytes {
            let source = match step(done).map_err(Outcome::from) {
                Ok(filled) => {
                    done += filled as u64;
                    continue;
                }
                Err(Outcome::Partial(filled)) => {
                    done += filled;
                    continue;
                }
                Err(Outcome::PageExists) => {
                    existing.push(offset + done);
                    done += PAGE_BYTES;
                    continue;
                }
                Err(Outcome::Changing(_)) if changing < CHANGING_TRIES => {
                    changing += 1;
                    std::thread::sleep(CHANGING_PAUSE);
                    continue;
                }
                Err(Outcome::Changing(source) | Outcome::Failed(source)) => source,
            };
            return Err(UffdError::Fill { offset: offset + done, bytes: bytes - done, source });
        }
        Ok(existing)
    }
}

impl UffdEvent {
    fn parse(message: &[u8]) -> UffdEvent {
        let word =
            |at: usize| message[at..at + 8].iter().rev().fold(0, |word, byte| word << 8 | u64::from(*byte));
        match message[0] {
            EVENT_PAGEFAULT => UffdEvent::Fault { address: word(16) },
            event => UffdEvent::Other { event },
        }
    }
}

enum Outcome {
    Partial(u64),
    PageExists,
    /// The kernel changes the address space just now; nothing was filled.
    Changing(userfaultfd::Error),
    Failed(userfaultfd::Error),
}

impl From<userfaultfd::Error> for Outcome {
    fn from(error: userfaultfd::Error) -> Outcome {
        use userfaultfd::Error as E;
        let errno = match &error {
            // The crate casts a negative count (an errno: nothing was done) to usize; the kernel leaves zero when it
            // does not even start.
            E::PartiallyCopied(count) => match *count as i64 {
                filled @ 1.. => return Outcome::Partial(filled as u64),
                _ => return Outcome::Changing(error),
            },
            // Of a partly zeroed range the crate does not say how much: the next try finds those pages there.
            E::CopyFailed(errno) | E::ZeropageFailed(errno) => *errno as i32,
            _ => 0,
        };
        match Errno::from_raw_os_error(errno) {
            Errno::EXIST => Outcome::PageExists,
            Errno::AGAIN => Outcome::Changing(error),
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
