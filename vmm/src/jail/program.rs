//! Assembles a system call filter for seccomp(2): which calls pass, and with which arguments.
//!
//! The kernel translates a filter in time proportional to its length, once for every machine that installs it. This
//! one needs one instruction for a call or value where seccompiler's needs five: 163 instead of 660, 0.12 instead of
//! 0.30 ms. Tests of `filter.rs`, the only caller, compare what the two decide.

use seccompiler::{BpfProgram, sock_filter};

/// Offsets of `struct seccomp_data` (linux/seccomp.h), which a filter reads.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
/// AUDIT_ARCH_X86_64 of linux/audit.h.
pub(super) const X86_64: u32 = 0xc000_003e;

const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// What a call's argument must be. The kernel's calls take these arguments as 32 bits, but for
/// [`SyscallArgument::Is64`].
#[derive(Debug, Clone)]
pub enum SyscallArgument {
    /// One of these.
    IsAnyOf(Vec<u32>),
    /// This, in all 64 bits.
    Is64(u64),
    /// `value` in the bits of `mask`.
    Has {
        /// The bits that are looked at.
        mask: u32,
        /// What they must be.
        value: u32,
    },
}

/// What becomes of a call.
#[derive(Debug, Clone)]
pub enum FilterAction {
    /// It passes.
    Allow,
    /// It passes if the argument of that number (from 0) is as said.
    AllowIf(u32, SyscallArgument),
    /// It fails with this error number.
    Refuse(u16),
}

/// The program is longer than its jumps reach.
#[derive(Debug, thiserror::Error)]
#[error("the system call filter has {instructions} instructions too many")]
pub struct TooLong {
    /// How many.
    pub instructions: usize,
}

/// A filter with these verdicts on calls by number; the first ones are found fastest. Any other call, and any of
/// another instruction set, ends the process.
pub fn assemble(calls: &[(libc::c_long, FilterAction)]) -> Result<BpfProgram, TooLong> {
    let mut tails: Vec<Vec<Step>> = Vec::new();
    let mut head = vec![Step::Load(ARCHITECTURE), Step::Unless(X86_64, Exit::Kill), Step::Load(NUMBER)];
    for (call, verdict) in calls {
        let exit = match verdict {
            FilterAction::Allow => Exit::Allow,
            FilterAction::AllowIf(argument, wanted) => {
                tails.push(check(ARGUMENTS + 8 * argument, wanted));
                Exit::Tail(tails.len() - 1)
            }
            FilterAction::Refuse(errno) => {
                tails.push(vec![Step::Return(libc::SECCOMP_RET_ERRNO | u32::from(*errno))]);
                Exit::Tail(tails.len() - 1)
            }
        };
        head.push(Step::If(*call as u32, exit));
    }
    head.push(Step::Return(libc::SECCOMP_RET_KILL_PROCESS));
    link(head, tails)
}

/// The end of a call's checks: reached when its number has been recognised.
fn check(offset: u32, wanted: &SyscallArgument) -> Vec<Step> {
    let mut steps = vec![Step::Load(offset)];
    match wanted {
        SyscallArgument::IsAnyOf(values) => {
            steps.extend(values.iter().map(|value| Step::If(*value, Exit::Allow)))
        }
        SyscallArgument::Is64(value) => steps.extend([
            Step::Unless(*value as u32, Exit::Kill),
            Step::Load(offset + 4),
            Step::If((value >> 32) as u32, Exit::Allow),
        ]),
        SyscallArgument::Has { mask, value } => {
            steps.extend([Step::And(*mask), Step::If(*value, Exit::Allow)])
        }
    }
    steps.push(Step::Return(libc::SECCOMP_RET_KILL_PROCESS));
    steps
}

/// An instruction whose jumps have names.
enum Step {
    Load(u32),
    And(u32),
    If(u32, Exit),
    Unless(u32, Exit),
    Return(u32),
}

/// Where a jump goes.
enum Exit {
    Allow,
    Kill,
    Tail(usize),
}

/// Puts everything in one row and computes the jumps.
fn link(head: Vec<Step>, tails: Vec<Vec<Step>>) -> Result<BpfProgram, TooLong> {
    let mut starts = Vec::with_capacity(tails.len());
    let mut end = head.len();
    for tail in &tails {
        starts.push(end);
        end += tail.len();
    }
    let (kill, allow) = (end, end + 1);
    let ends = [Step::Return(libc::SECCOMP_RET_KILL_PROCESS), Step::Return(libc::SECCOMP_RET_ALLOW)];
    let steps = head.into_iter().chain(tails.into_iter().flatten()).chain(ends);
    let distance = |from: usize, exit: &Exit| {
        let to = match exit {
            Exit::Allow => allow,
            Exit::Kill => kill,
            Exit::Tail(tail) => starts[*tail],
        };
        // All jumps go forward; a target is never the instruction before the next.
        let distance = to - from - 1;
        u8::try_from(distance).map_err(|_| TooLong { instructions: distance - usize::from(u8::MAX) })
    };
    let assembled = steps.enumerate().map(|(at, step)| {
        let (code, k, jt, jf) = match &step {
            Step::Load(offset) => (LOAD, *offset, 0, 0),
            Step::And(mask) => (AND, *mask, 0, 0),
            Step::If(value, exit) => (EQUAL, *value, distance(at, exit)?, 0),
            Step::Unless(value, exit) => (EQUAL, *value, 0, distance(at, exit)?),
            Step::Return(action) => (RETURN, *action, 0, 0),
        };
        Ok(sock_filter { code: code as u16, jt, jf, k })
    });
    assembled.collect()
}
