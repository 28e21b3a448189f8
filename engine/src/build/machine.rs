//! Makes a snapshot: boots a kernel on a root disk, waits until the machine is warm, probes it, saves it, and restores
//! the result four times to record which pages a fork touches ([`recording`]).

use crate::build::recipe::{Probe, Rehearse};
use crate::fork::agent::ClientError;
use crate::fork::scratch::Scratch;
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::snapshots::{self, MachineConfiguration, SnapshotError, file_error};
use forkd_abi::generation::Generation;
use forkd_abi::protocol::{Status, WARM_PARAMETER, WarmCommand, WorkerState};
use forkd_vmm::cgroup::Limits;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::{ImageId, MemoryLayout, PMEM_ALIGN, create_image};
use forkd_vmm::process::{MachineReport, MachineSpec, MachineStart};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

mod asking;
mod console;
mod error;
pub mod recording;
mod rig;

pub use error::{BuildError, BuildFailure};
use recording::TrialOptions;
pub use rig::Machines;
use rig::{BuildMachine, INTERRUPT_CHECK, PAGE, REQUEST_TIMEOUT, open};

/// How long a kernel may take from its first instruction to the agent. kvm_pvm needs 15 s when it is alone.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// What to build.
#[derive(Debug)]
pub struct MachineRequest<'a> {
    /// Guest kernel (vmlinux or bzImage).
    pub kernel: &'a Path,
    /// Initramfs for it.
    pub initrd: Option<&'a Path>,
    /// Root disk (EROFS), padded to 2 MiB.
    pub root_disk: &'a Path,
    /// Guest RAM, MiB.
    pub memory_mib: u64,
    /// Number of vCPUs.
    pub vcpus: u8,
    /// Warm command instead of the root disk's own.
    pub warm: Option<&'a WarmCommand>,
    /// How long services and the warm worker may take to be ready.
    pub ready_timeout: Duration,
    /// What is done before the machine is asked.
    pub rehearse: &'a Rehearse,
    /// What proves the warm state. While the trace is recorded, the first is asked.
    pub probes: &'a [Probe],
    /// forkd's directories.
    pub paths: &'a Paths,
    /// Scratch disk.
    pub scratch: Scratch<'a>,
    /// A second console, /dev/hvc0.
    pub second_console: bool,
    /// Ends the build when set.
    pub interrupt: &'a Interrupt,
}

/// Where a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BuildStep {
    /// The kernel boots.
    Boot,
    /// Services and the warm command start.
    Warm,
    /// What copies will do first is done.
    Rehearse,
    /// The probe runs.
    Probe,
    /// Memory and state are saved.
    Save,
    /// The snapshot is restored to record its trace.
    Trace,
}

/// Builds a snapshot into the directory `into`: all its files but the manifest.
pub fn build(
    machines: &Machines,
    request: &MachineRequest<'_>,
    into: &Path,
    mut step: impl FnMut(BuildStep),
) -> Result<MachineConfiguration, BuildFailure> {
    // The machine boots from the snapshot's own copy: padded to whole regions, and nobody else's to change.
    let root_disk_path = into.join(snapshots::ROOT_DISK);
    copy_sparse(&open(request.root_disk)?, &root_disk_path, PMEM_ALIGN)
        .map_err(file_error("writing", &root_disk_path))?;
    let root_disk = open(&root_disk_path)?;
    let size = root_disk.metadata().map_err(file_error("reading the size of", &root_disk_path))?.len();
    let layout = MemoryLayout::new(request.memory_mib, size)?;
    let ram = create_image("forkd-ram", layout.ram_bytes())?;

    step(BuildStep::Boot);
    let machine = boot(machines, request, layout, &ram, &root_disk.into())?;
    let vmstate = warm_up(&machine, request, &mut step).map_err(|error| machine.failed(error))?;
    console::keep(&machine.console, &into.join(snapshots::CONSOLE))?;
    drop(machine);
    let configuration =
        MachineConfiguration::new(layout, request.vcpus, KvmKind::detect(), request.scratch.mib);
    save(into, &configuration, &File::from(vmstate), &File::from(ram))?;

    step(BuildStep::Trace);
    let MachineRequest { probes, paths, interrupt, .. } = *request;
    let probe = probes.first();
    recording::record(machines, &configuration, into, into, &TrialOptions { probe, paths, interrupt })?;
    Ok(configuration)
}

/// Starts the machine.
fn boot<'a>(
    machines: &Machines,
    request: &MachineRequest<'a>,
    layout: MemoryLayout,
    ram: &OwnedFd,
    root_disk: &OwnedFd,
) -> Result<BuildMachine<'a>, BuildError> {
    let kernel = open(request.kernel)?;
    let initrd = request.initrd.map(open).transpose()?;
    let record = Generation::original().encode()?;
    let (command_line, vcpus) = (command_line(request)?, request.vcpus);
    let (initrd_comes, second_console) = (initrd.is_some(), request.second_console);
    let start = MachineStart::Boot { command_line, vcpus, initrd: initrd_comes, second_console };
    let scratch_bytes = request.scratch.bytes();
    let limits = Limits::of(machines.name(), &layout);
    let spec = MachineSpec {
        layout,
        limits,
        record,
        mac: None,
        start,
        scratch_bytes,
        waits_at_first_instruction: false,
    };
    let images = images(&layout, ram, root_disk);
    let (scratch, interrupt) = (&request.scratch, request.interrupt);
    BuildMachine::spawn(machines, &spec, &images, &kernel, initrd.as_ref(), (scratch, interrupt))
}

