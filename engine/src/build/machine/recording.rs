//! Recording a trace: a snapshot is restored a few times, page by page, and what is touched until its probe is answered is
//! written down, with the pages themselves.

use super::error::{BuildError, BuildFailure};
use super::rig::{BuildMachine, INTERRUPT_CHECK, Machines, PAGE, REQUEST_TIMEOUT, open, run_probe};
use crate::build::recipe::Probe;
use crate::fork::agent::AgentClient;
use crate::fork::identity;
use crate::fork::scratch::Scratch;
use crate::interrupt::Interrupt;
use crate::local::snapshots::{self, MachineConfiguration, file_error};
use forkd_fs::trace::{PageRun, RegionTrace, Trace};
use forkd_vmm::cgroup::Limits;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::memory::ImageId;
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::process::{MachineReport, MachineSpec, MachineStart, monotonic_ns};
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The snapshot's file behind each image.
const IMAGE_NAMES: [&str; 2] = [snapshots::MEMORY, snapshots::ROOT_DISK];
/// Phases of a restore that are told apart: up to the first instruction, up to ready, up to the answer.
const PHASES: usize = 3;
/// Trial restores. No two touch quite the same pages, and a page that is missing costs a fork a round trip. A guest that
/// waits for its pages, or for its first request, sees time go by and does what it does once a second.
/// Copies with variables of their own and copies without differ, too.
/// The slow ones come first: the others then find a timer overdue, as every later fork does.
pub const TRIALS: [Trial; 4] = [
    Trial { page_delay: Duration::from_millis(10), before_probe: Duration::ZERO, variable: false },
    Trial { page_delay: Duration::from_millis(2), before_probe: Duration::ZERO, variable: true },
    Trial { page_delay: Duration::ZERO, before_probe: Duration::from_millis(1500), variable: true },
    Trial { page_delay: Duration::ZERO, before_probe: Duration::ZERO, variable: false },
];

/// A page that one trial touched, and in which phase; every page once.
type Touch = (ImageId, usize, u32);

/// What a trial restore needs besides the snapshot.
#[derive(Debug, Clone, Copy)]
pub struct TrialOptions<'a> {
    /// What each is asked; without, it is recorded until its agent answers.
    pub probe: Option<&'a Probe>,
    /// Its scratch disk.
    pub scratch: Scratch<'a>,
    /// Ends the recording when set.
    pub interrupt: &'a Interrupt,
}

