//! `forkd warm`: keeps an image in memory, so that forks of it open no pack, decode nothing and wait for no page.

use crate::cli::WarmArgs;
use crate::commands::{end_on_signal, runtime};
use crate::detach::{DetachError, Detached, Handover, split};
use crate::error::{self, CommandError};
use crate::output::{Output, table};
use crate::units::{show_since, show_size};
use forkd_engine::chain::chain;
use forkd_engine::fork::source::{self, OpenedSource, Origin, SourceError, Wanted};
use forkd_engine::fork::template::{Template, TemplateError};
use forkd_engine::fork::warm::{Address, AddressError, Daemon, WarmError, WarmStatus};
use forkd_engine::local::paths::Paths;
use forkd_engine::progress::{Amount, Progress, follow};
use forkd_fs::store::ReadError;
use forkd_vmm::kvm::KvmKind;
use std::process::ExitCode;

/// `forkd warm` failed.
#[derive(Debug, thiserror::Error)]
pub enum WarmCommandError {
    /// The daemon.
    #[error(transparent)]
    Warm(#[from] WarmError),
    /// Going to the background.
    #[error("going to the background failed")]
    Detach(#[from] DetachError),
    /// The pack or snapshot.
    #[error(transparent)]
    Source(#[from] SourceError),
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
    Address(#[from] AddressError),
    /// Daemons that were asked, and did not answer.
    #[error("{}", errors.iter().map(|error| chain(error)).collect::<Vec<_>>().join("; "))]
    Unanswered {
        /// One a daemon.
        errors: Vec<WarmError>,
    },
    /// `--stop` of something that is not warm.
    #[error("{name} is not warm")]
    NotWarm {
        /// What was named.
        name: String,
    },
}

/// Runs the command.
pub fn run(args: &WarmArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    if args.list {
        return Ok(list(&paths, output));
    }
    if args.stop && args.all {
        let (stopped, unanswered) = each(&Address::all(&paths), Address::stop);
        return Ok(report_stopped(&stopped, unanswered, output));
    }
    let wanted = args.wanted();
    if args.stop {
        return stop_named(&paths, &wanted, output);
    }
    let address = Address::of(&paths, &wanted).map_err(WarmCommandError::from)?;
    let handover = if args.foreground {
        None
    } else {
        match split().map_err(WarmCommandError::from)? {
            Detached::Foreground(exit) => return Ok(exit),
            Detached::Background(handover) => Some(handover),
        }
    };
    hold(args, &paths, address, handover, output)
}

/// Loads the image and serves it until told to stop.
fn hold(
    args: &WarmArgs,
    paths: &Paths,
    address: Address,
    handover: Option<Handover>,
    output: &Output,
) -> Result<ExitCode, CommandError> {
    if let Some(handover) = &handover {
        handover.end_with_foreground();
    }
    let runtime = runtime()?;
    let wanted = args.wanted();
    let opening = source::open(paths, &wanted, args.cache.options(), None, |_| {});
    let OpenedSource { name, resolved, origin, cache } =
        runtime.block_on(opening).map_err(WarmCommandError::from)?;
    let template = load(&runtime, &name, origin, output)?;
    if let Some(cache) = cache {
        cache.flush();
    }
    // The name of a replaced snapshot leads elsewhere by now; what was opened is what is served, under what it was asked for.
    let mut daemon =
        Daemon::start(paths, address, name, resolved, &template).map_err(WarmCommandError::from)?;
    end_on_signal(&runtime, daemon.remover());
    output.report(daemon.status(), |status| {
        format!(
            "{} is warm: {} in memory, held by process {}\n",
            status.resolved,
            show_size(status.resident_bytes),
            status.pid
        )
    });
    if handover.is_some_and(|handover| !handover.finish(0)) {
        return Ok(ExitCode::FAILURE);
    }
    daemon.serve().map_err(WarmCommandError::from)?;
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

fn load(
    runtime: &tokio::runtime::Runtime,
    name: &str,
    origin: Origin,
    output: &Output,
) -> Result<Template, WarmCommandError> {
    let kind = KvmKind::detect();
    let failed = |source| WarmCommandError::Template { name: name.to_owned(), source: Box::new(source) };
    let store = match origin {
        Origin::Directory(held) => {
            return Template::open_local(&held.path(), kind).and_then(Template::into_memory).map_err(failed);
        }
        Origin::Pack(store) => store,
    };
    let opening = Template::open_pack(store.clone(), runtime.handle().clone(), kind);
    let mut template = runtime.block_on(opening).map_err(failed)?;
    store.set_demand_deadline(source::DEMAND_DEADLINE);
    let bar = output.begin("loading", Amount::Bytes(template.progress().bytes_total));
    let filled = runtime
        .block_on(follow(&*bar, template.fill(std::future::ready(())), || template.progress().bytes_fetched));
    match filled {
        Ok(true) => template.set_complete(),
        Ok(false) => return Err(WarmCommandError::Incomplete { name: name.to_owned() }),
        Err(error) => {
            return Err(WarmCommandError::Download { name: name.to_owned(), source: Box::new(error) });
        }
    }
    Ok(template)
}

fn list(paths: &Paths, output: &Output) -> ExitCode {
    let (mut held, unanswered) = each(&Address::all(paths), Address::status);
    held.sort_by(|a, b| a.name.cmp(&b.name));
    output.report(&held, |held: &Vec<WarmStatus>| {
        let mut rows =
            vec![["NAME", "IMAGE", "LOADED", ">MEMORY", ">FORKS", ">PID"].map(str::to_owned).to_vec()];
        rows.extend(held.iter().map(|held| {
            vec![
                held.name.clone(),
                held.resolved.clone(),
                show_since(held.since_unix),
                show_size(held.resident_bytes),
                held.forks.to_string(),
                held.pid.to_string(),
            ]
        }));
        table(&rows)
    });
    exit(unanswered)
}

/// Stops what holds it, whatever has become of its file, tag or hub since.
fn stop_named(paths: &Paths, wanted: &Wanted<'_>, output: &Output) -> Result<ExitCode, CommandError> {
    let family = Address::family_of(paths, wanted);
    let (mut stopped, mut unanswered) = each(family.as_deref().unwrap_or_default(), Address::stop);
    if stopped.is_empty() && unanswered.is_empty() {
        // As `--list` shows it: from another directory, or where another hub is meant now.
        let has_name = |address: &Address| {
            address.status().is_ok_and(|held| held.is_some_and(|held| held.name == wanted.name()))
        };
        let named = Address::all(paths).into_iter().filter(has_name).collect::<Vec<_>>();
        (stopped, unanswered) = each(&named, Address::stop);
    }
    if stopped.is_empty() && unanswered.is_empty() {
        family.map_err(WarmCommandError::from)?;
        return Err(WarmCommandError::NotWarm { name: wanted.name().to_owned() }.into());
    }
    Ok(report_stopped(&stopped, unanswered, output))
}

/// Asks them all: one that does not answer is in the others' way no more than in its own.
fn each(
    addresses: &[Address],
    ask: impl Fn(&Address) -> Result<Option<WarmStatus>, WarmError>,
) -> (Vec<WarmStatus>, Vec<WarmError>) {
    let (mut answers, mut unanswered) = (Vec::new(), Vec::new());
    for address in addresses {
        match ask(address) {
            Ok(answer) => answers.extend(answer),
            Err(error) => unanswered.push(error),
        }
    }
    (answers, unanswered)
}

fn report_stopped(stopped: &Vec<WarmStatus>, unanswered: Vec<WarmError>, output: &Output) -> ExitCode {
    output.report(stopped, |stopped| {
        stopped.iter().map(|held| format!("{} is no longer warm\n", held.name)).collect()
    });
    exit(unanswered)
}

/// What worked has been reported, with `--json` as the one document that there is: the rest is said on stderr.
fn exit(unanswered: Vec<WarmError>) -> ExitCode {
    if unanswered.is_empty() {
        ExitCode::SUCCESS
    } else {
        error::report(&WarmCommandError::Unanswered { errors: unanswered }.into(), &Output::new(false))
    }
}
