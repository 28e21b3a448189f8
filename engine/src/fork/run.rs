//! One fork, from what the user named to the report on its children. [`fork`] is the only way to do one.

use crate::chain::chain;
use crate::fork::ask::{ChildOutcome, ChildRequest, ask_all};
use crate::fork::opening::{OpenedSnapshot, download, open_pack, open_snapshot};
use crate::fork::report::{ForkReport, ForkTimeline, ForkedPackReport, WarmReport};
use crate::fork::supervisor::{ChildrenSpec, StartError, Supervisor, milliseconds_since};
use crate::fork::template::{Template, TemplateError};
use crate::fork::warm::{WarmImage, WarmSocket, WarmStatus};
use crate::local::paths::Paths;
use crate::local::snapshots::LockedSnapshot;
use crate::picture::svg::PictureError;
use crate::picture::timeline::EventRecorder;
use crate::progress::{Progress, Silent};
use crate::target::{OpenOptions, OpenStage, Origin, Target, TargetError};
use forkd_fs::cache::{CacheOptions, ChunkCache};
use forkd_fs::observe::Observer;
use forkd_fs::store::ReadError;
use forkd_vmm::kvm::{Hypervisor, KvmError, KvmKind};
use forkd_vmm::process::monotonic_ns;
use forkd_vmm::zygote::Zygote;
use std::error::Error;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

/// What is to be forked, and how.
pub struct ForkRequest {
    /// What to fork.
    pub target: Target,
    /// What people call it.
    pub name: String,
    /// The children.
    pub children: ChildrenSpec,
    /// What each child is asked.
    pub request: ChildRequest,
    /// Download all of a pack before the first child starts, and use no warm image.
    pub eager: bool,
    /// The chunk cache's limits.
    pub cache: CacheOptions,
    /// Draw what happened into this file.
    pub timeline: Option<PathBuf>,
    /// Look which prefetched pages the children have touched, which takes time.
    pub look_at_prefetched: bool,
    /// When the caller began, CLOCK_MONOTONIC, ns: the report's times count from then.
    pub started_ns: u64,
}

impl ForkRequest {
    /// One child of `target`, which `name` names for people, without limits or network, asked `request`.
    pub fn new(target: Target, name: &str, request: ChildRequest) -> ForkRequest {
        ForkRequest {
            target,
            name: name.to_owned(),
            children: ChildrenSpec::default(),
            request,
            eager: false,
            cache: CacheOptions::default(),
            timeline: None,
            look_at_prefetched: false,
            started_ns: monotonic_ns(),
        }
    }
}

/// Whoever has a fork done: shows its progress, lends it a runtime, and hears of what happens.
pub trait ForkCaller {
    /// What shows its progress.
    fn progress(&self) -> &dyn Progress {
        &Silent
    }

    /// The async runtime. Children of what is at hand start before it is asked for: its threads would be in their way.
    fn runtime(&self) -> io::Result<Handle>;
    /// The children are started: from now on they can be ended by [`Supervisor::end`]. They are ended when the caller
    /// fails to do what it has to. `warm`: they come from the image that a daemon holds, which may be older than what its
    /// name means now.
    fn on_started(&self, _supervisor: &Arc<Supervisor>, _warm: Option<&WarmStatus>) -> io::Result<()> {
        Ok(())
    }
}

/// A fork could not be done.
#[derive(Debug, thiserror::Error)]
pub enum ForkError {
    /// /dev/kvm.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The async runtime.
    #[error("the async runtime does not start")]
    Runtime(#[source] io::Error),
    /// The pack or snapshot.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Opening the machine.
    #[error("{name}")]
    Template {
        /// What was to be forked.
        name: String,
        /// Why not.
        #[source]
        source: Box<TemplateError>,
    },
    /// An eager fork could not download.
    #[error("{name}")]
    Download {
        /// What was to be forked.
        name: String,
        /// Why not.
        #[source]
        source: Box<ReadError>,
    },
    /// Starting children.
    #[error(transparent)]
    Start(#[from] StartError),
}

/// A fork whose children have been asked. They run until it is ended; their zygote and their caller have to live as long.
pub struct AnsweredFork<'a> {
    /// What came of it.
    pub report: ForkReport,
    /// Why the timeline could not be drawn. Children that run are not ended for that.
    pub timeline_error: Option<PictureError>,
    /// The children.
    pub supervisor: Arc<Supervisor>,
    cache: Option<Arc<ChunkCache>>,
    filling: Option<Filling>,
    /// Machines end with it.
    _zygote: &'a Zygote,
    /// Their memory comes by its runtime.
    _caller: &'a dyn ForkCaller,
}

impl AnsweredFork<'_> {
    /// The children stay: what none of them has asked for yet is fetched, too.
    pub fn fetch_rest(&mut self) {
        if let Some(filling) = &mut self.filling {
            filling.want_rest();
        }
    }

