//! The jail of a machine's process: what a guest that has taken its monitor over finds around itself.
//!
//! The zygote builds it once (a root directory with nothing in it, an empty network, open devices, the compiled
//! filter); every machine's process then enters it: namespaces of its own, a user of its own, no capabilities, small
//! limits, none but its own descriptors and, last, the system call filter. Everything a guest can influence is read
//! after that.

pub mod filter;
mod program;

use crate::channel::{Channel, ChannelError};
use crate::kvm::{Hypervisor, KvmError, KvmKind};
use crate::sys::{self, ForkError, Forked, Lifetime};
use crate::uffd::{Uffd, UffdDevice, UffdError};
use filter::{Filter, FilterError};
use forkd_abi::chain::chain;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MountPropagationFlags, UnmountFlags};
use rustix::process::{DumpableBehavior, Gid, Resource, Rlimit, Uid, WaitId, WaitIdOptions};
use rustix::thread::{CapabilitySet, CapabilitySets, UnshareFlags};
use serde::{Deserialize, Serialize};
use std::io;

/// Namespaces that every machine has for itself, beside its pid namespace: 0.03 ms a machine together.
const PER_MACHINE: UnshareFlags = UnshareFlags::NEWNS.union(UnshareFlags::NEWIPC).union(UnshareFlags::NEWUTS);
/// Namespaces that the machines of one fork share. One network each would cost 0.4 ms a machine; nothing is in it, and
/// what a machine may use of a network comes as an open descriptor.
const PER_FORK: UnshareFlags = PER_MACHINE.union(UnshareFlags::NEWNET);
/// First of the user ids that machines get: above those that distributions and containers hand out.
const FIRST_UID: u32 = 1 << 30;
/// Machines of one fork with different user ids; a fork has at most 1000.
const UIDS_PER_FORK: u32 = 1024;
/// Forks with different ranges of user ids.
const UID_RANGES: u32 = 1 << 20;
/// User and group of machines where there is no choice of ids.
const NOBODY: u32 = 65534;
/// Most descriptors a machine holds at once: 256 vsock streams, and room for its files and devices.
const DESCRIPTORS: u64 = 512;
/// Most threads of a machine: vCPUs, devices, and KVM's own workers.
const THREADS: u64 = 64;
/// Largest file that a machine writes, bytes: its console (4 MiB and a line) or its saved state.
pub const FILE_BYTES: u64 = 8 << 20;
/// Highest capability number that is tried.
const LAST_CAPABILITY: u32 = 63;

