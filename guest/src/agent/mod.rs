//! The agent: one thread, one `poll`, everything it serves.
//!
//! `main.rs` sets it up, as PID 1 ([`init`], [`machine`]) or as an ordinary process for tests, and calls
//! [`Agent::run`]. Few system calls and no timers: on kvm_pvm a system call costs 0.2 ms and a page fault 1.2 ms, so
//! buffers are made once, sockets are tried before they are polled, and nothing runs while nothing is asked.

pub mod files;
pub mod init;
pub mod machine;
pub mod program;
pub mod sys;

mod connection;
mod exec;
mod network;
mod process;
mod service;
mod stream;
mod terminal;
mod tunnel;
mod worker;

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::{
    Exit, FrameKind, MachineFile, ProtocolError, Request, Response, Status, WarmCommand, WorkerState,
    decode_control,
};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{WaitOptions, wait};
use serde::Serialize;

use self::connection::{Connection, Task};
use self::exec::{Exec, ExecPipe};
use self::files::{FileDownload, FileUpload};
use self::machine::{GoesOn, Machine, Ring};
use self::process::{Spawner, exit_of};
use self::program::{PACK, UNPACK};
use self::service::{Phase, Services};
use self::stream::{Stream, next_frame};
use self::tunnel::Tunnels;
use self::worker::{EvalKey, Worker, WorkerPipe};

/// Requests served at a time; one more is told so and closed. Forwarded connections ([`tunnel`]) are counted apart, so
/// that however many there are, there is room for these.
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
    services: Services,
    /// To be started once the services are ready.
    warm: Option<WarmCommand>,
    machine: Option<Machine>,
    connections: Vec<Option<Connection>>,
    tunnels: Tunnels,
    next_serial: u64,
    /// A snapshot's requester has closed its connection: ring as soon as this round is over.
    snapshot_due: bool,
    /// Somebody waits for this machine to be branched.
    branch_due: bool,
    scratch: Vec<u8>,
    polled: Vec<libc::pollfd>,
    sources: Vec<Source>,
}

