//! Asking the children of a fork, all at once, and hearing their answers.

use crate::chain::chain;
use crate::fork::agent::{AgentClient, ClientError};
use crate::fork::supervisor::{Milestone, Supervisor};
use crate::progress::{Amount, Progress};
use forkd_abi::protocol::{Answer, ExecRequest, Exit};
use forkd_vmm::process::monotonic_ns;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long a child may take to answer, its memory's way here included.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(600);
/// Most output of an `--exec` that is kept, bytes.
const OUTPUT_MAX: usize = 1 << 20;
/// Pause between two looks at a child that does not answer.
const POLL: Duration = Duration::from_millis(5);
/// Looks at it, until its connection's failure is taken for the reason.
const FAILURE_POLLS: u32 = 60;

/// What is asked of every child.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ChildRequest {
    /// Nothing: a child that is ready has answered.
    Nothing,
    /// Whether its agent answers.
    Ping,
    /// Code for the warm worker.
    Eval(String),
    /// A program and its arguments.
    Exec(Vec<String>),
}

/// How a child answered, or why it did not.
#[derive(Debug)]
pub struct ChildOutcome {
    /// What it answered: what was printed, and the value.
    pub answer: Option<String>,
    /// The value alone, of code.
    pub value: Option<String>,
    /// Whether it did answer, if only that the code failed.
    pub answered: bool,
    /// Why there is no answer, or why the code failed.
    pub error: Option<String>,
    /// Exit code of a program; 128 and the signal's number when one ended it.
    pub exit_code: Option<i32>,
    /// When.
    pub at: Milestone,
}

impl ChildOutcome {
    /// Of a child that answered, without a word.
    fn answered(at: Milestone) -> ChildOutcome {
        ChildOutcome { answer: None, value: None, answered: true, error: None, exit_code: None, at }
    }
}

/// What [`ask_all`] waits for.
enum Event {
    /// A child goes on, got ready or is over.
    Changed(usize),
    Answered(usize, ChildOutcome),
}

/// Asks every child at the same time, and waits until each has answered or is over.
///
/// With `after_ready` a child is asked that long after it was ready, otherwise as soon as it has executed its first
/// instruction.
pub fn ask_all(
    supervisor: &Arc<Supervisor>,
    request: &ChildRequest,
    after_ready: Option<Duration>,
    progress: &dyn Progress,
) -> Vec<ChildOutcome> {
    let (sender, events) = std::sync::mpsc::channel();
    let changes = sender.clone();
    // Nobody listens any more when all have answered.
    supervisor.watch(move |at| drop(changes.send(Event::Changed(at))));
    let count = supervisor.children().len();
    let task = progress.begin("children", Amount::Steps(count as u64));
    let mut asked = vec![false; count];
    let mut outcomes: Vec<Option<ChildOutcome>> = asked.iter().map(|_| None).collect();
    let mut known: std::collections::VecDeque<_> = (0..count).map(Event::Changed).collect();
    while outcomes.iter().any(Option::is_none) {
        let Some(event) = known.pop_front().or_else(|| events.recv().ok()) else { break };
        let (Event::Changed(concerned) | Event::Answered(concerned, _)) = event;
        match event {
            Event::Answered(at, outcome) => drop(outcomes[at].get_or_insert(outcome)),
            Event::Changed(at) if outcomes[at].is_none() => {
                // A machine that is gone refuses connections just like one that still starts; the state tells.
                outcomes[at] = over(supervisor, at).or_else(|| without_asking(supervisor, at, request));
                if outcomes[at].is_none() && !asked[at] && may_be_asked(supervisor, at, request, after_ready)
                {
                    asked[at] = true;
                    let (sender, asker, request) = (sender.clone(), Arc::clone(supervisor), request.clone());
                    let spawned = std::thread::Builder::new().spawn(move || {
                        std::thread::sleep(after_ready.unwrap_or_default());
                        drop(sender.send(Event::Answered(at, ask(&asker, at, &request))));
                    });
                    // There is a limit on a user's threads.
                    outcomes[at] = spawned
                        .err()
                        .map(|error| failed(supervisor, format!("there is no thread to ask it: {error}")));
                }
            }
            Event::Changed(_) => {}
        }
        if outcomes[concerned].is_some() {
            supervisor.end_turn(concerned);
        }
        task.to(outcomes.iter().flatten().count() as u64);
    }
    supervisor.watch(|_| {});
    outcomes.into_iter().flatten().collect()
}

/// Where nothing is asked for, being ready is the answer.
fn without_asking(supervisor: &Supervisor, at: usize, request: &ChildRequest) -> Option<ChildOutcome> {
    let ready = supervisor.children()[at].ready.filter(|_| matches!(request, ChildRequest::Nothing));
    ready.map(ChildOutcome::answered)
}

