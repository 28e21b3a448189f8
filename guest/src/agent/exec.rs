//! One exec: a process whose pipes or terminal are streamed over its connection.
//!
//! The agent's loop calls in when one of the pipes is ready or the process has been reaped. Dropping an [`Exec`] whose
//! process still runs kills its process group, or hangs its terminal up: that is what happens when the connection goes.

use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::{ExecRequest, Exit, FrameKind, Response, decode_control};
use rustix::io::Errno;

use super::process::{Command, Manner, Spawner, kill_group, readable_bytes, signal_group};
use super::program::Refusal;
use super::stream::{BACKLOG_LIMIT, Stream};
use super::terminal;

/// A running process and the agent's ends of its pipes.
pub struct Exec {
    pid: i32,
    stdin: Option<OwnedFd>,
    stdin_backlog: Vec<u8>,
    stdin_ended: bool,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    /// stdin and stdout are the master of a terminal.
    terminal: bool,
    /// Where a helper says why it could not become the program.
    report: Option<OwnedFd>,
    reported: Vec<u8>,
    /// Nobody waits for it once it is started.
    detach: bool,
    reaped: bool,
}

/// Which pipe is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecPipe {
    Report,
    Stdin,
    Stdout,
    Stderr,
}

/// Most of a terminal's last output that is read when its process has ended, and of a helper's report, in bytes.
const REST_MAX: usize = 256 << 10;
/// The end of input, typed at a terminal: Ctrl-D.
const END_OF_INPUT: u8 = 4;

impl Exec {
    /// Starts a program and tells `stream` so, unless a helper is still to say how that went.
    pub fn start(spawner: &Spawner, request: &ExecRequest, stream: &mut Stream) -> Result<Self, Refusal> {
        let command = Command { argv: &request.argv, env: &request.env, cwd: request.cwd.as_deref() };
        let manner = Manner {
            tty: request.tty.as_ref(),
            user: request.user.as_deref(),
            login: request.login,
            detach: request.detach,
        };
        let child = spawner.start_as(&command, request.stdin, &manner)?;
        let exec = Self {
            pid: child.pid,
            stdin: child.stdin,
            stdin_backlog: Vec::new(),
            stdin_ended: false,
            stdout: child.stdout,
            stderr: child.stderr,
            terminal: child.terminal,
            report: child.report,
            reported: Vec::new(),
            detach: request.detach,
            reaped: false,
        };
        if exec.report.is_none() {
            exec.started(stream);
        }
        Ok(exec)
    }

    fn started(&self, stream: &mut Stream) {
        let started = Response::Started { pid: self.pid.unsigned_abs() };
        if self.detach { stream.finish(&started) } else { stream.reply(&started) }
    }

    /// Reads on in what the helper says. Its end without a word is the program's beginning.
    fn read_report(&mut self, stream: &mut Stream) {
        let Some(report) = &self.report else { return };
        let mut buffer = [0; 1024];
        match rustix::io::read(report, &mut buffer) {
            Err(Errno::INTR) => return,
            Ok(n) if n > 0 && self.reported.len() < REST_MAX => {
                return self.reported.extend_from_slice(&buffer[..n]);
            }
            _ => self.report = None,
        }
        if self.reported.is_empty() {
            return self.started(stream);
        }
        match decode_control::<Response>(&self.reported) {
            Ok(refusal) => stream.finish(&refusal),
            Err(error) => stream.fail(error.to_string()),
        }
    }

    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Whether more stdin frames may be read from the connection.
    pub fn takes_input(&self) -> bool {
        self.stdin_backlog.len() < BACKLOG_LIMIT
    }

    /// Calls `add` with each pipe to poll and the events to wait for. Output is left in its pipe, and the process
    /// comes to wait, while the host does not take what was read before.
    pub fn interests(&self, stream: &Stream, mut add: impl FnMut(ExecPipe, i32, i16)) {
        if let Some(fd) = &self.report {
            add(ExecPipe::Report, fd.as_raw_fd(), libc::POLLIN);
        }
        if stream.backlog() < BACKLOG_LIMIT {
            if let Some(fd) = &self.stdout {
                add(ExecPipe::Stdout, fd.as_raw_fd(), libc::POLLIN);
            }
            if let Some(fd) = &self.stderr {
                add(ExecPipe::Stderr, fd.as_raw_fd(), libc::POLLIN);
            }
        }
        if let Some(fd) = self.stdin.as_ref().filter(|_| !self.stdin_backlog.is_empty()) {
            add(ExecPipe::Stdin, fd.as_raw_fd(), libc::POLLOUT);
        }
    }

