//! Loading an image that is to stay in memory, and finding and ending the daemons that hold one.

use super::{WarmError, WarmKeyError, WarmSocket, WarmStatus};
use crate::chain::chain;
use crate::fork::opening::{OpenedSnapshot, download, open_pack, open_snapshot};
use crate::fork::template::{Template, TemplateError};
use crate::local::paths::Paths;
use crate::progress::Progress;
use crate::target::{OpenOptions, OpenedTarget, Origin, Target, TargetError};
use forkd_fs::cache::CacheOptions;
use forkd_fs::store::ReadError;
use tokio::runtime::Handle;

/// An image cannot be kept in memory, or let go of.
#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    /// The daemon.
    #[error(transparent)]
    Warm(#[from] WarmError),
    /// The pack or snapshot.
    #[error(transparent)]
    Target(#[from] TargetError),
    /// Opening the machine.
    #[error("{name}")]
    Template {
        /// What was to be loaded.
        name: String,
        /// Why not.
        #[source]
        source: Box<TemplateError>,
    },
    /// Downloading it.
    #[error("{name}")]
    Download {
        /// What was to be loaded.
        name: String,
        /// Why not.
        #[source]
        source: Box<ReadError>,
    },
    /// Chunks could not be put in place.
    #[error("{name}: there is not enough memory for the whole image")]
    Incomplete {
        /// What was to be loaded.
        name: String,
    },
    /// What is named.
    #[error(transparent)]
    Key(#[from] WarmKeyError),
    /// Daemons that were asked, and did not answer.
    #[error("{}", errors.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; "))]
    Unanswered {
        /// One a daemon.
        errors: Vec<WarmError>,
    },
    /// It is to be let go of, and nobody holds it.
    #[error("{name} is not warm")]
    NotWarm {
        /// What was named.
        name: String,
    },
}

/// A whole machine in memory.
pub struct LoadedImage {
    /// What it was loaded from: owner/name@version for a package of the hub, otherwise as it was named.
    pub resolved: String,
    /// The machine.
    pub template: Template,
}

/// Loads all of what `target`, called `name`, leads to.
pub fn load(
    paths: &Paths,
    target: &Target,
    name: &str,
    limits: CacheOptions,
    runtime: &Handle,
    progress: &dyn Progress,
) -> Result<LoadedImage, HoldError> {
    let options = OpenOptions { cache: limits, observer: None };
    let OpenedTarget { resolved, origin, cache } =
        runtime.block_on(target.open(paths, name, options, |_| {}))?;
    let failed = |source| HoldError::Template { name: name.to_owned(), source: Box::new(source) };
    let (mut template, cache) = match origin {
        Origin::Directory(snapshot) => {
            let options = OpenOptions { cache: limits, observer: None };
            let opened = open_snapshot(paths, &snapshot.path(), options, || Ok(runtime.clone()));
            let OpenedSnapshot { template, cache } = opened.map_err(failed)?;
            (template.into_memory().map_err(failed)?, cache)
        }
        Origin::Pack(store) => (open_pack(runtime, store).map_err(failed)?, cache),
    };
    let not_read = |source| HoldError::Download { name: name.to_owned(), source: Box::new(source) };
    if template.pager().is_some()
        && !download(runtime, &mut template, "loading", progress).map_err(not_read)?
    {
        return Err(HoldError::Incomplete { name: name.to_owned() });
    }
    if let Some(cache) = cache {
        cache.flush();
    }
    let template = template.called(&resolved);
    Ok(LoadedImage { resolved, template })
}

/// What daemons said, and what those failed with that said nothing.
#[derive(Debug, Default)]
pub struct DaemonAnswers {
    /// What they hold, or held.
    pub held: Vec<WarmStatus>,
    /// One for each that did not answer.
    pub unanswered: Vec<WarmError>,
}

impl DaemonAnswers {
    /// Asks them all: one that does not answer is in the others' way no more than in its own.
    fn of(
        sockets: &[WarmSocket],
        ask: impl Fn(&WarmSocket) -> Result<Option<WarmStatus>, WarmError>,
    ) -> DaemonAnswers {
        let mut answers = DaemonAnswers::default();
        for socket in sockets {
            match ask(socket) {
                Ok(answer) => answers.held.extend(answer),
                Err(error) => answers.unanswered.push(error),
            }
        }
        answers
    }

    fn is_empty(&self) -> bool {
        self.held.is_empty() && self.unanswered.is_empty()
    }
}

/// All images that are held, by name.
pub fn list(paths: &Paths) -> DaemonAnswers {
    let mut answers = DaemonAnswers::of(&WarmSocket::all(paths), WarmSocket::status);
    answers.held.sort_by(|a, b| a.name.cmp(&b.name));
    answers
}

/// Ends all daemons.
pub fn stop_all(paths: &Paths) -> DaemonAnswers {
    DaemonAnswers::of(&WarmSocket::all(paths), WarmSocket::stop)
}

/// Ends what holds `target`, called `name`, whatever has become of its file, tag or hub since.
pub fn stop(paths: &Paths, target: &Target, name: &str) -> Result<DaemonAnswers, HoldError> {
    let family = WarmSocket::family_of(paths, target);
    let mut answers = DaemonAnswers::of(family.as_deref().unwrap_or_default(), WarmSocket::stop);
    if answers.is_empty() {
        // As the list shows it: from another directory, or where another hub is meant now.
        let has_name = |socket: &WarmSocket| {
            socket.status().is_ok_and(|held| held.is_some_and(|held| held.name == name))
        };
        let named = WarmSocket::all(paths).into_iter().filter(has_name).collect::<Vec<_>>();
        answers = DaemonAnswers::of(&named, WarmSocket::stop);
    }
    if answers.is_empty() {
        family?;
        return Err(HoldError::NotWarm { name: name.to_owned() });
    }
    Ok(answers)
}
