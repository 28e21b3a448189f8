//! Runs the real agent on the host for the tests beside this folder.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use forkd_abi::protocol::{ExecRequest, Exit, Frame, Response, decode_control, read_frame};
use forkd_engine::fork::agent::{AgentClient, ClientError};
use tempfile::TempDir;

pub const SOON: Duration = Duration::from_secs(10);

/// A running agent; ends with the test.
pub struct Agent {
    process: Child,
    pub dir: TempDir,
}

impl Agent {
    pub fn start() -> Self {
        Self::launch(None)
    }

    /// With a shell script as its warm worker.
    pub fn with_worker(script: &str) -> Self {
        Self::launch(Some(script))
    }

    /// With a warm command that does not exist.
    pub fn with_missing_worker() -> Self {
        Self::launch_with(
            Some(r#"{"warm":{"argv":["/no/such/worker"]}}"#.to_owned()),
            TempDir::new().unwrap(),
        )
    }

    /// With `/forkd/warm.json` as given.
    pub fn with_machine_file(json: &str) -> Self {
        Self::launch_with(Some(json.to_owned()), TempDir::new().unwrap())
    }

    fn launch(script: Option<&str>) -> Self {
        let dir = TempDir::new().unwrap();
        let machine_file = script.map(|script| {
            let path = dir.path().join("worker.sh");
            fs::write(&path, script).unwrap();
            format!(r#"{{"warm":{{"argv":["/bin/sh",{path:?}]}}}}"#)
        });
        Self::launch_with(machine_file, dir)
    }

    fn launch_with(machine_file: Option<String>, dir: TempDir) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_forkd-agent"));
        command.arg("--listen-unix").arg(dir.path().join("agent.sock"));
        command.env("NPY_DISABLE_CPU_FEATURES", "AVX2").env("SECRET_OF_THE_HOST", "1");
        if let Some(text) = machine_file {
            let path = dir.path().join("warm.json");
            fs::write(&path, text).unwrap();
            command.arg("--warm").arg(path);
        }
        Self { process: command.spawn().unwrap(), dir }
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    pub fn client(&self) -> AgentClient {
        AgentClient::connect_direct(&self.socket(), SOON).unwrap()
    }

    /// A bare connection, for talking nonsense.
    pub fn raw(&self) -> UnixStream {
        self.client().ping(SOON).unwrap();
        let stream = UnixStream::connect(self.socket()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.set_write_timeout(Some(SOON)).unwrap();
        stream
    }

    /// Memory the agent has resident, in KiB.
    pub fn resident_kib(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Processor time the agent has used, in clock ticks.
    pub fn cpu_ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
    }

    pub fn run(&self, argv: &[&str]) -> Result<Ran, ClientError> {
        self.run_request(request(argv), None)
    }

    pub fn run_request(&self, request: ExecRequest, stdin: Option<Vec<u8>>) -> Result<Ran, ClientError> {
        let stdin = stdin.map(|bytes| Box::new(std::io::Cursor::new(bytes)) as Box<dyn Read + Send>);
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = self.client().exec(request, stdin, &mut stdout, &mut stderr, Some(SOON))?;
        Ok(Ran { exit, stdout, stderr: String::from_utf8(stderr).unwrap() })
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

pub struct Ran {
    pub exit: Exit,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ran {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.stdout).unwrap()
    }
}

pub const fn code(code: i32) -> Exit {
    Exit { code: Some(code), signal: None }
}

pub const fn signal(signal: i32) -> Exit {
    Exit { code: None, signal: Some(signal) }
}

pub fn request(argv: &[&str]) -> ExecRequest {
    ExecRequest { argv: argv.iter().map(|arg| (*arg).to_owned()).collect(), ..ExecRequest::default() }
}

pub fn next(stream: &mut UnixStream) -> Frame {
    read_frame(stream).unwrap().expect("the agent closed the connection")
}

pub fn next_response(stream: &mut UnixStream) -> Response {
    decode_control(&next(stream).payload).unwrap()
}

/// Waits until the condition holds.
pub fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + SOON;
    while !condition() {
        assert!(Instant::now() < end, "not within {SOON:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether a process exists and is not a zombie.
pub fn runs(pid: u32) -> bool {
    let stat = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.starts_with(" Z"))
}