/// A jail could not be built or entered.
#[derive(Debug, thiserror::Error)]
pub enum JailError {
    /// A step was refused.
    #[error("the jail of a machine's process is incomplete: {step} failed")]
    Step {
        /// What was tried.
        step: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// /dev/kvm.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// /dev/userfaultfd.
    #[error(transparent)]
    Uffd(#[from] UffdError),
    /// The filter.
    #[error(transparent)]
    Filter(#[from] FilterError),
    /// The process that tried it out.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// It did not answer.
    #[error("the process that tried the jail out says nothing")]
    Silent(#[from] ChannelError),
    /// It failed there.
    #[error("{error}")]
    Elsewhere {
        /// Why, with causes.
        error: String,
    },
}

/// Builds a jail in a process of its own, to see what this host lets this user have. Must be called before this process
/// starts any thread.
pub fn try_out() -> Result<Isolation, JailError> {
    let (ours, theirs) = Channel::pair()?;
    match sys::fork_process(Lifetime::BoundToParent)? {
        Forked::Child => {
            let built = Jail::build().map(|jail| jail.isolation());
            let _ = theirs.send(&built.map_err(|error| chain(&error)), &[]);
            sys::exit_now(0)
        }
        Forked::Parent(child) => {
            drop(theirs);
            let answer = ours.receive::<Result<Isolation, String>>();
            let _ = rustix::process::waitid(WaitId::Pid(child), WaitIdOptions::EXITED);
            answer?.0.map_err(|error| JailError::Elsewhere { error })
        }
    }
}

fn step<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> JailError {
    move |source| JailError::Step { step, source: source.into() }
}

/// What of the jail this host lets this user have. The filter, the limits and the lack of privileges are always there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Isolation {
    /// Own namespaces and a user of its own, by the capabilities of whoever runs forkd.
    Privileged,
    /// Own namespaces, inside a user namespace: outside of them it is the user who runs forkd.
    UserNamespace,
    /// No namespaces: neither capabilities nor user namespaces are to be had.
    None,
}

/// Who machines run as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Users {
    /// Each as another user, counted from this id.
    From(u32),
    /// All as this one.
    One(u32),
    /// As whoever runs forkd.
    Unchanged,
}

/// The prepared jail. See the module's description.
#[derive(Debug)]
pub struct Jail {
    isolation: Isolation,
    users: Users,
    zygote: OwnedFd,
    hypervisor: Hypervisor,
    uffd: Result<UffdDevice, UffdError>,
    filter: Option<Filter>,
}

/// What distinguishes one machine's jail.
#[derive(Debug, Clone, Copy)]
pub struct JailOptions {
    /// Counted from 0 in its fork.
    pub number: u32,
    /// Largest file that its process may write, bytes; [`FILE_BYTES`] unless it has a disk to write to.
    pub file_bytes: u64,
    /// What it has a userfaultfd for.
    pub uffd: UffdUse,
}

/// What a machine's process has a userfaultfd for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UffdUse {
    /// It has none.
    None,
    /// Its owner may want to know what it writes to. It goes on without where there is none to be had.
    Tracking,
    /// Its memory is filled on demand.
    Filling,
}

/// What was opened for a machine before its process lost the means to.
#[derive(Debug)]
pub struct JailDevices {
    /// /dev/kvm.
    pub hypervisor: Hypervisor,
    /// As [`JailOptions::uffd`] says.
    pub uffd: Option<Uffd>,
}

impl Jail {
    /// Builds the jail around the calling process, which from then on reaches no file by its path. It must have one
    /// thread, and keeps the capabilities that [`Jail::enter`] needs.
    pub fn build() -> Result<Jail, JailError> {
        let hypervisor = Hypervisor::open(KvmKind::detect())?;
        let uffd = UffdDevice::open();
        // Where the kernel's clock lies in memory is looked up once, in a way that the filter forbids.
        let _ = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        sys::keep_allocator_from_files();
        let zygote = sys::own_pidfd().map_err(step("opening the zygote's process"))?;
        rustix::thread::set_no_new_privs(true).map_err(step("forswearing privileges"))?;
        let held = rustix::thread::capabilities(None).map_err(step("reading capabilities"))?.effective;
        let isolation = leave_namespaces(held)?;
        // A user namespace of an ordinary user has one user in it.
        let choose = isolation != Isolation::UserNamespace
            && held.contains(CapabilitySet::SETUID | CapabilitySet::SETGID);
        let users = if choose { users() } else { Users::Unchanged };
        if isolation != Isolation::None {
            rustix::system::sethostname(b"machine").map_err(step("hiding the host's name"))?;
            enter_empty_root()?;
        }
        drop_bounding_set();
        // In its own pid namespace every machine is process 1. Otherwise the filter has to name its real id.
        let filter = (isolation != Isolation::None).then(|| Filter::new(1)).transpose()?;
        Ok(Jail { isolation, users, zygote, hypervisor, uffd, filter })
    }

    /// What this host lets this user have.
    pub fn isolation(&self) -> Isolation {
        self.isolation
    }

