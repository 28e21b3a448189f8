//! `forkd-agent`: PID 1 of a forkd machine and the agent that serves its host, in one static binary.
//!
//! As PID 1 (`init=/forkd/agent`) it turns the read-only root disk into an ordinary Linux, listens on vsock, rings
//! "booted" and starts the warm worker. With `--listen-unix PATH [--warm FILE]` it does none of PID 1's work and serves
//! a Unix socket instead: so tests run the real agent on the host. With `--start` and `--ready` it is the agent's own helper
//! ([`start`], [`ready`]), with `--pack` and `--unpack` a server of one copy ([`copy`]), with `--get` a client of HTTP
//! ([`http`]).

mod agent;
mod copy;
mod http;
mod ready;
mod start;
mod users;

use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use forkd_abi::protocol::{MachineFile, PORT, WARM_PARAMETER, WarmCommand};

use agent::init::{self, MACHINE_FILE};
use agent::machine::{Machine, give_up};
use agent::program::START;
use agent::{Agent, BACKLOG, sys};

const USAGE: &str = "usage: forkd-agent --listen-unix PATH [--warm FILE]
As process 1 of a machine it takes no arguments.";

fn main() -> ExitCode {
    sys::keep_freed_memory();
    // The kernel hands PID 1 whatever was on its command line and meant nothing to it.
    if std::process::id() == 1 {
        run_as_init();
    }
    let mut arguments = std::env::args_os().skip(1).peekable();
    if arguments.next_if(|mode| mode == START).is_some() {
        return start::run(arguments);
    }
    if let Some(mode) = arguments.next_if(copy::serves) {
        return copy::run(&mode, arguments.next());
    }
    if arguments.next_if(ready::serves).is_some() {
        return ready::run(arguments.next());
    }
    if arguments.next_if(http::serves).is_some() {
        return http::run(arguments.next());
    }
    let mut socket = None;
    let mut warm = None;
    while let Some(argument) = arguments.next() {
        match argument.to_str() {
            Some("--listen-unix") => socket = arguments.next().map(PathBuf::from),
            Some("--warm") => warm = arguments.next().map(PathBuf::from),
            _ => return usage(),
        }
    }
    let Some(socket) = socket else { return usage() };
    match serve_unix(&socket, warm.as_deref()) {
        Ok(error) => eprintln!("forkd-agent: cannot wait for requests: {error}"),
        Err(error) => eprintln!("forkd-agent: {}: {error}", socket.display()),
    }
    ExitCode::FAILURE
}

fn usage() -> ExitCode {
    eprintln!("{USAGE}");
    ExitCode::from(2)
}

/// Serves a Unix socket until waiting fails.
fn serve_unix(socket: &Path, warm: Option<&Path>) -> io::Result<io::Error> {
    let machine_file = match warm {
        Some(path) => init::read_machine_file(path).map_err(io::Error::other)?,
        None => MachineFile::default(),
    };
    let listener = UnixListener::bind(socket)?;
    listener.set_nonblocking(true)?;
    let mut agent = Agent::new(listener.into(), None)?;
    agent.start(machine_file);
    Ok(agent.run())
}

fn run_as_init() -> ! {
    std::panic::set_hook(Box::new(|panic| give_up(&panic.to_string())));
    if let Err(error) = init::set_up_root() {
        give_up(&format!("cannot {error}"));
    }
    let mut machine_file = match init::read_machine_file(Path::new(MACHINE_FILE)) {
        Ok(machine_file) => machine_file,
        Err(error) => give_up(&error.to_string()),
    };
    if let Ok(parameter) = std::env::var(WARM_PARAMETER) {
        match WarmCommand::from_parameter(&parameter) {
            Some(warm) => machine_file.warm = Some(warm),
            None => give_up("cannot read the warm command on the kernel's command line"),
        }
    }
    match start_machine(machine_file) {
        Ok(mut agent) => give_up(&format!("cannot wait for requests: {}", agent.run())),
        Err(error) => give_up(&format!("cannot start the agent: {error}")),
    }
}

fn start_machine(machine_file: MachineFile) -> io::Result<Agent> {
    let machine = Machine::new(machine_file.hostname.as_deref().unwrap_or("forkd"))?;
    let listener = sys::listen_vsock(PORT, BACKLOG)?;
    machine.booted();
    let mut agent = Agent::new(listener, Some(machine))?;
    agent.start(machine_file);
    Ok(agent)
}
