//! The agent: one thread, one `poll`, everything it serves.
//!
//! `main.rs` sets it up, as PID 1 ([`init`], [`machine`]) or as an ordinary process for tests, and calls
//! [`Agent::run`]. Few system calls and no timers: on kvm_pvm a system call costs 0.2 ms and a page fault 1.2 ms, so
//! buffers are made once, sockets are tried before they are polled, and nothing runs while nothing is asked.

pub mod init;
pub mod machine;
pub mod sys;

mod exec;
mod files;
mod network;
mod process;
mod stream;
mod worker;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::{
    ExecRequest, Exit, FrameKind, ProtocolError, Request, Response, Status, WarmCommand, WorkerState,
    decode_control,
};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{WaitOptions, wait};

use self::exec::{Exec, ExecPipe};
use self::files::{FileDownload, FileUpload};
use self::machine::Machine;
use self::process::{Command, Spawner, exit_of};
use self::stream::{Stream, next_frame};
use self::worker::{EvalKey, Worker, WorkerPipe};

/// Connections served at a time; one more is told so and closed.
pub const MAX_CONNECTIONS: usize = 64;
/// Connections the kernel keeps waiting to be accepted.
pub const BACKLOG: i32 = 64;
/// The most read from a pipe or socket at once.
const SCRATCH_LEN: usize = 64 << 10;

/// The agent and all it serves.
pub struct Agent {
    listener: OwnedFd,
    signals: OwnedFd,
    spawner: Spawner,
    worker: Worker,
    machine: Option<Machine>,
    connections: Vec<Option<Connection>>,
    next_serial: u64,
    /// A snapshot's requester has closed its connection: ring as soon as this round is over.
    snapshot_due: bool,
    scratch: Vec<u8>,
    polled: Vec<libc::pollfd>,
    sources: Vec<Source>,
}

struct Connection {
    /// Never used twice, unlike a slot.
    serial: u64,
    stream: Stream,
    task: Task,
}

enum Task {
    /// The request has not arrived yet.
    Request,
    /// Status, once the worker is no longer starting.
    Status,
    Exec(Exec),
    Eval,
    Put(FileUpload),
    Get(FileDownload),
    Snapshot,
}

impl Task {
    /// For messages: when a frame came.
    fn name(&self) -> &'static str {
        match self {
            Task::Request => "before the request",
            Task::Status => "after a status request",
            Task::Exec(_) => "after an exec request",
            Task::Eval => "after an eval request",
            Task::Put(_) => "after a put request",
            Task::Get(_) => "after a get request",
            Task::Snapshot => "after a snapshot request",
        }
    }
}

/// What a polled descriptor belongs to.
#[derive(Clone, Copy)]
enum Source {
    Connection(usize),
    Exec(usize, ExecPipe),
    Worker(WorkerPipe),
    Signals,
    Listener,
}

impl Agent {
    /// An agent on a listening, non-blocking socket. `machine` is `None` outside a forkd machine.
    pub fn new(listener: OwnedFd, machine: Option<Machine>) -> io::Result<Self> {
        Ok(Self {
            listener,
            signals: sys::child_signals()?,
            spawner: Spawner::new()?,
            worker: Worker::none(),
            machine,
            connections: Vec::with_capacity(MAX_CONNECTIONS),
            next_serial: 0,
            snapshot_due: false,
            // Not zeros: those would be pages still to be faulted in.
            scratch: vec![0xff; SCRATCH_LEN],
            polled: Vec::with_capacity(4 * MAX_CONNECTIONS),
            sources: Vec::with_capacity(4 * MAX_CONNECTIONS),
        })
    }

    /// Starts the warm worker.
    pub fn start_worker(&mut self, warm: &WarmCommand) {
        self.worker = Worker::start(&self.spawner, warm);
        if let WorkerState::Failed { reason, .. } = self.worker.state() {
            eprintln!("forkd-agent: {reason}");
        }
    }

    /// Serves for ever; returns only when the kernel refuses to wait.
    pub fn run(&mut self) -> io::Error {
        loop {
            self.collect();
            if let Err(error) = sys::poll(&mut self.polled) {
                return error;
            }
            for i in 0..self.polled.len() {
                let events = self.polled[i].revents;
                if events != 0 {
                    self.dispatch(self.sources[i], events);
                }
            }
            self.settle();
        }
    }

    /// Lists what to wait for. Signals come after the pipes, so that a process's output is read before its end; the
    /// listener last, so that no event of this round meets a slot's next user.
    fn collect(&mut self) {
        let Self { polled, sources, connections, worker, .. } = self;
        polled.clear();
        sources.clear();
        let mut add = |source, fd, events| {
            polled.push(libc::pollfd { fd, events, revents: 0 });
            sources.push(source);
        };
        for (slot, connection) in connections.iter().enumerate() {
            let Some(connection) = connection else { continue };
            add(Source::Connection(slot), connection.stream.raw_fd(), connection.interest());
            if let Task::Exec(exec) = &connection.task
                && !connection.stream.is_finishing()
            {
                exec.interests(&connection.stream, |pipe, fd, events| {
                    add(Source::Exec(slot, pipe), fd, events)
                });
            }
        }
        worker.interests(|pipe, fd, events| add(Source::Worker(pipe), fd, events));
        add(Source::Signals, self.signals.as_raw_fd(), libc::POLLIN);
        add(Source::Listener, self.listener.as_raw_fd(), libc::POLLIN);
    }

