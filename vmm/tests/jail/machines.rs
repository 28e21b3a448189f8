//! Real machines in their jail: started through the zygote, lazily filled, looked at from outside.

use crate::common::{SUM, image, layout, machine, printed, run_until};
use crate::trace;
use bytes::Bytes;
use forkd_vmm::cgroup::{self, Groups, Limits};
use forkd_vmm::channel::ChannelError;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::jail::{self, FILE_BYTES, Isolation, Jail, JailOptions, UffdUse};
use forkd_vmm::memory::{ImageId, create_image};
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::process::{
    MachineFiles, MachineProcess, MachineReport, MachineSpec, MachineStart, monotonic_ns,
};
use forkd_vmm::sys::{self, ConfinedFork, Forked, Lifetime};
use forkd_vmm::zygote::Zygote;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use rustix::thread::{CapabilitySet, UnshareFlags};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

const CHUNK: u64 = 64 * 1024;
const RAM: u64 = 8 << 20;
/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

struct Origin {
    full: OwnedFd,
}

impl PageSource for Origin {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        let mut bytes = vec![0; CHUNK as usize];
        rustix::io::pread(&self.full, &mut bytes, chunk.chunk * CHUNK)?;
        Ok(ChunkContent::Data(Bytes::from(bytes)))
    }

    fn unavailable(&self, chunk: ImageChunk, _waiting: &[ClientId], failure: SourceFailure) {
        panic!("chunk {chunk:?} of a file in memory: {failure}");
    }
}

/// A saved machine that sums its memory, and what forks of it need.
struct Bed {
    zygote: Zygote,
    origin: Arc<Origin>,
    pager: Pager,
    vmstate: OwnedFd,
    expected: u32,
    dir: tempfile::TempDir,
}

struct Child {
    process: MachineProcess,
    console: File,
    socket: PathBuf,
    rung: Vec<(Ring, u64)>,
}

impl Bed {
    fn new() -> Bed {
        // First: it forks, and the pager has threads.
        let zygote = Zygote::start().unwrap();
        let full = image(SUM);
        let mut expected = 0_u32;
        for page in 512..1536_u32 {
            rustix::io::pwrite(&full, &page.to_le_bytes(), u64::from(page) * 4096).unwrap();
            expected = expected.wrapping_add(page);
        }
        let (mut original, _console) = machine(&full, Vec::new());
        run_until(&mut original, Ring::SnapshotHere);
        let state = original.save().unwrap().encode().unwrap();
        let vmstate = create_image("vmstate", state.len() as u64).unwrap();
        rustix::io::pwrite(&vmstate, &state, 0).unwrap();
        let shape = ImageShape { bytes: RAM, chunk_bytes: CHUNK };
        let origin = Arc::new(Origin { full });
        let pager =
            Pager::new(&[(ImageId::Ram, shape)], origin.clone(), 2).expect("these tests need userfaultfd");
        Bed { zygote, origin, pager, vmstate, expected, dir: tempfile::tempdir().unwrap() }
    }

    fn spawn(&self, number: u64, lazy: bool) -> Child {
        let socket = self.dir.path().join(format!("{number}.vsock"));
        let vsock = UnixListener::bind(&socket).unwrap();
        let console = tempfile::tempfile().unwrap();
        let spec = MachineSpec {
            layout: layout(),
            limits: Limits::of(format!("test{}-{number}", std::process::id()), &layout()),
            record: Vec::new(),
            mac: None,
            scratch_bytes: 0,
            waits_at_first_instruction: false,
            start: MachineStart::Restore { lazy, zero_runs: Vec::new(), delta_runs: 0 },
        };
        let files = MachineFiles {
            images: vec![if lazy {
                self.pager.image_file(ImageId::Ram).unwrap()
            } else {
                self.origin.full.as_fd()
            }],
            start: self.vmstate.as_fd(),
            console: console.as_fd(),
            vsock: vsock.as_fd(),
            scratch: None,
            initrd: None,
            wire: None,
            delta: None,
        };
        let process = self.zygote.spawn(&spec, &files).unwrap();
        Child { process, console, socket, rung: Vec::new() }
    }

    /// Serves the child's memory and reads its reports until it rings `wanted`.
    fn follow(&self, child: &mut Child, number: u64, wanted: Ring) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match child.process.channel.receive_until::<MachineReport>(deadline).unwrap().expect("it reports")
            {
                (MachineReport::Attached { bases }, mut fds) => {
                    self.pager.attach(ClientId(number), fds.pop().unwrap(), bases).unwrap();
                }
                (MachineReport::Rang { ring, at_ns }, _) => {
                    child.rung.push((ring, at_ns));
                    if ring == wanted {
                        return;
                    }
                }
                (report, _) => panic!("{report:?}"),
            }
        }
    }
}