    /// Where machines' processes are to be forked.
    pub fn place<'a>(&self, cgroup: Option<BorrowedFd<'a>>) -> sys::ProcessPlace<'a> {
        sys::ProcessPlace { pid_namespace: self.isolation != Isolation::None, cgroup }
    }

    /// Shuts this process, just forked, into the jail with nothing but `files`.
    pub fn enter(self, options: &JailOptions, files: &[BorrowedFd<'_>]) -> Result<JailDevices, JailError> {
        let (opened, filter) = self.confine(options, files)?;
        filter.install()?;
        Ok(opened)
    }

    /// Everything that [`Jail::enter`] does but the filter, which the caller installs.
    pub fn confine(
        self,
        options: &JailOptions,
        files: &[BorrowedFd<'_>],
    ) -> Result<(JailDevices, Filter), JailError> {
        let Jail { isolation, users, zygote, hypervisor, uffd: device, filter } = self;
        // Without the device only a capability gives a userfaultfd, so it comes before they go.
        let open = || Uffd::from_device(&device?);
        let uffd = match options.uffd {
            UffdUse::None => None,
            UffdUse::Tracking => open().ok(),
            UffdUse::Filling => Some(open()?),
        };
        if isolation != Isolation::None {
            sys::unshare(PER_MACHINE).map_err(step("leaving namespaces"))?;
        }
        sys::leave_keyring().map_err(step("leaving the session keyring"))?;
        limit_resources(options, users)?;
        become_nobody(options, users)?;
        sys::bind_to_parent(&zygote).map_err(step("binding it to its parent"))?;
        drop(zygote);
        let mut kept = files.to_vec();
        kept.push(hypervisor.as_fd());
        kept.extend(uffd.as_ref().map(Uffd::as_fd));
        sys::close_all_but(&kept).map_err(step("closing descriptors"))?;
        let filter = match filter {
            Some(filter) => filter,
            None => Filter::new(rustix::process::getpid().as_raw_nonzero().get() as u32)?,
        };
        Ok((JailDevices { hypervisor, uffd }, filter))
    }
}

/// Leaves the host's namespaces for those of the fork.
fn leave_namespaces(held: CapabilitySet) -> Result<Isolation, JailError> {
    let needed = CapabilitySet::SYS_ADMIN | CapabilitySet::SETUID | CapabilitySet::SETGID;
    if held.contains(needed) && sys::unshare(PER_FORK).is_ok() {
        return Ok(Isolation::Privileged);
    }
    let (uid, gid) = (rustix::process::getuid(), rustix::process::getgid());
    if sys::unshare(UnshareFlags::NEWUSER | PER_FORK).is_err() {
        return Ok(Isolation::None);
    }
    let map = |file: &str, text: String| std::fs::write(format!("/proc/self/{file}"), text);
    map("setgroups", "deny".to_owned())
        .and_then(|()| map("uid_map", format!("{NOBODY} {} 1", uid.as_raw())))
        .and_then(|()| map("gid_map", format!("{NOBODY} {} 1", gid.as_raw())))
        .map_err(step("mapping this user into a user namespace"))?;
    Ok(Isolation::UserNamespace)
}

/// Which users there are to choose from: containers have fewer than the host.
fn users() -> Users {
    let range = rustix::process::getpid().as_raw_nonzero().get() as u32 % UID_RANGES;
    let first = FIRST_UID + range * UIDS_PER_FORK;
    let has = |first: u32, count: u32| {
        ["/proc/self/uid_map", "/proc/self/gid_map"]
            .iter()
            .all(|map| std::fs::read_to_string(map).is_ok_and(|text| maps(&text, first, count)))
    };
    if has(first, UIDS_PER_FORK) {
        Users::From(first)
    } else if has(NOBODY, 1) {
        Users::One(NOBODY)
    } else {
        Users::Unchanged
    }
}

/// Whether a map (user_namespaces(7)) has `count` ids from `first` on, in one range.
fn maps(text: &str, first: u32, count: u32) -> bool {
    text.lines().any(|line| {
        let mut fields = line.split_whitespace().map(str::parse::<u64>);
        let (Some(Ok(start)), Some(Ok(_)), Some(Ok(length))) = (fields.next(), fields.next(), fields.next())
        else {
            return false;
        };
        let (first, end) = (u64::from(first), u64::from(first) + u64::from(count));
        start <= first && end <= start.saturating_add(length)
    })
}

/// Puts an empty, read-only directory in the place of the host's files.
fn enter_empty_root() -> Result<(), JailError> {
    // Any directory does: it is hidden a moment later. This one is there, or the check for threads had failed.
    let over = c"/proc";
    rustix::mount::mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)
        .map_err(step("cutting mounts off"))?;
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    rustix::mount::mount(c"none", over, c"tmpfs", flags, c"size=4k,nr_inodes=1,mode=555")
        .map_err(step("mounting an empty root"))?;
    rustix::process::chdir(over).map_err(step("entering the empty root"))?;
    match rustix::process::pivot_root(c".", c".") {
        Ok(()) => {
            rustix::mount::unmount(c".", UnmountFlags::DETACH).map_err(step("detaching the host's files"))?;
        }
        // The host runs from its initramfs, whose root cannot be left, only covered; nobody in here may look below.
        Err(Errno::INVAL) => {
            rustix::mount::mount_move(c".", c"/").map_err(step("covering the root"))?;
            rustix::process::chroot(c".").map_err(step("changing the root"))?;
        }
        Err(errno) => return Err(step("changing the root")(errno)),
    }
    rustix::process::chdir(c"/").map_err(step("entering the empty root"))
}

