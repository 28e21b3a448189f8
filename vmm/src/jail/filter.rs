//! The system calls that a machine's process may make; any other ends it with SIGSYS. One filter for all of its
//! threads: it is installed while there is one.
//!
//! Whatever is opened, bound or connected was so before: there is no call here that takes the name of anything.

use super::program::{FilterAction, SyscallArgument, TooLong, assemble};
use kvm_bindings as kvm;
use libc::c_long;
use seccompiler::BpfProgram;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// The filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The rules do not make a filter.
    #[error(transparent)]
    TooLong(#[from] TooLong),
    /// The kernel refused it.
    #[error("the system call filter cannot be installed")]
    Install(#[source] seccompiler::Error),
}

/// Reading, writing and waiting on descriptors.
const FILES: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_memfd_create,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
];

/// Streams on sockets that were there before; none can be made.
const SOCKETS: &[c_long] = &[
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_shutdown,
    libc::SYS_getsockopt,
];

/// Memory, threads, time and signals of this process itself.
const SELF: &[c_long] = &[
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_futex,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_getrandom,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Calls that the C library makes and does without, so they are no reason to end anybody. clone3(2): its flags lie in
/// memory, which a filter cannot read; threads are then started with clone(2). mremap(2): memory that is moved loses
/// its userfaultfd, and the kernel would fill what is missing of it with zeros, in the image that siblings share.
const MISSING: &[c_long] = &[libc::SYS_clone3, libc::SYS_mremap];

/// clone(2) flags of glibc's pthread_create: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID,
/// CHILD_CLEARTID. A process, or a namespace, is made with others.
const THREAD_FLAGS: u64 = 0x3d_0f00;
/// KVM's ioctls (KVMIO of linux/kvm.h).
const KVM: u32 = 0xae;

const fn none(number: u32) -> u32 {
    ioctl_expr(_IOC_NONE, KVM, number, 0) as u32
}

const fn read<T>(number: u32) -> u32 {
    ioctl_expr(_IOC_READ, KVM, number, size_of::<T>() as u32) as u32
}

const fn write<T>(number: u32) -> u32 {
    ioctl_expr(_IOC_WRITE, KVM, number, size_of::<T>() as u32) as u32
}

const fn both<T>(number: u32) -> u32 {
    ioctl_expr(_IOC_READ | _IOC_WRITE, KVM, number, size_of::<T>() as u32) as u32
}

/// Requests of ioctl(2), numbers from linux/kvm.h. The filter compares one after the other, so the first are those
/// that a running machine makes.
const REQUESTS: &[u32] = &[
    none(0x80),                        // KVM_RUN
    write::<kvm::kvm_irq_level>(0x61), // KVM_IRQ_LINE
    read::<kvm::kvm_regs>(0x81),
    write::<kvm::kvm_regs>(0x82),
    read::<kvm::kvm_sregs>(0x83),
    write::<kvm::kvm_sregs>(0x84),
    read::<kvm::kvm_vcpu_events>(0x9f), // KVM_GET_PIT2 has the same number and another size
    write::<kvm::kvm_vcpu_events>(0xa0),
    none(0x03), // KVM_CHECK_EXTENSION
    write::<kvm::kvm_xsave>(0xa5),
    read::<kvm::kvm_xcrs>(0xa6),
    read::<kvm::kvm_xsave>(0xcf), // KVM_GET_XSAVE2
    libc::FIONBIO as u32,
    none(0x00), // KVM_GET_API_VERSION
    none(0x01), // KVM_CREATE_VM
    both::<kvm::kvm_msr_list>(0x02),
    none(0x04),                    // KVM_GET_VCPU_MMAP_SIZE
    both::<kvm::kvm_cpuid2>(0x05), // KVM_GET_SUPPORTED_CPUID
    none(0x41),                    // KVM_CREATE_VCPU
    write::<kvm::kvm_userspace_memory_region>(0x46),
    none(0x47),                     // KVM_SET_TSS_ADDR
    write::<u64>(0x48),             // KVM_SET_IDENTITY_MAP_ADDR
    none(0x60),                     // KVM_CREATE_IRQCHIP
    both::<kvm::kvm_irqchip>(0x62), // KVM_GET_IRQCHIP
    read::<kvm::kvm_irqchip>(0x63), // KVM_SET_IRQCHIP, which linux/kvm.h declares as reading
    write::<kvm::kvm_irqfd>(0x76),
    write::<kvm::kvm_pit_config>(0x77), // KVM_CREATE_PIT2
    write::<kvm::kvm_ioeventfd>(0x79),
    write::<kvm::kvm_clock_data>(0x7b),
    read::<kvm::kvm_clock_data>(0x7c),
    both::<kvm::kvm_msrs>(0x88),
    write::<kvm::kvm_msrs>(0x89),
    write::<kvm::kvm_signal_mask>(0x8b),
    read::<kvm::kvm_lapic_state>(0x8e),
    write::<kvm::kvm_lapic_state>(0x8f),
    write::<kvm::kvm_cpuid2>(0x90),
    both::<kvm::kvm_cpuid2>(0x91),
    read::<kvm::kvm_mp_state>(0x98),
    write::<kvm::kvm_mp_state>(0x99),
    none(0x9a), // KVM_NMI
    read::<kvm::kvm_pit_state2>(0x9f),
    write::<kvm::kvm_pit_state2>(0xa0),
    read::<kvm::kvm_debugregs>(0xa1),
    write::<kvm::kvm_debugregs>(0xa2),
    none(0xa2), // KVM_SET_TSC_KHZ
    none(0xa3), // KVM_GET_TSC_KHZ
    write::<kvm::kvm_enable_cap>(0xa3),
    read::<kvm::kvm_xsave>(0xa4),
    write::<kvm::kvm_xcrs>(0xa7),
    none(0xad), // KVM_KVMCLOCK_CTRL
    write::<kvm::kvm_msr_filter>(0xc6),
];

/// Commands of fcntl(2): flags of a descriptor, and copies of it.
const FCNTLS: &[i32] = &[libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];

/// The compiled filter.
#[derive(Debug)]
pub struct Filter {
    program: BpfProgram,
}

impl Filter {
    /// The filter of a process that knows itself by the id `own_pid`.
    pub fn new(own_pid: u32) -> Result<Filter, FilterError> {
        Ok(Filter { program: assemble(&calls(own_pid))? })
    }

    /// Holds for this process from now on, and for all threads it will start. It allows no further filter.
    pub fn install(&self) -> Result<(), FilterError> {
        seccompiler::apply_filter(&self.program).map_err(FilterError::Install)
    }
}

/// The calls that are known, those first that a running machine makes all the time.
fn calls(own_pid: u32) -> Vec<(c_long, FilterAction)> {
    let mut calls =
        vec![(libc::SYS_ioctl, FilterAction::AllowIf(1, SyscallArgument::IsAnyOf(REQUESTS.to_vec())))];
    calls.extend([FILES, SOCKETS, SELF].concat().into_iter().map(|call| (call, FilterAction::Allow)));
    calls.extend(MISSING.iter().map(|call| (*call, FilterAction::Refuse(libc::ENOSYS as u16))));
    let commands = FCNTLS.iter().map(|command| *command as u32).collect();
    let no_code = SyscallArgument::Has { mask: libc::PROT_EXEC as u32, value: 0 };
    // How glibc and Rust ask about an open file. Another file would have to be in the root directory, which is empty.
    let of_descriptor =
        SyscallArgument::Has { mask: libc::AT_EMPTY_PATH as u32, value: libc::AT_EMPTY_PATH as u32 };
    let set_name = SyscallArgument::IsAnyOf(vec![libc::PR_SET_NAME as u32]);
    let checked = [
        (libc::SYS_fcntl, 1, SyscallArgument::IsAnyOf(commands)),
        (libc::SYS_mmap, 2, no_code.clone()),
        (libc::SYS_mprotect, 2, no_code),
        (libc::SYS_clone, 0, SyscallArgument::Is64(THREAD_FLAGS)),
        (libc::SYS_tgkill, 0, SyscallArgument::IsAnyOf(vec![own_pid])),
        (libc::SYS_prctl, 0, set_name),
        (libc::SYS_newfstatat, 3, of_descriptor.clone()),
        (libc::SYS_statx, 2, of_descriptor),
    ];
    calls.extend(checked.map(|(call, argument, wanted)| (call, FilterAction::AllowIf(argument, wanted))));
    calls
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::jail::program::X86_64;
    use seccompiler::{
        SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Compare, SeccompCondition, SeccompFilter,
        SeccompRule, TargetArch,
    };
    use std::collections::BTreeMap;

    const PID: u32 = 7;
    const I386: u32 = 0x4000_0003;

    /// What a filter sees of a call (`struct seccomp_data`), as the 32-bit words that it reads.
    type Seen = [u32; 16];

    fn seen(number: u32, architecture: u32, argument: usize, value: u64) -> Seen {
        let mut words = [0; 16];
        (words[0], words[1]) = (number, architecture);
        (words[4 + 2 * argument], words[5 + 2 * argument]) = (value as u32, (value >> 32) as u32);
        words
    }

    /// What the kernel's interpreter (net/core/filter.c) makes of a program.
    fn decide(program: &BpfProgram, seen: &Seen) -> u32 {
        let (mut at, mut accumulator) = (0, 0u32);
        loop {
            let instruction = &program[at];
            let k = instruction.k;
            at += 1;
            let holds = match u32::from(instruction.code) {
                0x20 => {
                    accumulator = seen[k as usize / 4];
                    continue;
                }
                0x54 => {
                    accumulator &= k;
                    continue;
                }
                0x05 => {
                    at += k as usize;
                    continue;
                }
                0x06 => return k,
                0x15 => accumulator == k,
                0x25 => accumulator > k,
                0x35 => accumulator >= k,
                other => panic!("instruction {other:#x}"),
            };
            at += usize::from(if holds { instruction.jt } else { instruction.jf });
        }
    }

    fn of_library(calls: &[(c_long, FilterAction)]) -> BpfProgram {
        let condition = |argument: u32, width, compare, value| {
            let condition = SeccompCondition::new(argument as u8, width, compare, value).unwrap();
            SeccompRule::new(vec![condition]).unwrap()
        };
        let rules: BTreeMap<_, _> = calls
            .iter()
            .filter_map(|(call, verdict)| {
                let rules = match verdict {
                    FilterAction::Allow => Vec::new(),
                    FilterAction::Refuse(_) => return None,
                    FilterAction::AllowIf(at, SyscallArgument::IsAnyOf(values)) => {
                        let one = |value: &u32| condition(*at, Width::Dword, Compare::Eq, u64::from(*value));
                        values.iter().map(one).collect()
                    }
                    FilterAction::AllowIf(at, SyscallArgument::Is64(value)) => {
                        vec![condition(*at, Width::Qword, Compare::Eq, *value)]
                    }
                    FilterAction::AllowIf(at, SyscallArgument::Has { mask, value }) => {
                        let compare = Compare::MaskedEq(u64::from(*mask));
                        vec![condition(*at, Width::Qword, compare, u64::from(*value))]
                    }
                };
                Some((*call, rules))
            })
            .collect();
        SeccompFilter::new(rules, SeccompAction::KillProcess, SeccompAction::Allow, TargetArch::x86_64)
            .and_then(BpfProgram::try_from)
            .unwrap()
    }

    /// Values that are on either side of every decision about an argument.
    fn interesting() -> Vec<u64> {
        let requests = REQUESTS.iter().map(|request| u64::from(*request));
        let commands = FCNTLS.iter().map(|command| *command as u64);
        let bits = (0..64).map(|bit| 1 << bit);
        let known: Vec<_> =
            requests.chain(commands).chain([0, THREAD_FLAGS, PID.into()]).chain(bits).collect();
        known.iter().flat_map(|value| [*value, value ^ 1, value | 1 << 32, value | 0x1004, !value]).collect()
    }

    #[test]
    fn decides_as_the_library_s_filter_of_the_same_rules() {
        let calls = calls(PID);
        let (ours, theirs) = (Filter::new(PID).unwrap().program, of_library(&calls));
        let missing: Vec<_> = MISSING.iter().map(|call| *call as u32).collect();
        let (mut allowed, mut killed) = (0, 0);
        for number in (0..600).filter(|number| !missing.contains(number)) {
            for argument in 0..6 {
                for value in interesting() {
                    let seen = seen(number, X86_64, argument, value);
                    let verdict = decide(&ours, &seen);
                    assert_eq!(
                        verdict,
                        decide(&theirs, &seen),
                        "call {number}, argument {argument}: {value:#x}"
                    );
                    match verdict {
                        libc::SECCOMP_RET_ALLOW => allowed += 1,
                        libc::SECCOMP_RET_KILL_PROCESS => killed += 1,
                        other => panic!("call {number}: {other:#x}"),
                    }
                }
            }
        }
        assert!(allowed > 10_000 && killed > 10_000, "{allowed} allowed, {killed} killed");
    }

    #[test]
    fn answers_what_is_missing_and_kills_what_is_foreign() {
        let program = Filter::new(PID).unwrap().program;
        for call in MISSING {
            let refused = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;
            assert_eq!(decide(&program, &seen(*call as u32, X86_64, 0, 0)), refused);
        }
        const X32: u32 = 0x4000_0000;
        for number in 0..600 {
            assert_eq!(decide(&program, &seen(number, I386, 0, 0)), libc::SECCOMP_RET_KILL_PROCESS);
            assert_eq!(decide(&program, &seen(number | X32, X86_64, 0, 0)), libc::SECCOMP_RET_KILL_PROCESS);
        }
    }

    #[test]
    fn is_short() {
        let calls = calls(PID);
        let (ours, theirs) = (Filter::new(PID).unwrap().program.len(), of_library(&calls).len());
        assert!(3 * ours < theirs, "{ours} instructions, the library's {theirs}");
    }
}
