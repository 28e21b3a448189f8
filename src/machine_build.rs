//! Makes a snapshot: boots a kernel on a root disk, waits until the machine is warm, probes it, saves it, and restores
//! the result once to record which pages a fork touches. Callers: `commands/build.rs`, `commands/snapshot.rs`.

use crate::identity::{self, IdentityError};
use crate::recipe::Probe;
use crate::scratch::Scratch;
use crate::snapshot::{self, Configuration, SnapshotError, file_error};
use crate::tools::{Interrupt, ToolError};
use forkd_fs::trace::{PageRun, RegionTrace, Trace, TraceError};
use forkd_guest::client::{AgentClient, ClientError};
use forkd_guest::generation::{Generation, GenerationError};
use forkd_guest::protocol::{Answer, Status, WARM_PARAMETER, WarmCommand, WorkerState};
use forkd_vmm::cgroup::Limits;
use forkd_vmm::channel::ChannelError;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::{ImageId, MemoryError, MemoryLayout, PMEM_ALIGN, create_image};
use forkd_vmm::pager::{
    ChunkContent, ChunkId, ClientId, ImageShape, PageSource, Pager, PagerError, SourceFailure,
};
use forkd_vmm::process::{MachineFiles, MachineProcess, MachineSpec, Report, Start};
use forkd_vmm::zygote::{SpawnError, Zygote};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Unit in which a recorded restore is traced, bytes.
const PAGE: u64 = forkd_vmm::memory::PAGE_BYTES;
/// The snapshot's file behind each image.
const IMAGE_NAMES: [&str; 2] = [snapshot::MEMORY, snapshot::ROOT_DISK];
/// Phases of a restore that are told apart: up to the first instruction, up to ready, up to the answer.
const PHASES: usize = 3;
/// Trial restores. No two touch quite the same pages, and a page that is missing costs a fork a round trip.
const TRIALS: usize = 3;
/// How long a kernel may take from its first instruction to the agent. kvm_pvm needs 15 s when it is alone.
const BOOT_TIMEOUT: Duration = Duration::from_secs(300);
/// How long a request that should be quick may take.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a wait looks for Ctrl-C.
const INTERRUPT_CHECK: Duration = Duration::from_millis(200);
/// Lines of the console that an error shows.
const CONSOLE_TAIL_LINES: usize = 12;

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
    #[error("the machine's process ended while {doing}; its console ended with:\n{console}")]
    Gone {
        /// What was waited for.
        doing: &'static str,
        /// The end of its console.
        console: String,
        /// Why it cannot be heard.
        #[source]
        source: ChannelError,
    },
    /// The machine failed.
    #[error("the machine failed while {doing}: {error}; its console ended with:\n{console}")]
    Failed {
        /// What was waited for.
        doing: &'static str,
        /// Why.
        error: String,
        /// The end of its console.
        console: String,
    },
    /// It took too long.
    #[error("{doing} took longer than {} s; the console ended with:\n{console}", after.as_secs())]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
        /// The end of its console.
        console: String,
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
    /// The snapshot is restored once to record its trace.
    Trace,
}

