//! `forkd ps`, `exec`, `eval`, `logs`, `kill`: what is done with children that run. They are found through their
//! forks' run directories; no daemon is involved. `logs` also shows what a snapshot's machine printed.

use crate::cli::{EvalArgs, ExecArgs, KillArgs, LogsArgs};
use crate::error::CommandError;
use crate::output::{Output, table};
use crate::units::show_size;
use forkd_abi::protocol::{Answer, ExecRequest, Exit};
use forkd_engine::fork::agent::{AgentClient, ClientError};
use forkd_engine::local::paths::Paths;
use forkd_engine::local::run_dir::{ForkDir, ForkStatus, RunDirError};
use forkd_engine::local::snapshots::{CONSOLE, Held, SnapshotError};
use serde::Serialize;
use std::fs::File;
use std::io::{self, Read, Write};
use std::process::ExitCode;
use std::time::Duration;

/// How long a child may take to accept a request.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(60);
/// How long a command in a child may run; long enough for anything somebody waits for.
const RUN_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);
/// Exit code of a command that a signal ended, less the signal (as shells have it).
const SIGNALLED: i32 = 128;

/// A child could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ChildrenError {
    /// Finding it.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// Its agent.
    #[error("{id}")]
    Agent {
        /// The child.
        id: String,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// The code failed in the guest.
    #[error("{id}: the code failed: {error}")]
    Code {
        /// The child.
        id: String,
        /// What the worker says.
        error: String,
    },
    /// `--env` without a value.
    #[error("`{text}` is not NAME=VALUE")]
    Environment {
        /// What was given.
        text: String,
    },
    /// Its memory.
    #[error("the memory of {id} cannot be looked at")]
    Memory {
        /// The child.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Nothing in its memory is an image as this forkd names them.
    #[error("no image is mapped in the memory of {id} (process {pid})")]
    NoImage {
        /// The child.
        id: String,
        /// Its process.
        pid: i32,
    },
    /// Its console, or that of a snapshot.
    #[error("the console of {id} cannot be shown")]
    Console {
        /// The child, or the tag.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A snapshot that has no console.
    #[error("no console is kept with the snapshot `{tag}`")]
    NoConsole {
        /// The tag.
        tag: String,
    },
    /// A snapshot whose console is asked for.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// One running fork, as `forkd ps --json` shows it.
#[derive(Debug, Serialize)]
struct Listed {
    fork: String,
    #[serde(flatten)]
    status: ForkStatus,
}

/// `forkd ps`.
pub fn ps(output: &Output) -> Result<ExitCode, CommandError> {
    let mut forks = Vec::new();
    for fork in ForkDir::all(&Paths::from_env()?).map_err(ChildrenError::from)? {
        match fork.status() {
            Ok(status) => forks.push(Listed { fork: fork.id, status }),
            // It has just ended, or left its directory for `forkd cleanup`.
            Err(RunDirError::Dead { .. }) => {}
            Err(error) => return Err(ChildrenError::from(error).into()),
        }
    }
    output.report(&forks, |forks| {
        let mut rows = vec![["CHILD", ">PID", "STATE", ">FETCHED", "PACK"].map(str::to_owned).to_vec()];
        for Listed { status, .. } in forks {
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

fn connect(id: &str) -> Result<AgentClient, CommandError> {
    let fork = ForkDir::of_child(&Paths::from_env()?, id).map_err(ChildrenError::from)?;
    let connected = AgentClient::connect(&fork.socket(id), CONNECT_TIMEOUT);
    Ok(connected.map_err(|source| ChildrenError::Agent { id: id.to_owned(), source })?)
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
        _ => Err(ChildrenError::Environment { text: text.clone() }),
    };
    let request = ExecRequest {
        argv: args.command.clone(),
        env: args.env.iter().map(pair).collect::<Result<_, _>>()?,
        cwd: args.cwd.clone(),
        stdin: args.interactive,
    };
    let stdin = args.interactive.then(|| Box::new(io::stdin()) as Box<dyn Read + Send>);
    let client = connect(&args.id)?;
    let agent_error = |source| ChildrenError::Agent { id: args.id.clone(), source };
    let Exit { code, signal } = if output.is_json() {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = client.exec(request, stdin, &mut stdout, &mut stderr, None).map_err(agent_error)?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let Exit { code, signal } = exit;
        let (stdout, stderr) = (text(stdout), text(stderr));
        let executed = Executed { id: args.id.clone(), exit_code: code, signal, stdout, stderr };
        output.report(&executed, |_| String::new());
        exit
    } else {
        client.exec(request, stdin, &mut io::stdout(), &mut io::stderr(), None).map_err(agent_error)?
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
    let answer = connect(id)?.eval(&args.code, RUN_TIMEOUT);
    let answer = answer.map_err(|source| ChildrenError::Agent { id: id.clone(), source })?;
    if let Some(error) = &answer.error {
        return Err(ChildrenError::Code { id: id.clone(), error: error.clone() }.into());
    }
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
    let paths = Paths::from_env()?;
    let (id, tag) = (args.id.as_deref(), args.tag.as_deref());
    let name = id.or(tag).unwrap_or_default();
    let failed = |source| ChildrenError::Console { id: name.to_owned(), source };
    let mut console = match tag {
        Some(tag) => console_of_snapshot(&paths, tag)?,
        None => {
            let fork = ForkDir::of_child(&paths, name).map_err(ChildrenError::from)?;
            File::open(fork.console(name)).map_err(failed)?
        }
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

fn console_of_snapshot(paths: &Paths, tag: &str) -> Result<File, ChildrenError> {
    let held = Held::find(paths, tag)?;
    File::open(held.path().join(CONSOLE)).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => ChildrenError::NoConsole { tag: tag.to_owned() },
        _ => ChildrenError::Console { id: tag.to_owned(), source },
    })
}

#[derive(Debug, Serialize)]
struct Killed {
    killed: usize,
}

/// `forkd kill`.
pub fn kill(args: &KillArgs, output: &Output) -> Result<ExitCode, CommandError> {
    let paths = Paths::from_env()?;
    let mut killed = 0;
    let mut failure = None;
    if args.all {
        for fork in ForkDir::all(&paths).map_err(ChildrenError::from)? {
            match fork.kill(None) {
                Ok(count) => killed += count,
                Err(RunDirError::Dead { .. }) => {}
                // The others are to be ended all the same.
                Err(error) => failure = Some(error),
            }
        }
    } else {
        for id in &args.ids {
            let fork = ForkDir::of_child(&paths, id).map_err(ChildrenError::from)?;
            let lives = fork.is_alive();
            killed += match fork.kill(Some(id)) {
                // A fork ends with its last child, at times before it has said so.
                Err(RunDirError::Dead { .. }) if lives => 1,
                answer => answer.map_err(ChildrenError::from)?,
            };
        }
    }
    if let Some(error) = failure {
        return Err(ChildrenError::from(error).into());
    }
    output.report(&Killed { killed }, |report| format!("ended {}\n", report.killed));
    Ok(ExitCode::SUCCESS)
}