    /// Reads or writes the pipe that is ready.
    pub fn on_ready(&mut self, pipe: ExecPipe, stream: &mut Stream, scratch: &mut [u8]) {
        match pipe {
            ExecPipe::Report => self.read_report(stream),
            ExecPipe::Stdin => self.flush_stdin(),
            ExecPipe::Stdout => forward(&mut self.stdout, FrameKind::Stdout, stream, scratch),
            ExecPipe::Stderr => forward(&mut self.stderr, FrameKind::Stderr, stream, scratch),
        }
    }

    /// A stdin frame; empty means the end. What comes after the end, or for a process without stdin, is dropped.
    pub fn on_input(&mut self, payload: &[u8]) {
        if self.stdin.is_none() || self.stdin_ended {
            return;
        }
        self.stdin_ended = payload.is_empty();
        self.stdin_backlog.extend_from_slice(payload);
        if self.terminal && self.stdin_ended {
            self.stdin_backlog.push(END_OF_INPUT);
        }
        self.flush_stdin();
    }

    /// Gives its terminal another size; an error for a process without one.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), String> {
        match self.stdout.as_ref().filter(|_| self.terminal) {
            Some(master) => terminal::resize(master, rows, cols).map_err(|error| error.to_string()),
            // All programs in it have closed it.
            None if self.terminal => Ok(()),
            None => Err("this exec has no terminal to resize".to_owned()),
        }
    }

    /// Sends a signal to the process group; `false` when the number is no signal.
    pub fn signal(&self, signal: i32) -> bool {
        self.reaped || signal_group(self.pid, signal)
    }

    /// The process has ended: sends what it left in its pipes, then how it ended. Its own children may live on and
    /// keep the pipes open; their output is not waited for.
    pub fn on_exit(&mut self, exit: Exit, stream: &mut Stream, scratch: &mut [u8]) {
        self.reaped = true;
        // The helper has ended or become the program, so nothing keeps the other end open.
        while self.report.is_some() && !stream.is_finishing() {
            self.read_report(stream);
        }
        if stream.is_finishing() {
            return;
        }
        if self.terminal {
            self.drain_terminal(stream, scratch);
        }
        for (pipe, kind) in [(&mut self.stdout, FrameKind::Stdout), (&mut self.stderr, FrameKind::Stderr)] {
            let mut left = pipe.as_ref().map_or(0, readable_bytes);
            while left > 0 {
                let want = left.min(scratch.len());
                forward(pipe, kind, stream, &mut scratch[..want]);
                left -= want;
            }
        }
        stream.finish(&Response::Exited(exit));
    }

    /// Reads what a terminal still holds; how much that is, its master does not say.
    fn drain_terminal(&mut self, stream: &mut Stream, scratch: &mut [u8]) {
        let mut read = 0;
        while let Some(master) = self.stdout.as_ref().filter(|_| read < REST_MAX) {
            match rustix::io::read(master, &mut *scratch) {
                Ok(n) if n > 0 => {
                    stream.send(FrameKind::Stdout, &scratch[..n]);
                    read += n;
                }
                Err(Errno::INTR) => {}
                _ => self.stdout = None,
            }
        }
        self.stdout = None;
    }

    fn flush_stdin(&mut self) {
        let Some(stdin) = &self.stdin else { return };
        while !self.stdin_backlog.is_empty() {
            match rustix::io::write(stdin, &self.stdin_backlog) {
                Ok(n) => drop(self.stdin_backlog.drain(..n)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    // The process reads no more; that is its right.
                    self.stdin_backlog.clear();
                    self.stdin = None;
                    return;
                }
            }
        }
        if self.stdin_ended {
            self.stdin = None;
        }
    }
}

impl Drop for Exec {
    fn drop(&mut self) {
        let left_alone = self.detach && self.report.is_none() && self.reported.is_empty();
        // The master is closed with this, and the terminal hangs up.
        let hangs_up = self.terminal && self.report.is_none();
        if !self.reaped && !left_alone && !hangs_up {
            kill_group(self.pid);
        }
    }
}

/// Reads once from a pipe that is ready and sends it on; closes the pipe at its end.
fn forward(pipe: &mut Option<OwnedFd>, kind: FrameKind, stream: &mut Stream, scratch: &mut [u8]) {
    let Some(fd) = pipe else { return };
    match rustix::io::read(&*fd, &mut *scratch) {
        Err(Errno::AGAIN | Errno::INTR) => {}
        Ok(n) if n > 0 => stream.send(kind, &scratch[..n]),
        _ => *pipe = None,
    }
}
