//! Recording a trace: a snapshot is restored a few times, page by page, and what is touched until its probe is answered is
//! written down, with the pages themselves.

use super::asking::{self, check_answer};
use super::console;
use super::error::{BuildError, BuildFailure};
use super::rig::{INTERRUPT_CHECK, Machines, PAGE, REQUEST_TIMEOUT, open};
use crate::build::recipe::Probe;
use crate::fork::ask::{ChildOutcome, ChildRequest};
use crate::fork::run::{AskedChildren, ForkCaller, ForkSource, fork_template};
use crate::fork::supervisor::{ChildrenSpec, Supervisor};
use crate::fork::template::Template;
use crate::fork::variables::{Variables, parse_variable};
use crate::fork::warm::WarmStatus;
use crate::interrupt::Interrupt;
use crate::local::paths::Paths;
use crate::local::snapshots::{self, MachineConfiguration, file_error};
use forkd_fs::trace::{PageRun, RegionTrace, Trace};
use forkd_vmm::memory::ImageId;
use forkd_vmm::pager::{ChunkContent, ClientId, ImageChunk, ImageShape, PageSource, Pager, SourceFailure};
use forkd_vmm::process::monotonic_ns;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;

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
    /// forkd's directories.
    pub paths: &'a Paths,
    /// Ends the recording when set.
    pub interrupt: &'a Interrupt,
}

