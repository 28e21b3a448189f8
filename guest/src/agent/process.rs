//! Programs the agent starts: finding, starting and signalling them, and how they ended.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::Exit;
use rustix::fs::{Access, access};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};

use super::sys::{self, Program};

/// Handed on from the agent's own environment: the monitor sets them on the kernel's command line where a guest must
/// not use all the CPU features it can see.
const INHERITED: [&str; 3] = ["GLIBC_TUNABLES", "OPENBLAS_CORETYPE", "NPY_DISABLE_CPU_FEATURES"];
const DEFAULTS: [(&str, &str); 3] = [
    ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"),
    ("HOME", "/root"),
    ("LANG", "C.UTF-8"),
];

/// The environment every program starts from.
pub fn base_environment() -> BTreeMap<String, String> {
    let defaults = DEFAULTS.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let inherited = INHERITED.iter().filter_map(|key| Some(((*key).to_owned(), std::env::var(key).ok()?)));
    defaults.into_iter().chain(inherited).collect()
}

/// What to start.
pub struct Command<'a> {
    pub argv: &'a [String],
    pub env: &'a BTreeMap<String, String>,
    pub cwd: Option<&'a str>,
}

/// A started program with the agent's ends of its pipes.
pub struct Child {
    pub pid: i32,
    /// Non-blocking; `None` when the program reads `/dev/null`.
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Starts programs with one base environment.
pub struct Spawner {
    environment: BTreeMap<String, String>,
    null: OwnedFd,
}

impl Spawner {
    pub fn new() -> io::Result<Self> {
        let null = std::fs::File::open("/dev/null")?.into();
        Ok(Self { environment: base_environment(), null })
    }

    /// Adds to what every program gets from now on.
    pub fn extend_environment(&mut self, more: &BTreeMap<String, String>) {
        self.environment.extend(more.iter().map(|(key, value)| (key.clone(), value.clone())));
    }

    /// Starts a program with pipes; `with_stdin` as opposed to `/dev/null`. The error text says what went wrong.
    pub fn start(&self, command: &Command<'_>, with_stdin: bool) -> Result<Child, String> {
        let program = command.argv.first().filter(|name| !name.is_empty()).ok_or("no program given")?;
        if let Some(key) = command.env.keys().find(|key| key.is_empty() || key.contains('=')) {
            return Err(format!("{key:?} is no name for an environment variable"));
        }
        let mut env = self.environment.clone();
        env.extend(command.env.iter().map(|(key, value)| (key.clone(), value.clone())));
        let cwd = command.cwd.unwrap_or("/");
        let path = find_program(program, env.get("PATH").map_or("", String::as_str))
            .ok_or_else(|| format!("cannot run {program:?}: no such program in PATH"))?;

        let pipes = || -> io::Result<_> {
            let stdin = if with_stdin { Some(pipe_with(PipeFlags::CLOEXEC)?) } else { None };
            Ok((stdin, pipe_with(PipeFlags::CLOEXEC)?, pipe_with(PipeFlags::CLOEXEC)?))
        };
        let (stdin, stdout, stderr) = pipes().map_err(|error| format!("cannot make pipes: {error}"))?;
        let input = stdin.as_ref().map_or(&self.null, |(read, _)| read);
        let stdio = [input.as_raw_fd(), stdout.1.as_raw_fd(), stderr.1.as_raw_fd()];
        let pid = sys::spawn(&Program { path: &path, argv: command.argv, env: &env, cwd, stdio }).map_err(
            |error| {
                if std::fs::metadata(cwd).is_ok_and(|meta| meta.is_dir()) {
                    format!("cannot run {program:?}: {error}")
                } else {
                    format!("cannot run {program:?}: working directory {cwd:?} cannot be entered")
                }
            },
        )?;
        let stdin = stdin.map(|(_, write)| write);
        if let Some(stdin) = &stdin {
            rustix::io::ioctl_fionbio(stdin, true)
                .map_err(|error| format!("cannot set up a pipe: {error}"))?;
        }
        Ok(Child { pid, stdin, stdout: stdout.0, stderr: stderr.0 })
    }
}

/// The path to run for `program`: itself when it has a slash, else the first executable in `path`.
fn find_program(program: &str, path: &str) -> Option<String> {
    if program.contains('/') {
        return Some(program.to_owned());
    }
    path.split(':')
        .filter(|dir| dir.starts_with('/'))
        .map(|dir| format!("{}/{program}", dir.trim_end_matches('/')))
        .find(|candidate| access(candidate, Access::EXEC_OK).is_ok())
}

/// Kills a process group; one that is gone already is no error.
pub fn kill_group(pid: i32) {
    signal_group(pid, libc::SIGKILL);
}

/// Signals a process group; one that is gone already is no error. `false` when `signal` is no signal.
pub fn signal_group(pid: i32, signal: i32) -> bool {
    let Some(pid) = Pid::from_raw(pid) else { return false };
    let Some(signal) = Signal::from_named_raw(signal) else { return false };
    let _ = kill_process_group(pid, signal);
    true
}

/// Bytes waiting in a pipe; 0 when that cannot be told.
pub fn readable_bytes(pipe: &OwnedFd) -> usize {
    rustix::io::ioctl_fionread(pipe).map_or(0, |bytes| usize::try_from(bytes).unwrap_or(0))
}

/// "exited with code 3", "was killed by signal 9".
pub fn exit_text(exit: Exit) -> String {
    match exit {
        Exit { signal: Some(signal), .. } => format!("was killed by signal {signal}"),
        Exit { code, .. } => format!("exited with code {}", code.unwrap_or(0)),
    }
}

/// How a process ended.
pub fn exit_of(status: WaitStatus) -> Exit {
    Exit { code: status.exit_status(), signal: status.terminating_signal() }
}
