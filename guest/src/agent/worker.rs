//! The warm worker: one long-lived process that evaluates code, one line of JSON in, one line of JSON out.
//!
//! The agent's loop tells it which of its pipes is ready and collects finished evals. Its life: starting (evals wait)
//! -> ready (one eval at a time, the others wait) -> failed (evals fail with how it ended). Lines to the worker:
//! `{"op":"eval","code":...}` and, in a copy, `{"op":"resumed","seed":hex,"env":{name:value}}`; from it: `{"ready":true}` once, then one
//! answer `{"answer":...,"error":...,"output":...}` per eval and nothing else.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::{Answer, Exit, MAX_PAYLOAD, Response, WarmCommand, WorkerState};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::process::{
    Child, Command, Manner, Spawner, exit_text, kill_group, readable_bytes, reported_refusal,
};
use super::program::Refusal;
use super::sys::let_wakers_go_on;

/// Longest line a worker may write: its answer must fit a frame, with the response's own few bytes.
const LINE_LIMIT: usize = MAX_PAYLOAD - 256;
/// How much of the end of the worker's standard error is kept.
const STDERR_TAIL: usize = 4 << 10;
/// How much of it is shown on the console while the worker starts: a serial console is slow.
const CONSOLE_LIMIT: usize = 16 << 10;

/// Names one eval's connection, even after its slot has been used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EvalKey {
    pub slot: usize,
    pub serial: u64,
}

#[derive(Serialize)]
#[serde(tag = "op", rename_all = "snake_case")]
enum ToWorker<'a> {
    Eval { code: &'a str },
    Resumed { seed: &'a str, env: &'a BTreeMap<String, String> },
}

#[derive(Deserialize)]
struct ReadyLine {
    ready: bool,
}

/// The warm worker, or the fact that there is none.
pub struct Worker {
    state: WorkerState,
    child: Option<WorkerChild>,
    waiting: VecDeque<(EvalKey, String)>,
    /// The eval the worker is busy with; its key is `None` once its connection has gone.
    running: Option<Option<EvalKey>>,
    finished: Vec<(EvalKey, Response)>,
}

struct WorkerChild {
    pid: i32,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// Written to the worker once its pipe takes it.
    outbound: Vec<u8>,
    line: Vec<u8>,
    /// The current line is too long: it is dropped up to its end.
    skipping: bool,
    stderr_tail: Vec<u8>,
    shown: usize,
    /// Why the agent killed it, if it did.
    killed_because: Option<&'static str>,
    /// Where a helper says why it could not become the worker's user.
    report: Option<OwnedFd>,
}

/// What became readable or writable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerPipe {
    Stdin,
    Stdout,
    Stderr,
}

impl Worker {
    /// No warm command: evals fail.
    pub fn none() -> Self {
        Self {
            state: WorkerState::None,
            child: None,
            waiting: VecDeque::new(),
            running: None,
            finished: Vec::new(),
        }
    }

    /// Something comes before it: evals wait.
    pub fn later() -> Self {
        Self { state: WorkerState::Starting, ..Self::none() }
    }

    /// Starts the warm command; a failure to start is a state too.
    pub fn start(&mut self, spawner: &Spawner, warm: &WarmCommand) {
        let command = Command { argv: &warm.argv, env: &warm.env, cwd: warm.cwd.as_deref() };
        match spawner.start_as(&command, true, &Manner { user: warm.user.as_deref(), ..Manner::default() }) {
            Ok(child) => {
                // So that the agent, waking it with news in a copy, first says that it is ready. Without, all works.
                let _ = let_wakers_go_on(child.pid);
                self.state = WorkerState::Starting;
                self.child = Some(WorkerChild::new(child));
            }
            Err(Refusal { message, .. }) => self.fail(message, Exit::default(), String::new()),
        }
    }

    /// There will be no worker, because of what came before it, or none was wanted.
    pub fn give_up(&mut self, reason: Option<&str>) {
        match reason {
            Some(reason) => self.fail(reason.to_owned(), Exit::default(), String::new()),
            None => {
                self.state = WorkerState::None;
                self.fail_evals();
            }
        }
    }

    fn fail(&mut self, reason: String, exit: Exit, stderr: String) {
        self.state = WorkerState::Failed { reason, exit, stderr };
        self.fail_evals();
    }

    fn fail_evals(&mut self) {
        let message = self.why_no_eval().unwrap_or_default();
        let running = self.running.take().flatten();
        for key in running.into_iter().chain(self.waiting.drain(..).map(|(key, _)| key)) {
            self.finished.push((key, Response::error(message.clone())));
        }
    }