/// Restores the snapshot in `dir` once for each of [`TRIALS`] and writes `trace` and `hotset` into `into`, which may be `dir`.
pub fn record(
    machines: &Machines,
    configuration: &MachineConfiguration,
    dir: &Path,
    into: &Path,
    options: &TrialOptions<'_>,
) -> Result<Trace, BuildFailure> {
    let records: Vec<_> = TRIALS
        .iter()
        .map(|trial| record_touches(machines, configuration, dir, options, trial))
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
        file: Template::image_name(id).to_owned(),
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

/// Forks the snapshot in `dir` once, page by page, up to the probe's answer; returns what was touched in which phase.
fn record_touches(
    machines: &Machines,
    configuration: &MachineConfiguration,
    dir: &Path,
    options: &TrialOptions<'_>,
    trial: &Trial,
) -> Result<Vec<Touch>, BuildFailure> {
    let layout = configuration.layout;
    let ids: Vec<_> = ImageId::ALL.into_iter().filter(|id| layout.image_bytes(*id) > 0).collect();
    let paths: Vec<PathBuf> = ids.iter().map(|id| dir.join(Template::image_name(*id))).collect();
    let files = paths.iter().map(|path| open(path)).collect::<Result<Vec<_>, _>>()?;
    let page_delay = trial.page_delay;
    let recorder = Arc::new(PageRecorder { files, page_delay, touched: Mutex::default() });
    let shape = |id: &ImageId| ImageShape { bytes: layout.image_bytes(*id), chunk_bytes: PAGE };
    let shapes: Vec<_> = ids.iter().map(|id| (*id, shape(id))).collect();
    let pager = Arc::new(Pager::new(&shapes, recorder.clone(), 1)?);
    let vmstate = open(&dir.join(snapshots::VMSTATE))?.into();
    let template = Arc::new(Template::served(*configuration, vmstate, pager));
    let moments = run_trial(machines, template, options, trial)?;
    let touched = std::mem::take(&mut *recorder.touched.lock().unwrap_or_else(PoisonError::into_inner));
    let phase = |at_ns: u64| moments.iter().filter(|moment| at_ns >= **moment).count();
    Ok(touched.into_iter().map(|(image, at_ns, page)| (image, phase(at_ns), page)).collect())
}

/// Forks a trial's machine and asks it the probe; returns when it had resumed and was ready, which is when the second and
/// third phase begin (CLOCK_MONOTONIC, ns).
fn run_trial(
    machines: &Machines,
    template: Arc<Template>,
    options: &TrialOptions<'_>,
    trial: &Trial,
) -> Result<[u64; PHASES - 1], BuildFailure> {
    let variable = trial.variable.then(|| parse_variable("FORKD_TRIAL=1")).transpose()?;
    let variables = Variables::new(variable.as_slice(), &[], 1)?;
    // Nobody is to find it, and to end it as one of theirs.
    let children = ChildrenSpec { variables, reachable: false, ..ChildrenSpec::default() };
    let request = options.probe.map_or(ChildRequest::Ping, asking::request);
    let after_ready = Some(trial.before_probe).filter(|delay| !delay.is_zero());
    let fork = TrialFork::default();
    let (done, over) = mpsc::channel::<()>();
    let asked = std::thread::scope(|scope| {
        scope.spawn(|| fork.end_when_interrupted(options.interrupt, over));
        let (zygote, asking) = (machines.zygote(), (&request, after_ready));
        let source = ForkSource { template, name: "trial", warm: None };
        let asked = fork_template(options.paths, zygote, source, &children, asking, &fork);
        drop(done);
        asked
    });
    let AskedChildren { supervisor, outcomes } = asked.map_err(|error| BuildError::Fork(Box::new(error)))?;
    let moments = match options.interrupt.check() {
        Ok(()) => moments_of(&supervisor, &outcomes, options, &fork).map_err(|error| {
            let console = supervisor.children().first().map(|child| supervisor.console(&child.id));
            BuildFailure { error, console: console.map(|path| console::tail(&path)).unwrap_or_default() }
        }),
        Err(interrupted) => Err(interrupted.into()),
    };
    supervisor.end();
    moments
}

/// When the only child had resumed and was ready, if it answered as it should.
fn moments_of(
    supervisor: &Supervisor,
    outcomes: &[ChildOutcome],
    options: &TrialOptions<'_>,
    fork: &TrialFork,
) -> Result<[u64; PHASES - 1], BuildError> {
    let failed = |error: &str| BuildError::Failed { doing: DOING, error: error.to_owned() };
    if fork.timed_out.load(Ordering::Relaxed) {
        return Err(BuildError::Timeout { doing: DOING, after: READY_TIMEOUT });
    }
    let outcome = outcomes.first().ok_or_else(|| failed("there is none"))?;
    match (options.probe, &outcome.error) {
        // What it printed has been compared before the snapshot.
        (Some(probe), _) if outcome.exit_code.is_some_and(|code| code != 0) => {
            check_answer(probe, None, Some(&format!("exit code {}", outcome.exit_code.unwrap_or(0))))?;
        }
        (Some(_), _) if outcome.exit_code.is_some() => {}
        // Code that fails is an answer, too.
        (Some(probe), error) if outcome.answered => {
            check_answer(probe, outcome.value.as_deref(), error.as_deref())?;
        }
        (_, Some(error)) => return Err(failed(error)),
        _ => {}
    }
    // The answer may be here before the report that it is ready, which was sent first.
    let asked_for = Instant::now();
    loop {
        let children = supervisor.children();
        let child = children.first().ok_or_else(|| failed("there is none"))?;
        match (child.first_instruction, child.ready) {
            (Some(resumed), Some(ready)) => return Ok([resumed.at_ns, ready.at_ns]),
            _ if asked_for.elapsed() > REPORT_TIMEOUT => {
                return Err(failed("it did not say that it was ready"));
            }
            _ => {}
        }
        drop(children);
        std::thread::sleep(REPORT_POLL);
    }
}

/// How long the report of a machine that has answered may be on its way, and how often it is looked for.
const REPORT_TIMEOUT: Duration = Duration::from_secs(10);
const REPORT_POLL: Duration = Duration::from_millis(1);
/// How long a trial may take to be ready: to attach, to resume and to be ready, as long as a request each.
const READY_TIMEOUT: Duration = REQUEST_TIMEOUT.saturating_mul(3);

/// What a trial restore is doing, for messages.
const DOING: &str = "restoring the snapshot to record its trace";

/// A trial as the caller of its fork.
#[derive(Default)]
struct TrialFork {
    supervisor: OnceLock<Arc<Supervisor>>,
    timed_out: AtomicBool,
}

impl TrialFork {
    /// Ends the children when the user wants it, or when they take too long to be ready, until `over` is closed.
    fn end_when_interrupted(&self, interrupt: &Interrupt, over: Receiver<()>) {
        let started = Instant::now();
        while over.recv_timeout(INTERRUPT_CHECK) == Err(RecvTimeoutError::Timeout) {
            let Some(supervisor) = self.supervisor.get() else { continue };
            let ready = supervisor.children().iter().all(|child| child.ready.is_some());
            let late = !ready && started.elapsed() > READY_TIMEOUT;
            if late || interrupt.is_set() {
                self.timed_out.store(late, Ordering::Relaxed);
                supervisor.kill(None);
                return;
            }
        }
    }
}

impl ForkCaller for TrialFork {
    fn runtime(&self) -> io::Result<Handle> {
        // All that it needs is at hand.
        Err(io::ErrorKind::Unsupported.into())
    }

    fn on_started(&self, supervisor: &Arc<Supervisor>, _: Option<&WarmStatus>) -> io::Result<()> {
        let _ = self.supervisor.set(Arc::clone(supervisor));
        Ok(())
    }
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
