//! The system calls that a machine's process may make; any other ends it with SIGSYS. One filter for all of its threads:
//! it is installed while there is one. Callers: `jail.rs`, tests.
//!
//! Whatever is opened, bound or connected was so before: there is no call here that takes the name of anything.

use kvm_bindings as kvm;
use libc::c_long;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen as Width, SeccompCmpOp as Compare,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};
use std::collections::BTreeMap;
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

/// The filter could not be made or installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// The rules do not make a filter.
    #[error("the system call filter cannot be built")]
    Rules(#[source] BackendError),
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
    libc::SYS_mremap,
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

/// Calls that the C library makes and does without, so they are no reason to end anybody. clone3(2): its flags lie in memory,
/// which a filter cannot read; threads are then started with clone(2). mremap(2): memory that is moved loses its
/// userfaultfd, and the kernel would fill what is missing of it with zeros, in the image that siblings share.
const MISSING: &[c_long] = &[libc::SYS_clone3, libc::SYS_mremap];

/// clone(2) flags of glibc's pthread_create: VM, FS, FILES, SIGHAND, THREAD, SYSVSEM, SETTLS, PARENT_SETTID,
/// CHILD_CLEARTID. A process, or a namespace, is made with others.
const THREAD_FLAGS: u64 = 0x3d_0f00;
/// KVM's ioctls (KVMIO of linux/kvm.h).
const KVM: u32 = 0xae;

const fn none(number: u32) -> u64 {
    ioctl_expr(_IOC_NONE, KVM, number, 0)
}

const fn read<T>(number: u32) -> u64 {
    ioctl_expr(_IOC_READ, KVM, number, size_of::<T>() as u32)
}

const fn write<T>(number: u32) -> u64 {
    ioctl_expr(_IOC_WRITE, KVM, number, size_of::<T>() as u32)
}

const fn both<T>(number: u32) -> u64 {
    ioctl_expr(_IOC_READ | _IOC_WRITE, KVM, number, size_of::<T>() as u32)
}

/// Requests of ioctl(2), numbers from linux/kvm.h. The filter compares one after the other, so the first are those that a
/// running machine makes.
const REQUESTS: &[u64] = &[
    none(0x80),                        // KVM_RUN
    write::<kvm::kvm_irq_level>(0x61), // KVM_IRQ_LINE
    read::<kvm::kvm_regs>(0x81),
    write::<kvm::kvm_regs>(0x82),
    read::<kvm::kvm_sregs>(0x83),
    write::<kvm::kvm_sregs>(0x84),
    both::<kvm::kvm_translation>(0x85),
    read::<kvm::kvm_vcpu_events>(0x9f), // KVM_GET_PIT2 has the same number and another size
    write::<kvm::kvm_vcpu_events>(0xa0),
    libc::FIONBIO,
    none(0x00), // KVM_GET_API_VERSION
    none(0x01), // KVM_CREATE_VM
    both::<kvm::kvm_msr_list>(0x02),
    none(0x03),                    // KVM_CHECK_EXTENSION
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
    write::<kvm::kvm_xsave>(0xa5),
    read::<kvm::kvm_xcrs>(0xa6),
    write::<kvm::kvm_xcrs>(0xa7),
    none(0xad), // KVM_KVMCLOCK_CTRL
    write::<kvm::kvm_msr_filter>(0xc6),
    read::<kvm::kvm_xsave>(0xcf), // KVM_GET_XSAVE2
];

/// Commands of fcntl(2): flags of a descriptor, and copies of it.
const FCNTLS: &[i32] = &[libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC];

/// The compiled filter.
#[derive(Debug)]
pub struct Filter {
    allowed: BpfProgram,
    refused: BpfProgram,
}

impl Filter {
    /// The filter of a process that knows itself by the id `own_pid`.
    pub fn new(own_pid: u32) -> Result<Filter, FilterError> {
        let kill = SeccompAction::KillProcess;
        let allowed = compile(rules(own_pid).map_err(FilterError::Rules)?, kill, SeccompAction::Allow)?;
        let missing = SeccompAction::Errno(libc::ENOSYS as u32);
        let calls = MISSING.iter().map(|call| (*call, Vec::new())).collect();
        let refused = compile(calls, SeccompAction::Allow, missing)?;
        Ok(Filter { allowed, refused })
    }

    /// Holds for this process from now on, and for all threads it will start.
    pub fn install(&self) -> Result<(), FilterError> {
        // The kernel takes the strictest answer of both. The strict one is last: it allows no further filter.
        seccompiler::apply_filter(&self.refused).map_err(FilterError::Install)?;
        seccompiler::apply_filter(&self.allowed).map_err(FilterError::Install)
    }
}

fn compile(
    rules: BTreeMap<c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<BpfProgram, FilterError> {
    SeccompFilter::new(rules, otherwise, matched, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(FilterError::Rules)
}

fn rules(own_pid: u32) -> Result<BTreeMap<c_long, Vec<SeccompRule>>, BackendError> {
    let always = [FILES, SOCKETS, SELF].concat().into_iter().map(|call| (call, Vec::new()));
    let mut rules: BTreeMap<_, _> = always.collect();
    let any = |argument, values: &[u64]| {
        values
            .iter()
            .map(|value| when(argument, Width::Dword, Compare::Eq, *value))
            .collect::<Result<Vec<_>, _>>()
    };
    rules.insert(libc::SYS_ioctl, any(1, REQUESTS)?);
    rules.insert(libc::SYS_fcntl, any(1, &FCNTLS.iter().map(|command| *command as u64).collect::<Vec<_>>())?);
    let no_code = Compare::MaskedEq(libc::PROT_EXEC as u64);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        rules.insert(call, vec![when(2, Width::Qword, no_code.clone(), 0)?]);
    }
    rules.insert(libc::SYS_clone, vec![when(0, Width::Qword, Compare::Eq, THREAD_FLAGS)?]);
    // Let through to be answered "no such call" by the other filter.
    rules.insert(libc::SYS_clone3, Vec::new());
    rules.insert(libc::SYS_tgkill, any(0, &[u64::from(own_pid)])?);
    rules.insert(libc::SYS_prctl, any(0, &[libc::PR_SET_NAME as u64])?);
    // How glibc and Rust ask about an open file. Another file would have to be in the root directory, which is empty.
    let of_descriptor = Compare::MaskedEq(libc::AT_EMPTY_PATH as u64);
    let flag = libc::AT_EMPTY_PATH as u64;
    rules.insert(libc::SYS_newfstatat, vec![when(3, Width::Dword, of_descriptor.clone(), flag)?]);
    rules.insert(libc::SYS_statx, vec![when(2, Width::Dword, of_descriptor, flag)?]);
    Ok(rules)
}

fn when(argument: u8, width: Width, compare: Compare, value: u64) -> Result<SeccompRule, BackendError> {
    SeccompRule::new(vec![SeccompCondition::new(argument, width, compare, value)?])
}
