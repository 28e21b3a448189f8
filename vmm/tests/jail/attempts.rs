//! What a taken-over machine's process might try, one system call or a few each.

use rustix::io::Errno;
use std::ffi::CStr;

/// What an attempt is aimed at.
#[derive(Debug, Clone, Copy)]
pub struct Around {
    /// The owner's process id on the host.
    pub owner: i32,
    /// A sibling's.
    pub sibling: i32,
    /// An open /dev/kvm of its own.
    pub kvm: i32,
    /// Its console.
    pub console: i32,
    /// A descriptor that its zygote has and it was not given.
    pub foreign: i32,
}

/// One thing that is tried.
pub struct Attempt {
    /// What, for the table.
    pub what: &'static str,
    /// Does it; `Ok` means that it was possible.
    pub run: fn(&Around) -> Result<(), Errno>,
    /// Must be refused without the system call filter too.
    pub twice: bool,
}

const fn twice(what: &'static str, run: fn(&Around) -> Result<(), Errno>) -> Attempt {
    Attempt { what, run, twice: true }
}

const fn once(what: &'static str, run: fn(&Around) -> Result<(), Errno>) -> Attempt {
    Attempt { what, run, twice: false }
}

fn call(number: libc::c_long, arguments: &[usize]) -> Result<usize, Errno> {
    let mut all = [0; 6];
    all[..arguments.len()].copy_from_slice(arguments);
    let [a, b, c, d, e, f] = all;
    // SAFETY: pointers among the arguments are to live, terminated strings or large enough buffers of the callers; what
    // the call may do to this process is the point of the test, and the process ends right after it.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, f) };
    if result == -1 {
        let code = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        return Err(Errno::from_raw_os_error(code));
    }
    Ok(result as usize)
}

fn only(number: libc::c_long, arguments: &[usize]) -> Result<(), Errno> {
    call(number, arguments).map(|_| ())
}

fn text(text: &'static CStr) -> usize {
    text.as_ptr() as usize
}

fn open(path: &CStr, flags: i32) -> Result<(), Errno> {
    only(libc::SYS_openat, &[libc::AT_FDCWD as usize, path.as_ptr() as usize, flags as usize, 0o600])
}

fn of_process(pid: i32, file: &str) -> std::ffi::CString {
    std::ffi::CString::new(format!("/proc/{pid}/{file}")).expect("no zero byte")
}

fn socket(family: i32, kind: i32) -> Result<usize, Errno> {
    call(libc::SYS_socket, &[family as usize, kind as usize, 0])
}

