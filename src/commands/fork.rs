//! `forkd fork`: copies of a machine, from a pack that need not be there yet.
//!
//! Order matters here. The process is split (for `--detach`) and the zygote forked while there is one thread; only
//! then come the runtime, the registry, the pack and the children.

use crate::cli::ForkArgs;
use crate::commands::fork_report::{
    ChildReport, Faults, Fetched, ForkReport, Memory, PackReport, Prefetch, Timeline,
};
use crate::commands::{fork_timeline, runtime};
use crate::detach::{Detached, split};
use crate::error::{CommandError, chain};
use crate::output::Output;
use crate::paths::Paths;
use crate::picture::{PictureError, check_place};
use crate::progress::Progress;
use crate::sandbox::{Sandbox, SandboxError};
use crate::source::{self, OpenedSource};
use crate::supervisor::{
    Allowance, ForkError, Moment, Plan, Supervisor, milliseconds_since, process_start_ns,
};
use crate::timeline::Recorder;
use crate::variables::{Variables, VariablesError};
use crate::warm::Address;
use forkd_fs::observe::Observer;
use forkd_fs::store::ReadError;
use forkd_guest::client::{AgentClient, ClientError};
use forkd_guest::protocol::{Answer, ExecRequest, Exit};
use forkd_vmm::kvm::{Hypervisor, KvmError, KvmKind};
use forkd_vmm::process::monotonic_ns;
use forkd_vmm::zygote::{SpawnError, Zygote};
use rustix::process::{Resource, Rlimit};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// How long a child may take to answer, its memory's way here included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// Most output of an `--exec` that is kept, bytes.
const OUTPUT_MAX: usize = 1 << 20;
/// Pause between two looks at a child that does not answer.
const POLL: Duration = Duration::from_millis(5);
/// Looks at it, until its connection's failure is taken for the reason.
const FAILURE_POLLS: u32 = 60;

