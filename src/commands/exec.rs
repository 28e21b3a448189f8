//! `forkd exec`: runs a program in a child.

use crate::cli::{CommandArgs, ExecArgs};
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use crate::pass_on::{self, SIGNALLED};
use crate::terminal::{self, RawMode};
use forkd_abi::protocol::{ExecRequest, Exit, Tty};
use forkd_engine::fork::agent::{AgentClient, ClientError};
use forkd_engine::fork::children::{self, agent_error, connect};
use serde::Serialize;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

/// What `forkd exec --json` prints after the command's own output.
#[derive(Debug, Serialize)]
struct Executed {
    id: String,
    exit_code: Option<i32>,
    signal: Option<i32>,
    timed_out: bool,
    stdout: String,
    stderr: String,
}

/// What `forkd exec --detach` prints.
#[derive(Debug, Serialize)]
struct Started<'a> {
    id: &'a str,
    pid: u32,
}

/// `forkd exec`: exits as the command did.
pub fn run(args: &ExecArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let request = ExecRequest {
        argv: args.command.clone(),
        stdin: args.interactive,
        tty: args.tty.then(our_tty),
        detach: args.detach,
        ..request(&args.how)?
    };
    if args.detach {
        let pid = children::start(&environment::paths()?, &args.id, request)?;
        output.report(&Started { id: &args.id, pid }, |started| started.pid.to_string());
        return Ok(ExitCode::SUCCESS);
    }
    if args.tty && output.is_json() {
        return Err(CommandError::NoTerminal { why: "with --json its output is in one document" });
    }
    if args.tty && args.interactive && !terminal::is_stdin() {
        return Err(CommandError::NoTerminal { why: "stdin is not a terminal" });
    }
    attach(&args.id, request, args.timeout, output)
}

/// What is asked of the agent, as far as `forkd exec` and `forkd shell` have it in common.
pub fn request(how: &CommandArgs) -> Result<ExecRequest, CommandError> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(CommandError::Environment { text: text.clone() }),
    };
    let env = how.env.iter().map(pair).collect::<Result<_, _>>()?;
    Ok(ExecRequest { env, cwd: how.cwd.clone(), user: how.user.clone(), ..ExecRequest::default() })
}

/// A terminal like ours.
pub fn our_tty() -> Tty {
    let (rows, cols) = terminal::size();
    Tty { rows, cols, term: std::env::var("TERM").ok() }
}

/// Runs a program with our input and output, and exits as it did.
pub fn attach(
    id: &str,
    request: ExecRequest,
    timeout: Option<Duration>,
    output: &Output,
) -> Result<ExitCode, CommandError> {
    let client = connect(&environment::paths()?, id)?;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    let result = if output.is_json() {
        exchange(client, request, timeout, &mut stdout, &mut stderr)
    } else {
        exchange(client, request, timeout, &mut io::stdout(), &mut io::stderr())
    };
    let timed_out = matches!((&result, timeout), (Err(Ended::Asking(ClientError::Timeout { .. })), Some(_)));
    let exit = match result {
        Ok(exit) => exit,
        Err(_) if timed_out => Exit::default(),
        Err(Ended::Asking(error)) => return Err(agent_error(id)(error).into()),
        Err(Ended::Terminal(error)) => return Err(CommandError::Terminal(error)),
    };
    if output.is_json() {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let (id, stdout, stderr) = (id.to_owned(), text(stdout), text(stderr));
        let Exit { code: exit_code, signal } = exit;
        let executed = Executed { id, exit_code, signal, timed_out, stdout, stderr };
        output.report(&executed, |_| String::new());
    }
    if let Some(after) = timeout.filter(|_| timed_out) {
        return Err(CommandError::TimedOut { id: id.to_owned(), after });
    }
    let status = exit.code.or(exit.signal.map(|signal| SIGNALLED + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}

/// Why an exec did not come to its end.
enum Ended {
    Asking(ClientError),
    Terminal(io::Error),
}

fn exchange(
    client: AgentClient,
    request: ExecRequest,
    timeout: Option<Duration>,
    stdout: &mut dyn Write,
    stderr: &mut dyn Write,
) -> Result<Exit, Ended> {
    let terminal = request.tty.is_some();
    let stdin = request.stdin.then(|| Box::new(io::stdin()) as Box<dyn Read + Send>);
    let signaller = client.signaller().map_err(Ended::Asking)?;
    let raw = (terminal && request.stdin && terminal::is_stdin()).then(RawMode::enter);
    let _raw = raw.transpose().map_err(Ended::Terminal)?;
    pass_on::start(signaller.clone(), terminal);
    client.exec_with(&signaller, request, stdin, stdout, stderr, timeout).map_err(Ended::Asking)
}
