//! Branching a child: new children that go on from where it is, while it goes on itself.
//!
//! The child's agent rings for a snapshot in the midst of its work, and the machine stops. Until it is let go on, two
//! things are taken: its own state, which it hands over, and what it has in its memory beyond the image. Everything else
//! happens while it runs. Its branches map the image as all children do, and over it one file with what it had changed.

use super::branch_error::{BRANCHES_MAX, BranchError, RING_TIMEOUT};
use super::error::StartError;
use super::moment::{BranchPoint, FrozenMachine, Stop, StoppedMachine};
use super::own_pages::OwnPages;
use super::{Child, Milestone, Supervisor, spawn_thread};
use crate::chain::chain;
use crate::fork::agent::AgentClient;
use crate::fork::pagemap::{self, ImageMapping};
use crate::fork::template::{SavedChild, Template};
use crate::local::branches::{BranchRequest, Branched, BranchedChild, SnapshotRequest, TakenSnapshot};
use crate::local::run_dir::ChildState;
use forkd_vmm::memory::{DeltaDraft, ImageId};
use forkd_vmm::process::{MachineOrder, MachineProcess, monotonic_ns};
use forkd_vmm::uffd::{Uffd, UffdError};
use rustix::fd::{AsFd, OwnedFd};
use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

/// How long branches may take to be ready.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// Pause between two looks at whether they are.
const LOOK: Duration = Duration::from_millis(1);

/// The child that is branched.
pub(super) struct Parent {
    pub(super) id: String,
    pub(super) process: Arc<MachineProcess>,
    socket: PathBuf,
    pub(super) disk: Option<Arc<File>>,
    /// What it was branched from itself.
    base: Option<Arc<FrozenMachine>>,
    uffd: Option<Arc<Uffd>>,
}

/// A machine that stands still, and the copy of its memory.
pub(super) struct StoppedCopy<'a> {
    draft: DeltaDraft<'a>,
    /// All that it has beyond its image, ranges of bytes.
    own: io::Result<Vec<Range<u64>>>,
    vmstate: OwnedFd,
    /// When it stopped, CLOCK_MONOTONIC, ns.
    pub(super) at_ns: u64,
}

impl StoppedCopy<'_> {
    /// What goes on from it, of the child `id`, with what is on its scratch disk.
    pub(super) fn finish(self, id: &str, disk: Option<Arc<File>>) -> Result<FrozenMachine, BranchError> {
        let own = self.own.map_err(|source| BranchError::Pages { id: id.to_owned(), source })?;
        Ok(FrozenMachine { vmstate: self.vmstate, delta: self.draft.finish(own)?, disk })
    }
}

impl Supervisor {
    /// Branches a child; returns when its branches are ready.
    pub fn branch(&self, request: &BranchRequest) -> Result<Branched, BranchError> {
        let count = request.environments.len();
        if !(1..=BRANCHES_MAX).contains(&count) {
            return Err(BranchError::Count { count });
        }
        let parent = self.parent(&request.child)?;
        let (frozen, pause_ms) = self.freeze(&parent)?;
        let (copied_bytes, ranges) = (frozen.delta.bytes(), frozen.delta.runs().len() as u64);
        let point = BranchPoint { parent: parent.id, frozen: Arc::new(frozen) };
        let new = self.start_branches(&request.environments, &point)?;
        self.wait_until_ready(&new.clone().collect::<Vec<_>>());
        let children = self.children();
        let branches = children[new].iter().map(branched).collect();
        Ok(Branched { pause_ms, copied_bytes, ranges, branches })
    }

    /// Takes a snapshot of a child, whose files lie in the request's directory when this returns.
    pub fn snapshot(&self, request: &SnapshotRequest) -> Result<TakenSnapshot, BranchError> {
        let parent = self.parent(&request.child)?;
        if parent.disk.is_some() {
            return Err(BranchError::Scratch { id: parent.id });
        }
        let (frozen, pause_ms) = self.freeze(&parent)?;
        let (copied_bytes, ranges) = (frozen.delta.bytes(), frozen.delta.runs().len() as u64);
        let saved = SavedChild { child: &parent.id, vmstate: frozen.vmstate.as_fd(), delta: &frozen.delta };
        let base = self.template.save_child(saved, &request.tag, &request.into)?;
        Ok(TakenSnapshot { pause_ms, copied_bytes, ranges, base })
    }

