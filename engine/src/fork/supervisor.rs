//! The children of one fork: their processes, their progress, what is left of them. A supervisor's process is also the
//! pager of its children.

mod error;
mod reports;
mod spec;

pub use error::StartError;
pub use spec::{ChildrenSpec, ResourceLimits};

use crate::chain::chain;
use crate::fork::identity;
use crate::fork::scratch::Scratch;
use crate::fork::start_queue::StartQueue;
use crate::fork::template::Template;
use crate::local::paths::Paths;
use crate::local::run_dir::{ChildState, ChildStatus, ForkStatus, RunDir};
use crate::network::wire::{ChildNetwork, ChildNetworks, NetworkStatus};
use forkd_vmm::cgroup::Limits;
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::pager::ClientId;
use forkd_vmm::process::{MachineFiles, MachineProcess, MachineSpec, monotonic_ns};
use forkd_vmm::zygote::Zygote;
use rustix::fd::AsFd;
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

/// How long the control socket is left alone when it cannot be served.
const PAUSE: Duration = Duration::from_millis(200);
/// A child that waits longer than this for one chunk counts as stalled.
const STALLED_AFTER: Duration = Duration::from_secs(1);

/// When something happened, and how much of the pack was there.
#[derive(Debug, Clone, Copy)]
pub struct Milestone {
    /// CLOCK_MONOTONIC, ns.
    pub at_ns: u64,
    /// Bytes of the pack that had been fetched.
    pub fetched: u64,
}

/// A child as the supervisor knows it.
#[derive(Debug)]
pub struct Child {
    /// Its name, unique on this machine.
    pub id: String,
    /// Its machine's process id.
    pub pid: i32,
    /// Its machine, until it is over: then its descriptors are of no more use.
    process: Option<Arc<MachineProcess>>,
    /// Unix socket of its vsock.
    pub socket: PathBuf,
    /// Where it stands.
    pub state: ChildState,
    /// Why it failed.
    pub error: Option<String>,
    /// Its first instruction after the snapshot.
    pub first_instruction: Option<Milestone>,
    /// It has executed its first instruction and does not wait for its turn.
    pub goes_on: bool,
    /// When it was unique and ready for requests.
    pub ready: Option<Milestone>,
    /// How it is reached on its network, if it has one.
    pub network: Option<NetworkStatus>,
    /// Where the other end of its network is, kept for others to enter; closed when the child is over.
    namespace: Option<File>,
    client: ClientId,
}

impl Child {
    fn kill(&self) {
        if let Some(process) = &self.process {
            process.kill();
        }
    }

    /// Ends it at once, if it is not over.
    fn end(&mut self, state: ChildState, error: Option<String>) {
        if !self.state.is_over() {
            self.kill();
            self.state = state;
            self.error = error;
        }
    }
}

/// The children of one fork.
pub struct Supervisor {
    run_dir: RunDir,
    /// Where scratch disks lie.
    cache: PathBuf,
    template: Arc<Template>,
    pack: String,
    children: Mutex<Vec<Child>>,
    /// More children are coming.
    spawning: AtomicBool,
    turns: Option<Mutex<StartQueue>>,
    watcher: Mutex<Watcher>,
    /// Where other processes ask; nobody listens any more once it is shut down.
    control: Option<UnixListener>,
    ended: AtomicBool,
}

/// Is told which child goes on, got ready or is over.
type Watcher = Box<dyn Fn(usize) + Send>;