/// A machine of this module: its process and the files it lives from.
struct Rig<'a> {
    process: MachineProcess,
    dir: TempDir,
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
        zygote: &Zygote,
        spec: &MachineSpec,
        images: &[&OwnedFd],
        start: &File,
        initrd: Option<&File>,
        request: &Request<'a>,
    ) -> Result<Rig<'a>, BuildError> {
        let dir = tempfile::tempdir().map_err(file_error("creating", Path::new("a temporary directory")))?;
        let console_path = dir.path().join("console.log");
        let console = File::create(&console_path).map_err(file_error("creating", &console_path))?;
        let socket = dir.path().join("vsock.sock");
        let vsock = UnixListener::bind(&socket).map_err(file_error("binding", &socket))?;
        let scratch = request.scratch.create()?;
        let files = MachineFiles {
            images: images.iter().map(|image| image.as_fd()).collect(),
            start: start.as_fd(),
            console: console.as_fd(),
            vsock: vsock.as_fd(),
            scratch: scratch.as_ref().map(AsFd::as_fd),
            initrd: initrd.map(|file| file.as_fd()),
            tap: None,
        };
        let process = zygote.spawn(spec, &files)?;
        Ok(Rig { process, dir, scratch, interrupt: request.interrupt })
    }

    fn console_tail(&self) -> String {
        let text = std::fs::read(self.dir.path().join("console.log")).unwrap_or_default();
        let text = String::from_utf8_lossy(&text).replace('\r', "");
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(CONSOLE_TAIL_LINES)..].join("\n")
    }

    fn agent(&self, doing: &'static str) -> Result<AgentClient, BuildError> {
        AgentClient::connect(&self.dir.path().join("vsock.sock"), REQUEST_TIMEOUT)
            .map_err(|source| BuildError::Agent { doing, source })
    }

    /// Waits for a report that `wanted` accepts.
    fn wait<T>(
        &self,
        doing: &'static str,
        timeout: Duration,
        mut wanted: impl FnMut(Report, Vec<OwnedFd>) -> Option<T>,
    ) -> Result<T, BuildError> {
        let deadline = Instant::now() + timeout;
        loop {
            let console = || self.console_tail();
            let failed = |error: String| BuildError::Failed { doing, error, console: console() };
            self.interrupt.check()?;
            let slice = deadline.min(Instant::now() + INTERRUPT_CHECK);
            match self.process.channel.receive_until::<Report>(slice) {
                Ok(None) if Instant::now() < deadline => {}
                Ok(Some((Report::Failed { error }, _))) => return Err(failed(error)),
                Ok(Some((Report::Ended, _))) => return Err(failed("the guest reset itself".to_owned())),
                Ok(Some((report, fds))) => {
                    if let Some(result) = wanted(report, fds) {
                        return Ok(result);
                    }
                }
                Ok(None) => return Err(BuildError::Timeout { doing, after: timeout, console: console() }),
                Err(source) => return Err(BuildError::Gone { doing, console: console(), source }),
            }
        }
    }

    fn wait_for_ring(&self, doing: &'static str, timeout: Duration, wanted: Ring) -> Result<(), BuildError> {
        self.wait(doing, timeout, |report, _| {
            matches!(report, Report::Rang { ring, .. } if ring == wanted).then_some(())
        })
    }
}

/// Builds a snapshot into the directory `into`: all its files but the manifest.
pub fn build(
    zygote: &Zygote,
    request: &Request<'_>,
    into: &Path,
    mut step: impl FnMut(Step),
) -> Result<Configuration, BuildError> {
    // The machine boots from the snapshot's own copy: padded to whole regions, and nobody else's to change.
    let root_disk_path = into.join(snapshot::ROOT_DISK);
    copy_sparse(&open(request.root_disk)?, &root_disk_path, PMEM_ALIGN)
        .map_err(file_error("writing", &root_disk_path))?;
    let root_disk = open(&root_disk_path)?;
    let size = root_disk.metadata().map_err(file_error("reading the size of", &root_disk_path))?.len();
    let layout = MemoryLayout::new(request.memory_mib, size)?;
    let kind = KvmKind::detect();
    let ram = create_image("forkd-ram", layout.ram_bytes())?;
    let root_disk = OwnedFd::from(root_disk);

    step(Step::Boot);
    let kernel = open(request.kernel)?;
    let initrd = request.initrd.map(open).transpose()?;
    let record = Generation::original().encode()?;
    let (command_line, vcpus) = (command_line(request)?, request.vcpus);
    let (initrd_comes, second_console) = (initrd.is_some(), request.second_console);
    let start = Start::Boot { command_line, vcpus, initrd: initrd_comes, second_console };
    let scratch_bytes = request.scratch.bytes();
    let spec =
        MachineSpec { layout, limits: limits(&layout), record, mac: None, start, scratch_bytes, held: false };
    let images = images(&layout, &ram, &root_disk);
    let machine = Rig::spawn(zygote, &spec, &images, &kernel, initrd.as_ref(), request)?;
    machine.wait_for_ring("booting", BOOT_TIMEOUT, Ring::Booted)?;

    step(Step::Warm);
    wait_until_warm(&machine, request.ready_timeout)?;
    if let Some(probe) = request.probe {
        step(Step::Probe);
        run_probe(&machine, probe)?;
    }

    step(Step::Save);
    let asked = machine.agent("taking the snapshot")?.snapshot(REQUEST_TIMEOUT);
    asked.map_err(|source| BuildError::Agent { doing: "taking the snapshot", source })?;
    let vmstate = machine.wait("taking the snapshot", REQUEST_TIMEOUT, |report, mut fds| match report {
        Report::Snapshot => fds.pop(),
        _ => None,
    })?;
    if let Some(disk) = &machine.scratch
        && request.scratch.is_written(disk)?
    {
        return Err(BuildError::ScratchWritten);
    }
    drop(machine);
    let configuration = Configuration::new(layout, request.vcpus, kind, request.scratch.mib);
    save(into, &configuration, &File::from(vmstate), &File::from(ram))?;

    step(Step::Trace);
    let mut touched = BTreeMap::new();
    for _ in 0..TRIALS {
        for (image, phase, page) in record_touches(zygote, &configuration, into, request)? {
            let first = touched.entry((image, page)).or_insert(phase);
            *first = phase.min(*first);
        }
    }
    let trace = trace_of(&configuration, &touched);
    let path = into.join(snapshot::TRACE);
    std::fs::write(&path, trace.encode()?).map_err(file_error("writing", &path))?;
    let path = into.join(snapshot::HOTSET);
    write_hotset(&trace, into, &path).map_err(file_error("writing", &path))?;
    Ok(configuration)
}

