//! Programs the agent starts: finding, starting and signalling them, and how they ended.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use forkd_abi::protocol::{Exit, Response, Tty, decode_control};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal, WaitStatus, kill_process_group};

use super::program::{AGENT, Refusal, START, StartOrder, program_path};
use super::sys::{self, Program, Stdio};
use super::terminal;

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

/// What an exec asks for beyond a command.
#[derive(Default)]
pub struct Manner<'a> {
    pub tty: Option<&'a Tty>,
    pub user: Option<&'a str>,
    pub login: bool,
    pub detach: bool,
}

/// A started program with the agent's ends of its pipes or terminal.
pub struct Child {
    pub pid: i32,
    /// Non-blocking; `None` when the program reads `/dev/null`.
    pub stdin: Option<OwnedFd>,
    /// `None` when it writes to `/dev/null`.
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Whether `stdin` and `stdout` are the master of a terminal.
    pub terminal: bool,
    /// Where the helper that is to become the program says why it cannot. Its end means that it could.
    pub report: Option<OwnedFd>,
}

/// Starts programs with one base environment.
pub struct Spawner {
    environment: BTreeMap<String, String>,
    null: OwnedFd,
}

impl Spawner {
    pub fn new() -> io::Result<Self> {
        let null = File::options().read(true).write(true).open("/dev/null")?.into();
        Ok(Self { environment: base_environment(), null })
    }

    /// Adds to what every program gets from now on.
    pub fn extend_environment(&mut self, more: &BTreeMap<String, String>) {
        self.environment.extend(more.iter().map(|(key, value)| (key.clone(), value.clone())));
    }

    /// Starts a program with pipes or a terminal; `with_stdin` as opposed to `/dev/null`. Another user's program, and a login,
    /// is started by a helper process: looking users up and becoming one is no work for process 1.
    pub fn start_as(
        &self,
        command: &Command<'_>,
        with_stdin: bool,
        manner: &Manner<'_>,
    ) -> Result<Child, Refusal> {
        if let Some(key) = command.env.keys().find(|key| key.is_empty() || key.contains('=')) {
            return Err(Refusal::new(format!("{key:?} is no name for an environment variable")));
        }
        if manner.detach && (manner.tty.is_some() || with_stdin) {
            return Err(Refusal::new("what is detached has neither input nor a terminal"));
        }
        let mut env = self.environment.clone();
        if let Some(term) = manner.tty.and_then(|tty| tty.term.as_ref()) {
            env.insert("TERM".to_owned(), term.clone());
        }
        env.extend(command.env.iter().map(|(key, value)| (key.clone(), value.clone())));
        let ends = self.ends(with_stdin, manner)?;
        start(command, &env, ends, manner)
    }

    /// Starts a program with the descriptors given as its standard input, output and error.
    pub fn start_wired(
        &self,
        command: &Command<'_>,
        user: Option<&str>,
        descriptors: [OwnedFd; 3],
    ) -> Result<Child, Refusal> {
        let mut env = self.environment.clone();
        env.extend(command.env.iter().map(|(key, value)| (key.clone(), value.clone())));
        let child = ChildEnds::Descriptors(descriptors);
        let ends = Ends { child, stdin: None, stdout: None, stderr: None };
        start(command, &env, ends, &Manner { user, ..Manner::default() })
    }

    /// Another descriptor of `/dev/null`.
    pub fn nothing(&self) -> io::Result<OwnedFd> {
        self.null.try_clone()
    }

    /// Starts the agent's own program to serve one connection to its end, in `mode`.
    pub fn start_server(&self, mode: &str, order: &str, connection: &OwnedFd) -> io::Result<()> {
        let argv = [AGENT, mode, order].map(str::to_owned);
        let null = self.null.as_raw_fd();
        let stdio = Stdio::Descriptors([connection.as_raw_fd(), null, io::stderr().as_raw_fd()]);
        let env = &self.environment;
        sys::spawn(&Program { path: AGENT, argv: &argv, env, cwd: "/", stdio, report: None }).map(drop)
    }

    /// Makes both ends of what a program reads and writes.
    fn ends(&self, with_stdin: bool, manner: &Manner<'_>) -> Result<Ends, Refusal> {
        let made = match manner.tty {
            Some(tty) => Ends::terminal(tty, with_stdin),
            None if manner.detach => Ok(Ends::nothing()),
            None => self.null.try_clone().and_then(|null| Ends::pipes(null, with_stdin)),
        };
        made.map_err(|error| Refusal::new(format!("cannot make pipes or a terminal: {error}")))
    }
}

