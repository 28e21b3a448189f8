//! One machine of a build: its process, what it says, and asking its agent.

use super::console;
use super::error::{BuildError, BuildFailure};
use crate::fork::agent::AgentClient;
use crate::fork::scratch::Scratch;
use crate::interrupt::Interrupt;
use crate::local::run_dir::{RunDir, RunDirError};
use crate::local::snapshots::{SnapshotError, file_error};
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::process::{MachineFiles, MachineProcess, MachineReport, MachineSpec};
use forkd_vmm::zygote::Zygote;
use rustix::fd::{AsFd, OwnedFd};
use std::fs::File;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Unit of memory, bytes.
pub(super) const PAGE: u64 = forkd_vmm::memory::PAGE_BYTES;
/// How long a request that should be quick may take.
pub(super) const REQUEST_TIMEOUT: Duration = Duration::from_secs(120);
/// How often a wait looks for Ctrl-C.
pub(super) const INTERRUPT_CHECK: Duration = Duration::from_millis(200);

/// Where the machines of one command come from and where they live.
#[derive(Debug)]
pub struct Machines {
    zygote: Zygote,
    run_dir: Arc<RunDir>,
    started: AtomicUsize,
}

impl Machines {
    /// Their sockets and consoles will be in `run_dir`, which learns of their cgroups.
    pub fn new(zygote: Zygote, run_dir: Arc<RunDir>) -> Result<Machines, RunDirError> {
        match zygote.cgroups() {
            Ok(cgroups) => run_dir.note_cgroups(&cgroups.path)?,
            Err(error) => tracing::debug!(error = crate::chain::chain(error), "machines get no cgroups"),
        }
        Ok(Machines { zygote, run_dir, started: AtomicUsize::new(0) })
    }

    /// What starts them.
    pub(super) fn zygote(&self) -> &Zygote {
        &self.zygote
    }

    /// The name of one more.
    pub(super) fn name(&self) -> String {
        format!("{}-{}", self.run_dir.id(), self.started.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// A machine of this module: its process and the files it lives from.
pub(super) struct BuildMachine<'a> {
    pub(super) process: MachineProcess,
    pub(super) socket: PathBuf,
    pub(super) console: PathBuf,
    pub(super) scratch: Option<File>,
    pub(super) interrupt: &'a Interrupt,
}

impl Drop for BuildMachine<'_> {
    fn drop(&mut self) {
        self.process.kill();
    }
}

impl<'a> BuildMachine<'a> {
    pub(super) fn spawn(
        machines: &Machines,
        spec: &MachineSpec,
        images: &[&OwnedFd],
        start: &File,
        initrd: Option<&File>,
        (scratch, interrupt): (&Scratch<'_>, &'a Interrupt),
    ) -> Result<BuildMachine<'a>, BuildError> {
        let (name, run_dir) = (&spec.limits.name, &machines.run_dir);
        let console_path = run_dir.console(name);
        let console = File::create(&console_path).map_err(file_error("creating", &console_path))?;
        let socket = run_dir.socket(name);
        let vsock = UnixListener::bind(&socket).map_err(file_error("binding", &socket))?;
        let scratch = scratch.create()?;
        let files = MachineFiles {
            images: images.iter().map(|image| image.as_fd()).collect(),
            start: start.as_fd(),
            console: console.as_fd(),
            vsock: vsock.as_fd(),
            scratch: scratch.as_ref().map(AsFd::as_fd),
            initrd: initrd.map(|file| file.as_fd()),
            wire: None,
            delta: None,
        };
        let process = machines.zygote.spawn(spec, &files)?;
        Ok(BuildMachine { process, socket, console: console_path, scratch, interrupt })
    }

    /// What ended its use, with its last words unless it was the user.
    pub(super) fn failed(&self, error: BuildError) -> BuildFailure {
        let console = match error {
            BuildError::Interrupted(_) => String::new(),
            _ => console::tail(&self.console),
        };
        BuildFailure { error, console }
    }

    pub(super) fn agent(&self, doing: &'static str) -> Result<AgentClient, BuildError> {
        AgentClient::connect(&self.socket, REQUEST_TIMEOUT)
            .map_err(|source| BuildError::Agent { doing, source })
    }

    /// Waits for a report that `wanted` accepts.
    pub(super) fn wait<T>(
        &self,
        doing: &'static str,
        timeout: Duration,
        mut wanted: impl FnMut(MachineReport, Vec<OwnedFd>) -> Option<T>,
    ) -> Result<T, BuildError> {
        let deadline = Instant::now() + timeout;
        loop {
            let failed = |error: String| BuildError::Failed { doing, error };
            self.interrupt.check()?;
            let slice = deadline.min(Instant::now() + INTERRUPT_CHECK);
            match self.process.channel.receive_until::<MachineReport>(slice) {
                Ok(None) if Instant::now() < deadline => {}
                Ok(Some((MachineReport::Failed { error }, _))) => return Err(failed(error)),
                Ok(Some((MachineReport::Ended, _))) => {
                    return Err(failed("the guest reset itself".to_owned()));
                }
                Ok(Some((report, fds))) => {
                    if let Some(result) = wanted(report, fds) {
                        return Ok(result);
                    }
                }
                Ok(None) => return Err(BuildError::Timeout { doing, after: timeout }),
                Err(source) => return Err(BuildError::Gone { doing, source }),
            }
        }
    }

    /// Returns when it rang, on CLOCK_MONOTONIC, ns.
    pub(super) fn wait_for_ring(
        &self,
        doing: &'static str,
        timeout: Duration,
        wanted: Ring,
    ) -> Result<u64, BuildError> {
        self.wait(doing, timeout, |report, _| match report {
            MachineReport::Rang { ring, at_ns } if ring == wanted => Some(at_ns),
            _ => None,
        })
    }
}

/// Opens a file of a snapshot.
pub(super) fn open(path: &Path) -> Result<File, SnapshotError> {
    File::open(path).map_err(file_error("opening", path))
}