fn command_line(request: &Request<'_>) -> Result<String, BuildError> {
    let Some(warm) = request.warm else { return Ok(String::new()) };
    let parameter = warm.to_parameter().map_err(BuildError::WarmCommand)?;
    Ok(format!("{WARM_PARAMETER}={parameter}"))
}

/// Writes the traced pages one behind the other: a fork gets them in one go instead of by whole chunks.
fn write_hotset(trace: &Trace, dir: &Path, to: &Path) -> io::Result<()> {
    let files = trace
        .regions
        .iter()
        .map(|region| File::open(dir.join(&region.file)))
        .collect::<Result<Vec<_>, _>>()?;
    let mut target = io::BufWriter::new(File::create(to)?);
    let mut bytes = [0; PAGE as usize];
    for (region, page) in trace.pages() {
        files[region].read_exact_at(&mut bytes, u64::from(page) * PAGE)?;
        target.write_all(&bytes)?;
    }
    target.flush()
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
                return Err(BuildError::Timeout { doing, after: timeout, console: machine.console_tail() });
            }
            Err(source) => return Err(BuildError::Agent { doing, source }),
        }
    }
}

fn run_probe(machine: &Rig<'_>, probe: &Probe) -> Result<(), BuildError> {
    let answer = machine
        .agent("probing")?
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

/// Serves pages of a snapshot's files one by one and notes which were asked for, in which phase.
struct Recorder {
    files: Vec<File>,
    phase: AtomicUsize,
    touched: Mutex<Vec<(ImageId, usize, u32)>>,
}

impl PageSource for Recorder {
    fn load(&self, chunk: ChunkId) -> Result<ChunkContent, SourceFailure> {
        let phase = self.phase.load(Ordering::Relaxed);
        let touch = (chunk.image, phase, chunk.chunk as u32);
        self.touched.lock().unwrap_or_else(PoisonError::into_inner).push(touch);
        let mut page = vec![0; PAGE as usize];
        self.files[chunk.image.index()].read_exact_at(&mut page, chunk.chunk * PAGE)?;
        let zero = page.iter().all(|byte| *byte == 0);
        Ok(if zero { ChunkContent::Zero } else { ChunkContent::Data(page.into()) })
    }

    fn unavailable(&self, chunk: ChunkId, _waiters: &[ClientId], failure: SourceFailure) {
        tracing::error!(
            ?chunk,
            error = crate::error::chain(&*failure),
            "a page of the new snapshot cannot be read"
        );
    }
}

/// The trace of pages and the earliest phase in which each was touched.
fn trace_of(configuration: &Configuration, touched: &BTreeMap<(ImageId, u32), usize>) -> Trace {
    let region = |id: ImageId| RegionTrace {
        file: IMAGE_NAMES[id.index()].to_owned(),
        buckets: (0..PHASES)
            .map(|phase| {
                let pages = touched.iter().filter(|((image, _), first)| *image == id && **first == phase);
                PageRun::from_pages(pages.map(|((_, page), _)| *page))
            })
            .collect(),
    };
    let images = ImageId::ALL.into_iter().filter(|id| configuration.layout.image_bytes(*id) > 0);
    Trace { regions: images.map(region).collect() }
}

/// Limits of one more machine of this process.
fn limits(layout: &MemoryLayout) -> Limits {
    static MACHINES: AtomicUsize = AtomicUsize::new(0);
    let number = MACHINES.fetch_add(1, Ordering::Relaxed);
    Limits::of(format!("build-{}-{number}", std::process::id()), layout)
}

/// Restores the snapshot in `dir` once, page by page, up to the probe's answer; returns what was touched in which phase.
fn record_touches(
    zygote: &Zygote,
    configuration: &Configuration,
    dir: &Path,
    request: &Request<'_>,
) -> Result<Vec<(ImageId, usize, u32)>, BuildError> {
    let layout = configuration.layout;
    let ids: Vec<_> = ImageId::ALL.into_iter().filter(|id| layout.image_bytes(*id) > 0).collect();
    let paths: Vec<PathBuf> = ids.iter().map(|id| dir.join(IMAGE_NAMES[id.index()])).collect();
    let files = paths.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let recorder = Arc::new(Recorder { files, phase: AtomicUsize::new(0), touched: Mutex::default() });
    let shape = |id: &ImageId| ImageShape { bytes: layout.image_bytes(*id), chunk_bytes: PAGE };
    let shapes: Vec<_> = ids.iter().map(|id| (*id, shape(id))).collect();
    let pager = Pager::new(&shapes, recorder.clone(), 1)?;
    let environment = BTreeMap::from([("FORKD_TRIAL".to_owned(), "1".to_owned())]);
    let record = identity::fresh("trial", 1, None, environment)?;
    let start = Start::Restore { lazy: true, zero_runs: Vec::new() };
    let scratch_bytes = request.scratch.bytes();
    let spec =
        MachineSpec { layout, limits: limits(&layout), record, mac: None, start, scratch_bytes, held: false };
    let vmstate = open(&dir.join(snapshot::VMSTATE))?;
    let images =
        ids.iter().filter_map(|id| pager.image_file(*id)?.try_clone_to_owned().ok()).collect::<Vec<_>>();
    let images: Vec<_> = images.iter().collect();
    let machine = Rig::spawn(zygote, &spec, &images, &vmstate, None, request)?;
    let doing = "restoring the new snapshot";
    let (bases, uffd) = machine.wait(doing, REQUEST_TIMEOUT, |report, mut fds| match report {
        Report::Attached { bases } => fds.pop().map(|uffd| (bases, uffd)),
        _ => None,
    })?;
    pager.attach(ClientId(0), uffd, bases)?;
    machine.wait_for_ring(doing, REQUEST_TIMEOUT, Ring::Resumed)?;
    recorder.phase.store(1, Ordering::Relaxed);
    machine.wait_for_ring(doing, REQUEST_TIMEOUT, Ring::Ready)?;
    recorder.phase.store(2, Ordering::Relaxed);
    match request.probe {
        Some(probe) => run_probe(&machine, probe)?,
        None => {
            let pinged = machine.agent(doing)?.ping(REQUEST_TIMEOUT);
            pinged.map_err(|source| BuildError::Agent { doing, source })?;
        }
    }
    drop(machine);
    let touched = std::mem::take(&mut *recorder.touched.lock().unwrap_or_else(PoisonError::into_inner));
    Ok(touched)
}