fn start(
    command: &Command<'_>,
    env: &BTreeMap<String, String>,
    ends: Ends,
    manner: &Manner<'_>,
) -> Result<Child, Refusal> {
    if manner.user.is_none() && !manner.login {
        return start_directly(command, env, ends);
    }
    let order = StartOrder {
        user: manner.user.map(str::to_owned),
        login: manner.login,
        cwd: command.cwd.map(str::to_owned),
        given: command.env.keys().cloned().collect(),
    };
    start_by_helper(&order, command.argv, env, ends)
}

fn start_directly(
    command: &Command<'_>,
    env: &BTreeMap<String, String>,
    ends: Ends,
) -> Result<Child, Refusal> {
    let path = program_path(command.argv, env)?;
    let cwd = command.cwd.unwrap_or("/");
    let program = Program { path: &path, argv: command.argv, env, cwd, stdio: ends.stdio(), report: None };
    let pid = sys::spawn(&program).map_err(|error| {
        if std::fs::metadata(cwd).is_ok_and(|meta| meta.is_dir()) {
            Refusal::of_program(&command.argv[0], &error)
        } else {
            Refusal::no_directory(&command.argv[0], cwd)
        }
    })?;
    Ok(ends.into_child(pid, None))
}

fn start_by_helper(
    order: &StartOrder,
    argv: &[String],
    env: &BTreeMap<String, String>,
    ends: Ends,
) -> Result<Child, Refusal> {
    let cannot = |error: &dyn std::fmt::Display| Refusal::new(format!("cannot start a helper: {error}"));
    let order = serde_json::to_string(order).map_err(|error| cannot(&error))?;
    let mut arguments = [AGENT, START, &order].map(str::to_owned).to_vec();
    arguments.extend_from_slice(argv);
    let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| cannot(&error))?;
    let report = Some(write.as_raw_fd());
    let program = Program { path: AGENT, argv: &arguments, env, cwd: "/", stdio: ends.stdio(), report };
    let pid = sys::spawn(&program).map_err(|error| cannot(&error))?;
    Ok(ends.into_child(pid, Some(read)))
}

/// Both ends of what a program reads and writes.
struct Ends {
    child: ChildEnds,
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

enum ChildEnds {
    Descriptors([OwnedFd; 3]),
    Device(CString),
}

impl Ends {
    fn pipes(null: OwnedFd, with_stdin: bool) -> io::Result<Self> {
        let (input, stdin) = if with_stdin {
            let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::io::ioctl_fionbio(&write, true)?;
            (read, Some(write))
        } else {
            (null, None)
        };
        let (stdout, output) = pipe_with(PipeFlags::CLOEXEC)?;
        let (stderr, errors) = pipe_with(PipeFlags::CLOEXEC)?;
        let child = ChildEnds::Descriptors([input, output, errors]);
        Ok(Self { child, stdin, stdout: Some(stdout), stderr: Some(stderr) })
    }

    fn nothing() -> Self {
        let child = ChildEnds::Device(c"/dev/null".to_owned());
        Self { child, stdin: None, stdout: None, stderr: None }
    }

    fn terminal(tty: &Tty, with_stdin: bool) -> io::Result<Self> {
        let (master, name) = terminal::open(tty.rows, tty.cols)?;
        let stdin = if with_stdin { Some(master.try_clone()?) } else { None };
        Ok(Self { child: ChildEnds::Device(name), stdin, stdout: Some(master), stderr: None })
    }

    fn stdio(&self) -> Stdio<'_> {
        match &self.child {
            ChildEnds::Descriptors(ends) => Stdio::Descriptors(ends.each_ref().map(AsRawFd::as_raw_fd)),
            ChildEnds::Device(name) => Stdio::Device(name),
        }
    }

    fn into_child(self, pid: i32, report: Option<OwnedFd>) -> Child {
        let terminal = self.stderr.is_none() && self.stdout.is_some();
        Child { pid, stdin: self.stdin, stdout: self.stdout, stderr: self.stderr, terminal, report }
    }
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

/// What a helper's words say of why it could not become the program, if they say that.
pub fn refusal_in(words: &[u8]) -> Option<String> {
    match decode_control(words) {
        Ok(Response::Error { message, .. }) => Some(message),
        _ => None,
    }
}

/// The same of a [`Child::report`] that nobody has read. Waits for the helper, which is not long.
pub fn reported_refusal(report: Option<&OwnedFd>) -> Option<String> {
    let mut words = [0; 1024];
    let n = rustix::io::read(report?, &mut words[..]).ok()?;
    refusal_in(&words[..n])
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