    /// Ends the children, if they are not over, and removes what they left on disk.
    pub fn end(self) {
        self.supervisor.end();
        if let Some(cache) = self.cache {
            cache.flush();
        }
    }
}

/// Forks: opens the target, starts the children, asks each of them and waits until all have answered or are over.
///
/// `zygote` has to be of a process that had one thread when it was started.
pub fn fork<'a>(
    paths: &Paths,
    zygote: &'a Zygote,
    request: ForkRequest,
    caller: &'a dyn ForkCaller,
) -> Result<AnsweredFork<'a>, ForkError> {
    drop(Hypervisor::open(KvmKind::detect())?);
    let opened = OpenedTemplate::open(paths, &request, caller)?;
    // What no child has asked for is fetched after the answers: it would only be in their way.
    let lazily = opened.runtime.as_ref().filter(|_| !request.eager);
    let filling = lazily.map(|runtime| Filling::start(runtime, &opened.template));
    let (children, asked) = (&request.children, &request.request);
    let source = ForkSource { template: opened.template, name: &request.name, warm: opened.warm.as_ref() };
    let AskedChildren { supervisor, outcomes } =
        fork_template(paths, zygote, source, children, (asked, None), caller)?;
    let pack = ForkedPackReport::of(request.name, supervisor.template(), opened.warm.map(WarmReport::from));
    let looked_at = request.look_at_prefetched;
    let report = ForkReport::new(&supervisor, pack, request.started_ns, opened.timeline, outcomes, looked_at);
    let timeline_error = request
        .timeline
        .zip(opened.recorder)
        .and_then(|(file, recorder)| report.scene(&recorder).draw().write(&file).err());
    Ok(AnsweredFork {
        report,
        timeline_error,
        supervisor,
        cache: opened.cache,
        filling,
        _zygote: zygote,
        _caller: caller,
    })
}

/// Children that have answered or are over, and what each answered, in the same order.
pub struct AskedChildren {
    /// The children.
    pub supervisor: Arc<Supervisor>,
    /// Their answers.
    pub outcomes: Vec<ChildOutcome>,
}

/// What children are forked from.
pub struct ForkSource<'a> {
    /// The machine.
    pub template: Arc<Template>,
    /// What people call it.
    pub name: &'a str,
    /// The daemon that holds it.
    pub warm: Option<&'a WarmStatus>,
}

/// Forks what is opened already: starts the children, and asks each of them, as [`ask_all`] does.
pub fn fork_template(
    paths: &Paths,
    zygote: &Zygote,
    source: ForkSource<'_>,
    children: &ChildrenSpec,
    (request, after_ready): (&ChildRequest, Option<Duration>),
    caller: &dyn ForkCaller,
) -> Result<AskedChildren, ForkError> {
    let supervisor = Supervisor::start(paths, zygote, source.template, source.name.to_owned(), children)?;
    if let Err(error) = caller.on_started(&supervisor, source.warm) {
        supervisor.end();
        return Err(ForkError::Runtime(error));
    }
    let outcomes = ask_all(&supervisor, request, after_ready, caller.progress());
    Ok(AskedChildren { supervisor, outcomes })
}

/// What the children are forked from.
struct OpenedTemplate {
    template: Arc<Template>,
    /// The daemon that held it.
    warm: Option<WarmStatus>,
    cache: Option<Arc<ChunkCache>>,
    timeline: ForkTimeline,
    recorder: Option<Arc<EventRecorder>>,
    /// Opening it needed this.
    runtime: Option<Handle>,
}

