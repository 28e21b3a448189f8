//! The few process primitives that safe crates do not offer.

use crate::memory::Mapping;
use rustix::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::UnshareFlags;
use std::io;
use std::ops::Range;
use std::os::fd::FromRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

/// Most ranges of one process_vm_readv(2): `UIO_MAXIOV` of linux/uio.h.
const IOV_MAX: usize = 1024;

/// Which side of [`fork_process`] the caller is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forked {
    /// The original process; holds the new process's id.
    Parent(Pid),
    /// The new process.
    Child,
}

/// `fork_process` was refused.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// A thread exists besides the caller, so its locks could be held forever in the child.
    #[error("fork(2) needs a single-threaded process, but {threads} threads run")]
    Threads {
        /// Threads of this process.
        threads: usize,
    },
    /// The same, where they cannot be counted.
    #[error("fork(2) needs a single-threaded process, but this one has more threads")]
    Threaded,
    /// The kernel refused.
    #[error("fork(2) failed")]
    Os(#[source] io::Error),
}

/// When the new process ends by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lifetime {
    /// It is killed when the thread that forked it dies.
    BoundToParent,
    /// It goes on.
    Independent,
}

/// Splits this process in two with fork(2).
///
/// Refuses while other threads run: only then may the child go on to use the allocator and standard library.
pub fn fork_process(lifetime: Lifetime) -> Result<Forked, ForkError> {
    let threads = std::fs::read_dir("/proc/self/task").map_err(ForkError::Os)?.count();
    if threads != 1 {
        return Err(ForkError::Threads { threads });
    }
    let parent = rustix::process::getpid();
    // SAFETY: fork(2) is sound in a single-threaded process, which was checked above and cannot change meanwhile,
    // as this is the only thread that could start another.
    match unsafe { libc::fork() } {
        -1 => Err(ForkError::Os(io::Error::last_os_error())),
        0 if lifetime == Lifetime::Independent => Ok(Forked::Child),
        0 => {
            let bound = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
            // The parent may have died before the death signal was armed.
            if bound.is_err() || rustix::process::getppid() != Some(parent) {
                exit_now(1);
            }
            Ok(Forked::Child)
        }
        pid => match Pid::from_raw(pid) {
            Some(pid) => Ok(Forked::Parent(pid)),
            None => Err(ForkError::Os(io::Error::other("fork(2) returned an impossible process id"))),
        },
    }
}

/// Has a process that was just forked begin on another processor than this one, if it may: Linux tends to keep it
/// here until its parent waits for something. Where it runs later is not restricted.
pub fn start_elsewhere(process: Pid) {
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else { return };
    let mut others = allowed;
    others.unset(rustix::thread::sched_getcpu());
    if others.count() > 0 && rustix::thread::sched_setaffinity(Some(process), &others).is_ok() {
        let _ = rustix::thread::sched_setaffinity(Some(process), &allowed);
    }
}

/// Copies ranges of what the process `pid` has at `address` to the same offsets of `into`.
///
/// # Errors
/// That of process_vm_readv(2); [`io::ErrorKind::UnexpectedEof`] when not all of it is there.
pub fn read_memory(pid: i32, address: u64, into: &Mapping, runs: &[Range<u64>]) -> io::Result<()> {
    let part = |base: u64, run: &Range<u64>| libc::iovec {
        iov_base: base.wrapping_add(run.start) as *mut libc::c_void,
        iov_len: (run.end - run.start) as usize,
    };
    let pieces: Vec<Range<u64>> = runs.iter().flat_map(pieces).collect();
    for runs in pieces.chunks(IOV_MAX) {
        let wanted: u64 = runs.iter().map(|run| run.end - run.start).sum();
        for run in runs {
            // Panics when it does not lie within.
            into.range(run.start, run.end - run.start);
        }
        let ours: Vec<_> = runs.iter().map(|run| part(into.address(), run)).collect();
        let theirs: Vec<_> = runs.iter().map(|run| part(address, run)).collect();
        // SAFETY: every range lies in the live, writable mapping `into`, which was checked above and whose memory nobody
        // has references into; the other process's addresses are the kernel's to check.
        let read = unsafe {
            libc::process_vm_readv(
                pid,
                ours.as_ptr(),
                ours.len() as libc::c_ulong,
                theirs.as_ptr(),
                theirs.len() as libc::c_ulong,
                0,
            )
        };
        match u64::try_from(read) {
            Ok(read) if read == wanted => {}
            Ok(_) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Err(_) => return Err(io::Error::last_os_error()),
        }
    }
    Ok(())
}

/// A call copies 2 GiB at most.
fn pieces(run: &Range<u64>) -> impl Iterator<Item = Range<u64>> + use<> {
    const PIECE: u64 = 1 << 20;
    let Range { start, end } = *run;
    (start..end).step_by(PIECE as usize).map(move |at| at..end.min(at.saturating_add(PIECE)))
}