    pub fn state(&self) -> &WorkerState {
        &self.state
    }

    /// The worker's process id while it runs.
    pub fn pid(&self) -> Option<i32> {
        self.child.as_ref().map(|child| child.pid)
    }

    /// Calls `add` with each pipe to poll and the events to wait for.
    pub fn interests(&self, mut add: impl FnMut(WorkerPipe, i32, i16)) {
        let Some(child) = &self.child else { return };
        if let Some(fd) = &child.stdout {
            add(WorkerPipe::Stdout, fd.as_raw_fd(), libc::POLLIN);
        }
        if let Some(fd) = &child.stderr {
            add(WorkerPipe::Stderr, fd.as_raw_fd(), libc::POLLIN);
        }
        if let Some(fd) = child.stdin.as_ref().filter(|_| !child.outbound.is_empty()) {
            add(WorkerPipe::Stdin, fd.as_raw_fd(), libc::POLLOUT);
        }
    }

    /// Queues an eval; its response comes with [`Worker::take_finished`].
    pub fn submit(&mut self, key: EvalKey, code: String) {
        if let Some(message) = self.why_no_eval() {
            self.finished.push((key, Response::error(message)));
            return;
        }
        self.waiting.push_back((key, code));
        self.start_next();
    }

    /// Forgets an eval whose connection has gone. One that runs already runs on, its answer is dropped.
    pub fn cancel(&mut self, key: EvalKey) {
        self.waiting.retain(|(waiting, _)| *waiting != key);
        if self.running == Some(Some(key)) {
            self.running = Some(None);
        }
    }

    /// Tells the worker that it is a copy, what to seed its own generators with, and what its environment gains. It
    /// reads this before any eval that comes later; there is no answer.
    pub fn resumed(&mut self, seed: &str, env: &BTreeMap<String, String>) {
        self.write_line(&ToWorker::Resumed { seed, env });
    }

    /// The evals that have ended since the last call.
    pub fn take_finished(&mut self) -> Vec<(EvalKey, Response)> {
        std::mem::take(&mut self.finished)
    }

    /// Reads or writes the pipe that is ready.
    pub fn on_ready(&mut self, pipe: WorkerPipe, scratch: &mut [u8]) {
        match pipe {
            WorkerPipe::Stdin => self.flush(),
            WorkerPipe::Stdout => self.read_stdout(scratch),
            WorkerPipe::Stderr => self.read_stderr(scratch),
        }
    }

    /// The worker has ended and been reaped.
    pub fn on_exit(&mut self, exit: Exit, scratch: &mut [u8]) {
        self.drain_stderr(scratch);
        let Some(child) = self.child.take() else { return };
        let reason = match (reported_refusal(child.report.as_ref()), child.killed_because) {
            (Some(refusal), _) => refusal,
            (None, Some(reason)) => reason.to_owned(),
            (None, None) => format!("the warm worker {}", exit_text(exit)),
        };
        let stderr = String::from_utf8_lossy(&child.stderr_tail).into_owned();
        self.fail(reason, exit, stderr);
    }

    fn why_no_eval(&self) -> Option<String> {
        match &self.state {
            WorkerState::None => Some("this machine has no warm worker to evaluate code with".to_owned()),
            WorkerState::Failed { reason, stderr, .. } if stderr.trim().is_empty() => Some(reason.clone()),
            WorkerState::Failed { reason, stderr, .. } => {
                Some(format!("{reason}; the end of its standard error:\n{}", stderr.trim_end()))
            }
            WorkerState::Starting | WorkerState::Ready => None,
        }
    }

    fn start_next(&mut self) {
        if self.state != WorkerState::Ready || self.running.is_some() {
            return;
        }
        if let Some((key, code)) = self.waiting.pop_front() {
            self.running = Some(Some(key));
            self.write_line(&ToWorker::Eval { code: &code });
        }
    }

    fn write_line(&mut self, message: &ToWorker<'_>) {
        let Some(child) = &mut self.child else { return };
        // Structs and maps of strings are always JSON.
        let Ok(mut line) = serde_json::to_vec(message) else { return };
        line.push(b'\n');
        child.outbound.append(&mut line);
        self.flush();
    }

    fn flush(&mut self) {
        let Some(child) = &mut self.child else { return };
        let Some(stdin) = &child.stdin else { return };
        while !child.outbound.is_empty() {
            match rustix::io::write(stdin, &child.outbound) {
                Ok(n) => drop(child.outbound.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    child.outbound.clear();
                    child.stdin = None;
                    return child.kill("the warm worker closed its standard input");
                }
            }
        }
    }