impl OpenedTemplate {
    fn open(
        paths: &Paths,
        request: &ForkRequest,
        caller: &dyn ForkCaller,
    ) -> Result<OpenedTemplate, ForkError> {
        let since_start = || milliseconds_since(request.started_ns, monotonic_ns());
        let recorder = request.timeline.as_ref().map(|_| Arc::new(EventRecorder::new(since_start())));
        let (mut timeline, mut cache, mut runtime) = (ForkTimeline::default(), None, None);
        let observer = recorder.clone().map(|recorder| recorder as Arc<dyn Observer>);
        let options = OpenOptions { cache: request.cache, observer };
        let (mut template, warm) = match (resident(paths, request), &request.target) {
            (Some((template, image)), _) => {
                let template = template.called(&image.resolved);
                (template, Some(image))
            }
            (None, Target::Tag(tag)) => {
                let snapshot = LockedSnapshot::find(paths, tag).map_err(TargetError::from)?;
                let opened = open_directory(paths, request, &snapshot, options, &mut runtime, caller)?;
                cache = opened.cache;
                (opened.template.called(tag), None)
            }
            (None, target) => {
                let handle = caller.runtime().map_err(ForkError::Runtime)?;
                runtime = Some(handle.clone());
                let opening = target.open(paths, &request.name, options.clone(), |at| match at {
                    OpenStage::Registry => timeline.registry_ms = Some(since_start()),
                    OpenStage::Index => timeline.index_ms = Some(since_start()),
                });
                let opened = handle.block_on(opening)?;
                let template = match opened.origin {
                    Origin::Directory(snapshot) => {
                        let opened =
                            open_directory(paths, request, &snapshot, options, &mut runtime, caller)?;
                        cache = opened.cache;
                        opened.template
                    }
                    Origin::Pack(store) => {
                        cache = opened.cache;
                        open_pack(&handle, store).map_err(template_error(&request.name))?
                    }
                };
                (template.called(&opened.resolved), None)
            }
        };
        if let Some(runtime) = runtime.as_ref().filter(|_| request.eager) {
            let failed =
                |source| ForkError::Download { name: request.name.clone(), source: Box::new(source) };
            download(runtime, &mut template, "downloading", caller.progress()).map_err(failed)?;
        }
        timeline.vmstate_ms = Some(since_start());
        if let Some(recorder) = &recorder {
            template.record_in(recorder);
        }
        Ok(OpenedTemplate { template: Arc::new(template), warm, cache, timeline, recorder, runtime })
    }
}

/// Fetches what is missing of the images, the rest of them once that is wanted; ends when dropped.
struct Filling {
    rest_wanted: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

impl Filling {
    fn start(runtime: &Handle, template: &Template) -> Filling {
        let (rest_wanted, wanted) = oneshot::channel::<()>();
        let fill = template.fill(async {
            if wanted.await.is_err() {
                std::future::pending::<()>().await;
            }
        });
        let task = runtime.spawn(async move {
            if let Err(error) = fill.await {
                tracing::error!(error = chain(&error), "fetching the rest of the pack failed");
            }
        });
        Filling { rest_wanted: Some(rest_wanted), task }
    }

    fn want_rest(&mut self) {
        if let Some(rest_wanted) = self.rest_wanted.take() {
            // It may have ended.
            let _ = rest_wanted.send(());
        }
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn open_directory(
    paths: &Paths,
    request: &ForkRequest,
    snapshot: &LockedSnapshot,
    options: OpenOptions,
    runtime: &mut Option<Handle>,
    caller: &dyn ForkCaller,
) -> Result<OpenedSnapshot, ForkError> {
    let needed = || match runtime {
        Some(runtime) => Ok(runtime.clone()),
        None => Ok(runtime.insert(caller.runtime().map_err(OpenFailure::Runtime)?).clone()),
    };
    let opened = open_snapshot(paths, &snapshot.path(), options, needed);
    opened.map_err(|failure: OpenFailure| failure.of(&request.name))
}

/// Why a snapshot's directory cannot be opened.
enum OpenFailure {
    Runtime(io::Error),
    Template(TemplateError),
}

impl From<TemplateError> for OpenFailure {
    fn from(error: TemplateError) -> OpenFailure {
        OpenFailure::Template(error)
    }
}

impl OpenFailure {
    /// The failure to fork `name`.
    fn of(self, name: &str) -> ForkError {
        match self {
            OpenFailure::Runtime(error) => ForkError::Runtime(error),
            OpenFailure::Template(error) => template_error(name)(error),
        }
    }
}

fn template_error(name: &str) -> impl FnOnce(TemplateError) -> ForkError {
    let name = name.to_owned();
    move |source| ForkError::Template { name, source: Box::new(source) }
}

/// What `forkd warm` holds of it. Without, or when its daemon does not answer, everything is opened as always.
fn resident(paths: &Paths, request: &ForkRequest) -> Option<(Template, WarmStatus)> {
    // What is wrong with the name is found again and said by those who open it.
    let socket = WarmSocket::of(paths, &request.target).ok().filter(|_| !request.eager)?;
    let unused = |error: &dyn Error| tracing::warn!(error = chain(error), "the warm image is not used");
    let (WarmImage { status, resident }, files) = socket.image().unwrap_or_else(|error| {
        unused(&error);
        None
    })?;
    let template = Template::from_resident(resident, files, KvmKind::detect());
    Some((template.inspect_err(|error| unused(error)).ok()?, status))
}