/// `forkd fork` failed.
#[derive(Debug, thiserror::Error)]
pub enum ForkCommandError {
    /// /dev/kvm.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// Processes.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// Splitting off for `--detach`.
    #[error("going to the background failed")]
    Detach(#[source] crate::detach::DetachError),
    /// The pack or snapshot.
    #[error(transparent)]
    Source(#[from] source::SourceError),
    /// Opening the machine.
    #[error("{name}")]
    Sandbox {
        /// What was to be forked.
        name: String,
        /// Why not.
        #[source]
        source: Box<SandboxError>,
    },
    /// `--eager` could not download.
    #[error("{name}")]
    Download {
        /// What was to be forked.
        name: String,
        /// Why not.
        #[source]
        source: Box<ReadError>,
    },
    /// `--env` and `--vary`.
    #[error(transparent)]
    Variables(#[from] VariablesError),
    /// Starting children.
    #[error(transparent)]
    Fork(#[from] ForkError),
    /// `--timeline`.
    #[error(transparent)]
    Picture(#[from] PictureError),
}

/// What is asked of every child.
#[derive(Debug, Clone)]
enum Work {
    Nothing,
    Eval(String),
    Exec(Vec<String>),
}

/// What came of it.
struct Outcome {
    answer: Option<String>,
    error: Option<String>,
    exit_code: Option<i32>,
    at: Moment,
}

/// Runs the command.
pub fn run(args: &ForkArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let started_ns = process_start_ns();
    let variables = Variables::new(&args.env, &args.vary, args.count).map_err(ForkCommandError::from)?;
    let detached = if args.detach {
        match split().map_err(ForkCommandError::Detach)? {
            Detached::Foreground(exit) => return Ok(exit),
            Detached::Background(handover) => Some(handover),
        }
    } else {
        None
    };
    if let Some(file) = &args.timeline {
        check_place(file).map_err(ForkCommandError::from)?;
    }
    let paths = Paths::from_env()?;
    drop(Hypervisor::open(KvmKind::detect()).map_err(ForkCommandError::Kvm)?);
    raise_file_limit();
    let zygote = Zygote::start().map_err(ForkCommandError::Spawn)?;
    let runtime = runtime()?;
    let supervisor = Arc::new(OnceLock::<Arc<Supervisor>>::new());
    runtime.spawn(end_on_signal(Arc::clone(&supervisor)));

    let mut timeline = Timeline::default();
    let since_start = || milliseconds_since(started_ns, monotonic_ns());
    let recorder = args.timeline.as_ref().map(|_| Arc::new(Recorder::new(since_start())));
    let wanted = args.wanted();
    let (sandbox, name, cache) = match resident(&paths, args) {
        Some(sandbox) => (sandbox, wanted.name().to_owned(), None),
        None => {
            let observer = recorder.clone().map(|recorder| recorder as Arc<dyn Observer>);
            let opening = source::open(&paths, &wanted, &args.cache, observer, |at| match at {
                source::Stage::Registry => timeline.registry_ms = Some(since_start()),
                source::Stage::Index => timeline.index_ms = Some(since_start()),
            });
            let OpenedSource { name, origin, cache } =
                runtime.block_on(opening).map_err(ForkCommandError::from)?;
            (open_sandbox(&runtime, &name, origin, args.eager, output)?, name, cache)
        }
    };
    timeline.vmstate_ms = Some(since_start());
    if let Some(recorder) = &recorder {
        sandbox.record_in(recorder);
    }

    let sandbox = Arc::new(sandbox);
    // What no child has asked for is fetched after the answers: it would only be in their way.
    let (rest_wanted, wanted) = tokio::sync::oneshot::channel::<()>();
    if !args.eager {
        let fill = sandbox.fill(async {
            let _ = wanted.await;
        });
        runtime.spawn(async move {
            if let Err(error) = fill.await {
                tracing::error!(error = chain(&error), "fetching the rest of the pack failed");
            }
        });
    }
    let allowance = Allowance { memory_mib: args.memory_limit_mib, cpus: args.cpus };
    let plan = Plan { count: args.count, variables, network: args.net, allowance };
    let children = Supervisor::start(&paths, &zygote, Arc::clone(&sandbox), name.clone(), &plan)
        .map_err(ForkCommandError::from)?;
    let supervisor = supervisor.get_or_init(|| children);
    let work = match (&args.eval, args.exec) {
        (Some(code), _) => Work::Eval(code.clone()),
        (None, true) => Work::Exec(args.command.clone()),
        (None, false) => Work::Nothing,
    };
    let outcomes = ask_all(supervisor, &work, output);
    let report = report(supervisor, &name, started_ns, timeline, outcomes, output.is_json());
    let drawn = fork_timeline::draw(args.timeline.as_deref(), recorder.as_deref(), &report);
    let failed = !drawn
        || report.children.iter().any(|child| child.error.is_some() || child.exit_code.unwrap_or(0) != 0);
    output.report(&report, ForkReport::text);
    let exit = if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    let stays = detached.is_some() || matches!(work, Work::Nothing);
    if let Some(handover) = detached {
        handover.finish(if failed { 1 } else { 0 });
    }
    if stays {
        if !args.detach {
            output.note("children run until Ctrl-C; `forkd exec ID -- CMD` reaches them");
        }
        drop(rest_wanted);
        while !supervisor.all_over() {
            std::thread::sleep(Duration::from_millis(50));
        }
    }
    supervisor.kill(None);
    supervisor.remove_run_dir();
    if let Some(cache) = cache {
        cache.flush();
    }
    runtime.shutdown_background();
    Ok(exit)
}

/// What `forkd warm` holds of it. Without, or when its daemon does not answer, everything is opened as always.
fn resident(paths: &Paths, args: &ForkArgs) -> Option<Sandbox> {
    let address = Address::of(paths, &args.wanted()).filter(|_| !args.eager)?;
    let found = address.image().unwrap_or_else(|error| {
        tracing::warn!(error = chain(&error), "the warm image is not used");
        None
    });
    found.and_then(|(resident, files)| Sandbox::from_resident(resident, files))
}

fn open_sandbox(
    runtime: &tokio::runtime::Runtime,
    name: &str,
    origin: source::Origin,
    eager: bool,
    output: &Output,
) -> Result<Sandbox, ForkCommandError> {
    let kind = KvmKind::detect();
    let failed = |source| ForkCommandError::Sandbox { name: name.to_owned(), source: Box::new(source) };
    match origin {
        source::Origin::Directory(held) => Sandbox::open_local(&held.path(), kind).map_err(failed),
        source::Origin::Pack(store) => {
            let handle = runtime.handle().clone();
            let opening = Sandbox::open_pack(store.clone(), handle, kind);
            let mut sandbox = runtime.block_on(opening).map_err(failed)?;
            store.set_demand_deadline(source::DEMAND_DEADLINE);
            if eager {
                let bar = Progress::bytes(output, "downloading", sandbox.progress().bytes_total);
                let filling = sandbox.fill(std::future::ready(()));
                let filled = runtime.block_on(bar.follow(filling, || sandbox.progress().bytes_fetched));
                let filled = filled.map_err(|error| ForkCommandError::Download {
                    name: name.to_owned(),
                    source: Box::new(error),
                })?;
                if filled {
                    sandbox.set_complete();
                }
            }
            Ok(sandbox)
        }
    }
}

/// A thousand children need a few descriptors each.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%errno, "the limit on open files stays as it is");
    }
}

/// Ctrl-C, SIGTERM and SIGHUP end the children and remove what is left of them.
async fn end_on_signal(supervisor: Arc<OnceLock<Arc<Supervisor>>>) {
    let kinds = [SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()];
    let [Ok(mut interrupt), Ok(mut terminate), Ok(mut hangup)] = kinds.map(signal) else { return };
    let code = tokio::select! {
        _ = interrupt.recv() => 130,
        _ = terminate.recv() => 143,
        _ = hangup.recv() => 129,
    };
    if let Some(supervisor) = supervisor.get() {
        supervisor.kill(None);
        supervisor.remove_run_dir();
    }
    std::process::exit(code);
}

/// What [`ask_all`] waits for.
enum Event {
    /// A child goes on, got ready or is over.
    Changed(usize),
    Answered(usize, Outcome),
}

/// Asks every child at the same time, and waits until each has answered or is over.
fn ask_all(supervisor: &Arc<Supervisor>, work: &Work, output: &Output) -> Vec<Outcome> {
    let (sender, events) = std::sync::mpsc::channel();
    let changes = sender.clone();
    // Nobody listens any more when all have answered.
    supervisor.watch(move |at| drop(changes.send(Event::Changed(at))));
    let count = supervisor.children().len();
    let bar = Progress::steps(output, "children", count as u64);
    let mut asked = vec![false; count];
    let mut outcomes: Vec<Option<Outcome>> = asked.iter().map(|_| None).collect();
    let mut known: std::collections::VecDeque<_> = (0..count).map(Event::Changed).collect();
    while outcomes.iter().any(Option::is_none) {
        let Some(event) = known.pop_front().or_else(|| events.recv().ok()) else { break };
        let (Event::Changed(concerned) | Event::Answered(concerned, _)) = event;
        match event {
            Event::Answered(at, outcome) => outcomes[at] = Some(outcome),
            Event::Changed(at) if outcomes[at].is_none() => {
                // A machine that is gone refuses connections just like one that still starts; the state tells.
                outcomes[at] = over(supervisor, at).or_else(|| without_asking(supervisor, at, work));
                if outcomes[at].is_none() && !asked[at] && may_be_asked(supervisor, at, work) {
                    asked[at] = true;
                    let (sender, supervisor, work) = (sender.clone(), Arc::clone(supervisor), work.clone());
                    std::thread::spawn(move || {
                        drop(sender.send(Event::Answered(at, ask(&supervisor, at, &work))));
                    });
                }
            }
            Event::Changed(_) => {}
        }
        if outcomes[concerned].is_some() {
            supervisor.end_turn(concerned);
        }
        bar.to(outcomes.iter().flatten().count() as u64);
    }
    supervisor.watch(|_| {});
    outcomes.into_iter().flatten().collect()
}

/// Where nothing is asked for, being ready is the answer.
fn without_asking(supervisor: &Supervisor, at: usize, work: &Work) -> Option<Outcome> {
    let ready = supervisor.children()[at].ready.filter(|_| matches!(work, Work::Nothing));
    ready.map(|at| Outcome { answer: None, error: None, exit_code: None, at })
}

/// A request that is there before the machine is ready saves it an interrupt. Before its first instruction it would wait for
/// a page that comes with later ones, and one whose turn it is not would be asked again and again.
fn may_be_asked(supervisor: &Supervisor, at: usize, work: &Work) -> bool {
    !matches!(work, Work::Nothing) && supervisor.children()[at].goes_on
}

/// The outcome of a child that is over without an answer.
fn over(supervisor: &Supervisor, at: usize) -> Option<Outcome> {
    let error = {
        let children = supervisor.children();
        let child = &children[at];
        child
            .state
            .is_over()
            .then(|| child.error.clone().unwrap_or_else(|| "it ended before it answered".to_owned()))
    };
    error.map(|error| failed(supervisor, error))
}

fn now(supervisor: &Supervisor) -> Moment {
    Moment { at_ns: monotonic_ns(), fetched: supervisor.sandbox().progress().bytes_fetched }
}

fn failed(supervisor: &Supervisor, error: String) -> Outcome {
    Outcome { answer: None, error: Some(error), exit_code: None, at: now(supervisor) }
}

fn ask(supervisor: &Supervisor, at: usize, work: &Work) -> Outcome {
    let socket = supervisor.children()[at].socket.clone();
    let asked = match work {
        Work::Nothing => return failed(supervisor, "it was asked nothing".to_owned()),
        Work::Eval(code) => eval(supervisor, &socket, code),
        Work::Exec(command) => exec(supervisor, &socket, command),
    };
    asked.unwrap_or_else(|error| {
        // When its machine failed, that is why it does not answer; the report of that may be a moment behind.
        for _ in 0..FAILURE_POLLS {
            if let Some(outcome) = over(supervisor, at) {
                return outcome;
            }
            std::thread::sleep(POLL);
        }
        failed(supervisor, chain(&error))
    })
}

fn eval(supervisor: &Supervisor, socket: &Path, code: &str) -> Result<Outcome, ClientError> {
    let Answer { answer, error, output } =
        AgentClient::connect(socket, ANSWER_TIMEOUT)?.eval(code, ANSWER_TIMEOUT)?;
    let at = now(supervisor);
    let printed = output.filter(|output| !output.is_empty());
    let answer = match (printed, answer) {
        (Some(printed), Some(answer)) => Some(format!("{printed}{answer}")),
        (printed, answer) => printed.or(answer),
    };
    Ok(Outcome { answer, error, exit_code: None, at })
}

fn exec(supervisor: &Supervisor, socket: &Path, command: &[String]) -> Result<Outcome, ClientError> {
    let request = ExecRequest { argv: command.to_vec(), ..ExecRequest::default() };
    let (mut stdout, mut stderr) = (Capped::default(), Capped::default());
    let client = AgentClient::connect(socket, ANSWER_TIMEOUT)?;
    let Exit { code, signal } = client.exec(request, None, &mut stdout, &mut stderr, Some(ANSWER_TIMEOUT))?;
    let text = [stdout.0, stderr.0].concat();
    Ok(Outcome {
        answer: Some(String::from_utf8_lossy(&text).into_owned()),
        error: None,
        exit_code: code.or(signal.map(|signal| 128 + signal)),
        at: now(supervisor),
    })
}

/// Keeps the first [`OUTPUT_MAX`] bytes.
#[derive(Default)]
struct Capped(Vec<u8>);

impl std::io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = OUTPUT_MAX.saturating_sub(self.0.len()).min(bytes.len());
        self.0.extend_from_slice(&bytes[..room]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fn report(
    supervisor: &Supervisor,
    name: &str,
    started_ns: u64,
    timeline: Timeline,
    outcomes: Vec<Outcome>,
    json: bool,
) -> ForkReport {
    let progress = supervisor.sandbox().progress();
    let since = |moment: &Moment| milliseconds_since(started_ns, moment.at_ns);
    let children = supervisor.children();
    let pids: Vec<_> =
        children.iter().filter(|child| !child.state.is_over()).map(|child| child.pid).collect();
    let earliest = |moments: &mut dyn Iterator<Item = Moment>| {
        moments.min_by_key(|moment| moment.at_ns).map(|moment| moment.fetched)
    };
    let fetched = Fetched {
        at_first_instruction: earliest(&mut children.iter().filter_map(|child| child.first_instruction)),
        at_ready: earliest(&mut children.iter().filter_map(|child| child.ready)),
        at_answered: earliest(&mut outcomes.iter().filter(|outcome| outcome.error.is_none()).map(|o| o.at)),
    };
    let shown = |(child, outcome): (&crate::supervisor::Child, Outcome)| ChildReport {
        id: child.id.clone(),
        pid: child.pid,
        first_instruction_ms: child.first_instruction.as_ref().map(since),
        ready_ms: child.ready.as_ref().map(since),
        answered_ms: outcome.error.is_none().then(|| since(&outcome.at)),
        answer: outcome.answer,
        exit_code: outcome.exit_code,
        error: outcome.error,
        network: child.network.clone(),
    };
    ForkReport {
        pack: PackReport {
            name: name.to_owned(),
            bytes_total: progress.bytes_total,
            bytes_fetched: progress.bytes_fetched,
            requests: progress.requests,
        },
        timeline,
        fetched,
        memory: Memory::measure(&pids, &supervisor.sandbox().images()),
        faults: Faults::of(supervisor.sandbox()),
        // Only JSON shows it, and looking takes time.
        prefetch: Prefetch::measure(supervisor.sandbox(), if json { &pids } else { &[] }),
        children: children.iter().zip(outcomes).map(shown).collect(),
    }
}