/// Ends this process at once, without destructors or exit handlers: closing a VM costs tens of milliseconds
/// (measured on kvm_pvm), which the kernel then spends without anybody waiting.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// Where [`fork_confined`] puts the new process.
#[derive(Debug, Clone, Copy, Default)]
pub struct ProcessPlace<'a> {
    /// As the first process of a new pid namespace.
    pub pid_namespace: bool,
    /// In this cgroup (v2), from its first instruction on. Moving a process later costs up to 8 ms: the kernel then
    /// waits for all processors.
    pub cgroup: Option<BorrowedFd<'a>>,
}

/// Which side of [`fork_confined`] the caller is on.
#[derive(Debug)]
pub enum ConfinedFork {
    /// The original process.
    Parent {
        /// The new process's id in this process's namespace.
        pid: Pid,
        /// The new process itself.
        pidfd: OwnedFd,
    },
    /// The new process. It is not bound to its parent yet: that survives no change of user.
    Child,
}

/// Arguments of clone3(2) (`struct clone_args` of linux/sched.h, second revision).
#[repr(C)]
#[derive(Default)]
struct CloneArguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// As [`fork_process`], into another namespace or cgroup. Needs Linux 5.7.
pub fn fork_confined(place: ProcessPlace<'_>) -> Result<ConfinedFork, ForkError> {
    if !is_single_threaded() {
        return Err(ForkError::Threaded);
    }
    let mut pidfd: libc::c_int = -1;
    let mut arguments = CloneArguments {
        flags: libc::CLONE_PIDFD as u64,
        pidfd: &raw mut pidfd as u64,
        exit_signal: libc::SIGCHLD as u64,
        ..CloneArguments::default()
    };
    if place.pid_namespace {
        arguments.flags |= libc::CLONE_NEWPID as u64;
    }
    if let Some(cgroup) = place.cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: the arguments have the layout and size that the kernel expects and outlive the call; neither CLONE_VM nor
    // a stack is asked for, so this is fork(2). That is sound in a single-threaded process, which was checked above.
    // What glibc's own fork would do beyond that concerns other threads only.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw mut arguments, size_of::<CloneArguments>()) };
    match result {
        0 => Ok(ConfinedFork::Child),
        -1 => Err(ForkError::Os(io::Error::last_os_error())),
        pid => {
            // SAFETY: the kernel has just stored a new descriptor there, which nobody else owns.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            match Pid::from_raw(pid as i32) {
                Some(pid) => Ok(ConfinedFork::Parent { pid, pidfd }),
                None => Err(ForkError::Os(io::Error::other("clone3(2) returned an impossible process id"))),
            }
        }
    }
}

/// CLONE_INTO_CGROUP of linux/sched.h.
const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;

/// Asked of the kernel in a way that needs no /proc: unshare(2) of CLONE_THREAD does nothing in a process of one thread
/// and is refused in others.
fn is_single_threaded() -> bool {
    // SAFETY: with this flag unshare(2) changes nothing.
    unsafe { libc::unshare(libc::CLONE_THREAD) == 0 }
}

/// Leaves namespaces for new ones; with a user namespace, this process has every capability in it.
pub fn unshare(namespaces: UnshareFlags) -> io::Result<()> {
    assert!(!namespaces.contains(UnshareFlags::FILES), "descriptors are no namespace");
    // SAFETY: unsound for the table of descriptors only, which was just excluded.
    Ok(unsafe { rustix::thread::unshare_unsafe(namespaces) }?)
}

/// Gives this process a session keyring of its own, without a name and empty: that of whoever started forkd may hold
/// secrets. Kernels without keyrings have nothing to hide.
pub fn leave_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_long = 1;
    // SAFETY: with a null name the call reads no memory of ours.
    let joined =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) };
    let error = io::Error::last_os_error();
    if joined >= 0 || error.raw_os_error() == Some(libc::ENOSYS) { Ok(()) } else { Err(error) }
}

/// Keeps the allocator from opening files: it would read from /sys how many processors there are as soon as a thread
/// finds all heaps busy, and from /proc how memory is promised as soon as it gives a part of a heap back.
pub fn keep_allocator_from_files() {
    const HEAPS: libc::c_int = 4;
    // SAFETY: mallopt(3) changes settings of the allocator; there is one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, HEAPS);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
    }
}

