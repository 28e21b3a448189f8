//! The children of one fork: their processes, their progress, what is left of them. A supervisor's process is also the
//! pager of its children.

mod branch_error;
mod branching;
mod error;
mod lifetime;
mod moment;
mod on_disk;
mod own_pages;
mod publishing;
mod reports;
mod spec;
mod status;
mod wake;

pub use crate::local::lifetime::{Lifetime, OnTimeout};
pub use branch_error::BranchError;
pub use error::StartError;
pub use spec::{ChildrenSpec, ResourceLimits};

use crate::chain::chain;
use crate::fork::forward::publish::Publisher;
use crate::fork::identity::{self, MachineId};
use crate::fork::scratch::Scratch;
use crate::fork::start_queue::StartQueue;
use crate::fork::template::Template;
use crate::local::branches::{BranchRequest, Branched, PausedToDisk, SnapshotRequest, TakenSnapshot};
use crate::local::paths::Paths;
use crate::local::run_dir::{ChildState, ForkControl, ForkStatus, PublishedPort, RunDir};
use crate::network::wire::{ChildNetwork, ChildNetworks, GatewayStatus, KeptNetwork};
use forkd_vmm::kvm::KvmKind;
use forkd_vmm::memory::Delta;
use forkd_vmm::pager::ClientId;
use forkd_vmm::process::{MachineFiles, MachineProcess, MachineSpec, monotonic_ns};
use forkd_vmm::uffd::Uffd;
use forkd_vmm::zygote::Zygote;
use moment::{BranchPoint, FrozenMachine, Stop};
use rustix::fd::AsFd;
use spec::Deadline;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;
use wake::Wake;

