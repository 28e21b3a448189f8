//! A machine's process, from both sides: what its owner tells it and hears from it, and what it does. Everything a
//! machine needs comes as file descriptors; its process opens no path.

mod files;

pub(crate) use files::take_channel;
pub use files::{Files, MachineFiles};

use crate::boot::BootFiles;
use crate::cgroup::Limits;
use crate::channel::{Channel, ChannelError};
use crate::devices::bus::Peripherals;
use crate::devices::doorbell::Ring;
use crate::devices::virtio::block::ScratchDisk;
use crate::devices::virtio::net::Link;
use crate::jail::filter::Filter;
use crate::jail::{Jail, JailDevices, JailError, JailOptions};
use crate::kvm::KvmKind;
use crate::machine::{AfterRing, Machine, MachineError, MachineShape, StopReason};
use crate::memory::{Delta, GuestMemory, ImageId, Mapping, MemoryError, MemoryLayout, Sharing, create_image};
use crate::pvm;
use crate::sys;
use crate::uffd::{Uffd, UffdError};
use crate::vmstate::{BODY_MAX, MachineState, VmstateError};
use files::Expected;
use forkd_abi::chain::chain;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::{AsFd, OwnedFd};
use rustix::process::Signal;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;

/// How a machine starts.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineStart {
    /// From a kernel. Its images are mapped shared, so that their owner can save them.
    Boot {
        /// More kernel command line.
        command_line: String,
        /// Number of vCPUs.
        vcpus: u8,
        /// An initramfs comes with the kernel.
        initrd: bool,
        /// It has a second console.
        second_console: bool,
    },
    /// From a snapshot. Its images are mapped privately.
    Restore {
        /// Images are incomplete: the machine's faults go to a pager.
        lazy: bool,
        /// Per image, ranges (start and end, bytes) known to be zero.
        zero_runs: Vec<Vec<(u64, u64)>>,
        /// Ranges of RAM that a file of its own has instead of the image ([`crate::memory::Delta`]); 0 without one.
        delta_runs: usize,
    },
}

/// What a machine's process is told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineSpec {
    /// Sizes of its memory.
    pub layout: MemoryLayout,
    /// What it may take of the host.
    pub limits: Limits,
    /// What the guest reads at its doorbell.
    pub record: Vec<u8>,
    /// The Ethernet address of its end of the wire that comes with it; none, and it has no link.
    pub mac: Option<[u8; 6]>,
    /// How it starts.
    pub start: MachineStart,
    /// Size of its scratch disk; 0 without one.
    pub scratch_bytes: u64,
    /// After its first instruction it waits for [`MachineOrder::Resume`].
    pub waits_at_first_instruction: bool,
}

impl MachineSpec {
    /// The images that the machine has.
    fn images(&self) -> impl Iterator<Item = ImageId> {
        ImageId::ALL.into_iter().filter(|id| self.layout.image_bytes(*id) > 0)
    }

    fn expected_files(&self) -> Expected {
        Expected {
            images: self.images().count(),
            scratch: self.scratch_bytes > 0,
            initrd: matches!(self.start, MachineStart::Boot { initrd: true, .. }),
            wire: self.mac.is_some(),
            delta: matches!(self.start, MachineStart::Restore { delta_runs: 1.., .. }),
        }
    }
}

/// What a machine's process says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineReport {
    /// Its userfaultfd (with the message), if it has one, and where it mapped each image.
    Attached {
        /// Addresses in its address space.
        bases: Vec<u64>,
    },
    /// The guest rang the doorbell.
    Rang {
        /// What it said.
        ring: Ring,
        /// When, on CLOCK_MONOTONIC, ns.
        at_ns: u64,
    },
    /// The machine stopped for a snapshot; its vmstate is in the file that comes with the message.
    Snapshot,
    /// The guest ended by itself (reset or power off).
    Ended,
    /// The machine cannot go on.
    Failed {
        /// Why, with causes.
        error: String,
    },
}

/// What a machine's process is told when it waits: after a snapshot, or held at its first instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineOrder {
    /// Run on.
    Resume,
}

/// A running machine's process, seen from its owner.
#[derive(Debug)]
pub struct MachineProcess {
    /// Process id.
    pub pid: i32,
    /// Its reports, and the way for orders.
    pub channel: Channel,
    /// The process itself: its id may be another's by the time that it is to be killed.
    pub(crate) pidfd: OwnedFd,
}

impl MachineProcess {
    /// Ends the machine at once, stopped or not.
    pub fn kill(&self) {
        self.signal(Signal::KILL);
    }