/// A guest runs, its memory comes, its console goes out, and it ends when told to.
pub fn runs() {
    let bed = Bed::new();
    let mut children: Vec<_> = (1..=4).map(|number| bed.spawn(number, true)).collect();
    for (number, child) in (1..).zip(&mut children) {
        bed.follow(child, number, Ring::Ready);
        let sum = printed(child.console.try_clone().unwrap());
        assert_eq!(u32::from_le_bytes(sum.try_into().unwrap()), bed.expected);
        child.process.kill();
    }
    for child in &children {
        let closed = child.process.channel.receive::<MachineReport>();
        assert!(matches!(closed, Err(ChannelError::Closed)), "killed on request is no failure: {closed:?}");
    }
}

fn status(path: &Path, field: &str) -> String {
    let text = fs::read_to_string(path).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default();
    line.trim_start_matches(':').split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What the kernel says of a running machine's process and of each of its threads.
pub fn is_nobody() {
    let bed = Bed::new();
    let mut children = [bed.spawn(1, true), bed.spawn(2, true)];
    for (number, child) in (1..).zip(&mut children) {
        bed.follow(child, number, Ring::Ready);
    }
    // Its vsock thread answers.
    let mut client = UnixStream::connect(&children[0].socket).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"nonsense\n").unwrap();
    let mut answer = [0; 5];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"ERROR");
    let [one, other] = children.each_ref().map(|child| PathBuf::from(format!("/proc/{}", child.process.pid)));
    let tasks: Vec<_> = fs::read_dir(one.join("task")).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert!(tasks.len() >= 2, "the vCPU and the vsock have a thread each: {tasks:?}");
    for task in tasks {
        let task = task.join("status");
        for capabilities in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(status(&task, capabilities), "0000000000000000", "{capabilities} of {task:?}");
        }
        assert_eq!((status(&task, "NoNewPrivs"), status(&task, "Seccomp")), ("1".to_owned(), "2".to_owned()));
        assert_eq!(status(&task, "Groups"), "");
    }
    let uids = [&one, &other].map(|process| status(&process.join("status"), "Uid"));
    assert!(uids.iter().all(|uids| !uids.split(' ').any(|uid| uid == "0")), "{uids:?}");
    assert_ne!(uids[0], uids[1], "siblings are different users");
    assert_eq!(status(&one.join("status"), "NSpid"), format!("{} 1", children[0].process.pid));
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&one), of(Path::new("/proc/self")), "{namespace}");
        assert_eq!(of(&one) == of(&other), namespace == "net", "{namespace}");
    }
    let root = fs::read_dir(one.join("root")).unwrap().count();
    assert_eq!(root, 0, "its root directory is empty");
    let mounts = fs::read_to_string(one.join("mountinfo")).unwrap();
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    let descriptors = fs::read_dir(one.join("fd")).unwrap();
    let targets: Vec<_> = descriptors.map(|fd| fs::read_link(fd.unwrap().path()).unwrap()).collect();
    let known = ["/dev/null", "/dev/kvm", "socket:", "anon_inode:"];
    let console = targets.iter().filter(|to| !known.iter().any(|k| to.to_string_lossy().starts_with(k)));
    let console: Vec<_> = console.collect();
    assert!(matches!(console[..], [path] if path.to_string_lossy().ends_with("(deleted)")), "{targets:?}");
    let limit = fs::read_to_string(one.join("limits")).unwrap();
    let files = limit.lines().find(|line| line.starts_with("Max open files")).unwrap();
    assert_eq!(files.split_whitespace().nth(3), Some("512"), "{files}");
    // The owner reads how much memory it takes.
    assert!(fs::read_to_string(one.join("smaps_rollup")).unwrap().contains("Pss:"));
}

/// A machine's process that does what the filter forbids is ended, and its owner is told why.
pub fn filtered() {
    let bed = Bed::new();
    let mut child = bed.spawn(1, true);
    bed.follow(&mut child, 1, Ring::Ready);
    trace::make_it_open_a_file(child.process.pid);
    let deadline = Instant::now() + PATIENCE;
    let report =
        child.process.channel.receive_until::<MachineReport>(deadline).unwrap().expect("a last report").0;
    let MachineReport::Failed { error } = report else { panic!("{report:?}") };
    assert_eq!(error, "the machine's process was ended by its system call filter");
    assert!(matches!(child.process.channel.receive::<MachineReport>(), Err(ChannelError::Closed)));
    // The zygote goes on.
    let mut next = bed.spawn(2, true);
    bed.follow(&mut next, 2, Ring::Ready);
}