    fn dispatch(&mut self, source: Source, events: i16) {
        match source {
            Source::Connection(slot) => self.on_connection(slot, events),
            Source::Exec(slot, pipe) => {
                if let Some(Connection { stream, task: Task::Exec(exec), .. }) = &mut self.connections[slot] {
                    exec.on_ready(pipe, stream, &mut self.scratch);
                }
            }
            Source::Worker(pipe) => self.worker.on_ready(pipe, &mut self.scratch),
            Source::Signals => self.reap(),
            Source::Listener => self.accept(),
        }
    }

    fn accept(&mut self) {
        // The peer may have gone again, and that is all that goes wrong here.
        let Ok(fd) = accept_with(&self.listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) else {
            return;
        };
        let mut stream = Stream::new(fd);
        let slot = match self.connections.iter().position(Option::is_none) {
            Some(slot) => slot,
            None if self.connections.len() < MAX_CONNECTIONS => {
                self.connections.push(None);
                self.connections.len() - 1
            }
            None => return stream.fail(format!("the agent already serves {MAX_CONNECTIONS} connections")),
        };
        self.next_serial += 1;
        self.connections[slot] = Some(Connection { serial: self.next_serial, stream, task: Task::Request });
        // The request usually came with the connection.
        self.on_connection(slot, libc::POLLIN);
    }

    fn on_connection(&mut self, slot: usize, events: i16) {
        let Some(connection) = &mut self.connections[slot] else { return };
        if events & libc::POLLOUT != 0 {
            connection.stream.flush();
            if let (Task::Get(get), 0) = (&mut connection.task, connection.stream.backlog())
                && !connection.stream.is_finishing()
            {
                get.pump(&mut connection.stream, &mut self.scratch);
            }
        }
        let ended = if connection.reads() {
            events & !libc::POLLOUT != 0 && !connection.stream.fill(&mut self.scratch)
        } else {
            let ends = if connection.stream.is_finishing() { 0 } else { libc::POLLRDHUP };
            events & (libc::POLLHUP | libc::POLLERR | ends) != 0
        };
        if ended {
            self.snapshot_due |= matches!(connection.task, Task::Snapshot);
            connection.stream.abandon();
            return;
        }
        self.parse(slot);
    }

    /// Acts on every whole frame received.
    fn parse(&mut self, slot: usize) {
        let Some(connection) = &mut self.connections[slot] else { return };
        let inbound = connection.stream.take_inbound();
        let mut consumed = 0;
        loop {
            match next_frame(&inbound[consumed..]) {
                Ok(None) => break,
                Ok(Some((kind, payload))) => {
                    let (start, end) = (consumed + payload.start, consumed + payload.end);
                    consumed = end;
                    self.on_frame(slot, kind, &inbound[start..end]);
                }
                Err(error) => self.fail(slot, &error),
            }
            if self.connections[slot].as_ref().is_none_or(|connection| connection.stream.is_finishing()) {
                consumed = inbound.len();
                break;
            }
        }
        if let Some(connection) = &mut self.connections[slot] {
            connection.stream.return_inbound(inbound, consumed);
        }
    }

    fn fail(&mut self, slot: usize, error: &ProtocolError) {
        if let Some(connection) = &mut self.connections[slot] {
            connection.stream.fail(error.to_string());
        }
    }

    fn on_frame(&mut self, slot: usize, kind: FrameKind, payload: &[u8]) {
        let Some(Connection { stream, task, .. }) = &mut self.connections[slot] else { return };
        match (task, kind) {
            (Task::Request, FrameKind::Control) => match decode_control(payload) {
                Ok(request) => self.on_request(slot, request),
                Err(error) => self.fail(slot, &error),
            },
            (Task::Exec(exec), FrameKind::Stdin) => exec.on_input(payload),
            (Task::Exec(exec), FrameKind::Control) => match decode_control(payload) {
                Ok(Request::Signal { signal }) if exec.signal(signal) => {}
                Ok(Request::Signal { signal }) => stream.fail(format!("{signal} is no signal")),
                Ok(_) => stream.fail("one request per connection: only signals may follow an exec"),
                Err(error) => self.fail(slot, &error),
            },
            (Task::Put(put), FrameKind::Stdin) => match put.on_input(payload) {
                Ok(true) => stream.finish(&Response::Ok),
                Ok(false) => {}
                Err(message) => stream.fail(message),
            },
            (task, kind) => {
                let doing = task.name();
                stream.fail(format!("a {kind:?} frame of {} bytes has no place {doing}", payload.len()));
            }
        }
    }