/// Connects to port 22 of 127.0.0.1.
fn loopback() -> Result<(), Errno> {
    let socket = socket(libc::AF_INET, libc::SOCK_STREAM)?;
    let address: [u8; 16] = [2, 0, 0, 22, 127, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    match only(libc::SYS_connect, &[socket, address.as_ptr() as usize, address.len()]) {
        // Somebody was there to say no.
        Err(Errno::CONNREFUSED) => Ok(()),
        other => other,
    }
}

fn map(protection: i32) -> Result<usize, Errno> {
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    call(libc::SYS_mmap, &[0, 4096, protection as usize, flags as usize, usize::MAX, 0])
}

fn limit(pid: usize, resource: libc::__rlimit_resource_t) -> Result<(), Errno> {
    let more = [1_u64 << 20, 1 << 20];
    only(libc::SYS_prlimit64, &[pid, resource as usize, more.as_ptr() as usize, 0])
}

/// Everything that is tried.
pub const ATTEMPTS: &[Attempt] = &[
    twice("read /etc/passwd", |_| open(c"/etc/passwd", libc::O_RDONLY)),
    twice("read /proc/self/status", |_| open(c"/proc/self/status", libc::O_RDONLY)),
    twice("open the owner's /proc/PID/mem", |to| open(&of_process(to.owner, "mem"), libc::O_RDWR)),
    twice("open a sibling's /proc/PID/mem", |to| open(&of_process(to.sibling, "mem"), libc::O_RDWR)),
    twice("write to sysfs", |_| open(c"/sys/kernel/mm/transparent_hugepage/enabled", libc::O_WRONLY)),
    twice("open /dev/kvm again", |_| open(c"/dev/kvm", libc::O_RDWR)),
    twice("leave the root by `..`", |_| open(c"../../../etc/passwd", libc::O_RDONLY)),
    twice("create a file", |_| open(c"/file", libc::O_CREAT | libc::O_WRONLY)),
    twice("make a directory", |_| only(libc::SYS_mkdir, &[text(c"/directory"), 0o700])),
    twice("make a device node", |_| {
        only(libc::SYS_mknod, &[text(c"/disk"), (libc::S_IFBLK | 0o600) as usize, 0x800])
    }),
    twice("change the root", |_| only(libc::SYS_chroot, &[text(c".")])),
    twice("mount", |_| only(libc::SYS_mount, &[text(c"none"), text(c"/"), text(c"tmpfs"), 0, 0])),
    twice("mount by descriptor", |_| only(libc::SYS_fsopen, &[text(c"proc"), 0])),
    twice("unmount", |_| only(libc::SYS_umount2, &[text(c"/"), libc::MNT_DETACH as usize])),
    twice("open a file by its handle", |to| {
        let handle = [8_u32, 1, 2, 0];
        only(libc::SYS_open_by_handle_at, &[to.console as usize, handle.as_ptr() as usize, 0])
    }),
    twice("connect to 127.0.0.1", |_| loopback()),
    once("make a Unix socket", |_| socket(libc::AF_UNIX, libc::SOCK_STREAM).map(|_| ())),
    once("make a netlink socket", |_| socket(libc::AF_NETLINK, libc::SOCK_RAW).map(|_| ())),
    once("make a vsock socket", |_| socket(libc::AF_VSOCK, libc::SOCK_STREAM).map(|_| ())),
    twice("make a packet socket", |_| socket(libc::AF_PACKET, libc::SOCK_RAW).map(|_| ())),
    twice("connect to the owner's control socket", |_| {
        let socket = socket(libc::AF_UNIX, libc::SOCK_STREAM)?;
        let mut address = [0_u8; 110];
        address[0] = libc::AF_UNIX as u8;
        address[2..20].copy_from_slice(b"/run/forkd/control");
        only(libc::SYS_connect, &[socket, address.as_ptr() as usize, address.len()])
    }),
    once("fork", |_| match call(libc::SYS_clone, &[libc::SIGCHLD as usize, 0])? {
        0 => forkd_vmm::sys::exit_now(0),
        _ => Ok(()),
    }),
    once("fork with clone3", |_| {
        let arguments = [0_u64, 0, 0, 0, libc::SIGCHLD as u64, 0, 0, 0];
        match call(libc::SYS_clone3, &[arguments.as_ptr() as usize, size_of_val(&arguments)])? {
            0 => forkd_vmm::sys::exit_now(0),
            _ => Ok(()),
        }
    }),
    once("move memory", |_| {
        let address = map(libc::PROT_READ | libc::PROT_WRITE)?;
        only(libc::SYS_mremap, &[address, 4096, 8192, libc::MREMAP_MAYMOVE as usize])
    }),
    twice("execute /bin/sh", |_| only(libc::SYS_execve, &[text(c"/bin/sh"), 0, 0])),
    once("map memory as code", |_| map(libc::PROT_READ | libc::PROT_EXEC).map(|_| ())),
    once("turn memory into code", |_| {
        let address = map(libc::PROT_READ | libc::PROT_WRITE)?;
        only(libc::SYS_mprotect, &[address, 4096, (libc::PROT_READ | libc::PROT_EXEC) as usize])
    }),
    twice("trace the owner", |to| only(libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, to.owner as usize])),
    twice("trace a sibling", |to| {
        only(libc::SYS_ptrace, &[libc::PTRACE_SEIZE as usize, to.sibling as usize])
    }),
    twice("read a sibling's memory", |to| {
        let byte = [0_u8; 1];
        let part = [byte.as_ptr() as usize, 1];
        let part = part.as_ptr() as usize;
        only(libc::SYS_process_vm_readv, &[to.sibling as usize, part, 1, part, 1, 0])
    }),
    twice("signal the owner", |to| only(libc::SYS_kill, &[to.owner as usize, 0])),
    twice("signal a sibling", |to| only(libc::SYS_kill, &[to.sibling as usize, 0])),
    twice("signal a sibling's thread", |to| {
        only(libc::SYS_tgkill, &[to.sibling as usize, to.sibling as usize, 0])
    }),
    twice("signal everybody", |_| only(libc::SYS_kill, &[-1_isize as usize, 0])),
    twice("open a sibling's process", |to| only(libc::SYS_pidfd_open, &[to.sibling as usize, 0])),
    once("make a user namespace", |_| only(libc::SYS_unshare, &[libc::CLONE_NEWUSER as usize])),
    twice("make a network namespace", |_| only(libc::SYS_unshare, &[libc::CLONE_NEWNET as usize])),
    twice("become root", |_| only(libc::SYS_setresuid, &[0, 0, 0])),
    twice("become root's group", |_| only(libc::SYS_setresgid, &[0, 0, 0])),
    twice("regain capabilities", |_| {
        let (header, all) = ([0x2008_0522_u32, 0], [u32::MAX; 6]);
        only(libc::SYS_capset, &[header.as_ptr() as usize, all.as_ptr() as usize])
    }),
    twice("raise its limit of descriptors", |_| limit(0, libc::RLIMIT_NOFILE)),
    twice("change the owner's limits", |to| limit(to.owner as usize, libc::RLIMIT_NOFILE)),
    once("survive its owner", |_| only(libc::SYS_prctl, &[libc::PR_SET_PDEATHSIG as usize, 0])),
    once("open its memory to others", |_| only(libc::SYS_prctl, &[libc::PR_SET_DUMPABLE as usize, 1])),
    once("load a BPF program", |_| {
        let attributes = [0_u64; 16];
        only(libc::SYS_bpf, &[5, attributes.as_ptr() as usize, size_of_val(&attributes)])
    }),
    once("watch performance counters", |_| {
        let mut attributes = [0_u32; 32];
        attributes[1] = 128;
        only(libc::SYS_perf_event_open, &[attributes.as_ptr() as usize, 0, usize::MAX, usize::MAX, 0])
    }),
    once("make an io_uring", |_| {
        let parameters = [0_u64; 16];
        only(libc::SYS_io_uring_setup, &[1, parameters.as_ptr() as usize])
    }),
    twice("make a userfaultfd", |_| only(libc::SYS_userfaultfd, &[0])),
    twice("load a kernel module", |to| only(libc::SYS_finit_module, &[to.console as usize, text(c""), 0])),
    twice("reboot", |_| only(libc::SYS_reboot, &[0xfee1_dead, 0x2812_1969, 0x89ab_cdef, 0])),
    twice("use I/O ports", |_| only(libc::SYS_iopl, &[3])),
    twice("set the clock", |_| {
        let time = [0_u64; 2];
        only(libc::SYS_clock_settime, &[libc::CLOCK_REALTIME as usize, time.as_ptr() as usize])
    }),
    once("read the kernel's log", |_| {
        let buffer = [0_u8; 64];
        only(libc::SYS_syslog, &[3, buffer.as_ptr() as usize, buffer.len()])
    }),
    once("use keys", |_| only(libc::SYS_keyctl, &[0, -3_isize as usize, 1])),
    once("make shared memory by key", |_| only(libc::SYS_shmget, &[1, 4096, 0o1666])),
    once("change its filter", |_| {
        let program = [0_usize; 2];
        only(libc::SYS_seccomp, &[1, 0, program.as_ptr() as usize])
    }),
    once("push characters into a terminal", |to| {
        only(libc::SYS_ioctl, &[to.console as usize, libc::TIOCSTI as usize, text(c"x")])
    }),
    once("make a VFIO device of KVM's", |to| {
        let device = [4_u32, 0, 0];
        only(libc::SYS_ioctl, &[to.kvm as usize, 0xc00c_aee0, device.as_ptr() as usize])
    }),
    once("get signals for a descriptor", |to| {
        only(libc::SYS_fcntl, &[to.console as usize, libc::F_SETOWN as usize, 1])
    }),
    twice("use a descriptor that it was not given", |to| {
        only(libc::SYS_fcntl, &[to.foreign as usize, libc::F_GETFD as usize])
    }),
    twice("fill the disk by its console", |to| only(libc::SYS_ftruncate, &[to.console as usize, 1 << 30])),
    twice("hold 1000 descriptors", |_| {
        (0..1000).try_for_each(|_| only(libc::SYS_memfd_create, &[text(c"x"), 0]))
    }),
    twice("start 1000 threads", |_| {
        let sleep = || std::thread::sleep(std::time::Duration::from_secs(30));
        let start = || std::thread::Builder::new().stack_size(64 * 1024).spawn(sleep);
        (0..1000).try_for_each(|_| match start() {
            Ok(_) => Ok(()),
            Err(error) => Err(Errno::from_raw_os_error(error.raw_os_error().unwrap_or(0))),
        })
    }),
];
