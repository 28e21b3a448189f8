//! The few process primitives that safe crates do not offer. Callers: `process.rs` and the root crate's
//! `--detach`, always before the first thread is started; `vcpu_loop.rs`; and of networks: the root crate's `network.rs`.

use rustix::fd::{AsRawFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::process::{Pid, Signal};
use rustix::thread::UnshareFlags;
use std::io;

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

/// Ends this process at once, without destructors or exit handlers: closing a VM costs tens of milliseconds
/// (measured on kvm_pvm), which the kernel then spends without anybody waiting.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: _exit(2) has no preconditions and does not return.
    unsafe { libc::_exit(code) }
}

/// Leaves SIGCHLD ignored, so the kernel reaps this process's children by itself.
pub fn ignore_child_signals() {
    // SAFETY: SIG_IGN installs no handler code; signal(2) with valid constants has no other preconditions.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
}

/// Moves the calling thread, and no other, into a network namespace of its own, where there is nothing yet.
pub fn leave_network() -> io::Result<()> {
    // SAFETY: the danger of this call is a thread that loses sight of file descriptors, which only the flag FILES does.
    Ok(unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }?)
}

/// A new tap device `name` in the network namespace of the calling thread, without headers and non-blocking. It lives as
/// long as its descriptor.
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

/// Interrupts what a thread waits for, KVM_RUN included. One that has ended hears nothing.
pub fn kick(thread: ThreadId) {
    let process = rustix::process::getpid();
    let (process, thread) = (process.as_raw_nonzero().get(), thread.0.as_raw_nonzero().get());
    // SAFETY: tgkill(2) reads no memory; the process is this one, so no stranger is signalled, and the handler that
    // `prepare_kicks` installed does nothing.
    unsafe { libc::syscall(libc::SYS_tgkill, process, thread, kick_signal()) };
}