/// Restores the snapshot in `dir` once for each of [`TRIALS`] and writes `trace` and `hotset` into `into`, which may be `dir`.
pub fn record(
    machines: &Machines,
    configuration: &MachineConfiguration,
    dir: &Path,
    into: &Path,
    trials: &TrialOptions<'_>,
) -> Result<Trace, BuildFailure> {
    let records: Vec<_> = TRIALS
        .iter()
        .map(|trial| record_touches(machines, configuration, dir, trials, trial))
        .collect::<Result<_, _>>()?;
    let trace = trace_of(configuration, &merge(&records));
    let path = into.join(snapshots::TRACE);
    std::fs::write(&path, trace.encode()?).map_err(file_error("writing", &path))?;
    let path = into.join(snapshots::HOTSET);
    write_hotset(&trace, dir, &path).map_err(file_error("writing", &path))?;
    Ok(trace)
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

/// How a trial restore is held up.
#[derive(Debug)]
pub struct Trial {
    /// What each page takes.
    page_delay: Duration,
    /// From ready to the probe.
    before_probe: Duration,
    /// It gets a variable for its environment.
    variable: bool,
}

/// Serves pages of a snapshot's files one by one and notes which were asked for, and when.
struct PageRecorder {
    files: Vec<File>,
    page_delay: Duration,
    /// Image, moment on CLOCK_MONOTONIC (ns), page.
    touched: Mutex<Vec<(ImageId, u64, u32)>>,
}

impl PageSource for PageRecorder {
    fn load(&self, chunk: ImageChunk) -> Result<ChunkContent, SourceFailure> {
        let touch = (chunk.image, monotonic_ns(), chunk.chunk as u32);
        self.touched.lock().unwrap_or_else(PoisonError::into_inner).push(touch);
        std::thread::sleep(self.page_delay);
        let mut page = vec![0; PAGE as usize];
        self.files[chunk.image.index()].read_exact_at(&mut page, chunk.chunk * PAGE)?;
        let zero = page.iter().all(|byte| *byte == 0);
        Ok(if zero { ChunkContent::Zero } else { ChunkContent::Data(page.into()) })
    }

    fn unavailable(&self, chunk: ImageChunk, _waiters: &[ClientId], failure: SourceFailure) {
        tracing::error!(
            ?chunk,
            error = crate::chain::chain(&*failure),
            "a page of the snapshot cannot be read"
        );
    }
}

/// The earliest phase in which any trial touched each page. Before the first instruction, which each fork waits for, is only
/// what every trial touched there: a guest that is held up on the way has a timer to serve, others serve it later.
fn merge(records: &[Vec<Touch>]) -> BTreeMap<(ImageId, u32), usize> {
    let mut touched = BTreeMap::new();
    for &(image, phase, page) in records.iter().flatten() {
        let (first, at_once) = touched.entry((image, page)).or_insert((phase, 0));
        *first = phase.min(*first);
        *at_once += usize::from(phase == 0);
    }
    let settled =
        |(first, at_once): (usize, usize)| if at_once < records.len() { first.max(1) } else { first };
    touched.into_iter().map(|(page, found)| (page, settled(found))).collect()
}

/// The trace of pages and the earliest phase in which each was touched.
fn trace_of(configuration: &MachineConfiguration, touched: &BTreeMap<(ImageId, u32), usize>) -> Trace {
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

/// Connects before the machine is ready, as a fork does that is asked something: after its first instruction.
fn connect_early(
    machine: &BuildMachine<'_>,
    doing: &'static str,
) -> Receiver<Result<AgentClient, BuildError>> {
    let (sender, connected) = mpsc::channel();
    let socket = machine.socket.clone();
    std::thread::spawn(move || {
        let client = AgentClient::connect(&socket, REQUEST_TIMEOUT);
        // Nobody waits any more when the trial failed.
        drop(sender.send(client.map_err(|source| BuildError::Agent { doing, source })));
    });
    connected
}

/// Restores the snapshot in `dir` once, page by page, up to the probe's answer; returns what was touched in which phase.
fn record_touches(
    machines: &Machines,
    configuration: &MachineConfiguration,
    dir: &Path,
    trials: &TrialOptions<'_>,
    trial: &Trial,
) -> Result<Vec<Touch>, BuildFailure> {
    let layout = configuration.layout;
    let ids: Vec<_> = ImageId::ALL.into_iter().filter(|id| layout.image_bytes(*id) > 0).collect();
    let paths: Vec<PathBuf> = ids.iter().map(|id| dir.join(IMAGE_NAMES[id.index()])).collect();
    let files = paths.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let page_delay = trial.page_delay;
    let recorder = Arc::new(PageRecorder { files, page_delay, touched: Mutex::default() });
    let shape = |id: &ImageId| ImageShape { bytes: layout.image_bytes(*id), chunk_bytes: PAGE };
    let shapes: Vec<_> = ids.iter().map(|id| (*id, shape(id))).collect();
    let pager = Pager::new(&shapes, recorder.clone(), 1)?;
    let variable = trial.variable.then(|| ("FORKD_TRIAL".to_owned(), "1".to_owned()));
    let environment = BTreeMap::from_iter(variable);
    let record = identity::fresh("trial", 1, None, environment)?;
    let start = MachineStart::Restore { lazy: true, zero_runs: Vec::new() };
    let scratch_bytes = trials.scratch.bytes();
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
    let vmstate = open(&dir.join(snapshots::VMSTATE))?;
    let images =
        ids.iter().filter_map(|id| pager.image_file(*id)?.try_clone_to_owned().ok()).collect::<Vec<_>>();
    let images: Vec<_> = images.iter().collect();
    let machine =
        BuildMachine::spawn(machines, &spec, &images, &vmstate, None, (&trials.scratch, trials.interrupt))?;
    let moments = run_trial(&machine, &pager, trials, trial).map_err(|error| machine.failed(error))?;
    drop(machine);
    let touched = std::mem::take(&mut *recorder.touched.lock().unwrap_or_else(PoisonError::into_inner));
    let phase = |at_ns: u64| moments.iter().filter(|moment| at_ns >= **moment).count();
    Ok(touched.into_iter().map(|(image, at_ns, page)| (image, phase(at_ns), page)).collect())
}

/// Serves a trial's machine until its probe is answered; returns when it had resumed and was ready, which is when the
/// second and third phase begin (CLOCK_MONOTONIC, ns).
fn run_trial(
    machine: &BuildMachine<'_>,
    pager: &Pager,
    trials: &TrialOptions<'_>,
    trial: &Trial,
) -> Result<[u64; PHASES - 1], BuildError> {
    let doing = "restoring the snapshot to record its trace";
    let (bases, uffd) = machine.wait(doing, REQUEST_TIMEOUT, |report, mut fds| match report {
        MachineReport::Attached { bases } => fds.pop().map(|uffd| (bases, uffd)),
        _ => None,
    })?;
    pager.attach(ClientId(0), uffd, bases)?;
    let resumed_ns = machine.wait_for_ring(doing, REQUEST_TIMEOUT, Ring::Resumed)?;
    let early = trial.before_probe.is_zero().then(|| connect_early(machine, doing));
    let ready_ns = machine.wait_for_ring(doing, REQUEST_TIMEOUT, Ring::Ready)?;
    std::thread::sleep(trial.before_probe);
    ask(machine, trials, early, doing)?;
    Ok([resumed_ns, ready_ns])
}

/// Asks the probe. The user can end it, which takes the machine's end: an answer may be minutes away.
fn ask(
    machine: &BuildMachine<'_>,
    trials: &TrialOptions<'_>,
    early: Option<Receiver<Result<AgentClient, BuildError>>>,
    doing: &'static str,
) -> Result<(), BuildError> {
    let (done, over) = mpsc::channel::<()>();
    let asked = std::thread::scope(|scope| {
        scope.spawn(move || {
            while over.recv_timeout(INTERRUPT_CHECK) == Err(RecvTimeoutError::Timeout) {
                if trials.interrupt.is_set() {
                    return machine.process.kill();
                }
            }
        });
        let connected = early.and_then(|early| early.recv().ok());
        let agent = connected.unwrap_or_else(|| machine.agent(doing));
        let asked = agent.and_then(|agent| match trials.probe {
            Some(probe) => run_probe(agent, probe),
            None => agent.ping(REQUEST_TIMEOUT).map_err(|source| BuildError::Agent { doing, source }),
        });
        drop(done);
        asked
    });
    trials.interrupt.check()?;
    asked
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_every_trial_touched_there_is_before_the_first_instruction() {
        const RAM: ImageId = ImageId::Ram;
        let merged = merge(&[
            vec![(RAM, 0, 1), (RAM, 0, 2), (RAM, 1, 3), (RAM, 2, 4), (RAM, 0, 6)],
            vec![(RAM, 0, 1), (RAM, 2, 2), (RAM, 2, 3), (RAM, 2, 4), (RAM, 2, 5)],
        ]);
        let expected = [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2), (6, 1)];
        assert_eq!(merged, expected.map(|(page, phase)| ((RAM, page), phase)).into());
        assert!(merge(&[]).is_empty());
    }
}