impl Supervisor {
    /// Starts children of `template`, which `pack` names for people.
    pub fn start(
        paths: &Paths,
        zygote: &Zygote,
        template: Arc<Template>,
        pack: String,
        spec: &ChildrenSpec,
    ) -> Result<Arc<Supervisor>, StartError> {
        spec.limits.check(zygote)?;
        let networks = ChildNetworks::new(spec.network)?;
        let run_dir = RunDir::create(paths)?;
        match zygote.cgroups() {
            Ok(cgroups) => run_dir.note_cgroups(&cgroups.path)?,
            Err(error) => tracing::debug!(error = chain(error), "children get no cgroups"),
        }
        let mut listener = spec.reachable.then(|| run_dir.listen()).transpose()?;
        let control =
            listener.as_ref().map(UnixListener::try_clone).transpose().map_err(StartError::Control)?;
        let children = Mutex::default();
        let spawning = AtomicBool::new(true);
        let watcher = Mutex::new(Box::new(|_| {}) as Watcher);
        let turns = StartQueue::of(spec.count, KvmKind::detect()).map(Mutex::new);
        let cache = paths.cache.clone();
        let ended = AtomicBool::new(false);
        let supervisor = Arc::new(Supervisor {
            run_dir,
            cache,
            template,
            pack,
            children,
            spawning,
            turns,
            watcher,
            control,
            ended,
        });
        let mut followed = false;
        let spawned = (1..=u64::from(spec.count)).try_for_each(|number| {
            let network = networks.of_child(number)?;
            supervisor.spawn(zygote, spec, number, network)?;
            // The first child does not wait for threads, and not for its memory until the last one is spawned.
            if !std::mem::replace(&mut followed, true) {
                let reports = Arc::clone(&supervisor);
                spawn_thread(move || reports.follow())?;
            }
            if let Some(listener) = listener.take() {
                let control = Arc::downgrade(&supervisor);
                spawn_thread(move || serve_control(&control, &listener))?;
            }
            Ok(())
        });
        supervisor.spawning.store(false, Ordering::Release);
        if spawned.is_err() {
            supervisor.end();
        }
        spawned.map(|()| supervisor)
    }

    fn spawn(
        &self,
        zygote: &Zygote,
        spec: &ChildrenSpec,
        number: u64,
        network: Option<ChildNetwork>,
    ) -> Result<(), StartError> {
        let id = format!("{}-{number}", self.run_dir.id());
        let identity = network.as_ref().map(|network| network.identity);
        let record = identity::fresh(&id, number, identity, spec.variables.of_child(number))?;
        let limits = spec.limits.limits(&id, &self.template.configuration().layout);
        let (process, socket) = self.start_machine(zygote, &id, record, limits, network.as_ref())?;
        self.children().push(Child {
            id,
            pid: process.pid,
            process: Some(Arc::new(process)),
            socket,
            state: ChildState::Starting,
            error: None,
            first_instruction: None,
            goes_on: false,
            ready: None,
            network: network.as_ref().map(ChildNetwork::status),
            namespace: network.map(|network| network.namespace),
            client: ClientId(number),
        });
        Ok(())
    }

