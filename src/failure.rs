//! What a command can fail with. How each failure is shown is the table in `error`.

use std::io;
use std::time::Duration;

use forkd_engine::build::kernel::KernelError;
use forkd_engine::build::pack::PackError;
use forkd_engine::build::pull::PullError;
use forkd_engine::build::repack::RepackError;
use forkd_engine::build::snapshot::SnapshotBuildError;
use forkd_engine::build::trace::RetraceError;
use forkd_engine::build::unpack::UnpackPackError;
use forkd_engine::cleanup::CleanupError;
use forkd_engine::fork::child_snapshot::ChildSnapshotError;
use forkd_engine::fork::children::ChildrenError;
use forkd_engine::fork::copy::CopyError;
use forkd_engine::fork::forward::ForwardError;
use forkd_engine::fork::run::ForkError;
use forkd_engine::fork::variables::VariablesError;
use forkd_engine::fork::warm::hold::HoldError;
use forkd_engine::hub::mount::MountHubError;
use forkd_engine::hub::publish::PublishError;
use forkd_engine::hub::registry::RegistryError;
use forkd_engine::hub::serve::ServeError;
use forkd_engine::inspect::diff::DiffError;
use forkd_engine::inspect::pack::InspectError;
use forkd_engine::local::mounts::MountsError;
use forkd_engine::local::paths::PathsError;
use forkd_engine::local::run_dir::RunDirError;
use forkd_engine::local::snapshots::SnapshotError;
use forkd_engine::picture::svg::PictureError;
use forkd_engine::reference::InvalidReference;
use forkd_vmm::zygote::SpawnError;

use crate::detach::DetachError;

/// What a command can fail with.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// `forkd serve`.
    #[error("{program} cannot be started")]
    Daemon {
        /// The program.
        program: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A directory of forkd's own.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The guest kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// Children that run.
    #[error(transparent)]
    Children(#[from] ChildrenError),
    /// `forkd snapshot --child`.
    #[error(transparent)]
    ChildSnapshot(#[from] ChildSnapshotError),
    /// `forkd forward`.
    #[error(transparent)]
    Forward(#[from] ForwardError),
    /// Run directories.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Building a snapshot.
    #[error(transparent)]
    Build(Box<SnapshotBuildError>),
    /// A fork.
    #[error(transparent)]
    Fork(Box<ForkError>),
    /// The process that starts a fork's machines.
    #[error(transparent)]
    Zygote(#[from] SpawnError),
    /// `--env` and `--vary`.
    #[error(transparent)]
    Variables(#[from] VariablesError),
    /// `--env` of `forkd exec` without a value.
    #[error("`{text}` is not NAME=VALUE")]
    Environment {
        /// What was given.
        text: String,
    },
    /// An option of `--net nat` without it.
    #[error("{option} is about a way out, and there is none without --net nat")]
    NeedsGateway {
        /// The option.
        option: &'static str,
    },
    /// `--timeout` of `forkd exec`.
    #[error("{id}: it did not end within {}, so it was killed", humantime::format_duration(*after))]
    TimedOut {
        /// The child.
        id: String,
        /// How long it was given.
        after: Duration,
    },
    /// A terminal was asked for, and there is none.
    #[error("{why}")]
    NoTerminal {
        /// What speaks against it.
        why: &'static str,
    },
    /// The terminal that there is.
    #[error("its mode cannot be changed")]
    Terminal(#[source] io::Error),
    /// `forkd cp`.
    #[error(transparent)]
    Copy(#[from] CopyError),
    /// What `forkd cp` cannot make sense of.
    #[error("{why}")]
    CopyUsage {
        /// What speaks against it.
        why: &'static str,
    },
    /// Splitting the process.
    #[error("going to the background failed")]
    Detach {
        /// What was to be done there.
        what: &'static str,
        /// Why not.
        #[source]
        source: DetachError,
    },
    /// A local snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// A text that names no package.
    #[error(transparent)]
    Reference(#[from] InvalidReference),
    /// The hub's registry.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// `forkd inspect`.
    #[error(transparent)]
    Inspect(Box<InspectError>),
    /// `forkd diff`.
    #[error(transparent)]
    Diff(Box<DiffError>),
    /// `forkd hub serve`.
    #[error(transparent)]
    Serve(#[from] ServeError),
    /// `forkd hub publish`.
    #[error(transparent)]
    Publish(Box<PublishError>),
    /// `forkd pack`.
    #[error(transparent)]
    Pack(#[from] PackError),
    /// `forkd unpack`.
    #[error(transparent)]
    Unpack(#[from] UnpackPackError),
    /// `forkd pull`.
    #[error(transparent)]
    Pull(Box<PullError>),
    /// `forkd repack`.
    #[error(transparent)]
    Repack(Box<RepackError>),
    /// `forkd trace`.
    #[error(transparent)]
    Trace(Box<RetraceError>),
    /// A picture.
    #[error(transparent)]
    Picture(#[from] PictureError),
    /// `forkd hub page`.
    #[error(transparent)]
    Page(PictureError),
    /// `forkd mount`.
    #[error(transparent)]
    Mount(Box<MountHubError>),
    /// A mountpoint, or what is mounted there.
    #[error(transparent)]
    Mounts(#[from] MountsError),
    /// The daemon of a mount, or its watcher.
    #[error("the {which}")]
    MountDaemon {
        /// What does not do what.
        which: &'static str,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// `forkd cleanup`.
    #[error(transparent)]
    Cleanup(#[from] CleanupError),
    /// Signals cannot be waited for.
    #[error("signal handlers")]
    Signals(#[source] io::Error),
    /// `forkd warm`.
    #[error(transparent)]
    Warm(Box<HoldError>),
    /// The async runtime could not be started.
    #[error("the async runtime does not start")]
    Runtime(#[source] io::Error),
}

impl CommandError {
    /// The failure of going to the background to do `what`.
    pub fn detaching(what: &'static str) -> impl FnOnce(DetachError) -> CommandError {
        move |source| CommandError::Detach { what, source }
    }

    /// The failure of a mount's daemon or watcher, which `which` names, with what it does not do.
    pub fn mount_daemon(which: &'static str) -> impl FnOnce(io::Error) -> CommandError {
        move |source| CommandError::MountDaemon { which, source }
    }

    /// Whether the command has printed its report already, and this is said beside it.
    pub fn follows_a_report(&self) -> bool {
        match self {
            CommandError::Warm(error) => matches!(**error, HoldError::Unanswered { .. }),
            CommandError::TimedOut { .. } => true,
            _ => false,
        }
    }
}

/// Boxes rare, large errors, so that results stay small.
macro_rules! boxed {
    ($($error:ty => $variant:ident),+ $(,)?) => {
        $(impl From<$error> for CommandError {
            fn from(error: $error) -> CommandError {
                CommandError::$variant(Box::new(error))
            }
        })+
    };
}

boxed! {
    ForkError => Fork,
    HoldError => Warm,
    InspectError => Inspect,
    DiffError => Diff,
    MountHubError => Mount,
    PublishError => Publish,
    PullError => Pull,
    RepackError => Repack,
    RetraceError => Trace,
    SnapshotBuildError => Build,
}
