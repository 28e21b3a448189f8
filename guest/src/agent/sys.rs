//! The system calls and instructions no safe crate offers: the only `unsafe` code of the agent.
//!
//! Called by the agent's modules alone. Each function is one call or a handful that belong together.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;

use forkd_abi::doorbell::{COMMAND_PORT, Command, DATA_PORT, FIRST_PORT, PORT_COUNT};
use forkd_abi::generation::{AT_TIME, HEAD_LEN, RECORD_MAX, record_len};

/// `RNDADDENTROPY` of linux/random.h: `_IOW('R', 3, int[2])`.
const RNDADDENTROPY: libc::c_ulong = 0x4008_5203;
/// `RNDRESEEDCRNG` of linux/random.h: `_IO('R', 7)`.
const RNDRESEEDCRNG: libc::c_ulong = 0x5207;

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Waits, without a limit, for any of `fds`.
pub fn poll(fds: &mut [libc::pollfd]) -> io::Result<()> {
    // SAFETY: the pointer and the length are those of one live, exclusively borrowed slice of pollfd.
    match check(unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) }) {
        Err(error) if error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ => Ok(()),
    }
}

/// Blocks `SIGCHLD` and returns a descriptor that becomes readable when a child has ended.
pub fn child_signals() -> io::Result<OwnedFd> {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set that the other calls then only read; all three get valid pointers, and
    // the descriptor signalfd returns is new and owned by nobody else.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), libc::SIGCHLD);
        check(libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), ptr::null_mut()))?;
        let fd = check(libc::signalfd(-1, set.as_ptr(), libc::SFD_CLOEXEC | libc::SFD_NONBLOCK))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// A listening vsock socket on `port`, open to every context id.
pub fn listen_vsock(port: u32, backlog: i32) -> io::Result<OwnedFd> {
    // SAFETY: sockaddr_vm is plain old data for which all zeros is a value; bind reads exactly its size; the descriptor
    // is new and owned by nobody else.
    unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        let fd = OwnedFd::from_raw_fd(check(libc::socket(libc::AF_VSOCK, kind, 0))?);
        let mut address: libc::sockaddr_vm = std::mem::zeroed();
        address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
        address.svm_cid = libc::VMADDR_CID_ANY;
        address.svm_port = port;
        let len = size_of::<libc::sockaddr_vm>() as libc::socklen_t;
        check(libc::bind(fd.as_raw_fd(), (&raw const address).cast(), len))?;
        check(libc::listen(fd.as_raw_fd(), backlog))?;
        Ok(fd)
    }
}

/// Brings the loopback interface up.
pub fn loopback_up() -> io::Result<()> {
    // SAFETY: ifreq is plain old data for which all zeros is a value; the ioctl reads a NUL-terminated name and the
    // flags out of it, both set, and writes nothing.
    unsafe {
        let fd = OwnedFd::from_raw_fd(check(libc::socket(
            libc::AF_INET,
            libc::SOCK_DGRAM | libc::SOCK_CLOEXEC,
            0,
        ))?);
        let mut request: libc::ifreq = std::mem::zeroed();
        request.ifr_name[0] = b'l' as c_char;
        request.ifr_name[1] = b'o' as c_char;
        request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        check(libc::ioctl(fd.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request))?;
    }
    Ok(())
}

/// Has a reader of the socket `fd` sleep until `bytes` are there, or the other side has ended.
pub fn wake_reader_at(fd: BorrowedFd<'_>, bytes: libc::c_int) -> io::Result<()> {
    // SAFETY: the option is an int, and its length is told.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_RCVLOWAT,
            (&raw const bytes).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    })?;
    Ok(())
}

/// Keeps freed memory instead of giving it back to the kernel: a page fault costs 1.2 ms on kvm_pvm.
pub fn keep_freed_memory() {
    // SAFETY: mallopt only changes the allocator's thresholds. A refusal (0) leaves the defaults, which is harmless.
    unsafe {
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 << 20);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 4 << 20);
    }
}

