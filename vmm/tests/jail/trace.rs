//! Takes a running process over, as a hole in a device would: it is made to execute a system call of ours.

use std::mem::MaybeUninit;
use std::ptr::null_mut;

fn trace(request: libc::c_uint, pid: i32, data: *mut libc::c_void) {
    // SAFETY: `data` is null or points to the registers of the caller below, which live as long as the call; the traced
    // process is another one.
    let result = unsafe { libc::ptrace(request, pid, null_mut::<libc::c_void>(), data) };
    assert_ne!(result, -1, "ptrace {request:#x}: {}", std::io::Error::last_os_error());
}

/// The process, which waits in a system call, makes openat(2) instead.
pub fn make_it_open_a_file(pid: i32) {
    trace(libc::PTRACE_SEIZE, pid, null_mut());
    trace(libc::PTRACE_INTERRUPT, pid, null_mut());
    let mut status = 0;
    // SAFETY: `status` is a live integer.
    let stopped = unsafe { libc::waitpid(pid, &mut status, libc::__WALL) };
    assert!(stopped == pid && libc::WIFSTOPPED(status), "the process stops: {status:#x}");
    let mut registers = MaybeUninit::<libc::user_regs_struct>::zeroed();
    trace(libc::PTRACE_GETREGS, pid, registers.as_mut_ptr().cast());
    // SAFETY: every bit pattern is valid for this struct of integers.
    let mut registers = unsafe { registers.assume_init() };
    // Back to the two bytes of the syscall instruction that it has just left, with another number.
    registers.rip -= 2;
    registers.rax = libc::SYS_openat as u64;
    registers.orig_rax = u64::MAX;
    registers.rdi = libc::AT_FDCWD as u64;
    trace(libc::PTRACE_SETREGS, pid, (&raw mut registers).cast());
    trace(libc::PTRACE_DETACH, pid, null_mut());
}
