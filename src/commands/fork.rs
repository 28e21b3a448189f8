//! `forkd fork`: copies of a machine, from a pack that need not be there yet.
//!
//! Order matters here. The process is split (for `--detach`) and the zygote forked while there is one thread; only then
//! does the engine fork, which starts threads.

use super::fork_text::text;
use crate::cli::ForkArgs;
use crate::detach::{Detached, Handover, split};
use crate::early_zygote::EarlyZygote;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::runtime::{end_on_signal, runtime};
use crate::units::show_since;
use forkd_engine::chain::chain;
use forkd_engine::fork::run::{AnsweredFork, ForkCaller, fork};
use forkd_engine::fork::supervisor::Supervisor;
use forkd_engine::fork::variables::Variables;
use forkd_engine::fork::warm::WarmStatus;
use forkd_engine::fork::zygote::start_zygote;
use forkd_engine::picture::svg::check_place;
use forkd_engine::progress::Progress;
use std::io;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::{Handle, Runtime};

/// Runs the command.
pub fn run(args: &ForkArgs, early: EarlyZygote, output: &Output) -> Result<ExitCode, CommandError> {
    let variables = Variables::new(&args.env, &args.vary, args.count)?;
    let network = args.net.mode().map_err(|option| CommandError::NeedsGateway { option })?;
    let detached = match args.detach.then(split).transpose().map_err(CommandError::detaching("fork"))? {
        Some(Detached::Foreground(exit)) => return Ok(exit),
        Some(Detached::Background(handover)) => Some(handover),
        None => None,
    };
    // No thread was started yet.
    let zygote = early.zygote.unwrap_or_else(start_zygote);
    detached.iter().for_each(Handover::end_with_foreground);
    if let Some(file) = &args.timeline {
        check_place(file)?;
    }
    let paths = environment::paths()?;
    let request = args.request(&paths, (variables, network), early.started_ns, output.is_json());
    let caller = Caller { output, runtime: OnceLock::new(), supervisor: Arc::default() };
    let zygote = zygote?;
    let mut forked = fork(&paths, &zygote, request, &caller)?;

    if let Some(error) = &forked.timeline_error {
        tracing::error!(error = chain(error), "the timeline cannot be written");
    }
    let failed = forked.timeline_error.is_some() || forked.report.has_failures();
    output.report(&forked.report, text);
    // Children that whoever asked for them did not wait for are nobody's.
    let stays = match detached {
        Some(handover) => handover.finish(u8::from(failed)),
        None => !args.asks_anything(),
    };
    if stays {
        stay(&mut forked, args.detach, output);
    }
    forked.end();
    if let Some(runtime) = caller.runtime.into_inner() {
        runtime.shutdown_background();
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn stay(forked: &mut AnsweredFork<'_>, detached: bool, output: &Output) {
    if !detached {
        output.note("children run until Ctrl-C; `forkd exec ID -- CMD` reaches them");
    }
    forked.fetch_rest();
    while !forked.supervisor.all_over() {
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Shows a fork on the terminal, and ends its children at Ctrl-C.
struct Caller<'a> {
    output: &'a Output,
    runtime: OnceLock<Runtime>,
    supervisor: Arc<OnceLock<Arc<Supervisor>>>,
}

impl ForkCaller for Caller<'_> {
    fn progress(&self) -> &dyn Progress {
        self.output
    }

    fn runtime(&self) -> io::Result<Handle> {
        if let Some(runtime) = self.runtime.get() {
            return Ok(runtime.handle().clone());
        }
        let runtime = runtime()?;
        let supervisor = Arc::clone(&self.supervisor);
        end_on_signal(&runtime, move || {
            if let Some(supervisor) = supervisor.get() {
                supervisor.end();
            }
        });
        Ok(self.runtime.get_or_init(|| runtime).handle().clone())
    }

    fn on_started(&self, supervisor: &Arc<Supervisor>, warm: Option<&WarmStatus>) -> io::Result<()> {
        // Said only now: children do not wait for the terminal.
        if let Some(image) = warm {
            let since = show_since(image.since_unix);
            self.output.note(format!("from the warm image of {}, loaded {since}", image.resolved));
        }
        self.runtime()?;
        let _ = self.supervisor.set(Arc::clone(supervisor));
        Ok(())
    }
}
