//! One connection from the host, and what is being done for it. Only the agent's loop uses this.

use super::exec::Exec;
use super::files::{FileDownload, FileUpload};
use super::stream::Stream;

/// A connection.
pub struct Connection {
    /// Never used twice, unlike a slot.
    pub serial: u64,
    pub stream: Stream,
    pub task: Task,
}

/// What is being done for a connection.
pub enum Task {
    /// The request has not arrived yet.
    Request,
    /// Status, once the worker is no longer starting.
    Status,
    Exec(Exec),
    Eval,
    Put(FileUpload),
    Get(FileDownload),
    Snapshot,
    Branch,
    /// Leaves for the tunnels as soon as the bytes behind its request are known.
    Connect {
        port: u16,
    },
}

impl Task {
    /// For messages: when a frame came.
    pub fn name(&self) -> &'static str {
        match self {
            Task::Request => "before the request",
            Task::Status => "after a status request",
            Task::Exec(_) => "after an exec request",
            Task::Eval => "after an eval request",
            Task::Put(_) => "after a put request",
            Task::Get(_) => "after a get request",
            Task::Snapshot => "after a snapshot request",
            Task::Branch => "after a branch request",
            Task::Connect { .. } => "after a connect request",
        }
    }
}

impl Connection {
    /// Whether bytes from the peer are wanted now.
    pub fn reads(&self) -> bool {
        let wanted = match &self.task {
            Task::Exec(exec) => exec.takes_input(),
            _ => true,
        };
        wanted && !self.stream.is_finishing()
    }

    pub fn interest(&self) -> i16 {
        let mut events = if self.reads() {
            libc::POLLIN
        } else if self.stream.is_finishing() {
            0
        } else {
            libc::POLLRDHUP
        };
        if self.stream.backlog() > 0 || matches!(self.task, Task::Get(_)) {
            events |= libc::POLLOUT;
        }
        events
    }
}
