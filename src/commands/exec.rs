//! `forkd exec`: runs a program in a child.

use crate::cli::ExecArgs;
use crate::environment;
use crate::failure::CommandError;
use crate::output::Output;
use forkd_abi::protocol::{ExecRequest, Exit};
use forkd_engine::fork::children::{agent_error, connect};
use serde::Serialize;
use std::io::{self, Read};
use std::process::ExitCode;

/// Exit code of a command that a signal ended, less the signal (as shells have it).
const SIGNALLED: i32 = 128;

/// What `forkd exec --json` prints after the command's own output.
#[derive(Debug, Serialize)]
struct Executed {
    id: String,
    exit_code: Option<i32>,
    signal: Option<i32>,
    stdout: String,
    stderr: String,
}

/// `forkd exec`: exits as the command did.
pub fn run(args: &ExecArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let pair = |text: &String| match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err(CommandError::Environment { text: text.clone() }),
    };
    let request = ExecRequest {
        argv: args.command.clone(),
        env: args.env.iter().map(pair).collect::<Result<_, _>>()?,
        cwd: args.cwd.clone(),
        stdin: args.interactive,
    };
    let stdin = args.interactive.then(|| Box::new(io::stdin()) as Box<dyn Read + Send>);
    let client = connect(&environment::paths()?, &args.id)?;
    let failed = agent_error(&args.id);
    let Exit { code, signal } = if output.is_json() {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = client.exec(request, stdin, &mut stdout, &mut stderr, None).map_err(failed)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let Exit { code, signal } = exit;
        let (stdout, stderr) = (text(stdout), text(stderr));
        let executed = Executed { id: args.id.clone(), exit_code: code, signal, stdout, stderr };
        output.report(&executed, |_| String::new());
        exit
    } else {
        client.exec(request, stdin, &mut io::stdout(), &mut io::stderr(), None).map_err(failed)?
    };
    let status = code.or(signal.map(|signal| SIGNALLED + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(status).unwrap_or(1)))
}
