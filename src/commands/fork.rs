//! `forkd fork`: copies of a machine, from a pack that need not be there yet.
//!
//! Order matters here. The process is split (for `--detach`) and the zygote forked while there is one thread; only then
//! does the engine fork, which starts threads.

use crate::cli::ForkArgs;
use crate::detach::{Detached, Handover, split};
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::runtime::{end_on_signal, runtime};
use crate::units::{show_since, show_size};
use forkd_engine::chain::chain;
use forkd_engine::fork::report::ForkReport;
use forkd_engine::fork::run::{AnsweredFork, ForkCaller, fork};
use forkd_engine::fork::supervisor::{Supervisor, process_start_ns};
use forkd_engine::fork::variables::Variables;
use forkd_engine::fork::warm::WarmStatus;
use forkd_engine::picture::svg::check_place;
use forkd_engine::progress::{Amount, Progress, Task};
use forkd_vmm::zygote::{SpawnError, Zygote};
use rustix::process::{Resource, Rlimit};
use std::ffi::OsString;
use std::io;
use std::process::ExitCode;
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::runtime::{Handle, Runtime};

/// What is begun before the command line is understood, because a first instruction waits for it: the jail takes longer to
/// build than the command line to parse.
pub struct EarlyZygote {
    started_ns: u64,
    /// Not yet where the process will split: the zygote is to be a child of the one that goes on.
    zygote: Option<Result<Zygote, SpawnError>>,
}

impl EarlyZygote {
    /// For arguments (the program's name first) that look like a fork's: options before the verb take no values.
    pub fn of(arguments: &[OsString]) -> Option<EarlyZygote> {
        let mut words = arguments.iter().skip(1).filter(|word| !word.as_encoded_bytes().starts_with(b"-"));
        let splits = arguments.iter().any(|word| word == "--detach");
        words
            .next()
            .is_some_and(|verb| verb == "fork")
            .then(|| EarlyZygote { started_ns: process_start_ns(), zygote: (!splits).then(start_zygote) })
    }
}

impl Default for EarlyZygote {
    fn default() -> EarlyZygote {
        EarlyZygote { started_ns: process_start_ns(), zygote: None }
    }
}

fn start_zygote() -> Result<Zygote, SpawnError> {
    raise_file_limit();
    Zygote::start()
}

/// Runs the command.
pub fn run(args: &ForkArgs, early: EarlyZygote, output: &Output) -> Result<ExitCode, CommandError> {
    let variables = Variables::new(&args.env, &args.vary, args.count)?;
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
    let request = args.request(&paths, variables, early.started_ns, output.is_json());
    let caller = Caller { output, runtime: OnceLock::new(), supervisor: Arc::default() };
    let mut forked = fork(&paths, &zygote?, request, &caller)?;

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

fn stay(forked: &mut AnsweredFork, detached: bool, output: &Output) {
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

impl Progress for Caller<'_> {
    fn begin(&self, what: &str, amount: Amount) -> Box<dyn Task> {
        self.output.begin(what, amount)
    }

    fn note(&self, line: &str) {
        self.output.note(line);
    }
}

impl ForkCaller for Caller<'_> {
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

    fn on_warm_image(&self, image: &WarmStatus) {
        let since = show_since(image.since_unix);
        self.output.note(format!("from the warm image of {}, loaded {since}", image.resolved));
    }

    fn on_started(&self, supervisor: &Arc<Supervisor>) {
        let _ = self.supervisor.set(Arc::clone(supervisor));
    }
}

/// A thousand children need a few descriptors each.
fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%errno, "the limit on open files stays as it is");
    }
}

/// For people.
fn text(report: &ForkReport) -> String {
    let ms = |value: Option<f64>| value.map_or("-".to_owned(), |value| format!("{value:.1} ms"));
    let headings = ["CHILD", ">FIRST INSTRUCTION", ">READY", ">ANSWERED", "ANSWER"];
    let mut rows = vec![headings.map(str::to_owned).to_vec()];
    for child in &report.children {
        let error = child.error.as_ref().map(|error| format!("error: {error}"));
        let code = child.exit_code.filter(|code| *code != 0).map(|code| format!("(exit code {code}) "));
        let answer = child.answer.as_deref().unwrap_or_default().trim_end().replace('\n', "\n    ");
        rows.push(vec![
            child.id.clone(),
            ms(child.first_instruction_ms),
            ms(child.ready_ms),
            ms(child.answered_ms),
            error.unwrap_or_else(|| code.unwrap_or_default() + &printable(&answer)),
        ]);
    }
    let mut text = table(&rows);
    if report.pack.bytes_total > 0 {
        let total = show_size(report.pack.bytes_total);
        let at = |bytes: Option<u64>| bytes.map_or("-".to_owned(), show_size);
        text.push_str(&format!(
            "{}: of {total} fetched {} at the first instruction, {} when ready, {} when answered ({} requests)\n",
            report.pack.name,
            at(report.fetched.at_first_instruction),
            at(report.fetched.at_ready),
            at(report.fetched.at_answered),
            report.pack.requests,
        ));
    }
    if let (Some(pss), Some(private)) = (report.memory.pss_kib_per_child, report.memory.private_kib_per_child)
    {
        text.push_str(&format!(
            "memory of a child: {pss} KiB PSS, {private} KiB private; images {} KiB, shared\n",
            report.memory.image_kib
        ));
    }
    text
}

/// Guests choose their answers: no control characters for the terminal, but line breaks.
fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' && c != '\t' { '\u{fffd}' } else { c }).collect()
}