/// The owner is killed: its machines and its zygote end.
pub fn orphaned() {
    let (mut read, write) = rustix::pipe::pipe().map(|(a, b)| (File::from(a), File::from(b))).unwrap();
    let owner = match sys::fork_process(Lifetime::BoundToParent).unwrap() {
        Forked::Child => {
            drop(read);
            let bed = Bed::new();
            let mut write = write;
            let mut children: Vec<_> = (1..=3).map(|number| bed.spawn(number, true)).collect();
            for (number, child) in (1..).zip(&mut children) {
                bed.follow(child, number, Ring::Ready);
                write.write_all(&child.process.pid.to_ne_bytes()).unwrap();
            }
            let zygote: i32 =
                status(&PathBuf::from(format!("/proc/{}/status", children[0].process.pid)), "PPid")
                    .parse()
                    .unwrap();
            write.write_all(&zygote.to_ne_bytes()).unwrap();
            drop(write);
            loop {
                std::thread::sleep(PATIENCE);
            }
        }
        Forked::Parent(owner) => owner,
    };
    drop(write);
    let mut pids = Vec::new();
    read.read_to_end(&mut pids).unwrap();
    let pids: Vec<_> = pids.chunks(4).map(|pid| i32::from_ne_bytes(pid.try_into().unwrap())).collect();
    assert_eq!(pids.len(), 4);
    let open =
        |pid: &i32| rustix::process::pidfd_open(Pid::from_raw(*pid).unwrap(), PidfdFlags::empty()).unwrap();
    let processes: Vec<_> = pids.iter().map(open).collect();
    rustix::process::kill_process(owner, Signal::KILL).unwrap();
    for process in processes {
        let timeout = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        let ended = rustix::event::poll(&mut [PollFd::new(&process, PollFlags::IN)], Some(&timeout));
        assert_eq!(ended, Ok(1), "a process outlived the owner of its machine");
    }
}

/// A process starts its life in the cgroup that was made for it; the cgroup goes with it, or with the cleanup.
pub fn grouped() {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let point = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    let point =
        point.into_iter().find(|fields| fields[2] == "cgroup2").map(|fields| PathBuf::from(fields[1]));
    let own =
        point.expect("this test needs a cgroup2 file system").join(format!("test-{}", std::process::id()));
    fs::create_dir(&own).expect("this test needs to make cgroups");
    let groups = Groups::below(&own).unwrap();
    let limits = Limits::of("abc-1".to_owned(), &layout());
    let directory = groups.path().join("abc-1");
    let sleeper = || {
        let group = groups.create(&limits).unwrap();
        let place = sys::ProcessPlace { pid_namespace: true, cgroup: Some(group.as_fd()) };
        match sys::fork_confined(place).unwrap() {
            ConfinedFork::Child => loop {
                std::thread::sleep(PATIENCE);
            },
            ConfinedFork::Parent { pid, pidfd } => (group, pid.as_raw_nonzero().get(), pidfd),
        }
    };
    let over = |pidfd: &OwnedFd| rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);

    let (group, pid, pidfd) = sleeper();
    let of_process = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    assert!(
        of_process.lines().any(|line| line.starts_with("0::") && line.ends_with("/forkd/abc-1")),
        "{of_process}"
    );
    assert_eq!(fs::read_to_string(directory.join("cgroup.procs")).unwrap().trim(), pid.to_string());
    assert!(groups.create(&limits).is_err(), "names are taken once");
    assert!(groups.remove(&group).is_err(), "somebody lives there");
    rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).unwrap();
    over(&pidfd).unwrap();
    groups.remove(&group).unwrap();
    assert!(!directory.exists());

    let (_group, _, pidfd) = sleeper();
    assert_eq!(cgroup::remove_dead(groups.path(), "ab").unwrap(), 0, "other forks' are left alone");
    assert_eq!(cgroup::remove_dead(groups.path(), "abc").unwrap(), 1);
    let signal = over(&pidfd).unwrap().and_then(|ended| ended.terminating_signal());
    assert_eq!((signal, directory.exists()), (Some(Signal::KILL.as_raw()), false));
    fs::remove_dir(groups.path()).unwrap();
    fs::remove_dir(own).unwrap();
}

