//! External programs (make, apt-get, mmdebstrap, mkfs.erofs): run with their output watched, their failure explained,
//! and an end when the user wants one, or when forkd itself is killed.
//!
//! Knows nothing of what the programs do.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use crate::interrupt::{Interrupt, Interrupted};
use forkd_vmm::sys;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group, test_kill_process_group};

/// Lines of a failed program's output that its error shows.
const TAIL_LINES: usize = 12;
/// Longest line that is kept; the rest of it is dropped.
const LINE_MAX: usize = 4096;
/// How often a running program is checked for the user's interrupt.
const POLL: Duration = Duration::from_millis(100);
/// How long an interrupted program may take to clean up before it is killed.
const GRACE: Duration = Duration::from_secs(10);
/// The same of an isolated one, which may not hear of it, and whose processes and mounts go with its namespaces.
const ISOLATED_GRACE: Duration = Duration::from_secs(1);
/// How long the processes of one that was killed may take to be gone.
const GONE: Duration = Duration::from_millis(500);

/// Why an external program did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed, or cannot be started.
    #[error("{tool} cannot be started")]
    Start {
        /// The program.
        tool: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It ran and failed.
    #[error("{tool} ended with {status}{}", tail_text(tail))]
    Failed {
        /// The program.
        tool: String,
        /// How it ended.
        status: ExitStatus,
        /// The end of its output.
        tail: String,
    },
    /// The user pressed Ctrl-C or asked us to end; the program has been stopped.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
    /// A lock file cannot be used.
    #[error("{}", path.display())]
    Lock {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its output could not be read or logged.
    #[error("the output of {tool} cannot be kept")]
    Output {
        /// The program.
        tool: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn tail_text(tail: &str) -> String {
    if tail.is_empty() { String::new() } else { format!("; its last words:\n{tail}") }
}

/// What isolates a program with all that it starts and mounts: namespaces that end when their first process does, which
/// the kernel kills when `unshare` is.
const UNSHARE: [&str; 6] = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"];

/// A program about to be run. Once it runs it is killed when the thread that runs it dies.
pub struct Tool<'a> {
    command: Command,
    name: String,
    interrupt: &'a Interrupt,
    log: Option<&'a mut dyn Write>,
    isolated: bool,
    finishes_alone: bool,
}

impl<'a> Tool<'a> {
    /// `program` is looked up in PATH. It reads nothing and writes to us.
    pub fn new(program: &str, interrupt: &'a Interrupt) -> Self {
        Self::started_by(Command::new(program), program, interrupt)
    }

    /// A program that starts others, or mounts. They end with it, and with us; its mounts are nobody else's to see. It
    /// is the first process of its namespace, which SIGTERM ends only if it has a handler. That takes root: for other
    /// users it is an ordinary program.
    pub fn isolated(program: &str, interrupt: &'a Interrupt) -> Self {
        if !can_isolate() {
            return Self::new(program, interrupt);
        }
        let mut command = Command::new(UNSHARE[0]);
        command.args(&UNSHARE[1..]).arg("--").arg(program);
        Self { isolated: true, ..Self::started_by(command, program, interrupt) }
    }

    fn started_by(mut command: Command, program: &str, interrupt: &'a Interrupt) -> Self {
        // A group of its own: the terminal's Ctrl-C comes to us, and we end it in an order that lets it clean up.
        command.stdin(Stdio::null()).env("LC_ALL", "C.UTF-8").process_group(0);
        Self {
            command,
            name: program.to_owned(),
            interrupt,
            log: None,
            isolated: false,
            finishes_alone: false,
        }
    }

    /// Lets it finish when forkd is killed.
    fn finishes_alone(mut self) -> Self {
        self.finishes_alone = true;
        self
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.command.arg(arg);
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.command.args(args);
        self
    }

    /// Sets a variable of its environment.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(key, value);
        self
    }

    /// Also writes its whole output to `log`.
    pub fn log(mut self, log: &'a mut dyn Write) -> Self {
        self.log = Some(log);
        self
    }

    /// Runs it to its end, handing each line it writes, on either stream, to `line`.
    pub fn run(mut self, mut line: impl FnMut(&str)) -> Result<(), ToolError> {
        self.interrupt.check()?;
        let output = |tool: &str| {
            let tool = tool.to_owned();
            move |source| ToolError::Output { tool, source }
        };
        let (reader, writer) = io::pipe().map_err(output(&self.name))?;
        let copy = writer.try_clone().map_err(output(&self.name))?;
        self.command.stdout(writer).stderr(copy);
        if !self.finishes_alone {
            sys::bind_to_starter(&mut self.command);
        }
        let mut child =
            self.command.spawn().map_err(|source| ToolError::Start { tool: self.name.clone(), source })?;
        // The command keeps its copies of the pipe's end, and the reader would wait for those.
        drop(self.command);

        let grace = if self.isolated { ISOLATED_GRACE } else { GRACE };
        let (sender, lines) = mpsc::sync_channel(64);
        thread::spawn(move || read_lines(BufReader::new(reader), |text| sender.send(text).is_ok()));
        let mut tail = VecDeque::with_capacity(TAIL_LINES);
        loop {
            match lines.recv_timeout(POLL) {
                Ok(text) => {
                    if let Some(Err(source)) = self.log.as_mut().map(|log| writeln!(log, "{text}")) {
                        stop(&mut child, grace);
                        return Err(ToolError::Output { tool: self.name, source });
                    }
                    line(&text);
                    if tail.len() == TAIL_LINES {
                        tail.pop_front();
                    }
                    tail.push_back(text);
                }
                Err(RecvTimeoutError::Timeout) => {
                    // A daemon it left behind may hold the pipe open for ever.
                    if matches!(child.try_wait(), Ok(Some(_))) {
                        break;
                    }
                }
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if self.interrupt.is_set() {
                stop(&mut child, grace);
                return Err(Interrupted.into());
            }
        }
        let status = child.wait().map_err(output(&self.name))?;
        if status.success() {
            return Ok(());
        }
        let tail = Vec::from(tail).join("\n").trim().to_owned();
        Err(ToolError::Failed { tool: self.name, status, tail })
    }

    /// Runs it and returns what it wrote, at most 1 MiB.
    pub fn capture(self) -> Result<String, ToolError> {
        let mut text = String::new();
        self.run(|line| {
            if text.len() < 1 << 20 {
                text.push_str(line);
                text.push('\n');
            }
        })?;
        Ok(text)
    }
}

/// Whether this user can have programs in namespaces of their own.
fn can_isolate() -> bool {
    if !rustix::process::geteuid().is_root() {
        return false;
    }
    let mut trial = Command::new(UNSHARE[0]);
    trial
        .args(&UNSHARE[1..])
        .args(["--", "true"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    trial.status().is_ok_and(|status| status.success())
}

/// Asks a program and its children to end, then makes them.
fn stop(child: &mut Child, grace: Duration) {
    let group = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let signal = |signal| group.map(|group| kill_process_group(group, signal));
    let _ = signal(Signal::TERM);
    let end = Instant::now() + grace;
    while Instant::now() < end && matches!(child.try_wait(), Ok(None)) {
        thread::sleep(POLL / 4);
    }
    let _ = signal(Signal::KILL);
    let _ = child.wait();
    // Its directory is removed next: nobody may still be writing there.
    let end = Instant::now() + GONE;
    while Instant::now() < end && group.is_some_and(|group| test_kill_process_group(group).is_ok()) {
        thread::sleep(POLL / 10);
    }
}

/// Splits output into lines. A carriage return ends one too: that is how progress is shown.
fn read_lines(mut reader: impl BufRead, mut each: impl FnMut(String) -> bool) {
    let mut line = Vec::new();
    loop {
        let buffer = match reader.fill_buf() {
            Ok([]) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
            Ok(buffer) => buffer,
        };
        let end = buffer.iter().position(|byte| matches!(byte, b'\n' | b'\r'));
        let text = &buffer[..end.unwrap_or(buffer.len())];
        line.extend_from_slice(&text[..text.len().min(LINE_MAX - line.len().min(LINE_MAX))]);
        let used = end.map_or(buffer.len(), |end| end + 1);
        reader.consume(used);
        if end.is_some() && !line.is_empty() {
            if !each(String::from_utf8_lossy(&line).into_owned()) {
                return;
            }
            line.clear();
        }
    }
    if !line.is_empty() {
        each(String::from_utf8_lossy(&line).into_owned());
    }
}

/// The variables that say how programs get out of here, for one whose environment is not ours.
pub fn proxies() -> Vec<(String, String)> {
    let names = ["http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"];
    let set = |name: &str| Some((name.to_owned(), std::env::var_os(name)?.into_string().ok()?));
    names.into_iter().filter_map(set).collect()
}

/// Where `program` is in PATH.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Administrators' programs are often missing from a user's PATH.
    let extra = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|path| is_executable(path))
}

fn is_executable(path: &Path) -> bool {
    path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok()
}

/// Whether packages can be installed: by root, with apt-get.
pub fn can_install() -> bool {
    rustix::process::geteuid().is_root() && find("apt-get").is_some()
}

/// Installs Debian packages.
pub fn install(
    packages: &[&str],
    interrupt: &Interrupt,
    mut line: impl FnMut(&str),
) -> Result<(), ToolError> {
    let install = |line: &mut dyn FnMut(&str)| {
        Tool::new("apt-get", interrupt)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .args(["install", "--yes", "--no-install-recommends"])
            .args(packages)
            // Half an installation would be this machine's trouble, not ours.
            .finishes_alone()
            .run(line)
    };
    // Lists that are absent or old are the usual reason for a failure.
    match install(&mut line) {
        Err(ToolError::Failed { .. }) => {
            Tool::new("apt-get", interrupt).arg("update").finishes_alone().run(&mut line)?;
            install(&mut line)
        }
        result => result,
    }
}

/// Takes the lock a file stands for, waiting for whoever has it; `waiting` is called once if that takes time. It is
/// given back when the file is dropped or the process ends.
pub fn lock(path: &Path, interrupt: &Interrupt, waiting: impl FnOnce()) -> Result<File, ToolError> {
    let failed = |source| ToolError::Lock { path: path.to_owned(), source };
    let file = File::options().create(true).truncate(false).write(true).open(path).map_err(failed)?;
    let mut waiting = Some(waiting);
    loop {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(file),
            Err(Errno::WOULDBLOCK | Errno::INTR) => {
                if let Some(waiting) = waiting.take() {
                    waiting();
                }
                interrupt.check()?;
                thread::sleep(POLL);
            }
            Err(errno) => return Err(failed(errno.into())),
        }
    }
}

/// SHA-256 of a file, in hexadecimal.
pub fn sha256_file(path: &Path) -> io::Result<String> {
    use sha2::{Digest, Sha256};
    let mut file = File::open(path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex(&digest.finalize())),
            n => digest.update(&buffer[..n]),
        }
    }
}

/// SHA-256 over length-prefixed parts, in hexadecimal: no two lists of parts run into each other.
pub fn sha256_parts<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> String {
    use sha2::{Digest, Sha256};
    let mut digest = Sha256::new();
    for part in parts {
        digest.update((part.len() as u64).to_le_bytes());
        digest.update(part);
    }
    hex(&digest.finalize())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
#[path = "tools_tests.rs"]
mod tests;