    fn read_stdout(&mut self, scratch: &mut [u8]) {
        let Some(child) = &mut self.child else { return };
        let Some(stdout) = &child.stdout else { return };
        let n = match rustix::io::read(stdout, &mut *scratch) {
            Err(Errno::AGAIN | Errno::INTR) => return,
            Ok(n) => n,
            Err(_) => 0,
        };
        if n == 0 {
            child.stdout = None;
            // Usually it is about to end by itself, and then this signal comes too late to change how.
            kill_group(child.pid);
            return;
        }
        let mut rest = &scratch[..n];
        while !rest.is_empty() {
            let end = rest.iter().position(|byte| *byte == b'\n');
            let Some(child) = &mut self.child else { return };
            child.append(&rest[..end.unwrap_or(rest.len())]);
            let Some(end) = end else { return };
            let line = std::mem::take(&mut child.line);
            let too_long = std::mem::take(&mut child.skipping);
            self.on_line(&line, too_long);
            rest = &rest[end + 1..];
        }
    }

    fn on_line(&mut self, line: &[u8], too_long: bool) {
        match self.state {
            WorkerState::Starting => {
                // Libraries print all sorts of things while they load.
                if serde_json::from_slice(line).is_ok_and(|line: ReadyLine| line.ready) {
                    self.state = WorkerState::Ready;
                }
            }
            WorkerState::Ready => {
                let Some(key) = self.running.take() else {
                    return self.broken("the warm worker wrote a line nobody asked for");
                };
                let response = if too_long {
                    Response::error(format!("the answer is longer than {LINE_LIMIT} bytes"))
                } else {
                    match serde_json::from_slice::<Answer>(line) {
                        Ok(answer) => Response::Answer(answer),
                        Err(_) => {
                            self.running = Some(key);
                            return self
                                .broken("the warm worker answered with something other than a JSON answer");
                        }
                    }
                };
                self.finished.extend(key.map(|key| (key, response)));
            }
            WorkerState::None | WorkerState::Failed { .. } => return,
        }
        self.start_next();
    }

    /// Answers can no longer be told apart: end the worker; its exit fails what waits.
    fn broken(&mut self, reason: &'static str) {
        if let Some(child) = &mut self.child {
            child.stdout = None;
            child.kill(reason);
        }
    }

    fn read_stderr(&mut self, scratch: &mut [u8]) {
        let starting = self.state == WorkerState::Starting;
        let Some(child) = &mut self.child else { return };
        let Some(stderr) = &child.stderr else { return };
        match rustix::io::read(stderr, &mut *scratch) {
            Err(Errno::AGAIN | Errno::INTR) => {}
            Ok(n) if n > 0 => {
                let bytes = &scratch[..n];
                if starting && child.shown < CONSOLE_LIMIT {
                    child.shown += n;
                    let _ = io::stderr().write_all(bytes);
                }
                child.stderr_tail.extend_from_slice(bytes);
                let excess = child.stderr_tail.len().saturating_sub(STDERR_TAIL);
                child.stderr_tail.drain(..excess);
            }
            _ => child.stderr = None,
        }
    }

    /// Reads what a worker that has ended left in its pipe, and no more: its own children may still write there.
    fn drain_stderr(&mut self, scratch: &mut [u8]) {
        let stderr = self.child.as_ref().and_then(|child| child.stderr.as_ref());
        let mut left = stderr.map_or(0, readable_bytes);
        while left > 0 {
            let want = left.min(scratch.len());
            self.read_stderr(&mut scratch[..want]);
            left -= want;
        }
    }
}

impl WorkerChild {
    fn new(child: Child) -> Self {
        Self {
            pid: child.pid,
            stdin: child.stdin,
            stdout: child.stdout,
            stderr: child.stderr,
            outbound: Vec::new(),
            line: Vec::new(),
            skipping: false,
            stderr_tail: Vec::new(),
            shown: 0,
            killed_because: None,
            report: child.report,
        }
    }

    fn append(&mut self, bytes: &[u8]) {
        if self.skipping || self.line.len() + bytes.len() > LINE_LIMIT {
            self.skipping = true;
            self.line.clear();
        } else {
            self.line.extend_from_slice(bytes);
        }
    }

    fn kill(&mut self, reason: &'static str) {
        self.killed_because.get_or_insert(reason);
        kill_group(self.pid);
    }
}
