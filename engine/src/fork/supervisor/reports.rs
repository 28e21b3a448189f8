//! What children report, and what follows from it: their states, their turns, their ends.

use super::moment::{Stop, StoppedMachine};
use super::{Child, Milestone, Supervisor};
use crate::chain::chain;
use crate::fork::start_queue::StartQueue;
use crate::fork::template::Template;
use crate::local::run_dir::ChildState;
use forkd_vmm::channel::ChannelError;
use forkd_vmm::devices::doorbell::Ring;
use forkd_vmm::pager::ClientId;
use forkd_vmm::process::{MachineOrder, MachineProcess, MachineReport};
use forkd_vmm::uffd::Uffd;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How often the supervisor looks for failed chunks while nothing else happens.
const TICK: Duration = Duration::from_millis(200);
/// The same while children are being spawned, whose channels are not polled yet.
const SPAWN_TICK: Duration = Duration::from_millis(1);
/// The same while children wait for their turns.
const TURN_TICK: Duration = Duration::from_millis(50);

impl Supervisor {
    /// Reads the children's reports until all are over.
    pub(super) fn follow(&self) {
        let mut open: Vec<(usize, Arc<MachineProcess>)> = Vec::new();
        loop {
            let spawning = self.spawning.load(Ordering::Acquire);
            {
                let mut children = self.children();
                let new = children.iter_mut().enumerate().filter(|(_, child)| !child.followed);
                open.extend(new.filter_map(|(at, child)| {
                    let process = child.process.clone()?;
                    child.followed = true;
                    Some((at, process))
                }));
                // One that is on disk will have reports again.
                if open.is_empty() && !spawning && children.iter().all(|child| child.state.is_over()) {
                    return;
                }
            }
            let tick = match (spawning, self.are_turns_awaited()) {
                (true, _) => SPAWN_TICK,
                (false, true) => TURN_TICK,
                (false, false) => TICK,
            };
            let tick = self.end_overdue_children().map_or(tick, |left| tick.min(left));
            let timeout = Timespec { tv_sec: 0, tv_nsec: tick.subsec_nanos().into() };
            let channels = open.iter().map(|(_, process)| PollFd::new(&process.channel, PollFlags::IN));
            let mut polled: Vec<_> = channels.chain([PollFd::new(&self.wake, PollFlags::IN)]).collect();
            match rustix::event::poll(&mut polled, Some(&timeout)) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => {
                    tracing::warn!(%error, "the children's reports cannot be waited for");
                    std::thread::sleep(TICK);
                    continue;
                }
            }
            let readable: Vec<_> = polled.iter().map(|poll| !poll.revents().is_empty()).collect();
            if readable.last() == Some(&true) {
                self.wake.heard();
            }
            let mut readable = readable.into_iter();
            open.retain(|(at, process)| {
                if !readable.next().unwrap_or(false) {
                    return true;
                }
                match process.channel.receive::<MachineReport>() {
                    Ok((report, fds)) => {
                        self.note(*at, report, fds);
                        true
                    }
                    Err(error) => {
                        self.finish(*at, &error);
                        false
                    }
                }
            });
            self.end_children_without_memory();
            self.end_those_on_disk();
            self.take_turns(&mut self.children());
        }
    }

    /// Lets children go on whose turn it is.
    fn take_turns(&self, children: &mut [Child]) {
        let Some(turns) = &self.turns else { return };
        let mut turns = turns.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.spawning.load(Ordering::Acquire) {
            let there = |child: &Child| child.first_instruction.is_some() || child.state.is_over();
            turns.gather(children.iter().all(there), Instant::now());
        }
        while let Some(at) = turns.next(Instant::now()) {
            children[at].goes_on = true;
            if let Some(process) = &children[at].process {
                // One that is gone is noticed by its reports.
                let _ = process.channel.send(&MachineOrder::Resume, &[]);
            }
            self.tell(at);
        }
    }

    /// What the child was wanted for is done: others may go on.
    pub fn end_turn(&self, at: usize) {
        let Some(turns) = &self.turns else { return };
        let mut children = self.children();
        turns.lock().unwrap_or_else(PoisonError::into_inner).end(at);
        self.take_turns(&mut children);
    }

    /// Where the child waits for its turn at the start: one that goes on from where a machine was does not.
    fn turns_of(&self, child: &Child) -> Option<&Mutex<StartQueue>> {
        self.turns.as_ref().filter(|_| child.frozen.is_none())
    }

    fn are_turns_awaited(&self) -> bool {
        let awaited =
            |turns: &Mutex<StartQueue>| turns.lock().unwrap_or_else(PoisonError::into_inner).are_awaited();
        self.turns.as_ref().is_some_and(awaited)
    }

    fn note(&self, at: usize, report: MachineReport, mut fds: Vec<OwnedFd>) {
        let mut children = self.children();
        let child = &mut children[at];
        match report {
            MachineReport::Attached { bases } => {
                let Some(uffd) = fds.pop() else { return };
                let attached = match self.template.pager() {
                    Some(pager) => pager.attach(child.client, uffd, bases),
                    None => Ok(Arc::new(Uffd::from_fd(uffd))),
                };
                match attached {
                    Ok(uffd) => child.uffd = Some(uffd),
                    Err(error) => child.end(ChildState::Failed, Some(chain(&error))),
                }
            }
            MachineReport::Rang { ring, at_ns } => {
                // The guest controls what it rings and how often: only the first of each kind counts.
                let moment = Milestone { at_ns, fetched: self.template.progress().bytes_fetched };
                match ring {
                    Ring::Resumed => {
                        let first = child.first_instruction.is_none();
                        child.first_instruction.get_or_insert(moment);
                        match self.turns_of(child) {
                            Some(turns) if first => {
                                turns.lock().unwrap_or_else(PoisonError::into_inner).wait(at);
                            }
                            Some(_) => {}
                            None => {
                                child.goes_on = true;
                                self.tell(at);
                            }
                        }
                        child.state = child.state.max(ChildState::Running);
                    }
                    Ring::Ready => {
                        child.ready.get_or_insert(moment);
                        if let Some(turns) = self.turns_of(child) {
                            turns.lock().unwrap_or_else(PoisonError::into_inner).ready(at, Instant::now());
                        }
                        child.state = child.state.max(ChildState::Ready);
                        self.tell(at);
                    }
                    Ring::SnapshotHere => child.rang_at_ns = at_ns,
                    Ring::Booted => {}
                }
            }
            MachineReport::Snapshot => stopped(child, fds.pop()),
            MachineReport::Ended => child.state = child.state.max(ChildState::Ended),
            MachineReport::Failed { error } => {
                child.error = Some(error);
                child.state = child.state.max(ChildState::Failed);
            }
        }
    }

    fn finish(&self, at: usize, error: &ChannelError) {
        let mut children = self.children();
        let child = &mut children[at];
        child.network = None;
        let gone = matches!(error, ChannelError::Closed);
        if !gone {
            // What it says cannot be understood: it is not to be trusted any further.
            child.kill();
        }
        child.process = None;
        child.followed = false;
        child.uffd = None;
        // The last of its siblings frees it.
        child.frozen = None;
        if let Some(pager) = self.template.pager() {
            pager.detach(child.client);
        }
        if child.on_disk.is_some() && !child.state.is_over() {
            return;
        }
        child.ports.clear();
        child.disk = None;
        self.end_publishing(at);
        if !child.state.is_over() {
            let why = if gone { "its process was killed".to_owned() } else { chain(error) };
            child.error.get_or_insert(why);
            child.state = ChildState::Failed;
        }
        if child.parent.is_some() {
            self.run_dir.forget(&child.id, child.state == ChildState::Failed);
        }
        self.tell(at);
    }

    /// Children that wait for a chunk which will not come would sleep forever.
    fn end_children_without_memory(&self) {
        let Some(pager) = self.template.pager() else { return };
        let end = |clients: &[ClientId], error: &dyn Fn() -> String| {
            for child in self.children().iter_mut().filter(|child| clients.contains(&child.client)) {
                child.end(ChildState::Failed, Some(error()));
            }
        };
        for unavailable in self.template.take_unavailable() {
            let (chunk, name) = (unavailable.chunk.chunk, Template::image_name(unavailable.chunk.image));
            end(&unavailable.waiters, &|| {
                format!("chunk {chunk} of {name} cannot be had: {}", unavailable.error)
            });
        }
        for (client, misconduct) in pager.take_misconduct() {
            end(&[client], &|| format!("its process is not to be trusted: {}", chain(&misconduct)));
        }
        if let Some(failure) = pager.failure() {
            for child in self.children().iter_mut() {
                child.end(ChildState::Failed, Some(chain(&failure)));
            }
        }
    }
}

/// The child's machine stands still, and has handed over its state.
fn stopped(child: &mut Child, vmstate: Option<OwnedFd>) {
    let Some(vmstate) = vmstate.filter(|_| child.rings_due > 0) else {
        // Nobody has asked for it.
        return child.kill();
    };
    child.rings_due -= 1;
    let machine = StoppedMachine { vmstate, at_ns: child.rang_at_ns };
    let taken =
        child.stop_wanted.take().is_some_and(|wanted| wanted.try_send(Stop::Stopped(machine)).is_ok());
    if let Some(process) = child.process.as_ref().filter(|_| !taken) {
        // Whoever asked has given up.
        let _ = process.channel.send(&MachineOrder::Resume, &[]);
    }
}
