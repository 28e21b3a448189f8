//! `forkd warm`: keeps an image in memory, so that forks of it open no pack, decode nothing and wait for no page.

use crate::cli::WarmArgs;
use crate::detach::{Detached, split};
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::{end_on_signal, runtime};
use crate::units::{show_since, show_size};
use forkd_engine::fork::warm::hold::{self, DaemonAnswers, HoldError, load};
use forkd_engine::fork::warm::{WarmDaemon, WarmError, WarmSocket, WarmStatus};
use forkd_engine::local::paths::Paths;
use forkd_engine::target::Target;
use std::process::ExitCode;

/// Runs the command.
pub fn run(args: &WarmArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    if args.list {
        return list(&paths, output);
    }
    if args.stop && args.all {
        return report_stopped(hold::stop_all(&paths), output);
    }
    let (target, name) = args.target(&paths);
    if args.stop {
        return report_stopped(hold::stop(&paths, &target, &name)?, output);
    }
    keep(args, &paths, &target, name, output)
}

/// Loads the image and serves it until told to stop.
fn keep(
    args: &WarmArgs,
    paths: &Paths,
    target: &Target,
    name: String,
    output: &Output,
) -> Result<ExitCode, CommandError> {
    let socket = WarmSocket::of(paths, target).map_err(HoldError::from)?;
    let handover = match args.foreground {
        true => None,
        false => match split().map_err(CommandError::detaching("keep the image in memory"))? {
            Detached::Foreground(exit) => return Ok(exit),
            Detached::Background(handover) => Some(handover),
        },
    };
    if let Some(handover) = &handover {
        handover.end_with_foreground();
    }
    let runtime = runtime().map_err(CommandError::Runtime)?;
    let loaded = load(paths, target, &name, args.cache.options(), runtime.handle(), output)?;
    // The name of a replaced snapshot leads elsewhere by now; what was opened is what is served, under what it was asked for.
    let mut daemon =
        WarmDaemon::start(paths, socket, name, loaded.resolved, &loaded.template).map_err(HoldError::from)?;
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
    daemon.serve().map_err(HoldError::from)?;
    runtime.shutdown_background();
    Ok(ExitCode::SUCCESS)
}

fn list(paths: &Paths, output: &Output) -> Result<ExitCode, CommandError> {
    let DaemonAnswers { held, unanswered } = hold::list(paths);
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

fn report_stopped(stopped: DaemonAnswers, output: &Output) -> Result<ExitCode, CommandError> {
    output.report(&stopped.held, |stopped| {
        stopped.iter().map(|held| format!("{} is no longer warm\n", held.name)).collect()
    });
    exit(stopped.unanswered)
}

/// What worked has been reported.
fn exit(unanswered: Vec<WarmError>) -> Result<ExitCode, CommandError> {
    match unanswered.is_empty() {
        true => Ok(ExitCode::SUCCESS),
        false => Err(HoldError::Unanswered { errors: unanswered }.into()),
    }
}
