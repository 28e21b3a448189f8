//! Makes a snapshot: boots a kernel on a root disk, waits until the machine is warm, probes it, saves it, and restores
//! the result four times to record which pages a fork touches ([`recording`]). Callers: `commands/build.rs`,
//! `commands/trace.rs`.

use crate::identity::IdentityError;
use crate::recipe::Probe;
use crate::run_dir::{RunDir, RunDirError};
use crate::scratch::Scratch;
use crate::snapshot::{self, Configuration, SnapshotError, file_error};
use crate::tools::{Interrupt, ToolError};
use forkd_fs::trace::TraceError;
use forkd_guest::client::{AgentClient, ClientError};
use forkd_guest::generation::{Generation, GenerationError};
use forkd_guest::protocol::{Answer, Status, WARM_PARAMETER, WarmCommand, WorkerState};
use forkd_vmm::cgroup::Limits;
use forkd_vmm::channel::ChannelError;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::{ImageId, MemoryError, MemoryLayout, PMEM_ALIGN, create_image};
use forkd_vmm::pager::PagerError;
use forkd_vmm::process::{MachineFiles, MachineProcess, MachineReport, MachineSpec, MachineStart};
use forkd_vmm::zygote::{SpawnError, Zygote};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

mod console;
pub mod recording;
use recording::Trials;

/// Unit of memory, bytes.
const PAGE: u64 = forkd_vmm::memory::PAGE_BYTES;
/// How long a kernel may take from its first instruction to the agent. kvm_pvm needs 15 s when it is alone.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a request that should be quick may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a wait looks for Ctrl-C.
const INTERRUPT_CHECK: Duration = Duration::from_millis(200);

/// What to build.
#[derive(Debug)]
pub struct Request<'a> {
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
    /// How long the warm worker may take to be ready.
    pub ready_timeout: Duration,
    /// Code whose answer proves the warm state.
    pub probe: Option<&'a Probe>,
    /// Scratch disk.
    pub scratch: Scratch<'a>,
    /// A second console, /dev/hvc0.
    pub second_console: bool,
    /// Ends the build when set.
    pub interrupt: &'a Interrupt,
}

/// A snapshot could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Files of the snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Starting a machine.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The machine's process is gone.
    #[error("the machine's process ended while {doing}")]
    Gone {
        /// What was waited for.
        doing: &'static str,
        /// Why it cannot be heard.
        #[source]
        source: ChannelError,
    },
    /// The machine failed.
    #[error("the machine failed while {doing}: {error}")]
    Failed {
        /// What was waited for.
        doing: &'static str,
        /// Why.
        error: String,
    },
    /// It took too long.
    #[error("{doing} took longer than {} s", after.as_secs())]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
    /// The agent does not answer.
    #[error("the guest's agent failed while {doing}")]
    Agent {
        /// What was asked.
        doing: &'static str,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// The worker did not become ready.
    #[error("the warm command is not ready: {reason}{}", stderr_part(stderr))]
    NotReady {
        /// What happened.
        reason: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// The probe's answer is wrong.
    #[error("the probe `{code}` answered {found}, not {expected}")]
    Probe {
        /// The code.
        code: String,
        /// What it answered.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// Its content would be lost.
    #[error(
        "the machine wrote to its scratch disk before the snapshot; copies start with an empty one, so prepare it in them"
    )]
    ScratchWritten,
    /// Recording the trace.
    #[error("the first restore of the new snapshot could not be served")]
    Pager(#[from] PagerError),
    /// The generation record.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// The trial's identity.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The warm command does not encode.
    #[error("the warm command cannot be passed on")]
    WarmCommand(#[source] serde_json::Error),
    /// Ctrl-C.
    #[error(transparent)]
    Interrupted(#[from] ToolError),
}

fn stderr_part(stderr: &str) -> String {
    if stderr.trim().is_empty() { String::new() } else { format!("; it wrote:\n{}", stderr.trim_end()) }
}

/// Where a build is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// The kernel boots.
    Boot,
    /// The warm command starts.
    Warm,
    /// The probe runs.
    Probe,
    /// Memory and state are saved.
    Save,
    /// The snapshot is restored to record its trace.
    Trace,
}

/// Why there is no snapshot, and what its machine, if there was one by then, said last.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: BuildError,
    /// The end of the machine's console, a guest's own words: control characters and all, at most a few lines; or empty.
    pub console: String,
}

impl<E: Into<BuildError>> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure { error: error.into(), console: String::new() }
    }
}

/// Where the machines of one command come from and where they live.
#[derive(Debug)]
pub struct Machines {
    zygote: Zygote,
    run_dir: Arc<RunDir>,
    started: AtomicUsize,
}