/// Closes every descriptor but `kept` and the three standard ones.
///
/// Values that own one of the others must not be used or dropped afterwards: for processes that were just forked and
/// leave by [`exit_now`].
pub fn close_all_but(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut kept: Vec<_> = kept.iter().map(|fd| fd.as_raw_fd() as u32).chain([0, 1, 2]).collect();
    kept.sort_unstable();
    let ends = kept.iter().skip(1).map(|fd| fd.saturating_sub(1)).chain([u32::MAX]);
    for (first, last) in kept.iter().map(|fd| fd + 1).zip(ends) {
        if first > last {
            continue;
        }
        // SAFETY: close_range(2) touches no memory; that nobody uses the closed descriptors is the caller's promise
        // above, and a use would fail with EBADF.
        if unsafe { libc::close_range(first, last, 0) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A descriptor of this process itself, by which its children can tell whether it lives.
pub fn own_pidfd() -> io::Result<OwnedFd> {
    let own = rustix::process::getpid();
    Ok(rustix::process::pidfd_open(own, rustix::process::PidfdFlags::empty())?)
}

/// Has this process killed when `parent`, which forked it, dies.
pub fn bind_to_parent(parent: impl AsFd) -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    // It may have died before the signal was armed; its id says nothing across pid namespaces.
    let mut polled = [rustix::event::PollFd::new(&parent, rustix::event::PollFlags::IN)];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    match rustix::event::poll(&mut polled, Some(&now))? {
        0 => Ok(()),
        _ => exit_now(1),
    }
}

/// Has the program that `command` starts killed when the thread that starts it dies.
pub fn bind_to_starter(command: &mut Command) {
    let starter = rustix::process::getpid();
    let bind = move || {
        rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may have died before the signal was armed.
        if rustix::process::getppid() != Some(starter) {
            exit_now(1);
        }
        Ok(())
    };
    // SAFETY: what runs between fork and exec makes system calls, and neither allocates nor takes a lock.
    unsafe { command.pre_exec(bind) };
}

/// Has endings of this process's children kept until they are asked for, whatever this process inherited.
pub fn default_child_signals() {
    // SAFETY: SIG_DFL installs no handler code; signal(2) with valid constants has no other preconditions.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
}

/// Moves the calling thread, and no other, into a network namespace of its own, where there is nothing yet.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: the danger of this call is a thread that loses sight of file descriptors, which only the flag FILES does.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// A new tap device `name` in the network namespace of the calling thread, without headers and non-blocking. It lives
/// as long as its descriptor.
pub fn create_tap(name: &str) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let tap = rustix::fs::open("/dev/net/tun", flags, Mode::empty())?;
    // SAFETY: ifreq is plain old data for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays the terminating zero.
    let room = libc::IFNAMSIZ - 1;
    for (to, from) in request.ifr_name[..room].iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: TUNSETIFF reads an ifreq and writes the device's name into it; it is live and borrowed by nobody else.
    match unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(tap),
    }
}

/// Random bytes of the kernel's. As few as callers ask for are never cut short by a signal (getrandom(2)).
pub fn random_bytes<const N: usize>() -> io::Result<[u8; N]> {
    const { assert!(N <= 256) };
    let mut bytes = [0; N];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(bytes)
}

/// Signal that takes a vCPU's thread out of the guest: a real-time signal, which nothing else here uses.
fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// A thread of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ThreadId(Pid);

/// The calling thread.
pub fn this_thread() -> ThreadId {
    ThreadId(rustix::thread::gettid())
}

/// Makes [`kick`] interrupt system calls and nothing more.
pub fn prepare_kicks() -> io::Result<()> {
    extern "C" fn interrupt_only(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    vmm_sys_util::signal::register_signal_handler(kick_signal(), interrupt_only)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Has the calling thread, and none that it starts, run for up to `slice` before another of its kind has its turn;
/// its share of a processor stays the same. Linux before 6.12 has one length for all and ignores this.
pub fn set_time_slice(slice: Duration) -> io::Result<()> {
    // SAFETY: sched_attr is plain old data for which all zeros is a value.
    let mut attributes: libc::sched_attr = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::sched_attr>();
    // SAFETY: sched_getattr(2) writes at most `size` bytes into the structure, and the thread is the calling one.
    // What it says is kept: a niceness that forkd was started with cannot be taken back by an unprivileged user.
    if unsafe { libc::syscall(libc::SYS_sched_getattr, 0, &raw mut attributes, size, 0) } == -1 {
        return Err(io::Error::last_os_error());
    }
    attributes.sched_flags = libc::SCHED_FLAG_RESET_ON_FORK as u64;
    attributes.sched_runtime = slice.as_nanos() as u64;
    // SAFETY: sched_setattr(2) reads the structure, which says how long it is, and the thread is the calling one.
    match unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// Interrupts what a thread waits for, KVM_RUN included. One that has ended hears nothing.
pub fn kick(thread: ThreadId) {
    let process = rustix::process::getpid();
    let (process, thread) = (process.as_raw_nonzero().get(), thread.0.as_raw_nonzero().get());
    // SAFETY: tgkill(2) reads no memory; the process is this one, so no stranger is signalled, and the handler that
    // `prepare_kicks` installed does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, kick_signal()) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_longer_slice_leaves_the_niceness() {
        std::thread::spawn(|| {
            let nice = 7;
            // SAFETY: setpriority(2) reads no memory; 0 is the calling thread.
            assert_eq!(unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, nice) }, 0);
            set_time_slice(Duration::from_millis(50)).unwrap();
            // SAFETY: as above.
            assert_eq!(unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }, nice);
        })
        .join()
        .unwrap();
    }
}
