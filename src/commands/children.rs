//! `forkd ps`, `exec`, `eval`, `logs`, `kill`: what is done with children that run. They are found through their
//! forks' run directories; no daemon is involved. `logs` also shows what a snapshot's machine printed.

use crate::cli::{EvalArgs, ExecArgs, KillArgs, LogsArgs};
use crate::environment;
use crate::failure::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_abi::protocol::{Answer, ExecRequest, Exit};
use forkd_engine::fork::children::{self, ChildrenError, RunningFork, agent_error, connect};
use serde::Serialize;
use std::io::{self, Read, Write};
use std::process::ExitCode;

/// Exit code of a command that a signal ended, less the signal (as shells have it).
const SIGNALLED: i32 = 128;

/// `forkd ps`.
pub fn ps(output: &Output) -> Result<ExitCode, CommandError> {
    let forks = children::list(&environment::paths()?).map_err(ChildrenError::from)?;
    output.report(&forks, |forks| {
        let mut rows = vec![["CHILD", ">PID", "STATE", ">FETCHED", "PACK"].map(str::to_owned).to_vec()];
        for RunningFork { status, .. } in forks {
            let fetched = match status.bytes_total {
                0 => "local".to_owned(),
                total => format!("{} of {}", show_size(status.bytes_fetched), show_size(total)),
            };
            for child in &status.children {
                let error = child.error.as_ref().map(|error| format!(" ({error})")).unwrap_or_default();
                let state = format!("{}{error}", child.state.name());
                rows.push(vec![
                    child.id.clone(),
                    child.pid.to_string(),
                    state,
                    fetched.clone(),
                    status.pack.clone(),
                ]);
            }
        }
        table(&rows)
    });
    Ok(ExitCode::SUCCESS)
}

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
pub fn exec(args: &ExecArgs, output: &Output) -> Result<ExitCode, CommandError> {
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

#[derive(Debug, Serialize)]
struct Evaluated<'a> {
    id: &'a str,
    #[serde(flatten)]
    answer: Answer,
}

/// `forkd eval`.
pub fn eval(args: &EvalArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let id = &args.id;
    let answer = children::eval(&environment::paths()?, id, &args.code)?;
    output.report(&Evaluated { id, answer }, |evaluated| {
        let Answer { answer, output, .. } = &evaluated.answer;
        let mut text = output.clone().unwrap_or_default();
        if let Some(answer) = answer {
            text.push_str(answer);
            text.push('\n');
        }
        text
    });
    Ok(ExitCode::SUCCESS)
}

/// What `forkd logs --json` prints: of a child its id, of a snapshot its tag.
#[derive(Debug, Serialize)]
struct Logged<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tag: Option<&'a str>,
    console: String,
}

/// `forkd logs`.
pub fn logs(args: &LogsArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let (id, tag) = (args.id.as_deref(), args.tag.as_deref());
    let name = id.or(tag).unwrap_or_default();
    let failed = |source| ChildrenError::Console { id: name.to_owned(), source };
    let mut console = match tag {
        Some(tag) => children::console_of_snapshot(&paths, tag)?,
        None => children::console(&paths, name)?,
    };
    if output.is_json() {
        let mut bytes = Vec::new();
        console.read_to_end(&mut bytes).map_err(failed)?;
        let console = String::from_utf8_lossy(&bytes).into_owned();
        output.report(&Logged { id, tag, console }, |_| String::new());
    } else {
        let mut stdout = io::stdout().lock();
        io::copy(&mut console, &mut stdout).and_then(|_| stdout.flush()).map_err(failed)?;
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(Debug, Serialize)]
struct Killed {
    killed: usize,
}

/// `forkd kill`.
pub fn kill(args: &KillArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = environment::paths()?;
    let killed = match args.all {
        true => children::kill_all(&paths),
        false => {
            args.ids.iter().try_fold(0, |killed, id| Ok(killed + usize::from(children::kill(&paths, id)?)))
        }
    };
    let killed = killed.map_err(ChildrenError::from)?;
    output.report(&Killed { killed }, |report| format!("ended {}\n", report.killed));
    Ok(ExitCode::SUCCESS)
}