impl Machines {
    /// Their sockets and consoles will be in `run_dir`, which learns of their cgroups.
    pub fn new(zygote: Zygote, run_dir: Arc<RunDir>) -> Result<Machines, RunDirError> {
        match zygote.cgroups() {
            Ok(cgroups) => run_dir.note_cgroups(&cgroups.path)?,
            Err(error) => tracing::debug!(error = crate::error::chain(error), "machines get no cgroups"),
        }
        Ok(Machines { zygote, run_dir, started: AtomicUsize::new(0) })
    }

    /// The name of one more.
    fn name(&self) -> String {
        format!("{}-{}", self.run_dir.id(), self.started.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// A machine of this module: its process and the files it lives from.
struct Rig<'a> {
    process: MachineProcess,
    socket: PathBuf,
    console: PathBuf,
    scratch: Option<File>,
    interrupt: &'a Interrupt,
}

impl Drop for Rig<'_> {
    fn drop(&mut self) {
        self.process.kill();
    }
}

impl<'a> Rig<'a> {
    fn spawn(
        machines: &Machines,
        spec: &MachineSpec,
        images: &[&OwnedFd],
        start: &File,
        initrd: Option<&File>,
        (scratch, interrupt): (&Scratch<'_>, &'a Interrupt),
    ) -> Result<Rig<'a>, BuildError> {
        let (name, run_dir) = (&spec.limits.name, &machines.run_dir);
        let console_path = run_dir.console(name);
        let console = File::create(&console_path).map_err(file_error("creating", &console_path))?;
        let socket = run_dir.socket(name);
        let vsock = UnixListener::bind(&socket).map_err(file_error("binding", &socket))?;
        let scratch = scratch.create()?;
        let files = MachineFiles {
            images: images.iter().map(|image| image.as_fd()).collect(),
            start: start.as_fd(),
            console: console.as_fd(),
            vsock: vsock.as_fd(),
            scratch: scratch.as_ref().map(AsFd::as_fd),
            initrd: initrd.map(|file| file.as_fd()),
            tap: None,
        };
        let process = machines.zygote.spawn(spec, &files)?;
        Ok(Rig { process, socket, console: console_path, scratch, interrupt })
    }

    /// What ended its use, with its last words unless it was the user.
    fn failed(&self, error: BuildError) -> Failure {
        let console = match error {
            BuildError::Interrupted(_) => String::new(),
            _ => console::tail(&self.console),
        };
        Failure { error, console }
    }

    fn agent(&self, doing: &'static str) -> Result<AgentClient, BuildError> {
        AgentClient::connect(&self.socket, REQUEST_TIMEOUT)
            .map_err(|source| BuildError::Agent { doing, source })
    }

    /// Waits for a report that `wanted` accepts.
    fn wait<T>(
        &self,
        doing: &'static str,
        timeout: Duration,
        mut wanted: impl FnMut(MachineReport, Vec<OwnedFd>) -> Option<T>,
    ) -> Result<T, BuildError> {
        let deadline = Instant::now() + timeout;
        loop {
            let failed = |error: String| BuildError::Failed { doing, error };
            self.interrupt.check()?;
            let slice = deadline.min(Instant::now() + INTERRUPT_CHECK);
            match self.process.channel.receive_until::<MachineReport>(slice) {
                Ok(None) if Instant::now() < deadline => {}
                Ok(Some((MachineReport::Failed { error }, _))) => return Err(failed(error)),
                Ok(Some((MachineReport::Ended, _))) => {
                    return Err(failed("the guest reset itself".to_owned()));
                }
                Ok(Some((report, fds))) => {
                    if let Some(result) = wanted(report, fds) {
                        return Ok(result);
                    }
                }
                Ok(None) => return Err(BuildError::Timeout { doing, after: timeout }),
                Err(source) => return Err(BuildError::Gone { doing, source }),
            }
        }
    }

    /// Returns when it rang, on CLOCK_MONOTONIC, ns.
    fn wait_for_ring(&self, doing: &'static str, timeout: Duration, wanted: Ring) -> Result<u64, BuildError> {
        self.wait(doing, timeout, |report, _| match report {
            MachineReport::Rang { ring, at_ns } if ring == wanted => Some(at_ns),
            _ => None,
        })
    }
}

/// Builds a snapshot into the directory `into`: all its files but the manifest.
pub fn build(
    machines: &Machines,
    request: &Request<'_>,
    into: &Path,
    mut step: impl FnMut(Step),
) -> Result<Configuration, Failure> {
    // The machine boots from the snapshot's own copy: padded to whole regions, and nobody else's to change.
    let root_disk_path = into.join(snapshot::ROOT_DISK);
    copy_sparse(&open(request.root_disk)?, &root_disk_path, PMEM_ALIGN)
        .map_err(file_error("writing", &root_disk_path))?;
    let root_disk = open(&root_disk_path)?;
    let size = root_disk.metadata().map_err(file_error("reading the size of", &root_disk_path))?.len();
    let layout = MemoryLayout::new(request.memory_mib, size)?;
    let ram = create_image("forkd-ram", layout.ram_bytes())?;

    step(Step::Boot);
    let machine = boot(machines, request, layout, &ram, &root_disk.into())?;
    let vmstate = warm_up(&machine, request, &mut step).map_err(|error| machine.failed(error))?;
    console::keep(&machine.console, &into.join(snapshot::CONSOLE))?;
    drop(machine);
    let configuration = Configuration::new(layout, request.vcpus, KvmKind::detect(), request.scratch.mib);
    save(into, &configuration, &File::from(vmstate), &File::from(ram))?;

    step(Step::Trace);
    let Request { probe, scratch, interrupt, .. } = *request;
    recording::record(machines, &configuration, into, into, &Trials { probe, scratch, interrupt })?;
    Ok(configuration)
}