/// From the first instruction to the snapshot, whose vmstate it returns.
fn warm_up(
    machine: &BuildMachine<'_>,
    request: &MachineRequest<'_>,
    step: &mut impl FnMut(BuildStep),
) -> Result<OwnedFd, BuildError> {
    machine.wait_for_ring("booting", BOOT_TIMEOUT, Ring::Booted)?;
    step(BuildStep::Warm);
    wait_until_warm(machine, request.ready_timeout)?;
    if *request.rehearse != Rehearse::default() {
        step(BuildStep::Rehearse);
        asking::rehearse(machine, request.rehearse)?;
    }
    if !request.probes.is_empty() {
        step(BuildStep::Probe);
        request.probes.iter().try_for_each(|probe| asking::prove(machine, probe))?;
    }
    step(BuildStep::Save);
    let asked = machine.agent("taking the snapshot")?.snapshot(REQUEST_TIMEOUT);
    asked.map_err(|source| BuildError::Agent { doing: "taking the snapshot", source })?;
    let vmstate = machine.wait("taking the snapshot", REQUEST_TIMEOUT, |report, mut fds| match report {
        MachineReport::Snapshot => fds.pop(),
        _ => None,
    })?;
    if let Some(disk) = &machine.scratch
        && request.scratch.is_written(disk)?
    {
        return Err(BuildError::ScratchWritten);
    }
    Ok(vmstate)
}

fn command_line(request: &MachineRequest<'_>) -> Result<String, BuildError> {
    let Some(warm) = request.warm else { return Ok(String::new()) };
    let parameter = warm.to_parameter().map_err(BuildError::WarmCommand)?;
    Ok(format!("{WARM_PARAMETER}={parameter}"))
}

fn images<'a>(layout: &MemoryLayout, ram: &'a OwnedFd, root_disk: &'a OwnedFd) -> Vec<&'a OwnedFd> {
    let all = [ram, root_disk].into_iter().zip(ImageId::ALL);
    all.filter(|(_, id)| layout.image_bytes(*id) > 0).map(|(fd, _)| fd).collect()
}

/// Asks once, and looks for Ctrl-C meanwhile. Each connection costs a guest whose kernel is emulated half a second: asked every
/// second, one that gets little of a processor does nothing but accept connections.
fn wait_until_warm(machine: &BuildMachine<'_>, timeout: Duration) -> Result<(), BuildError> {
    let doing = "warming up";
    let deadline = Instant::now() + timeout;
    loop {
        let agent = machine.agent(doing)?;
        let left = deadline.saturating_duration_since(Instant::now());
        let (tell, told) = mpsc::channel();
        // It ends with the connection, which ends with the machine at the latest.
        thread::spawn(move || tell.send(agent.status(true, left)));
        let answer = loop {
            machine.interrupt.check()?;
            match told.recv_timeout(INTERRUPT_CHECK) {
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break Err(ClientError::Timeout { after: left }),
                Ok(answer) => break answer,
            }
        };
        match answer {
            Ok(Status { worker: WorkerState::Failed { reason, stderr, .. }, .. }) => {
                return Err(BuildError::NotReady { reason, stderr });
            }
            Ok(Status { worker: WorkerState::Ready | WorkerState::None, .. }) => return Ok(()),
            Ok(_) if Instant::now() < deadline => {}
            Ok(_) | Err(ClientError::Timeout { .. }) => {
                return Err(BuildError::Timeout { doing, after: timeout });
            }
            Err(source) => return Err(BuildError::Agent { doing, source }),
        }
    }
}

fn save(
    into: &Path,
    configuration: &MachineConfiguration,
    vmstate: &File,
    ram: &File,
) -> Result<(), SnapshotError> {
    let path = into.join(snapshots::CONFIGURATION);
    let text = serde_json::to_vec_pretty(configuration).map_err(SnapshotError::Configuration)?;
    std::fs::write(&path, text).map_err(file_error("writing", &path))?;
    let path = into.join(snapshots::VMSTATE);
    copy_sparse(vmstate, &path, 1).map_err(file_error("writing", &path))?;
    let path = into.join(snapshots::MEMORY);
    copy_sparse(ram, &path, PAGE).map_err(file_error("writing", &path))
}

/// Copies a file, leaving holes for holes and blocks of zeros, its length rounded up to `unit`.
fn copy_sparse(from: &File, to: &Path, unit: u64) -> io::Result<()> {
    const BLOCK: usize = 256 * 1024;
    let length = from.metadata()?.len();
    let target = File::create(to)?;
    let mut block = vec![0; BLOCK];
    let mut offset = 0;
    loop {
        let data = match rustix::fs::seek(from, rustix::fs::SeekFrom::Data(offset)) {
            Ok(data) => data,
            // No more data.
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        offset = data / BLOCK as u64 * BLOCK as u64;
        let part = &mut block[..(length - offset).min(BLOCK as u64) as usize];
        from.read_exact_at(part, offset)?;
        if part.iter().any(|byte| *byte != 0) {
            target.write_all_at(part, offset)?;
        }
        offset += BLOCK as u64;
        if offset >= length {
            break;
        }
    }
    target.set_len(length.next_multiple_of(unit))
}