/// Mixes `entropy` into the kernel's pool, credited or not, and makes the generator use it now.
pub fn add_entropy<const N: usize>(
    urandom: BorrowedFd<'_>,
    entropy: &[u8; N],
    credit: bool,
) -> io::Result<()> {
    /// `struct rand_pool_info` of linux/random.h with room for what is added.
    #[repr(C)]
    struct PoolInfo<const N: usize> {
        entropy_count: libc::c_int,
        buf_size: libc::c_int,
        buf: [u8; N],
    }
    let len = N as libc::c_int;
    let info = PoolInfo { entropy_count: if credit { 8 * len } else { 0 }, buf_size: len, buf: *entropy };
    // SAFETY: RNDADDENTROPY reads the two ints and then `buf_size` bytes, all inside `info`; RNDRESEEDCRNG takes none.
    unsafe {
        check(libc::ioctl(urandom.as_raw_fd(), RNDADDENTROPY, &raw const info))?;
        check(libc::ioctl(urandom.as_raw_fd(), RNDRESEEDCRNG))?;
    }
    Ok(())
}

/// Access to the doorbell's ports from this process, given back on drop: programs it starts afterwards have none.
pub struct IoPorts(());

impl IoPorts {
    /// Asks the kernel for the ports; needs `CAP_SYS_RAWIO` and a kernel with `CONFIG_X86_IOPL_IOPERM`.
    pub fn open() -> io::Result<Self> {
        ioperm(true)?;
        Ok(Self(()))
    }

    /// Rings one command.
    pub fn ring(&self, command: Command) {
        // SAFETY: `self` proves ioperm granted the port; the instruction touches neither memory nor flags.
        unsafe {
            std::arch::asm!("out dx, al", in("dx") COMMAND_PORT, in("al") command as u8,
                options(nomem, nostack, preserves_flags));
        }
    }

    /// Rings "snapshot here", and as the next I/O of whoever continues from it, "resumed".
    pub fn ring_snapshot(&self) {
        // SAFETY: `self` proves ioperm granted the port. Without `nomem` the compiler keeps nothing in registers that
        // memory should hold, and a copy continues with exactly the registers and memory of the original.
        unsafe {
            std::arch::asm!(
                "out dx, al",
                "mov al, {resumed}",
                "out dx, al",
                resumed = const Command::Resumed as u8,
                in("dx") COMMAND_PORT,
                inout("al") Command::Snapshot as u8 => _,
                options(nostack, preserves_flags),
            );
        }
    }

    /// Reads the generation record into `buffer` and returns its part that is the record; all `0xff` where there is no
    /// doorbell.
    pub fn read_record<'a>(&self, buffer: &'a mut [u8; RECORD_MAX]) -> &'a [u8] {
        self.ring(Command::Rewind);
        let (head, environment) = buffer.split_at_mut(HEAD_LEN);
        self.read_data(head);
        let length = head.first_chunk().map_or(HEAD_LEN, record_len);
        self.read_data(&mut environment[..length - HEAD_LEN]);
        &buffer[..length]
    }

    /// The host's wall clock now, nanoseconds since 1970.
    pub fn host_time_ns(&self) -> u64 {
        self.ring(Command::Rewind);
        let mut start = [0; AT_TIME + 8];
        self.read_data(&mut start);
        start.last_chunk().map_or(0, |time| u64::from_le_bytes(*time))
    }

    fn read_data(&self, into: &mut [u8]) {
        // Written through before the string instruction, so that the page is present and private.
        into.fill(0xff);
        // SAFETY: `self` proves ioperm granted the port; the instruction writes exactly RCX bytes from RDI upwards
        // (the ABI keeps the direction flag clear), which is the live slice.
        unsafe {
            std::arch::asm!("rep insb", in("dx") DATA_PORT, inout("rcx") into.len() => _,
                inout("rdi") into.as_mut_ptr() => _, options(nostack, preserves_flags));
        }
    }
}