/// Starts the machine.
fn boot<'a>(
    machines: &Machines,
    request: &Request<'a>,
    layout: MemoryLayout,
    ram: &OwnedFd,
    root_disk: &OwnedFd,
) -> Result<Rig<'a>, BuildError> {
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
    Rig::spawn(machines, &spec, &images, &kernel, initrd.as_ref(), (scratch, interrupt))
}

/// From the first instruction to the snapshot, whose vmstate it returns.
fn warm_up(
    machine: &Rig<'_>,
    request: &Request<'_>,
    step: &mut impl FnMut(Step),
) -> Result<OwnedFd, BuildError> {
    machine.wait_for_ring("booting", BOOT_TIMEOUT, Ring::Booted)?;
    step(Step::Warm);
    wait_until_warm(machine, request.ready_timeout)?;
    if let Some(probe) = request.probe {
        step(Step::Probe);
        run_probe(machine.agent("probing")?, probe)?;
    }
    step(Step::Save);
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

fn command_line(request: &Request<'_>) -> Result<String, BuildError> {
    let Some(warm) = request.warm else { return Ok(String::new()) };
    let parameter = warm.to_parameter().map_err(BuildError::WarmCommand)?;
    Ok(format!("{WARM_PARAMETER}={parameter}"))
}

fn open(path: &Path) -> Result<File, SnapshotError> {
    File::open(path).map_err(file_error("opening", path))
}

fn images<'a>(layout: &MemoryLayout, ram: &'a OwnedFd, root_disk: &'a OwnedFd) -> Vec<&'a OwnedFd> {
    let all = [ram, root_disk].into_iter().zip(ImageId::ALL);
    all.filter(|(_, id)| layout.image_bytes(*id) > 0).map(|(fd, _)| fd).collect()
}

/// Asks again every second, so that Ctrl-C is noticed while a worker takes long.
fn wait_until_warm(machine: &Rig<'_>, timeout: Duration) -> Result<(), BuildError> {
    let doing = "warming up";
    let deadline = Instant::now() + timeout;
    loop {
        machine.interrupt.check()?;
        match machine.agent(doing)?.status(true, Duration::from_secs(1)) {
            Ok(Status { worker: WorkerState::Failed { reason, stderr, .. }, .. }) => {
                return Err(BuildError::NotReady { reason, stderr });
            }
            Ok(Status { worker: WorkerState::Ready | WorkerState::None, .. }) => return Ok(()),
            Ok(_) | Err(ClientError::Timeout { .. }) if Instant::now() < deadline => {}
            Ok(_) | Err(ClientError::Timeout { .. }) => {
                return Err(BuildError::Timeout { doing, after: timeout });
            }
            Err(source) => return Err(BuildError::Agent { doing, source }),
        }
    }
}

fn run_probe(agent: AgentClient, probe: &Probe) -> Result<(), BuildError> {
    let answer = agent
        .eval(&probe.code, REQUEST_TIMEOUT)
        .map_err(|source| BuildError::Agent { doing: "probing", source })?;
    let found = show_answer(&answer);
    match &probe.expect {
        Some(expected) if answer.answer.as_ref() != Some(expected) => {
            Err(BuildError::Probe { code: probe.code.clone(), found, expected: expected.clone() })
        }
        None if answer.error.is_some() => Err(BuildError::Probe {
            code: probe.code.clone(),
            found,
            expected: "without an error".to_owned(),
        }),
        _ => Ok(()),
    }
}

fn show_answer(answer: &Answer) -> String {
    let error = answer.error.as_ref().map(|error| format!("the error {error}"));
    error.or_else(|| answer.answer.clone()).unwrap_or_else(|| "nothing".to_owned())
}

fn save(into: &Path, configuration: &Configuration, vmstate: &File, ram: &File) -> Result<(), SnapshotError> {
    let path = into.join(snapshot::CONFIGURATION);
    let text = serde_json::to_vec_pretty(configuration).map_err(SnapshotError::Configuration)?;
    std::fs::write(&path, text).map_err(file_error("writing", &path))?;
    let path = into.join(snapshot::VMSTATE);
    copy_sparse(vmstate, &path, 1).map_err(file_error("writing", &path))?;
    let path = into.join(snapshot::MEMORY);
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