/// What a polled descriptor belongs to.
#[derive(Clone, Copy)]
enum Source {
    Connection(usize),
    Exec(usize, ExecPipe),
    Worker(WorkerPipe),
    Services,
    Tunnels,
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
            services: Services::default(),
            warm: None,
            machine,
            connections: Vec::with_capacity(MAX_CONNECTIONS),
            tunnels: Tunnels::default(),
            next_serial: 0,
            snapshot_due: false,
            branch_due: false,
            // Not zeros: those would be pages still to be faulted in.
            scratch: vec![0xff; SCRATCH_LEN],
            polled: Vec::with_capacity(4 * MAX_CONNECTIONS),
            sources: Vec::with_capacity(4 * MAX_CONNECTIONS),
        })
    }

    /// Starts what the machine file names: services, and behind them the warm worker.
    pub fn start(&mut self, machine_file: MachineFile) {
        self.spawner.extend_environment(&machine_file.env);
        self.warm = machine_file.warm;
        if !machine_file.services.is_empty() {
            self.worker = Worker::later();
        }
        self.services = Services::new(machine_file.services);
        self.start_services();
    }

    /// Goes on with the services, and when all are ready with the worker.
    fn start_services(&mut self) {
        self.services.go_on(&self.spawner);
        match self.services.phase() {
            Phase::Starting => {}
            Phase::Failed(_) if matches!(self.worker.state(), WorkerState::Failed { .. }) => {}
            Phase::Failed(reason) => {
                eprintln!("forkd-agent: {reason}");
                self.worker.give_up(Some(reason));
                self.warm = None;
            }
            Phase::Ready => match self.warm.take() {
                Some(warm) => self.start_worker(&warm),
                None if *self.worker.state() == WorkerState::Starting && self.worker.pid().is_none() => {
                    self.worker.give_up(None);
                }
                None => {}
            },
        }
    }

    /// What is started later sees the worker's environment too.
    fn start_worker(&mut self, warm: &WarmCommand) {
        self.worker.start(&self.spawner, warm);
        self.spawner.extend_environment(&warm.env);
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
        let Self { polled, sources, connections, tunnels, worker, services, .. } = self;
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
        if let Some(fd) = tunnels.raw_fd() {
            add(Source::Tunnels, fd, libc::POLLIN);
        }
        if let Some(fd) = services.raw_fd() {
            add(Source::Services, fd, libc::POLLIN);
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
            Source::Services => {
                self.services.on_ready(&mut self.scratch);
                self.start_services();
            }
            Source::Tunnels => self.tunnels.on_ready(&mut self.scratch),
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
        let mut inbound = connection.stream.take_inbound();
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
            if let Some(Connection { stream, task: Task::Connect { port }, .. }) =
                self.connections[slot].take_if(|connection| matches!(connection.task, Task::Connect { .. }))
            {
                // What has come already is for the port.
                let early = inbound.split_off(consumed);
                return self.tunnels.open(stream.into_fd(), port, early, &mut self.scratch);
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
                Ok(Request::Resize { rows, cols }) => {
                    if let Err(message) = exec.resize(rows, cols) {
                        stream.fail(message);
                    }
                }
                Ok(_) => stream.fail("one request per connection: only signals and sizes may follow an exec"),
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
            Request::Exec(exec) => match Exec::start(&self.spawner, &exec, stream) {
                Ok(exec) => *task = Task::Exec(exec),
                Err(refusal) => stream.finish(&refusal.into()),
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
            Request::Snapshot | Request::Branch if self.machine.is_none() => {
                stream.fail("this agent does not run a machine, so there is nothing to take a snapshot of");
            }
            Request::Branch => {
                *task = Task::Branch;
                self.branch_due = true;
            }
            Request::Snapshot => {
                stream.reply(&Response::Ok);
                *task = Task::Snapshot;
            }
            Request::Connect { port } => *task = Task::Connect { port },
            Request::Pack(pack) => self.hand_over(slot, PACK, &pack),
            Request::Unpack(unpack) => self.hand_over(slot, UNPACK, &unpack),
            Request::Signal { .. } | Request::Resize { .. } => {
                stream.fail("a signal or a size needs an exec on the same connection");
            }
        }
    }

    /// Leaves a connection to a process of its own, which may block and ends with it.
    fn hand_over(&mut self, slot: usize, mode: &str, request: &impl Serialize) {
        let Some(Connection { stream, .. }) = &mut self.connections[slot] else { return };
        let order = match serde_json::to_string(request) {
            Ok(order) => order,
            Err(error) => return stream.fail(error.to_string()),
        };
        match self.spawner.start_server(mode, &order, stream.fd()) {
            Ok(()) => self.connections[slot] = None,
            Err(error) => stream.fail(format!("cannot start a process for it: {error}")),
        }
    }

    fn status(&self) -> Status {
        Status {
            worker: self.worker.state().clone(),
            generation: self.machine.as_ref().map_or(0, Machine::generation),
            // A few hundred at most.
            connections: (self.connections.iter().flatten().count() + self.tunnels.len()) as u32,
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
        if self.services.on_exit(pid, exit) {
            return self.start_services();
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
            self.end_connections();
            if let Err(error) = self.ring(Machine::snapshot) {
                eprintln!("forkd-agent: no snapshot: {error}");
            }
        }
        if std::mem::take(&mut self.branch_due) {
            self.branch();
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

    /// Ends what is going on with the host, as if it had closed all connections.
    fn end_connections(&mut self) {
        for slot in 0..self.connections.len() {
            if let Some(connection) = &mut self.connections[slot] {
                connection.stream.abandon();
            }
            self.close_if_over(slot);
        }
        self.tunnels.reset_all();
    }

    /// Rings. A copy goes on here as well as the original.
    fn ring(&mut self, ring: Ring) -> io::Result<GoesOn> {
        let Some(machine) = &mut self.machine else { return Ok(GoesOn::Original) };
        let (worker, spawner) = (&mut self.worker, &mut self.spawner);
        ring(machine, &mut |seed, environment| {
            spawner.extend_environment(environment);
            worker.resumed(seed, environment);
        })
    }

    /// Rings while connections are open: the original keeps them, and nobody is at the other end of a copy's.
    fn branch(&mut self) {
        let response = match self.ring(Machine::branch) {
            Ok(GoesOn::Original) => Response::Ok,
            Ok(GoesOn::Copy) => return self.end_connections(),
            Err(error) => Response::error(format!("cannot ring for a snapshot: {error}")),
        };
        for connection in self.connections.iter_mut().flatten() {
            if matches!(connection.task, Task::Branch) && !connection.stream.is_finishing() {
                connection.stream.finish(&response);
            }
        }
    }
}
