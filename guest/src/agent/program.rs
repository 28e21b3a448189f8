//! Finding a program, why one cannot be run, and what the helper that starts it as another user is told.

use std::collections::BTreeMap;
use std::io;

use forkd_abi::protocol::{Ready, Response};
use rustix::fs::{Access, access};
use serde::{Deserialize, Serialize};

/// The agent's own program, whatever has become of its file.
pub const AGENT: &str = "/proc/self/exe";
/// Its argument when it is to start a program: a [`StartOrder`] in JSON and the program's own arguments follow.
pub const START: &str = "--start";
/// Its argument when it is to serve a `pack` request, in JSON, on its standard input.
pub const PACK: &str = "--pack";
/// Its argument when it is to serve an `unpack` request, in JSON, on its standard input.
pub const UNPACK: &str = "--unpack";
/// Its argument when it is to wait until a service is ready: a [`ReadyOrder`] in JSON follows.
pub const READY: &str = "--ready";
/// What it says then. Any other line says why it is not.
pub const READY_LINE: &str = "ready";
/// Its argument when it is to get an `http://` URL, which follows.
pub const GET: &str = "--get";
/// Exit code of shells for a program that is not there.
const NOT_FOUND: u8 = 127;
/// Exit code of shells for a program that cannot be run.
const NOT_RUNNABLE: u8 = 126;

/// How a program is to be started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartOrder {
    /// `NAME|UID[:GROUP|GID]`.
    pub user: Option<String>,
    /// Start in the user's home directory, and without a program the user's shell.
    pub login: bool,
    /// Working directory.
    pub cwd: Option<String>,
    /// Variables that were asked for, which the user's own do not replace.
    pub given: Vec<String>,
}

/// What to wait for, and how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReadyOrder {
    /// What shows that it is ready.
    pub ready: Ready,
    /// Seconds.
    pub timeout_s: u32,
}

/// Why a program was not started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// For a person.
    pub message: String,
    /// The exit code of shells, where the program is the reason.
    pub code: Option<u8>,
}

impl Refusal {
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), code: None }
    }

    /// The program at a path that was found cannot be run.
    pub fn of_program(program: &str, error: &io::Error) -> Self {
        let code = match error.kind() {
            io::ErrorKind::NotFound => Some(NOT_FOUND),
            io::ErrorKind::InvalidInput => None,
            _ => Some(NOT_RUNNABLE),
        };
        Self { message: format!("cannot run {program:?}: {error}"), code }
    }

    pub fn no_directory(program: &str, cwd: &str) -> Self {
        Self::new(format!("cannot run {program:?}: working directory {cwd:?} cannot be entered"))
    }
}

impl From<Refusal> for Response {
    fn from(refusal: Refusal) -> Response {
        Response::Error { message: refusal.message, code: refusal.code }
    }
}

/// The path to run: the program itself when it has a slash, else the first executable in `PATH`.
pub fn program_path(argv: &[String], env: &BTreeMap<String, String>) -> Result<String, Refusal> {
    let program = argv.first().filter(|name| !name.is_empty());
    let program = program.ok_or_else(|| Refusal::new("no program given"))?;
    if program.contains('/') {
        return Ok(program.clone());
    }
    env.get("PATH")
        .map_or("", String::as_str)
        .split(':')
        .filter(|dir| dir.starts_with('/'))
        .map(|dir| format!("{}/{program}", dir.trim_end_matches('/')))
        .find(|candidate| access(candidate, Access::EXEC_OK).is_ok())
        .ok_or_else(|| Refusal {
            message: format!("cannot run {program:?}: no such program in PATH"),
            code: Some(NOT_FOUND),
        })
}