/// How long the control socket is left alone when it cannot be served.
const PAUSE: Duration = Duration::from_millis(200);

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
    /// What is kept of its network, if it has one; closed when the child is over.
    pub network: Option<KeptNetwork>,
    /// Its ports that the fork forwards, until it is over.
    pub ports: Vec<PublishedPort>,
    /// Its machine is stopped, or on disk.
    paused: bool,
    /// Its machine, which has no process, while it is paused to disk.
    on_disk: Option<Arc<FrozenMachine>>,
    /// Of its guest. Its machine is told none where it has it already.
    machine_id: MachineId,
    /// Whether its machine's reports are read.
    followed: bool,
    /// How many machines it has had: each but the first went on from disk.
    machines: u32,
    /// When its time is over, if it has such.
    deadline: Option<Deadline>,
    /// Why it was paused, if nobody asked for that.
    pub overdue: Option<String>,
    client: ClientId,
    /// The child that it was branched from.
    parent: Option<String>,
    /// Its scratch disk, until it is over.
    disk: Option<Arc<File>>,
    /// What it goes on from, until it is over.
    frozen: Option<Arc<FrozenMachine>>,
    /// It is to be branched: who waits for it to stop.
    stop_wanted: Option<SyncSender<Stop>>,
    /// How often its agent was asked to ring for a snapshot, and has not yet.
    rings_due: u32,
    /// Tells what it writes to, where the kernel can.
    uffd: Option<Arc<Uffd>>,
    /// When it rang for a snapshot the last time, CLOCK_MONOTONIC, ns.
    rang_at_ns: u64,
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
    /// The children's published ports, if any are.
    publisher: Mutex<Option<Publisher>>,
    zygote: Zygote,
    limits: ResourceLimits,
    lifetime: Option<Lifetime>,
    /// What branches get theirs from; one branching at a time has it.
    networks: Mutex<ChildNetworks>,
    /// Held while a child is stopped to be branched.
    freezing: Mutex<()>,
    /// Of the next branch. Held while branches are started, so that theirs are the last children.
    next_number: Mutex<u64>,
    /// Has the reports looked at.
    wake: Wake,
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
        let networks = ChildNetworks::new(&spec.network, spec.count)?;
        let run_dir = RunDir::create(paths)?;
        run_dir.note_labels(&spec.labels)?;
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
        let wake = Wake::new().map_err(StartError::Thread)?;
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
            publisher: Mutex::default(),
            zygote: zygote.clone(),
            limits: spec.limits,
            lifetime: spec.lifetime,
            networks: Mutex::new(networks),
            freezing: Mutex::default(),
            next_number: Mutex::new(u64::from(spec.count) + 1),
            wake,
        });
        let mut followed = false;
        let spawned = (1..=u64::from(spec.count)).try_for_each(|number| {
            let network = supervisor.network_of(number)?;
            supervisor.spawn(number, spec.variables.of_child(number), network, None)?;
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
        let spawned = spawned.and_then(|()| supervisor.publish(&spec.publish));
        supervisor.spawning.store(false, Ordering::Release);
        if spawned.is_err() {
            supervisor.end();
        }
        spawned.map(|()| supervisor)
    }

    fn network_of(&self, number: u64) -> Result<Option<ChildNetwork>, StartError> {
        Ok(self.networks.lock().unwrap_or_else(PoisonError::into_inner).of_child(number)?)
    }

    /// Starts child `number`, from the template or from where another child was.
    fn spawn(
        &self,
        number: u64,
        environment: BTreeMap<String, String>,
        network: Option<ChildNetwork>,
        branch: Option<BranchPoint>,
    ) -> Result<(), StartError> {
        let id = format!("{}-{number}", self.run_dir.id());
        let (identity, machine_id) = (network.as_ref().map(|network| network.identity), identity::random()?);
        let record = identity::record(&id, number, machine_id, identity, environment)?;
        let frozen = branch.as_ref().map(|branch| &*branch.frozen);
        let disk = match frozen.and_then(|frozen| frozen.disk.as_ref()) {
            Some(disk) => self.scratch().copy(disk)?,
            None => self.scratch().create()?,
        };
        let disk = disk.map(Arc::new);
        let (process, socket) =
            self.start_machine((&id, &id), record, network.as_ref(), frozen, disk.as_deref())?;
        let network = network.map(|network| network.connect(&identity::hostname(&id))).transpose()?;
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
            network,
            ports: Vec::new(),
            paused: false,
            on_disk: None,
            machine_id,
            followed: false,
            machines: 1,
            deadline: Deadline::of(self.lifetime),
            overdue: None,
            client: ClientId(number),
            parent: branch.as_ref().map(|branch| branch.parent.clone()),
            disk,
            frozen: branch.map(|branch| branch.frozen),
            stop_wanted: None,
            rings_due: 0,
            uffd: None,
            rang_at_ns: 0,
        });
        Ok(())
    }

    fn scratch(&self) -> Scratch<'_> {
        Scratch { dir: &self.cache, mib: self.template.configuration().scratch_mib }
    }

    /// A process for the child `id`, whose cgroup is `group`, and the socket of its vsock.
    fn start_machine(
        &self,
        (id, group): (&str, &str),
        record: Vec<u8>,
        network: Option<&ChildNetwork>,
        frozen: Option<&FrozenMachine>,
        disk: Option<&File>,
    ) -> Result<(MachineProcess, PathBuf), StartError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| StartError::File { operation, path, source }
        };
        let socket = self.run_dir.socket(id);
        let vsock = UnixListener::bind(&socket).map_err(failed("binding", &socket))?;
        let console_path = self.run_dir.console(id);
        let console = OpenOptions::new().create(true).append(true).open(&console_path);
        let console = console.map_err(failed("creating", &console_path))?;
        let configuration = self.template.configuration();
        let delta = frozen.map(|frozen| &frozen.delta).or(self.template.delta());
        let spec = MachineSpec {
            layout: configuration.layout,
            limits: self.limits.limits(group, &configuration.layout),
            record,
            mac: network.map(|network| network.identity.mac),
            start: self.template.start(delta),
            scratch_bytes: self.scratch().bytes(),
            waits_at_first_instruction: self.turns.is_some() && frozen.is_none(),
        };
        let files = MachineFiles {
            images: self.template.images(),
            start: frozen.map_or_else(|| self.template.vmstate(), |frozen| frozen.vmstate.as_fd()),
            console: console.as_fd(),
            vsock: vsock.as_fd(),
            scratch: disk.map(AsFd::as_fd),
            wire: network.map(ChildNetwork::wire),
            initrd: None,
            delta: delta.filter(|delta| !delta.runs().is_empty()).map(Delta::file),
        };
        Ok((self.zygote.spawn(&spec, &files)?, socket))
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
        *self.publisher.lock().unwrap_or_else(PoisonError::into_inner) = None;
        if let Some(control) = &self.control {
            // Whoever waits in accept(2) is woken.
            let _ = rustix::net::shutdown(control, rustix::net::Shutdown::Both);
        }
        self.run_dir.remove();
    }

    fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }

    /// The way out of the child of that name, if there is such a child and it has one.
    pub fn gateway_status(&self, id: &str) -> Option<GatewayStatus> {
        let children = self.children();
        let child = children.iter().find(|child| child.id == id)?;
        child.network.as_ref()?.gateway_status()
    }
}

impl ForkControl for Supervisor {
    fn status(&self) -> ForkStatus {
        Supervisor::status(self)
    }

    fn kill(&self, child: Option<&str>) -> usize {
        Supervisor::kill(self, child)
    }

    fn pause(&self, child: Option<&str>) -> usize {
        Supervisor::pause(self, child)
    }

    fn resume(&self, child: Option<&str>) -> usize {
        Supervisor::resume(self, child)
    }

    fn gateway(&self, child: &str) -> Option<GatewayStatus> {
        self.gateway_status(child)
    }

    fn set_lifetime(&self, child: Option<&str>, lifetime: Option<Lifetime>) -> usize {
        Supervisor::set_lifetime(self, child, lifetime)
    }

    fn branch(&self, request: &BranchRequest) -> Result<Branched, String> {
        Supervisor::branch(self, request).map_err(|error| chain(&error))
    }

    fn snapshot(&self, request: &SnapshotRequest) -> Result<TakenSnapshot, String> {
        Supervisor::snapshot(self, request).map_err(|error| chain(&error))
    }

    fn pause_to_disk(&self, child: Option<&str>) -> Result<PausedToDisk, String> {
        Supervisor::pause_to_disk(self, child).map_err(|error| chain(&error))
    }

    fn resume_from_disk(&self, child: Option<&str>) -> Result<usize, String> {
        Supervisor::resume_from_disk(self, child).map_err(|error| chain(&error))
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
        supervisor.run_dir.answer(stream, &supervisor);
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