    pub(super) fn parent(&self, id: &str) -> Result<Parent, BranchError> {
        let id = id.to_owned();
        let children = self.children();
        let found = children.iter().find(|child| child.id == id && !child.state.is_over());
        match found.map(|child| (child, child.process.clone())) {
            Some((child, _)) if child.paused => Err(BranchError::Paused { id }),
            Some((child, Some(_))) if child.ready.is_none() => Err(BranchError::NotReady { id }),
            None | Some((_, None)) => Err(BranchError::Unknown { id }),
            Some((child, Some(process))) => Ok(Parent {
                id,
                process,
                socket: child.socket.clone(),
                disk: child.disk.clone(),
                base: child.frozen.clone(),
                uffd: child.uffd.clone(),
            }),
        }
    }

    /// Stops the child, takes what its branches need, and lets it go on. Returns how long it stood still, ms.
    fn freeze(&self, parent: &Parent) -> Result<(FrozenMachine, f64), BranchError> {
        let _one_at_a_time = self.freezing.lock().unwrap_or_else(PoisonError::into_inner);
        let copy = self.stop_and_copy(parent)?;
        let disk = parent.disk.as_ref().map_or(Ok(None), |disk| self.scratch().copy(disk));
        let pause_ms = self.let_go_on(parent, copy.at_ns)?;
        let disk = disk.map_err(StartError::from)?.map(Arc::new);
        Ok((copy.finish(&parent.id, disk)?, pause_ms))
    }

    /// Stops the child and copies what it has in its memory. Whoever calls it holds `freezing`: two would clear what the
    /// other has the kernel note.
    pub(super) fn stop_and_copy<'a>(&'a self, parent: &'a Parent) -> Result<StoppedCopy<'a>, BranchError> {
        let pages = |source| BranchError::Pages { id: parent.id.clone(), source };
        let (pid, ram_bytes) = (parent.process.pid, self.template.configuration().layout.ram_bytes());
        let ram = pagemap::image_mapping(pid, ImageId::Ram, Template::image_name(ImageId::Ram));
        let ram = ram.map_err(pages)?;
        let own = OwnPages::open(pid, ram.address, ram_bytes).map_err(pages)?;
        let base = parent.base.as_ref().map(|base| &base.delta).or(self.template.delta());
        let mut draft = DeltaDraft::new(ram_bytes, base)?;
        // What it does not write to until it stops need not be copied while it stands still.
        let tracked = parent.uffd.as_ref().and_then(|uffd| {
            self.track_writes(uffd, &ram, ram_bytes).inspect_err(|error| untracked(error)).ok()?;
            own.track().inspect_err(|error| untracked(error)).ok()
        });
        match &tracked {
            Some(runs) => draft.copy(pid, ram.address, runs)?,
            None => draft.prepare(&own.all().map_err(pages)?),
        }
        let StoppedMachine { vmstate, at_ns } = self.stop_to_branch(parent)?;
        let taken = own.all().and_then(|all| {
            let missing = if tracked.is_some() { own.written()? } else { all.clone() };
            Ok((all, missing))
        });
        let own = taken.and_then(|(all, missing)| {
            draft.copy(pid, ram.address, &missing).map_err(io::Error::other)?;
            Ok(all)
        });
        Ok(StoppedCopy { draft, own, vmstate, at_ns })
    }

    /// Lets a child go on that has stood still since `at_ns`. Returns how long that was, ms.
    pub(super) fn let_go_on(&self, parent: &Parent, at_ns: u64) -> Result<f64, BranchError> {
        let id = || parent.id.clone();
        let resumed = parent.process.channel.send(&MachineOrder::Resume, &[]);
        let pause_ms = monotonic_ns().saturating_sub(at_ns) as f64 / 1e6;
        // Its id may be another's now, and so the memory that was copied.
        if !parent.process.is_alive() {
            return Err(BranchError::Ended { id: id() });
        }
        resumed.map_err(|source| BranchError::Resume { id: id(), source })?;
        Ok(pause_ms)
    }

