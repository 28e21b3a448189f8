//! One exec: a process whose pipes are streamed over its connection.
//!
//! The agent's loop calls in when one of the pipes is ready or the process has been reaped. Dropping an [`Exec`] whose
//! process still runs kills its process group: that is what happens when the connection goes.

use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::{Exit, FrameKind, Response};
use rustix::io::Errno;

use super::process::{Child, kill_group, readable_bytes, signal_group};
use super::stream::{BACKLOG_LIMIT, Stream};

/// A running process and the agent's ends of its pipes.
pub struct Exec {
    pid: i32,
    stdin: Option<OwnedFd>,
    stdin_backlog: Vec<u8>,
    stdin_ended: bool,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
    reaped: bool,
}

/// Which pipe is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExecPipe {
    Stdin,
    Stdout,
    Stderr,
}

impl Exec {
    pub fn new(child: Child) -> Self {
        Self {
            pid: child.pid,
            stdin: child.stdin,
            stdin_backlog: Vec::new(),
            stdin_ended: false,
            stdout: Some(child.stdout),
            stderr: Some(child.stderr),
            reaped: false,
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
        self.flush_stdin();
    }

    /// Sends a signal to the process group; `false` when the number is no signal.
    pub fn signal(&self, signal: i32) -> bool {
        self.reaped || signal_group(self.pid, signal)
    }

    /// The process has ended: sends what it left in its pipes, then how it ended. Its own children may live on and
    /// keep the pipes open; their output is not waited for.
    pub fn on_exit(&mut self, exit: Exit, stream: &mut Stream, scratch: &mut [u8]) {
        self.reaped = true;
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
        if !self.reaped {
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