    /// Stops all threads of the machine: it takes no processor time until [`MachineProcess::resume`]. Its memory stays, and
    /// can be filled meanwhile.
    pub fn pause(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets a stopped machine go on.
    pub fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// Whether it has not ended: its id is its own.
    pub fn is_alive(&self) -> bool {
        let mut polled = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut polled, Some(&Timespec::default())), Ok(0))
    }

    fn signal(&self, signal: Signal) {
        // It may have ended by itself.
        let _ = rustix::process::pidfd_send_signal(&self.pidfd, signal);
    }
}

/// What a machine's process does, from its birth to its end. Nothing that a guest or a pack has a say in is looked at
/// before it is in its jail; the images' sizes, which are, the owner has checked.
pub(crate) fn run_machine(spec: MachineSpec, fds: Vec<OwnedFd>, jail: Jail, options: &JailOptions) -> ! {
    let confined = jail.confine(options, &fds.iter().map(AsFd::as_fd).collect::<Vec<_>>());
    let mut fds = fds.into_iter();
    let Some(channel) = take_channel(&mut fds) else { sys::exit_now(1) };
    end_on_panic(&channel);
    // Lives until the process ends, which no destructor survives: the vsock thread uses guest memory to the last, and
    // closing a VM takes tens of milliseconds.
    let mut machine = confined
        .map_err(ProcessError::from)
        .and_then(|confined| MachineRun::new(spec, confined, fds, &channel));
    let failure = machine.as_mut().map_or(None, |machine| machine.run(&channel).err());
    let (report, code) = match failure.as_ref().or(machine.as_ref().err()) {
        None => (MachineReport::Ended, 0),
        Some(error) => (MachineReport::Failed { error: chain(error) }, 1),
    };
    let _ = channel.send(&report, &[]);
    sys::exit_now(code)
}

/// A thread that panics would leave the machine half running; and a report of it on stderr would be for nobody.
fn end_on_panic(channel: &Channel) {
    let Ok(channel) = channel.as_fd().try_clone_to_owned().map(Channel::from_fd) else { return };
    std::panic::set_hook(Box::new(move |panic| {
        let error = format!("the monitor has a defect: {panic}");
        let _ = channel.send(&MachineReport::Failed { error }, &[]);
        sys::exit_now(1)
    }));
}