    fn on_request(&mut self, slot: usize, request: Request) {
        let Some(Connection { stream, task, serial }) = &mut self.connections[slot] else { return };
        match request {
            Request::Ping => stream.finish(&Response::Pong),
            Request::Status { wait: true } => *task = Task::Status,
            Request::Status { wait: false } => {
                let status = self.status();
                self.finish(slot, &Response::Status(status));
            }
            Request::Exec(exec) => match start_exec(&self.spawner, &exec) {
                Ok(exec) => {
                    stream.reply(&Response::Started { pid: exec.pid().unsigned_abs() });
                    *task = Task::Exec(exec);
                }
                Err(message) => stream.fail(message),
            },
            Request::Eval { code } => {
                *task = Task::Eval;
                self.worker.submit(EvalKey { slot, serial: *serial }, code);
            }
            Request::Put { path, mode } => match FileUpload::open(&path, mode, *serial) {
                Ok(put) => *task = Task::Put(put),
                Err(message) => stream.fail(message),
            },
            Request::Get { path } => match FileDownload::open(&path, stream) {
                Ok(get) => *task = Task::Get(get),
                Err(message) => stream.fail(message),
            },
            Request::Snapshot if self.machine.is_none() => {
                stream.fail("this agent does not run a machine, so there is nothing to take a snapshot of");
            }
            Request::Snapshot => {
                stream.reply(&Response::Ok);
                *task = Task::Snapshot;
            }
            Request::Signal { .. } => stream.fail("a signal needs an exec on the same connection"),
        }
    }

    fn status(&self) -> Status {
        Status {
            worker: self.worker.state().clone(),
            generation: self.machine.as_ref().map_or(0, Machine::generation),
            // At most MAX_CONNECTIONS.
            connections: self.connections.iter().flatten().count() as u32,
        }
    }

    fn finish(&mut self, slot: usize, response: &Response) {
        if let Some(connection) = &mut self.connections[slot] {
            connection.stream.finish(response);
        }
    }

    /// Reaps every child that has ended: execs, the worker, and orphans that PID 1 inherits.
    fn reap(&mut self) {
        let _ = rustix::io::read(&self.signals, &mut self.scratch[..1024]);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            self.on_exit(pid.as_raw_nonzero().get(), exit_of(status));
        }
    }

    fn on_exit(&mut self, pid: i32, exit: Exit) {
        if self.worker.pid() == Some(pid) {
            self.worker.on_exit(exit, &mut self.scratch);
            eprintln!("forkd-agent: the warm worker {}", process::exit_text(exit));
            return;
        }
        for connection in self.connections.iter_mut().flatten() {
            if let Connection { stream, task: Task::Exec(exec), .. } = connection
                && exec.pid() == pid
                && !stream.is_finishing()
            {
                return exec.on_exit(exit, stream, &mut self.scratch);
            }
        }
    }

    /// Ends a round: hands out answers, closes what is over, takes the snapshot that is due.
    fn settle(&mut self) {
        for (key, response) in self.worker.take_finished() {
            let connection = self.connections[key.slot].as_mut();
            if let Some(connection) = connection.filter(|connection| connection.serial == key.serial) {
                connection.stream.finish(&response);
            }
        }
        for slot in 0..self.connections.len() {
            let Some(connection) = &self.connections[slot] else { continue };
            if matches!(connection.task, Task::Status)
                && !connection.stream.is_finishing()
                && *self.worker.state() != WorkerState::Starting
            {
                let status = self.status();
                self.finish(slot, &Response::Status(status));
            }
            self.close_if_over(slot);
        }
        if std::mem::take(&mut self.snapshot_due) {
            self.snapshot();
        }
    }

    fn close_if_over(&mut self, slot: usize) {
        let Some(connection) = self.connections[slot].take_if(|connection| connection.stream.is_over())
        else {
            return;
        };
        if matches!(connection.task, Task::Eval) {
            self.worker.cancel(EvalKey { slot, serial: connection.serial });
        }
    }

    /// Closes everything and rings. A copy goes on here as well as the original.
    fn snapshot(&mut self) {
        for slot in 0..self.connections.len() {
            if let Some(connection) = &mut self.connections[slot] {
                connection.stream.abandon();
            }
            self.close_if_over(slot);
        }
        let Some(machine) = &mut self.machine else { return };
        let (worker, spawner) = (&mut self.worker, &mut self.spawner);
        let become_copy = |seed: &str, environment: &BTreeMap<String, String>| {
            spawner.extend_environment(environment);
            worker.resumed(seed, environment);
        };
        if let Err(error) = machine.snapshot(become_copy) {
            eprintln!("forkd-agent: no snapshot: {error}");
        }
    }
}

impl Connection {
    /// Whether bytes from the peer are wanted now.
    fn reads(&self) -> bool {
        let wanted = match &self.task {
            Task::Exec(exec) => exec.takes_input(),
            _ => true,
        };
        wanted && !self.stream.is_finishing()
    }

    fn interest(&self) -> i16 {
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

fn start_exec(spawner: &Spawner, request: &ExecRequest) -> Result<Exec, String> {
    let command = Command { argv: &request.argv, env: &request.env, cwd: request.cwd.as_deref() };
    spawner.start(&command, request.stdin).map(Exec::new)
}