impl Drop for IoPorts {
    fn drop(&mut self) {
        // Cannot fail for ports that were granted; if it did, the process would merely keep them.
        let _ = ioperm(false);
    }
}

fn ioperm(on: bool) -> io::Result<()> {
    // SAFETY: ioperm takes three numbers and changes only what this process may do.
    let result = unsafe {
        libc::syscall(
            libc::SYS_ioperm,
            libc::c_ulong::from(FIRST_PORT),
            libc::c_ulong::from(PORT_COUNT),
            i64::from(on),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// What a program gets as 0, 1 and 2.
#[derive(Clone, Copy)]
pub enum Stdio<'a> {
    Descriptors([RawFd; 3]),
    /// A device, thrice; a terminal then controls the program's session.
    Device(&'a CStr),
}

/// The number of [`Program::report`] in the program.
pub const REPORT: RawFd = 3;

/// A program to start: its path, arguments, whole environment, directory and descriptors.
pub struct Program<'a> {
    pub path: &'a str,
    pub argv: &'a [String],
    pub env: &'a BTreeMap<String, String>,
    pub cwd: &'a str,
    pub stdio: Stdio<'a>,
    /// What it gets as [`REPORT`].
    pub report: Option<RawFd>,
}

/// Starts a program in a session of its own without copying page tables (`posix_spawn`: `CLONE_VM | CLONE_VFORK`; a
/// `fork` costs 110 ms on kvm_pvm). Returns its process id, which is its process group too.
pub fn spawn(program: &Program<'_>) -> io::Result<i32> {
    let nul = |_| io::Error::new(io::ErrorKind::InvalidInput, "a NUL byte in a string for a program");
    let path = CString::new(program.path).map_err(nul)?;
    let cwd = CString::new(program.cwd).map_err(nul)?;
    let argv = program.argv.iter().map(|arg| CString::new(arg.as_str()));
    let argv = argv.collect::<Result<Vec<_>, _>>().map_err(nul)?;
    let env = program.env.iter().map(|(key, value)| CString::new(format!("{key}={value}")));
    let env = env.collect::<Result<Vec<_>, _>>().map_err(nul)?;
    let argv = null_terminated(&argv);
    let env = null_terminated(&env);

    let mut actions = SpawnActions::new()?;
    match program.stdio {
        Stdio::Descriptors(fds) => {
            for (target, fd) in (0..).zip(fds) {
                actions.dup2(fd, target)?;
            }
        }
        // The session is made before. Its leader's first terminal, opened without O_NOCTTY, becomes the one that
        // controls it.
        Stdio::Device(path) => {
            actions.open(0, path)?;
            actions.dup2(0, 1)?;
            actions.dup2(0, 2)?;
        }
    }
    if let Some(fd) = program.report {
        actions.dup2(fd, REPORT)?;
    }
    actions.chdir(&cwd)?;
    let attributes = SpawnAttributes::new()?;
    let mut pid = 0;
    // SAFETY: every pointer is to a live, initialised object; the two arrays are NULL-terminated arrays of
    // NUL-terminated strings that outlive the call.
    let code = unsafe {
        libc::posix_spawn(
            &raw mut pid,
            path.as_ptr(),
            &raw const actions.0,
            &raw const attributes.0,
            argv.as_ptr(),
            env.as_ptr(),
        )
    };
    spawn_result(code)?;
    Ok(pid)
}

/// Takes over the descriptor `fd` that this process was started with, and keeps it from programs that it starts.
pub fn inherited(fd: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: fcntl takes numbers and fails for a descriptor that is not open. The caller is a process that was started
    // with it for this purpose, and nothing else of it uses the number.
    unsafe {
        check(libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC))?;
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Lets a process not take the processor from whoever wakes it (`SCHED_BATCH`).
pub fn let_wakers_go_on(pid: i32) -> io::Result<()> {
    // SAFETY: sched_param is plain old data for which all zeros is a value, the one this policy wants; it is only read.
    check(unsafe {
        let parameters: libc::sched_param = std::mem::zeroed();
        libc::sched_setscheduler(pid, libc::SCHED_BATCH, &raw const parameters)
    })
    .map(drop)
}

/// posix_spawn and its relatives return the error number instead of setting `errno`.
fn spawn_result(code: libc::c_int) -> io::Result<()> {
    if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(code)) }
}

fn null_terminated(strings: &[CString]) -> Vec<*mut c_char> {
    strings.iter().map(|string| string.as_ptr().cast_mut()).chain([ptr::null_mut()]).collect()
}

struct SpawnActions(libc::posix_spawn_file_actions_t);

impl SpawnActions {
    fn new() -> io::Result<Self> {
        let mut actions = MaybeUninit::uninit();
        // SAFETY: init initialises the object it is given, and it is only read as such when init succeeded.
        unsafe {
            spawn_result(libc::posix_spawn_file_actions_init(actions.as_mut_ptr()))?;
            Ok(Self(actions.assume_init()))
        }
    }

    fn dup2(&mut self, fd: RawFd, target: RawFd) -> io::Result<()> {
        // SAFETY: the object is initialised; the numbers are only stored.
        spawn_result(unsafe { libc::posix_spawn_file_actions_adddup2(&raw mut self.0, fd, target) })
    }

    fn open(&mut self, target: RawFd, path: &CStr) -> io::Result<()> {
        // SAFETY: the object is initialised, and glibc copies the string.
        spawn_result(unsafe {
            libc::posix_spawn_file_actions_addopen(&raw mut self.0, target, path.as_ptr(), libc::O_RDWR, 0)
        })
    }

    fn chdir(&mut self, path: &CString) -> io::Result<()> {
        // SAFETY: the object is initialised, and glibc copies the string.
        spawn_result(unsafe { libc::posix_spawn_file_actions_addchdir_np(&raw mut self.0, path.as_ptr()) })
    }
}

impl Drop for SpawnActions {
    fn drop(&mut self) {
        // SAFETY: the object is initialised and not used again.
        unsafe { libc::posix_spawn_file_actions_destroy(&raw mut self.0) };
    }
}

struct SpawnAttributes(libc::posix_spawnattr_t);

impl SpawnAttributes {
    /// A new session, no blocked signals, and SIGPIPE (which Rust ignores) as a program expects it.
    fn new() -> io::Result<Self> {
        let mut attributes = MaybeUninit::uninit();
        let mut signals = MaybeUninit::uninit();
        // SAFETY: both init functions initialise the object they are given before anything reads it; the setters copy.
        unsafe {
            spawn_result(libc::posix_spawnattr_init(attributes.as_mut_ptr()))?;
            let mut this = Self(attributes.assume_init());
            libc::sigemptyset(signals.as_mut_ptr());
            spawn_result(libc::posix_spawnattr_setsigmask(&raw mut this.0, signals.as_ptr()))?;
            libc::sigaddset(signals.as_mut_ptr(), libc::SIGPIPE);
            spawn_result(libc::posix_spawnattr_setsigdefault(&raw mut this.0, signals.as_ptr()))?;
            let flags =
                libc::POSIX_SPAWN_SETSID as i32 | libc::POSIX_SPAWN_SETSIGMASK | libc::POSIX_SPAWN_SETSIGDEF;
            spawn_result(libc::posix_spawnattr_setflags(&raw mut this.0, flags as libc::c_short))?;
            Ok(this)
        }
    }
}

impl Drop for SpawnAttributes {
    fn drop(&mut self) {
        // SAFETY: the object is initialised and not used again.
        unsafe { libc::posix_spawnattr_destroy(&raw mut self.0) };
    }
}