#[derive(Debug, thiserror::Error)]
enum ProcessError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error("the message that started this machine lacks a file")]
    Files,
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Machine(#[from] MachineError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Uffd(#[from] UffdError),
    #[error(transparent)]
    Snapshot(#[from] VmstateError),
    #[error("the vsock's listener cannot be used")]
    Listener(#[source] io::Error),
    #[error("the vmstate cannot be read")]
    ReadState(#[source] io::Error),
    #[error("the vmstate cannot be handed over")]
    WriteState(#[source] io::Error),
    #[error("the vmstate and its machine's configuration disagree on the memory layout")]
    Layout,
}

struct MachineRun {
    machine: Machine,
    vsock: UnixListener,
    waits_at_first_instruction: bool,
    /// Kept open: were the last descriptor closed, missing pages would become zero pages.
    _uffd: Option<Uffd>,
}

impl MachineRun {
    fn new(
        spec: MachineSpec,
        (opened, filter): (JailDevices, Filter),
        fds: impl Iterator<Item = OwnedFd>,
        channel: &Channel,
    ) -> Result<MachineRun, ProcessError> {
        let files = Files::decode(spec.expected_files(), fds).ok_or(ProcessError::Files)?;
        let JailDevices { hypervisor, uffd } = opened;
        let filling = matches!(spec.start, MachineStart::Restore { lazy: true, .. });
        let mappings = map_images(&spec, files.images, uffd.as_ref().filter(|_| filling))?;
        if let (Some(file), MachineStart::Restore { delta_runs, .. }, Some(ram)) =
            (files.delta, &spec.start, mappings.get(ImageId::Ram.index()))
        {
            Delta::from_file(file, ram.bytes(), *delta_runs)?.overlay(ram)?;
        }
        if hypervisor.kind() == KvmKind::Pvm {
            pvm::lengthen_turns();
        }
        // From here on nobody can change what the userfaultfd watches.
        filter.install().map_err(JailError::from)?;
        if let Some(uffd) = &uffd {
            let bases = mappings.iter().map(Mapping::address).collect();
            channel.send(&MachineReport::Attached { bases }, &[uffd.as_fd()])?;
        }
        let memory = GuestMemory::new(&spec.layout, mappings)?;
        let second_console = matches!(spec.start, MachineStart::Boot { second_console: true, .. });
        let (console, record) = (Some(File::from(files.console)), spec.record);
        let link = spec.mac.zip(files.wire).map(|(mac, wire)| Link { wire, mac });
        let scratch =
            files.scratch.map(|file| ScratchDisk { file: File::from(file), bytes: spec.scratch_bytes });
        let peripherals = Peripherals { console, record, scratch, link, second_console };
        let machine = match &spec.start {
            MachineStart::Boot { command_line, vcpus, .. } => {
                let shape = MachineShape { layout: spec.layout, vcpus: *vcpus };
                let (kernel, initrd) = (File::from(files.start), files.initrd.map(File::from));
                let mut boot = BootFiles { kernel, initrd };
                Machine::boot(hypervisor, shape, memory, &mut boot, command_line, peripherals)?
            }
            MachineStart::Restore { .. } => {
                let (start, mut bytes) = (File::from(files.start), Vec::new());
                read_shared(&start, &mut bytes).map_err(ProcessError::ReadState)?;
                // Closed before it is understood, for the reason that images are.
                drop(start);
                let state = MachineState::decode(&bytes)?;
                if state.layout != spec.layout {
                    return Err(ProcessError::Layout);
                }
                let machine = Machine::restore(hypervisor, &state, memory, peripherals)?;
                machine.renew_generation()?;
                machine
            }
        };
        Ok(MachineRun {
            machine,
            vsock: UnixListener::from(files.vsock),
            waits_at_first_instruction: spec.waits_at_first_instruction,
            _uffd: uffd,
        })
    }

    fn run(&mut self, channel: &Channel) -> Result<(), ProcessError> {
        let listener = self.vsock.try_clone().map_err(ProcessError::Listener)?;
        if let Some(backend) = self.machine.vsock_backend(listener)? {
            std::thread::spawn(move || backend.run());
        }
        if let Some(backend) = self.machine.net_backend()? {
            std::thread::spawn(move || backend.run());
        }
        let (mut rung, waits_at_first_instruction) = (Vec::new(), self.waits_at_first_instruction);
        loop {
            let mut lost = None;
            let stop = self.machine.run(|ring| {
                // A guest can ring as often as it likes; only the first of each kind is news.
                if ring != Ring::SnapshotHere && rung.contains(&ring) {
                    return AfterRing::Continue;
                }
                rung.push(ring);
                let report = MachineReport::Rang { ring, at_ns: monotonic_ns() };
                lost = channel.send(&report, &[]).err();
                if waits_at_first_instruction && ring == Ring::Resumed && lost.is_none() {
                    lost = channel.receive::<MachineOrder>().err();
                }
                if ring == Ring::SnapshotHere || lost.is_some() {
                    AfterRing::Stop
                } else {
                    AfterRing::Continue
                }
            })?;
            if let Some(error) = lost {
                return Err(error.into());
            }
            if stop == StopReason::Reset {
                return Ok(());
            }
            let state = self.machine.save()?.encode()?;
            let mut file = File::from(create_image("vmstate", state.len() as u64)?);
            file.write_all(&state).map_err(ProcessError::WriteState)?;
            channel.send(&MachineReport::Snapshot, &[file.as_fd()])?;
            let (MachineOrder::Resume, _) = channel.receive()?;
        }
    }
}

/// Reads a whole vmstate. Siblings share the file's description, and so its position: it is not used.
fn read_shared(file: &File, into: &mut Vec<u8>) -> io::Result<()> {
    into.resize(file.metadata()?.len().min(BODY_MAX as u64 + 4096) as usize, 0);
    file.read_exact_at(into, 0)
}

/// Now on CLOCK_MONOTONIC, ns: comparable between processes of one host.
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Maps a machine's images and closes them: its siblings have the same, and it must not be able to write to them.
fn map_images(
    spec: &MachineSpec,
    files: Vec<OwnedFd>,
    uffd: Option<&Uffd>,
) -> Result<Vec<Mapping>, ProcessError> {
    let (sharing, zero_runs) = match &spec.start {
        MachineStart::Boot { .. } => (Sharing::Shared, &[][..]),
        MachineStart::Restore { zero_runs, .. } => (Sharing::Private, &zero_runs[..]),
    };
    let mut mappings = Vec::new();
    for (position, (id, file)) in spec.images().zip(&files).enumerate() {
        // No machine writes to a root disk, and its file may be one that must not change.
        let sharing = if id == ImageId::RootDisk { Sharing::Private } else { sharing };
        let mapping = Mapping::of_file(file, spec.layout.image_bytes(id), sharing)?;
        if let Some(uffd) = uffd {
            uffd.register(&mapping)?;
        }
        let runs: Vec<_> =
            zero_runs.get(position).into_iter().flatten().map(|(start, end)| *start..*end).collect();
        mapping.overlay_zero(&runs)?;
        mappings.push(mapping);
    }
    Ok(mappings)
}