/// A request that is there before the machine is ready saves it an interrupt. Before its first instruction it would wait for
/// a page that comes with later ones, and one whose turn it is not would be asked again and again.
fn may_be_asked(
    supervisor: &Supervisor,
    at: usize,
    request: &ChildRequest,
    after_ready: Option<Duration>,
) -> bool {
    let child = &supervisor.children()[at];
    !matches!(request, ChildRequest::Nothing)
        && child.goes_on
        && (after_ready.is_none() || child.ready.is_some())
}

/// The outcome of a child that is over without an answer, or is paused because its time is.
fn over(supervisor: &Supervisor, at: usize) -> Option<ChildOutcome> {
    let error = {
        let children = supervisor.children();
        let child = &children[at];
        let over = child
            .state
            .is_over()
            .then(|| child.error.clone().unwrap_or_else(|| "it ended before it answered".to_owned()));
        over.or_else(|| child.overdue.as_ref().map(|why| format!("{why}, it is paused")))
    };
    error.map(|error| failed(supervisor, error))
}

fn now(supervisor: &Supervisor) -> Milestone {
    Milestone { at_ns: monotonic_ns(), fetched: supervisor.template().progress().bytes_fetched }
}

fn failed(supervisor: &Supervisor, error: String) -> ChildOutcome {
    ChildOutcome { answered: false, error: Some(error), ..ChildOutcome::answered(now(supervisor)) }
}

fn ask(supervisor: &Supervisor, at: usize, request: &ChildRequest) -> ChildOutcome {
    let socket = supervisor.children()[at].socket.clone();
    match ask_one(&socket, request) {
        Ok(ChildReply { answer, value, error, exit_code }) => {
            ChildOutcome { answer, value, error, exit_code, ..ChildOutcome::answered(now(supervisor)) }
        }
        Err(error) => {
            // When its machine failed, that is why it does not answer; the report of that may be a moment behind.
            for _ in 0..FAILURE_POLLS {
                if let Some(outcome) = over(supervisor, at) {
                    return outcome;
                }
                std::thread::sleep(POLL);
            }
            failed(supervisor, chain(&error))
        }
    }
}

/// What a child says to a request; [`ChildOutcome`] says what the fields mean.
#[derive(Debug, Default)]
pub struct ChildReply {
    /// What it answered.
    pub answer: Option<String>,
    /// The value alone, of code.
    pub value: Option<String>,
    /// Why the code failed.
    pub error: Option<String>,
    /// Exit code of a program.
    pub exit_code: Option<i32>,
}

/// Asks the child whose agent listens at `socket`.
///
/// # Errors
/// [`ClientError`] as its variants say.
pub fn ask_one(socket: &Path, request: &ChildRequest) -> Result<ChildReply, ClientError> {
    let agent = || AgentClient::connect(socket, ANSWER_TIMEOUT);
    match request {
        ChildRequest::Nothing => Ok(ChildReply::default()),
        ChildRequest::Ping => agent()?.ping(ANSWER_TIMEOUT).map(|()| ChildReply::default()),
        ChildRequest::Eval(code) => eval(agent()?, code),
        ChildRequest::Exec(command) => exec(agent()?, command),
    }
}

fn eval(agent: AgentClient, code: &str) -> Result<ChildReply, ClientError> {
    let Answer { answer, error, output } = agent.eval(code, ANSWER_TIMEOUT)?;
    let printed = output.filter(|output| !output.is_empty());
    let value = answer.clone();
    let answer = match (printed, answer) {
        (Some(printed), Some(answer)) => Some(format!("{printed}{answer}")),
        (printed, answer) => printed.or(answer),
    };
    Ok(ChildReply { answer, value, error, exit_code: None })
}

fn exec(agent: AgentClient, command: &[String]) -> Result<ChildReply, ClientError> {
    let request = ExecRequest { argv: command.to_vec(), ..ExecRequest::default() };
    let (mut stdout, mut stderr) = (Capped::default(), Capped::default());
    let Exit { code, signal } = agent.exec(request, None, &mut stdout, &mut stderr, Some(ANSWER_TIMEOUT))?;
    let text = [stdout.0, stderr.0].concat();
    Ok(ChildReply {
        answer: Some(String::from_utf8_lossy(&text).into_owned()),
        exit_code: code.or(signal.map(|signal| 128 + signal)),
        ..ChildReply::default()
    })
}

/// Keeps the first [`OUTPUT_MAX`] bytes.
#[derive(Default)]
struct Capped(Vec<u8>);

impl std::io::Write for Capped {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let room = OUTPUT_MAX.saturating_sub(self.0.len()).min(bytes.len());
        self.0.extend_from_slice(&bytes[..room]);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}
