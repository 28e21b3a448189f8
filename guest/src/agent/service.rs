//! Services: programs that the recipe wants to run beside the warm worker, started one after the other.
//!
//! The agent's loop tells which pipe is ready and which process has ended. A service's output goes to the console
//! straight. Whether it is ready a helper finds out ([`READY`]), which may block; only what it says is read here.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use forkd_abi::protocol::{Exit, Ready, ServiceCommand};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};

use super::process::{Command, Spawner, exit_text, kill_group, refusal_in, reported_refusal};
use super::program::{AGENT, READY, READY_LINE, ReadyOrder, Refusal};

/// The most that is kept of what a helper says, in bytes.
const SAID_MAX: usize = 4 << 10;

/// All services of the machine.
#[derive(Default)]
pub struct Services {
    waiting: VecDeque<ServiceCommand>,
    starting: Option<Starting>,
    /// Name and process of those that are ready.
    running: Vec<(String, i32)>,
    failed: Option<String>,
}

struct Starting {
    name: String,
    pid: i32,
    /// Who finds out whether it is ready; without, it is once it runs.
    helper: Option<i32>,
    /// What the helper says, or who starts the service as its user.
    words: OwnedFd,
    heard: Vec<u8>,
    /// Where it is said why the service's user could not be become.
    report: Option<OwnedFd>,
}

/// Where the services are.
#[derive(Debug, PartialEq, Eq)]
pub enum Phase<'a> {
    Starting,
    Ready,
    Failed(&'a str),
}

impl Services {
    pub fn new(services: Vec<ServiceCommand>) -> Self {
        Self { waiting: services.into(), ..Self::default() }
    }

    pub fn phase(&self) -> Phase<'_> {
        match &self.failed {
            Some(reason) => Phase::Failed(reason),
            None if self.starting.is_none() && self.waiting.is_empty() => Phase::Ready,
            None => Phase::Starting,
        }
    }

    /// Starts the next ones, up to the first that is still to get ready.
    pub fn go_on(&mut self, spawner: &Spawner) {
        while self.failed.is_none() && self.starting.is_none() {
            let Some(service) = self.waiting.pop_front() else { return };
            if let Err(refusal) = self.start(spawner, &service) {
                self.failed = Some(format!("the service {}: {}", service.name, refusal.message));
            }
        }
    }

    fn start(&mut self, spawner: &Spawner, service: &ServiceCommand) -> Result<(), Refusal> {
        let cannot = |error: io::Error| Refusal::new(format!("no descriptors for it: {error}"));
        let console = || io::stderr().as_fd().try_clone_to_owned().map_err(cannot);
        let pipe = || pipe_with(PipeFlags::CLOEXEC).map_err(|errno| cannot(errno.into()));
        let nothing = || spawner.nothing().map_err(cannot);
        let user = service.user.as_deref();
        let command = Command { argv: &service.argv, env: &service.env, cwd: service.cwd.as_deref() };
        let (its_output, helper_input) = match &service.ready {
            Some(Ready::Line(_)) => {
                let (read, write) = pipe()?;
                (write, read)
            }
            _ => (console()?, nothing()?),
        };
        let its_errors = its_output.try_clone().map_err(cannot)?;
        let child = spawner.start_wired(&command, user, [nothing()?, its_output, its_errors])?;
        let (name, pid) = (service.name.clone(), child.pid);
        let Some(ready) = service.ready.clone() else {
            match child.report {
                None => self.running.push((name, pid)),
                Some(words) => {
                    let heard = Vec::new();
                    self.starting = Some(Starting { name, pid, helper: None, words, heard, report: None });
                }
            }
            return Ok(());
        };
        let order = ReadyOrder { ready, timeout_s: service.timeout_s };
        let order = serde_json::to_string(&order).map_err(|error| Refusal::new(error.to_string()))?;
        let argv = [AGENT, READY, &order].map(str::to_owned);
        let command = Command { argv: &argv, env: &service.env, cwd: None };
        let (words, said) = pipe()?;
        let helper = spawner.start_wired(&command, user, [helper_input, said, console()?])?;
        let (helper, heard, report) = (Some(helper.pid), Vec::new(), child.report);
        self.starting = Some(Starting { name, pid, helper, words, heard, report });
        Ok(())
    }

    /// The pipe to wait for.
    pub fn raw_fd(&self) -> Option<i32> {
        self.starting.as_ref().map(|starting| starting.words.as_raw_fd())
    }

    /// Reads what the helper says.
    pub fn on_ready(&mut self, scratch: &mut [u8]) {
        let Some(starting) = &mut self.starting else { return };
        let n = match rustix::io::read(&starting.words, &mut *scratch) {
            Err(Errno::AGAIN | Errno::INTR) => return,
            Ok(n) => n,
            Err(_) => 0,
        };
        let room = SAID_MAX - starting.heard.len().min(SAID_MAX);
        starting.heard.extend_from_slice(&scratch[..n.min(room)]);
        if n == 0 {
            return self.on_silence();
        }
        let text = String::from_utf8_lossy(&starting.heard).into_owned();
        match text.split_once('\n').filter(|_| starting.helper.is_some()) {
            Some((READY_LINE, _)) => self.is_ready(),
            Some((why, _)) => self.fail(why),
            None => {}
        }
    }

    /// Whoever could say something has gone.
    fn on_silence(&mut self) {
        let Some(starting) = &self.starting else { return };
        let refused = || reported_refusal(starting.report.as_ref());
        match (starting.helper, refusal_in(&starting.heard).or_else(refused)) {
            (_, Some(why)) => self.fail(&why),
            (None, None) => self.is_ready(),
            (Some(_), None) => self.fail("cannot be told ready: nothing waits for it any more"),
        }
    }

    fn is_ready(&mut self) {
        let Some(Starting { name, pid, .. }) = self.starting.take() else { return };
        self.running.push((name, pid));
    }

    /// Whether the process was a service's.
    pub fn on_exit(&mut self, pid: i32, exit: Exit) -> bool {
        if let Some(at) = self.running.iter().position(|(_, running)| *running == pid) {
            let (name, _) = self.running.swap_remove(at);
            eprintln!("forkd-agent: the service {name} {}", exit_text(exit));
            return true;
        }
        let Some(starting) = self.starting.as_ref().filter(|starting| starting.pid == pid) else {
            return false;
        };
        let why = reported_refusal(starting.report.as_ref()).or_else(|| {
            let _ = starting.helper?;
            Some(format!("{} before it was ready", exit_text(exit)))
        });
        match why {
            Some(why) => self.fail(&why),
            None => self.on_ready(&mut [0; 1024]),
        }
        true
    }

    fn fail(&mut self, why: &str) {
        let Some(Starting { name, pid, helper, .. }) = self.starting.take() else { return };
        if let Some(helper) = helper {
            kill_group(helper);
        }
        kill_group(pid);
        self.failed = Some(format!("the service {name} {why}"));
    }
}
