//! The role of a supervisor: forks for one order, answers, and stays until its children are over.
//!
//! The order comes over the Unix socket that is its stdin. A supervisor whose daemon ends before the order came, or
//! before it has answered, ends too: its children would be nobody's. Afterwards its children decide how long it lives,
//! unless the order says that they end with the daemon.

use crate::environment::{self, start_logging};
use crate::order::{FailureKind, ForkAnswer, ForkOrder, ForkedChild};
use forkd_engine::chain::chain;
use forkd_engine::fork::report::ChildReport;
use forkd_engine::fork::run::{AnsweredFork, ForkCaller, ForkError, ForkRequest, fork};
use forkd_engine::fork::supervisor::{StartError, Supervisor};
use forkd_engine::fork::template::TemplateError;
use forkd_engine::fork::warm::WarmStatus;
use forkd_engine::fork::zygote::start_zygote;
use forkd_engine::hub::registry::RegistryError;
use forkd_engine::local::daemon::OnExit;
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshots::SnapshotError;
use forkd_engine::target::TargetError;
use forkd_vmm::zygote::Zygote;
use rustix::fs::{Mode, OFlags};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;
use tokio::runtime::{Builder, Handle, Runtime};
use tokio::signal::unix::{SignalKind, signal};

/// The argument of this role.
pub const ROLE: &str = "supervise";
/// Longest order, bytes.
const ORDER_MAX: u64 = 4 << 20;
/// How often it looks whether its children are over when nothing says so.
const LOOK: Duration = Duration::from_secs(5);
/// Threads of its runtime, which fetch and decode what is missing of a pack.
const WORKERS: usize = 2;

/// Waits for an order and carries it out. To be called by a process of one thread.
pub fn run() -> ExitCode {
    let zygote = start_zygote();
    start_logging("warn");
    // Ctrl-C in the daemon's terminal is not for children that may outlive it.
    let _ = rustix::process::setsid();
    let served = take_stdin().and_then(|stream| {
        let Some(order) = read_order(&stream)? else { return Ok(()) };
        match zygote {
            Ok(zygote) => carry_out(&order, &zygote, &stream),
            Err(error) => answer(&stream, &failed(FailureKind::Host, chain(&error))),
        }
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = chain(&error), "a supervisor ends");
            ExitCode::FAILURE
        }
    }
}

/// The socket, and nothing in its place.
fn take_stdin() -> io::Result<UnixStream> {
    let socket = rustix::io::fcntl_dupfd_cloexec(rustix::stdio::stdin(), 3)?;
    let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    rustix::stdio::dup2_stdin(&null)?;
    Ok(UnixStream::from(socket))
}

/// `None` when the daemon has none.
fn read_order(stream: &UnixStream) -> io::Result<Option<ForkOrder>> {
    let mut line = String::new();
    BufReader::new(stream.take(ORDER_MAX)).read_line(&mut line)?;
    if line.is_empty() { Ok(None) } else { Ok(Some(serde_json::from_str(&line)?)) }
}

fn answer(mut stream: &UnixStream, answer: &ForkAnswer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn failed(kind: FailureKind, message: String) -> ForkAnswer {
    ForkAnswer::Failed { kind, message }
}

fn carry_out(order: &ForkOrder, zygote: &Zygote, stream: &UnixStream) -> io::Result<()> {
    let (paths, request) = match (environment::paths(), order.request()) {
        (Ok(paths), Ok(request)) => (paths, request),
        (Err(error), _) => return answer(stream, &failed(FailureKind::Host, chain(&error))),
        (_, Err(error)) => return answer(stream, &failed(FailureKind::Refused, chain(&error))),
    };
    let caller = Caller {
        daemon: stream.try_clone()?,
        ends_with_daemon: order.on_exit == OnExit::End,
        answered: Arc::default(),
        supervisor: Arc::default(),
        runtime: OnceLock::new(),
    };
    let forked = fork_all(&paths, zygote, request, &caller);
    let mut forked = match forked {
        Ok(forked) => forked,
        Err(refusal) => return answer(stream, &refusal),
    };
    caller.answered.store(true, Ordering::Release);
    let told = answer(stream, &report(&forked));
    match &told {
        Ok(()) => stay(&mut forked),
        Err(error) => tracing::warn!(%error, "the daemon is gone: what was made for it ends, too"),
    }
    forked.end();
    Ok(())
}

/// All children, ready, or none.
fn fork_all<'a>(
    paths: &Paths,
    zygote: &'a Zygote,
    request: ForkRequest,
    caller: &'a Caller,
) -> Result<AnsweredFork<'a>, ForkAnswer> {
    let forked = fork(paths, zygote, request, caller).map_err(|error| failed(kind(&error), chain(&error)))?;
    let error = forked.report.children.iter().find_map(|child| child.error.clone());
    match error {
        Some(error) => {
            forked.end();
            Err(failed(FailureKind::Host, error))
        }
        None => Ok(forked),
    }
}