    /// Has the kernel note what the child writes to.
    fn track_writes(&self, uffd: &Uffd, ram: &ImageMapping, ram_bytes: u64) -> Result<(), UffdError> {
        match self.template.pager() {
            Some(pager) => pager.track_writes(uffd, &ram.parts)?,
            None => ram.parts.iter().try_for_each(|(at, bytes)| uffd.track_writes(*at, *bytes, false))?,
        }
        ram.gaps(ram_bytes).iter().try_for_each(|(at, bytes)| uffd.track_writes(*at, *bytes, false))
    }

    /// Has the child ring, and returns when its machine stands still. One that rings too late goes on at once.
    fn stop_to_branch(&self, parent: &Parent) -> Result<StoppedMachine, BranchError> {
        let id = || parent.id.clone();
        let (stopped, answers) = sync_channel(2);
        let refused = stopped.clone();
        if let Some(child) = self.children().iter_mut().find(|child| child.id == parent.id) {
            child.stop_wanted = Some(stopped);
            child.rings_due += 1;
        }
        let socket = parent.socket.clone();
        spawn_thread(move || {
            let asked =
                AgentClient::connect(&socket, RING_TIMEOUT).and_then(|client| client.branch(RING_TIMEOUT));
            if let Err(error) = asked {
                // Nobody listens any more when it has stopped all the same.
                let _ = refused.send(Stop::Refused(error));
            }
        })?;
        match answers.recv_timeout(RING_TIMEOUT) {
            Ok(Stop::Stopped(machine)) => Ok(machine),
            Ok(Stop::Refused(source)) => Err(BranchError::Agent { id: id(), source }),
            Err(_) => Err(BranchError::Timeout { id: id() }),
        }
    }

    /// Starts a branch for each environment; returns their places among the children. Those that are started when one
    /// cannot be are ended.
    fn start_branches(
        &self,
        environments: &[BTreeMap<String, String>],
        point: &BranchPoint,
    ) -> Result<Range<usize>, BranchError> {
        let mut numbers = self.next_number.lock().unwrap_or_else(PoisonError::into_inner);
        let first = self.children().len();
        self.spawning.store(true, Ordering::Release);
        // Whoever follows the children's reports does so as long as one lives, and looks for new ones.
        let follows = self.children().iter().any(|child| !child.state.is_over());
        self.wake.call();
        let started = if follows { Ok(()) } else { Err(BranchError::Unknown { id: point.parent.clone() }) };
        let started = started.and_then(|()| {
            environments.iter().try_for_each(|environment| {
                let number = *numbers;
                *numbers += 1;
                let network = self.network_of(number)?;
                Ok(self.spawn(number, environment.clone(), network, Some(point.clone()))?)
            })
        });
        self.spawning.store(false, Ordering::Release);
        let new = first..self.children().len();
        drop(numbers);
        if started.is_err() {
            for child in &mut self.children()[new.clone()] {
                child.end(ChildState::Killed, None);
            }
        }
        started.map(|()| new)
    }

    /// Until all are ready or over, or have had their time.
    pub(super) fn wait_until_ready(&self, new: &[usize]) {
        let until = Instant::now() + READY_TIMEOUT;
        let done = |child: &Child| child.ready.is_some() || child.state.is_over();
        let all_done = || {
            let children = self.children();
            new.iter().all(|at| done(&children[*at]))
        };
        while Instant::now() < until && !all_done() {
            std::thread::sleep(LOOK);
        }
    }
}

fn untracked(error: &dyn std::error::Error) {
    tracing::debug!(error = chain(error), "what a child writes to is not told: its pause is longer");
}

fn branched(child: &Child) -> BranchedChild {
    let at = |milestone: Option<Milestone>| milestone.map(|milestone| milestone.at_ns);
    BranchedChild {
        id: child.id.clone(),
        pid: child.pid,
        first_instruction_ns: at(child.first_instruction),
        ready_ns: at(child.ready),
        error: child.error.clone(),
    }
}