/// Less privileged hosts: a root that may not make namespaces, and one that nobody may make namespaces on.
pub fn fewer_privileges() {
    let without_admin = || {
        let mut sets = rustix::thread::capabilities(None).unwrap();
        sets.effective.remove(CapabilitySet::SYS_ADMIN);
        sets.permitted.remove(CapabilitySet::SYS_ADMIN);
        rustix::thread::set_capabilities(None, sets).unwrap();
    };
    let in_process =
        |prepare: &dyn Fn(), expected: Isolation| match sys::fork_process(Lifetime::BoundToParent) {
            Ok(Forked::Child) => {
                prepare();
                assert_eq!(jail::try_out().unwrap(), expected);
                runs();
                sys::exit_now(0)
            }
            Ok(Forked::Parent(child)) => {
                let ended = rustix::process::waitid(WaitId::Pid(child), WaitIdOptions::EXITED).unwrap();
                assert_eq!(ended.and_then(|ended| ended.exit_status()), Some(0), "{expected:?}");
            }
            Err(error) => panic!("{error}"),
        };
    in_process(&without_admin, Isolation::UserNamespace);
    let without_namespaces = || {
        sys::unshare(UnshareFlags::NEWUSER).unwrap();
        fs::write("/proc/self/setgroups", "deny").unwrap();
        fs::write("/proc/self/uid_map", "0 0 1").unwrap();
        fs::write("/proc/self/gid_map", "0 0 1").unwrap();
        fs::write("/proc/sys/user/max_user_namespaces", "0").unwrap();
        without_admin();
    };
    in_process(&without_namespaces, Isolation::None);
}

/// Prints what the jail adds to a process, and how long machines take to their first instruction in it.
pub fn cost() {
    match sys::fork_process(Lifetime::BoundToParent).unwrap() {
        Forked::Child => {
            let started = monotonic_ns();
            let mut jail = Some(Jail::build().unwrap());
            println!("building the jail: {:.2} ms", ms_since(started));
            for count in [1, 100] {
                let mut median =
                    |jailed| median((0..11).map(|_| processes(&mut jail, count, jailed)).collect());
                let (plain, jailed) = (median(false), median(true));
                println!(
                    "{count} processes: {plain:.2} ms plain, {jailed:.2} ms in the jail (medians of 11)"
                );
            }
            sys::exit_now(0)
        }
        Forked::Parent(child) => {
            let ended = rustix::process::waitid(WaitId::Pid(child), WaitIdOptions::EXITED).unwrap();
            assert_eq!(ended.and_then(|ended| ended.exit_status()), Some(0));
        }
    }
    let bed = Bed::new();
    for (count, rounds) in [(1_u64, 20), (100, 5)] {
        let times = (0..rounds).map(|round| machines(&bed, round * count + count * 1000, count));
        println!(
            "{count} machines: {:.2} ms to the last first instruction (median)",
            median(times.collect())
        );
    }
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn ms_since(start_ns: u64) -> f64 {
    (monotonic_ns() - start_ns) as f64 / 1e6
}

/// Time until `count` new processes have said that they are where they should be.
fn processes(jail: &mut Option<Jail>, count: u32, jailed: bool) -> f64 {
    let started = monotonic_ns();
    let (said, say) = rustix::pipe::pipe().unwrap();
    let mut born = Vec::new();
    for number in 0..count {
        let place = jail.as_ref().filter(|_| jailed).map(|jail| jail.place(None)).unwrap_or_default();
        match sys::fork_confined(place).unwrap() {
            ConfinedFork::Child => {
                let cell = JailOptions { number, file_bytes: FILE_BYTES, uffd: UffdUse::Filling };
                let entered = jail.take().filter(|_| jailed).map(|jail| jail.enter(&cell, &[say.as_fd()]));
                let _opened = entered.transpose().unwrap();
                let _ = rustix::io::write(&say, b"x");
                loop {
                    std::thread::sleep(PATIENCE);
                }
            }
            ConfinedFork::Parent { pidfd, .. } => born.push(pidfd),
        }
    }
    for _ in 0..count {
        assert_eq!(rustix::io::read(&said, &mut [0]), Ok(1));
    }
    let time = ms_since(started);
    for pidfd in born {
        rustix::process::pidfd_send_signal(&pidfd, Signal::KILL).unwrap();
        rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED).unwrap();
    }
    time
}

fn machines(bed: &Bed, first: u64, count: u64) -> f64 {
    let started = monotonic_ns();
    let numbers = first..first + count;
    let mut children: Vec<_> = numbers.clone().map(|number| bed.spawn(number, false)).collect();
    for (number, child) in numbers.zip(&mut children) {
        bed.follow(child, number, Ring::Resumed);
    }
    let last = children.iter().flat_map(|child| &child.rung).map(|(_, at)| *at).max().unwrap();
    for child in &children {
        child.process.kill();
        while child.process.channel.receive::<MachineReport>().is_ok() {}
    }
    (last - started) as f64 / 1e6
}
