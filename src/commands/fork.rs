//! `forkd fork`: copies of a machine, from a pack that need not be there yet.
//!
//! Order matters here. The process is split (for `--detach`) and the zygote forked while there is one thread; only then
//! come the runtime, the registry, the pack and the children.

use crate::cli::ForkArgs;
use crate::commands::fork_ask::{Work, ask_all};
use crate::commands::fork_report::{ForkReport, Timeline, WarmReport};
use crate::commands::{end_on_signal, fork_timeline, runtime};
use crate::detach::{Detached, Handover, split};
use crate::error::CommandError;
use crate::output::Output;
use crate::units::show_since;
use forkd_engine::chain::chain;
use forkd_engine::fork::source::{self, Origin, SourceError, Stage};
use forkd_engine::fork::supervisor::{
    Allowance, ForkError, Plan, Supervisor, milliseconds_since, process_start_ns,
};
use forkd_engine::fork::template::{Template, TemplateError};
use forkd_engine::fork::variables::{Variables, VariablesError};
use forkd_engine::fork::warm::{Address, Handed, WarmStatus};
use forkd_engine::local::paths::Paths;
use forkd_engine::local::snapshots::Held;
use forkd_engine::picture::svg::{PictureError, check_place};
use forkd_engine::picture::timeline::Recorder;
use forkd_engine::progress::{Amount, Progress, follow};
use forkd_fs::cache::ChunkCache;
use forkd_fs::observe::Observer;
use forkd_fs::store::{ReadError, Store};
use forkd_vmm::kvm::{Hypervisor, KvmError, KvmKind};
use forkd_vmm::process::monotonic_ns;
use forkd_vmm::zygote::{SpawnError, Zygote};
use rustix::process::{Resource, Rlimit};
use std::error::Error;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::sync::oneshot;

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
    Source(#[from] SourceError),
    /// Opening the machine.
    #[error("{name}")]
    Template {
        /// What was to be forked.
        name: String,
        /// Why not.
        #[source]
        source: Box<TemplateError>,
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

/// What is begun before the command line is understood, because a first instruction waits for it: the jail takes longer to
/// build than the command line to parse.
pub struct Ahead {
    started_ns: u64,
    /// Not yet where the process will split: the zygote is to be a child of the one that goes on.
    zygote: Option<Result<Zygote, SpawnError>>,
}

impl Ahead {
    /// For arguments (the program's name first) that look like a fork's: options before the verb take no values.
    pub fn of(arguments: &[OsString]) -> Option<Ahead> {
        let mut words = arguments.iter().skip(1).filter(|word| !word.as_encoded_bytes().starts_with(b"-"));
        let splits = arguments.iter().any(|word| word == "--detach");
        words
            .next()
            .is_some_and(|verb| verb == "fork")
            .then(|| Ahead { started_ns: process_start_ns(), zygote: (!splits).then(start_zygote) })
    }
}

impl Default for Ahead {
    fn default() -> Ahead {
        Ahead { started_ns: process_start_ns(), zygote: None }
    }
}

fn start_zygote() -> Result<Zygote, SpawnError> {
    raise_file_limit();
    Zygote::start()
}

/// Runs the command.
pub fn run(args: &ForkArgs, ahead: Ahead, output: &Output) -> Result<ExitCode, CommandError> {
    let Ahead { started_ns, zygote } = ahead;
    let variables = Variables::new(&args.env, &args.vary, args.count).map_err(ForkCommandError::from)?;
    let detached = match args.detach.then(split).transpose().map_err(ForkCommandError::Detach)? {
        Some(Detached::Foreground(exit)) => return Ok(exit),
        Some(Detached::Background(handover)) => Some(handover),
        None => None,
    };
    // No thread was started yet.
    let zygote = zygote.unwrap_or_else(start_zygote);
    detached.iter().for_each(Handover::end_with_foreground);
    if let Some(file) = &args.timeline {
        check_place(file).map_err(ForkCommandError::from)?;
    }
    let paths = Paths::from_env()?;
    drop(Hypervisor::open(KvmKind::detect()).map_err(ForkCommandError::Kvm)?);
    let zygote = zygote.map_err(ForkCommandError::Spawn)?;

    let mut opened = Opened::new(args, &paths, started_ns, output)?;
    // What no child has asked for is fetched after the answers: it would only be in their way.
    let (rest_wanted, wanted) = oneshot::channel::<()>();
    if let Some(background) = opened.background.as_ref().filter(|_| !args.eager) {
        background.fill(&opened.template, wanted);
    }
    let allowance = Allowance { memory_mib: args.memory_limit_mib, cpus: args.cpus };
    let plan = Plan { count: args.count, variables, network: args.net, allowance };
    let supervisor = Supervisor::start(&paths, &zygote, opened.template, opened.name.clone(), &plan)
        .map_err(ForkCommandError::from)?;
    note_warm(opened.warm.as_ref(), output);
    let background = opened.background.take().map_or_else(Background::start, Ok);
    let background = background.inspect_err(|_| supervisor.end())?;
    let _ = background.supervisor.set(Arc::clone(&supervisor));

    let work = Work::of(args);
    let outcomes = ask_all(&supervisor, &work, output);
    let mut report =
        ForkReport::new(&supervisor, opened.name, started_ns, opened.timeline, outcomes, output.is_json());
    report.pack.warm = opened.warm.map(WarmReport::from);
    let drawn = fork_timeline::draw(args.timeline.as_deref(), opened.recorder.as_deref(), &report);
    let failed = !drawn
        || report.children.iter().any(|child| child.error.is_some() || child.exit_code.unwrap_or(0) != 0);
    output.report(&report, ForkReport::text);
    let exit = if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS };
    // Children that whoever asked for them did not wait for are nobody's.
    let stays = match detached {
        Some(handover) => handover.finish(if failed { 1 } else { 0 }),
        None => matches!(work, Work::Nothing),
    };
    if stays {
        if !args.detach {
            output.note("children run until Ctrl-C; `forkd exec ID -- CMD` reaches them");
        }
        drop(rest_wanted);
        wait_for_end(&supervisor);
    }
    supervisor.end();
    if let Some(cache) = opened.cache {
        cache.flush();
    }
    background.runtime.shutdown_background();
    Ok(exit)
}

fn wait_for_end(supervisor: &Supervisor) {
    while !supervisor.all_over() {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// What happens beside the children: signals are waited for, packs are fetched.
struct Background {
    runtime: Runtime,
    supervisor: Arc<OnceLock<Arc<Supervisor>>>,
}

impl Background {
    fn start() -> Result<Background, CommandError> {
        let background = Background { runtime: runtime()?, supervisor: Arc::default() };
        let supervisor = Arc::clone(&background.supervisor);
        end_on_signal(&background.runtime, move || {
            if let Some(supervisor) = supervisor.get() {
                supervisor.end();
            }
        });
        Ok(background)
    }

    /// Fetches what is missing of the images, the rest of them once it is `wanted`.
    fn fill(&self, template: &Template, wanted: oneshot::Receiver<()>) {
        let fill = template.fill(async {
            let _ = wanted.await;
        });
        self.runtime.spawn(async move {
            if let Err(error) = fill.await {
                tracing::error!(error = chain(&error), "fetching the rest of the pack failed");
            }
        });
    }

    /// Downloads a whole pack.
    fn download(&self, template: &mut Template, name: &str, output: &Output) -> Result<(), ForkCommandError> {
        let bar = output.begin("downloading", Amount::Bytes(template.progress().bytes_total));
        let filling = template.fill(std::future::ready(()));
        let filled = self.runtime.block_on(follow(&*bar, filling, || template.progress().bytes_fetched));
        let name = name.to_owned();
        if filled.map_err(|source| ForkCommandError::Download { name, source: Box::new(source) })? {
            template.set_complete();
        }
        Ok(())
    }
}

/// What the children are forked from.
struct Opened {
    template: Arc<Template>,
    name: String,
    /// The daemon that held it.
    warm: Option<WarmStatus>,
    cache: Option<Arc<ChunkCache>>,
    timeline: Timeline,
    recorder: Option<Arc<Recorder>>,
    /// Opening it needed this. Children of what is at hand do not wait until its threads run.
    background: Option<Background>,
}

impl Opened {
    fn new(args: &ForkArgs, paths: &Paths, started_ns: u64, output: &Output) -> Result<Opened, CommandError> {
        let since_start = || milliseconds_since(started_ns, monotonic_ns());
        let recorder = args.timeline.as_ref().map(|_| Arc::new(Recorder::new(since_start())));
        let wanted = args.wanted();
        let (mut timeline, mut background, mut cache, mut warm) = (Timeline::default(), None, None, None);
        let mut name = wanted.name().to_owned();
        let mut template = match (resident(paths, args), wanted.tag) {
            (Some((template, status)), _) => {
                warm = Some(status);
                template
            }
            (None, Some(tag)) => open_local(
                &name,
                &Held::find(paths, tag).map_err(SourceError::from).map_err(ForkCommandError::from)?,
            )?,
            (None, None) => {
                let background = background.insert(Background::start()?);
                let observer = recorder.clone().map(|recorder| recorder as Arc<dyn Observer>);
                let opening = source::open(paths, &wanted, args.cache.options(), observer, |at| match at {
                    Stage::Registry => timeline.registry_ms = Some(since_start()),
                    Stage::Index => timeline.index_ms = Some(since_start()),
                });
                let opened = background.runtime.block_on(opening).map_err(ForkCommandError::from)?;
                (name, cache) = (opened.name, opened.cache);
                match opened.origin {
                    Origin::Directory(held) => open_local(&name, &held)?,
                    Origin::Pack(store) => open_pack(&background.runtime, &name, store)?,
                }
            }
        };
        if let Some(background) = background.as_ref().filter(|_| args.eager) {
            background.download(&mut template, &name, output)?;
        }
        timeline.vmstate_ms = Some(since_start());
        if let Some(recorder) = &recorder {
            template.record_in(recorder);
        }
        Ok(Opened { template: Arc::new(template), name, warm, cache, timeline, recorder, background })
    }
}

/// It may be older than what its name means now.
fn note_warm(held: Option<&WarmStatus>, output: &Output) {
    if let Some(held) = held {
        let since = show_since(held.since_unix);
        output.note(format!("from the warm image of {}, loaded {since}", held.resolved));
    }
}

fn open_local(name: &str, held: &Held) -> Result<Template, ForkCommandError> {
    Template::open_local(&held.path(), KvmKind::detect()).map_err(sandbox_error(name))
}

fn open_pack(runtime: &Runtime, name: &str, store: Arc<Store>) -> Result<Template, ForkCommandError> {
    let opening = Template::open_pack(store.clone(), runtime.handle().clone(), KvmKind::detect());
    let opened = runtime.block_on(opening);
    store.set_demand_deadline(source::DEMAND_DEADLINE);
    opened.map_err(sandbox_error(name))
}

fn sandbox_error(name: &str) -> impl FnOnce(TemplateError) -> ForkCommandError {
    let name = name.to_owned();
    move |source| ForkCommandError::Template { name, source: Box::new(source) }
}

/// What `forkd warm` holds of it. Without, or when its daemon does not answer, everything is opened as always.
fn resident(paths: &Paths, args: &ForkArgs) -> Option<(Template, WarmStatus)> {
    // What is wrong with the name is found again and said by those who open it.
    let address = Address::of(paths, &args.wanted()).ok().filter(|_| !args.eager)?;
    let unused = |error: &dyn Error| tracing::warn!(error = chain(error), "the warm image is not used");
    let (Handed { status, resident }, files) = address.image().unwrap_or_else(|error| {
        unused(&error);
        None
    })?;
    let template = Template::from_resident(resident, files, KvmKind::detect());
    Some((template.inspect_err(|error| unused(error)).ok()?, status))
}

/// A thousand children need a few descriptors each.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%errno, "the limit on open files stays as it is");
    }
}