    /// A child's process, and the socket of its vsock.
    fn start_machine(
        &self,
        zygote: &Zygote,
        id: &str,
        record: Vec<u8>,
        limits: Limits,
        network: Option<&ChildNetwork>,
    ) -> Result<(MachineProcess, PathBuf), StartError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| StartError::File { operation, path, source }
        };
        let socket = self.run_dir.socket(id);
        let vsock = UnixListener::bind(&socket).map_err(failed("binding", &socket))?;
        let console_path = self.run_dir.console(id);
        let console = File::create(&console_path).map_err(failed("creating", &console_path))?;
        let configuration = self.template.configuration();
        let scratch = Scratch { dir: &self.cache, mib: configuration.scratch_mib };
        let disk = scratch.create()?;
        let spec = MachineSpec {
            layout: configuration.layout,
            limits,
            record,
            mac: network.map(|network| network.identity.mac),
            start: self.template.start(),
            scratch_bytes: scratch.bytes(),
            waits_at_first_instruction: self.turns.is_some(),
        };
        let files = MachineFiles {
            images: self.template.images(),
            start: self.template.vmstate(),
            console: console.as_fd(),
            vsock: vsock.as_fd(),
            scratch: disk.as_ref().map(AsFd::as_fd),
            tap: network.map(|network| network.tap.as_fd()),
            initrd: None,
        };
        Ok((zygote.spawn(&spec, &files)?, socket))
    }

    /// The children; short-lived lock.
    pub fn children(&self) -> MutexGuard<'_, Vec<Child>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has `watcher` told from now on, instead of the one before, which child goes on, got ready or
    /// is over. It must not ask for
    /// the children: their lock may be held.
    pub fn watch(&self, watcher: impl Fn(usize) + Send + 'static) {
        *self.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Box::new(watcher);
    }

    fn tell(&self, at: usize) {
        self.watcher.lock().unwrap_or_else(PoisonError::into_inner)(at);
    }

    /// The template they were forked from.
    pub fn template(&self) -> &Arc<Template> {
        &self.template
    }

    /// The file with what the machine of the child `id` prints.
    pub fn console(&self, id: &str) -> PathBuf {
        self.run_dir.console(id)
    }

    /// Ends children: all, or the one of that name. Returns how many were alive.
    pub fn kill(&self, id: Option<&str>) -> usize {
        let mut children = self.children();
        let mut killed = 0;
        for child in children.iter_mut() {
            if id.is_none_or(|id| id == child.id) && !child.state.is_over() {
                child.end(ChildState::Killed, None);
                killed += 1;
            }
        }
        killed
    }

    /// Whether no child is alive.
    pub fn all_over(&self) -> bool {
        self.children().iter().all(|child| child.state.is_over())
    }

    /// Ends all children and removes what the fork left on disk.
    pub fn end(&self) {
        self.kill(None);
        self.ended.store(true, Ordering::Release);
        if let Some(control) = &self.control {
            // Whoever waits in accept(2) is woken.
            let _ = rustix::net::shutdown(control, rustix::net::Shutdown::Both);
        }
        self.run_dir.remove();
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// What `forkd ps` shows.
    pub fn status(&self) -> ForkStatus {
        let progress = self.template.progress();
        let waits = self.template.pager().map(|pager| pager.waits()).unwrap_or_default();
        let shown = |child: &Child| {
            let stuck = waits.get(&child.client).is_some_and(|wait| *wait > STALLED_AFTER);
            let stalled = stuck && !child.state.is_over();
            ChildStatus {
                id: child.id.clone(),
                pid: child.pid,
                state: if stalled { ChildState::Stalled } else { child.state },
                error: child.error.clone().or_else(|| progress.last_error.clone().filter(|_| stalled)),
                network: child.network.clone(),
            }
        };
        ForkStatus {
            pack: self.pack.clone(),
            bytes_fetched: progress.bytes_fetched,
            bytes_total: progress.bytes_total,
            children: self.children().iter().map(shown).collect(),
        }
    }
}

/// Answers other processes until the supervisor has ended.
fn serve_control(supervisor: &Weak<Supervisor>, listener: &UnixListener) {
    for stream in listener.incoming() {
        let Some(supervisor) = supervisor.upgrade().filter(|supervisor| !supervisor.has_ended()) else {
            return;
        };
        let Ok(stream) = stream else {
            // Descriptors may be short for a moment; without this thread nobody could end the fork.
            std::thread::sleep(PAUSE);
            continue;
        };
        supervisor.run_dir.answer(stream, || supervisor.status(), |id| supervisor.kill(id));
    }
}

fn spawn_thread(run: impl FnOnce() + Send + 'static) -> Result<(), StartError> {
    std::thread::Builder::new().spawn(run).map(drop).map_err(StartError::Thread)
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.end();
    }
}

/// Milliseconds from `start_ns` to `at_ns`, both on CLOCK_MONOTONIC.
pub fn milliseconds_since(start_ns: u64, at_ns: u64) -> f64 {
    at_ns.saturating_sub(start_ns) as f64 / 1e6
}

/// When this process started, on CLOCK_MONOTONIC, ns: now less the CPU time it has used, which is right as long as
/// it has not waited for anything. Call it first thing.
pub fn process_start_ns() -> u64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    monotonic_ns().saturating_sub(used.tv_sec as u64 * 1_000_000_000 + used.tv_nsec as u64)
}