fn report(forked: &AnsweredFork<'_>) -> ForkAnswer {
    let shown = |child: &ChildReport| ForkedChild {
        id: child.id.clone(),
        first_instruction_ms: child.first_instruction_ms,
        ready_ms: child.ready_ms,
    };
    let children: Vec<_> = forked.report.children.iter().map(shown).collect();
    let fork = children.first().and_then(|child| child.id.split_once('-'));
    ForkAnswer::Forked { fork: fork.map_or_else(String::new, |(fork, _)| fork.to_owned()), children }
}

fn stay(forked: &mut AnsweredFork<'_>) {
    forked.fetch_rest();
    let (sender, changes) = mpsc::channel();
    forked.supervisor.watch(move |_| {
        // This looks by itself when it is not told.
        let _ = sender.send(());
    });
    while !forked.supervisor.all_over() {
        // Either way there is something to look at.
        let _ = changes.recv_timeout(LOOK);
    }
}

/// Whose fault it is.
fn kind(error: &ForkError) -> FailureKind {
    match error {
        ForkError::Target(error) => target_kind(error),
        ForkError::Template { source, .. } => match &**source {
            TemplateError::Snapshot(error) => snapshot_kind(error),
            TemplateError::Foreign | TemplateError::Host(_) => FailureKind::Refused,
            TemplateError::Read(_) | TemplateError::Base(_) => FailureKind::Upstream,
            _ => FailureKind::Host,
        },
        ForkError::Download { .. } => FailureKind::Upstream,
        ForkError::Start(StartError::NoLimit { .. }) => FailureKind::Refused,
        ForkError::Kvm(_) | ForkError::Runtime(_) | ForkError::Start(_) => FailureKind::Host,
    }
}

fn target_kind(error: &TargetError) -> FailureKind {
    match error {
        TargetError::Reference(_) => FailureKind::Refused,
        TargetError::NoSuchPath { .. } => FailureKind::NotFound,
        TargetError::Registry(
            RegistryError::UnknownPackage { .. }
            | RegistryError::UnknownVersion { .. }
            | RegistryError::NotHosted { .. },
        ) => FailureKind::NotFound,
        TargetError::Registry(RegistryError::NoHub) => FailureKind::Refused,
        TargetError::Registry(_) | TargetError::Open(_) => FailureKind::Upstream,
        TargetError::Snapshot(error) => snapshot_kind(error),
    }
}

fn snapshot_kind(error: &SnapshotError) -> FailureKind {
    match error {
        SnapshotError::Unknown { .. } => FailureKind::NotFound,
        _ => FailureKind::Host,
    }
}

/// Ends the children when the daemon does, where that is wanted, and at SIGTERM.
struct Caller {
    daemon: UnixStream,
    ends_with_daemon: bool,
    answered: Arc<AtomicBool>,
    supervisor: Arc<OnceLock<Arc<Supervisor>>>,
    runtime: OnceLock<Runtime>,
}

impl Caller {
    fn watch_daemon(&self, supervisor: &Arc<Supervisor>) -> io::Result<()> {
        let (mut daemon, supervisor) = (self.daemon.try_clone()?, Arc::clone(supervisor));
        let (ends, answered) = (self.ends_with_daemon, Arc::clone(&self.answered));
        let watch = move || {
            // It says nothing more: this returns when it is gone.
            let _ = daemon.read(&mut [0]);
            if ends || !answered.load(Ordering::Acquire) {
                supervisor.kill(None);
            }
        };
        std::thread::Builder::new().name("daemon".to_owned()).spawn(watch).map(drop)
    }
}

impl ForkCaller for Caller {
    fn runtime(&self) -> io::Result<Handle> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime.handle().clone());
        }
        let runtime = Builder::new_multi_thread().worker_threads(WORKERS).enable_all().build()?;
        let supervisor = Arc::clone(&self.supervisor);
        let mut terminate = {
            let _context = runtime.enter();
            signal(SignalKind::terminate())?
        };
        runtime.spawn(async move {
            terminate.recv().await;
            match supervisor.get() {
                Some(supervisor) => drop(supervisor.kill(None)),
                // Nothing is there yet that would be left.
                None => std::process::exit(1),
            }
        });
        Ok(self.runtime.get_or_init(|| runtime).handle().clone())
    }

    fn on_started(&self, supervisor: &Arc<Supervisor>, _: Option<&WarmStatus>) -> io::Result<()> {
        let _ = self.supervisor.set(Arc::clone(supervisor));
        self.runtime()?;
        self.watch_daemon(supervisor)
    }
}
