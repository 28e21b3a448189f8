//! Programs in sandboxes: starting one on a thread of its own, what comes of it as a stream, and giving it up.

use super::error::ApiError;
use super::sandboxes::found;
use crate::sandboxes::Owner;
use crate::state::Daemon;
use crate::streams::{ChannelWriter, WAITING};
use bytes::Bytes;
use forkd_abi::protocol::{ExecRequest, Exit, Tty};
use forkd_engine::fork::agent::{AgentClient, ClientError, Signaller};
use forkd_engine::fork::children::{self, ChildrenError, agent_error};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{self, Receiver};
use utoipa::ToSchema;

/// A program to run. `argv` or `cmd` says which.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecBody {
    /// Program and arguments.
    argv: Option<Vec<String>>,
    /// A line for `sh -c`.
    cmd: Option<String>,
    /// Variables beside those of the sandbox.
    #[serde(default)]
    env: BTreeMap<String, String>,
    /// Where it starts: `/` without it.
    cwd: Option<String>,
    /// Whose process it is, NAME|UID[:GROUP|GID]: root's without it.
    user: Option<String>,
    /// What it reads; nothing without it.
    pub stdin: Option<String>,
    /// How long it may run, s, before it is killed; as long as it likes without it.
    pub timeout_s: Option<f64>,
    /// Nobody waits for it: the answer has its process id.
    #[serde(default)]
    pub detach: bool,
    /// A terminal for it (WebSocket only).
    pub tty: Option<TtyBody>,
}

/// A terminal.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TtyBody {
    /// Lines.
    rows: u16,
    /// Characters in a line.
    cols: u16,
    /// What it can do: TERM of the program.
    term: Option<String>,
}

impl ExecBody {
    /// As the agent takes it.
    pub fn request(&self) -> Result<ExecRequest, ApiError> {
        let argv = match (&self.argv, &self.cmd) {
            (Some(argv), None) if !argv.is_empty() => argv.clone(),
            (None, Some(cmd)) => vec!["sh".to_owned(), "-c".to_owned(), cmd.clone()],
            _ => return Err(ApiError::invalid("either argv or cmd says what to run")),
        };
        let tty = self.tty.as_ref().map(|TtyBody { rows, cols, term }| Tty {
            rows: *rows,
            cols: *cols,
            term: term.clone(),
        });
        Ok(ExecRequest {
            argv,
            env: self.env.clone(),
            cwd: self.cwd.clone(),
            user: self.user.clone(),
            tty,
            ..ExecRequest::default()
        })
    }

    /// How long it may run.
    pub fn timeout(&self) -> Result<Option<Duration>, ApiError> {
        let wrong = || ApiError::invalid("timeout_s is a time in seconds, more than none");
        let time = |seconds| {
            let time = Duration::try_from_secs_f64(seconds).ok().filter(|time| !time.is_zero());
            time.ok_or_else(wrong)
        };
        self.timeout_s.map(time).transpose()
    }
}

/// A connection to a sandbox's agent, for one program.
pub struct Attached {
    id: String,
    client: AgentClient,
    signaller: Signaller,
    permit: OwnedSemaphorePermit,
}

/// Connects to the agent of the caller's sandbox.
pub async fn attach(daemon: &Daemon, owner: &Owner, id: &str) -> Result<Attached, ApiError> {
    found(daemon, owner, id).await?;
    let permit = daemon.blocking.stream()?;
    let (paths, id) = (daemon.paths.clone(), id.to_owned());
    let connecting = tokio::task::spawn_blocking(move || -> Result<Attached, ChildrenError> {
        let client = children::connect(&paths, &id)?;
        let signaller = client.signaller().map_err(agent_error(&id))?;
        Ok(Attached { id, client, signaller, permit })
    });
    Ok(connecting.await.map_err(|error| ApiError::internal(error.to_string()))??)
}

impl Attached {
    /// Starts the program, whose output and end come through what this returns.
    pub fn start(
        self,
        request: ExecRequest,
        stdin: Option<Box<dyn Read + Send>>,
        timeout: Option<Duration>,
    ) -> RunningProgram {
        let (events, receiver) = mpsc::channel(WAITING);
        let writer =
            |stream| ChannelWriter::new(events.clone(), move |bytes| ProgramEvent::Output(stream, bytes));
        let (mut stdout, mut stderr) = (writer(OutputStream::Stdout), writer(OutputStream::Stderr));
        let Attached { client, signaller, permit, .. } = self;
        let given_up = GiveUp(signaller.clone());
        tokio::task::spawn_blocking(move || {
            let _permit = permit;
            let exit = client.exec_with(&signaller, request, stdin, &mut stdout, &mut stderr, timeout);
            // Who does not wait for it does not need it.
            let _ = events.blocking_send(ProgramEvent::Ended(exit));
        });
        RunningProgram { events: receiver, signaller: given_up }
    }

    /// Starts a program that nobody waits for.
    pub async fn detach(self, request: ExecRequest, timeout: Duration) -> Result<u32, ApiError> {
        let Attached { id, client, permit, .. } = self;
        let starting = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            client.start(request, timeout).map_err(agent_error(&id))
        });
        Ok(starting.await.map_err(|error| ApiError::internal(error.to_string()))??)
    }
}

/// Where output comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OutputStream {
    /// Standard output; all of a terminal's.
    Stdout,
    /// Standard error.
    Stderr,
}

/// What comes of a program.
#[derive(Debug)]
pub enum ProgramEvent {
    /// It has written something.
    Output(OutputStream, Bytes),
    /// It has ended; the last event.
    Ended(Result<Exit, ClientError>),
}

/// A program under way, which ends when this is dropped.
pub struct RunningProgram {
    /// What comes of it.
    pub events: Receiver<ProgramEvent>,
    signaller: GiveUp,
}

impl RunningProgram {
    /// What sends signals to it.
    pub fn signaller(&self) -> Signaller {
        self.signaller.0.clone()
    }
}

/// Gives a program up when dropped; one that has ended already does not mind.
struct GiveUp(Signaller);

impl Drop for GiveUp {
    fn drop(&mut self) {
        self.0.give_up();
    }
}