/// Takes every capability out of reach of all that is forked from here.
fn drop_bounding_set() {
    for number in 0..=LAST_CAPABILITY {
        // Numbers that the kernel does not know are refused; without CAP_SETPCAP all are, and with no_new_privs set and
        // nothing to execute the bounding set is of no use to anybody.
        let capability = CapabilitySet::from_bits_retain(1 << number);
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
}

fn limit_resources(options: &JailOptions, users: Users) -> Result<(), JailError> {
    let mut limits = vec![
        // A core dump of a machine would hold the guest's memory.
        (Resource::Core, 0),
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Fsize, options.file_bytes),
        (Resource::Memlock, 0),
        (Resource::Msgqueue, 0),
        (Resource::Rtprio, 0),
        (Resource::Nice, 0),
    ];
    // The kernel counts by user, so this would count all of the user's processes otherwise.
    if matches!(users, Users::From(_)) {
        limits.push((Resource::Nproc, THREADS));
    }
    for (resource, most) in limits {
        let most = rustix::process::getrlimit(resource).maximum.map_or(most, |hard| hard.min(most));
        let limit = Rlimit { current: Some(most), maximum: Some(most) };
        rustix::process::setrlimit(resource, limit).map_err(step("limiting resources"))?;
    }
    Ok(())
}

fn become_nobody(options: &JailOptions, users: Users) -> Result<(), JailError> {
    // The group of whoever is signalled by group; its siblings would be in it.
    rustix::process::setsid().map_err(step("leaving the session"))?;
    let id = match users {
        Users::From(first) => Some(first + options.number % UIDS_PER_FORK),
        Users::One(id) => Some(id),
        Users::Unchanged => None,
    };
    if let Some(id) = id {
        let (uid, gid) = (Uid::from_raw(id), Gid::from_raw(id));
        rustix::thread::set_thread_groups(&[]).map_err(step("leaving groups"))?;
        rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("changing the group"))?;
        rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("changing the user"))?;
    }
    // Kernels without ambient capabilities have none to clear.
    let _ = rustix::thread::clear_ambient_capability_set();
    let none = CapabilitySet::empty();
    let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
    rustix::thread::set_capabilities(None, sets).map_err(step("giving up capabilities"))?;
    // No other process of the same user may look into it.
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(step("closing its memory to others"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn maps_of_users_are_read() {
        let host = "         0          0 4294967295\n";
        assert!(maps(host, FIRST_UID + (UID_RANGES - 1) * UIDS_PER_FORK, UIDS_PER_FORK));
        let container = "0 100000 65536\n";
        assert!(maps(container, NOBODY, 1));
        assert!(!maps(container, FIRST_UID, UIDS_PER_FORK));
        assert!(!maps("", NOBODY, 1));
        assert!(!maps("0 x 65536", NOBODY, 1));
    }
}
