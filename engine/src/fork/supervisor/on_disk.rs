//! Pausing a child to disk, and letting it go on from there. Its machine is taken as for a branch, what it has in its
//! memory is written to a file without a name, and its process ends, which frees that memory. Another process goes on
//! from the file as the same child.

use super::branch_error::BranchError;
use super::branching::Parent;
use super::moment::FrozenMachine;
use super::{Child, StartError, Supervisor};
use crate::fork::identity;
use crate::local::branches::PausedToDisk;
use crate::local::run_dir::ChildState;
use forkd_vmm::memory::Delta;
use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

/// Pause between two looks at whether a process is gone.
const LOOK: Duration = Duration::from_millis(1);

impl Supervisor {
    /// Pauses children to disk: all, or the one of that name. Those that lie there already are counted with them.
    pub fn pause_to_disk(&self, id: Option<&str>) -> Result<PausedToDisk, BranchError> {
        let ids: Vec<_> = {
            let children = self.children();
            let meant = |child: &&Child| id.is_none_or(|id| id == child.id) && !child.state.is_over();
            children.iter().filter(meant).map(|child| child.id.clone()).collect()
        };
        ids.iter().try_fold(PausedToDisk::default(), |sum, id| {
            Ok(sum + PausedToDisk { children: 1, bytes: self.put_on_disk(id)? })
        })
    }

    /// Returns how much of its memory lies there, bytes.
    fn put_on_disk(&self, id: &str) -> Result<u64, BranchError> {
        let _one_at_a_time = self.freezing.lock().unwrap_or_else(PoisonError::into_inner);
        let was_paused = {
            let children = self.children();
            let child = children.iter().find(|child| child.id == id);
            if let Some(machine) = child.and_then(|child| child.on_disk.as_ref()) {
                return Ok(machine.delta.bytes());
            }
            child.is_some_and(|child| child.paused)
        };
        if was_paused {
            // Its agent has to ring.
            self.resume(Some(id));
        }
        let put = self.parent(id).and_then(|parent| self.take_to_disk(&parent));
        if put.is_err() && was_paused {
            self.pause(Some(id));
        }
        put
    }

    fn take_to_disk(&self, parent: &Parent) -> Result<u64, BranchError> {
        let copy = self.stop_and_copy(parent)?;
        let at_ns = copy.at_ns;
        let machine = match copy
            .finish(&parent.id, parent.disk.clone())
            .and_then(|machine| self.write_to_disk(machine))
        {
            Ok(machine) => Arc::new(machine),
            Err(error) => {
                self.let_go_on(parent, at_ns)?;
                return Err(error);
            }
        };
        let bytes = machine.delta.bytes();
        {
            let mut children = self.children();
            let found = children.iter_mut().find(|child| child.id == parent.id && !child.state.is_over());
            let child = found.filter(|_| parent.process.is_alive());
            let Some(child) = child else { return Err(BranchError::Ended { id: parent.id.clone() }) };
            // Noted first: nobody is to wait for an answer that does not come.
            self.run_dir.note_paused(&child.id, true);
            child.paused = true;
            child.on_disk = Some(machine);
            parent.process.kill();
        }
        // Until then it has its memory, and its place with the pager.
        while self.children().iter().any(|child| child.id == parent.id && child.process.is_some()) {
            std::thread::sleep(LOOK);
        }
        Ok(bytes)
    }

    fn write_to_disk(&self, machine: FrozenMachine) -> Result<FrozenMachine, BranchError> {
        let FrozenMachine { vmstate, delta, disk } = machine;
        let failed = |source| BranchError::Disk { directory: self.cache.clone(), source };
        let ram_bytes = self.template.configuration().layout.ram_bytes();
        fs::create_dir_all(&self.cache).map_err(failed)?;
        let file = tempfile::tempfile_in(&self.cache).map_err(failed)?;
        delta.write_to(&file, ram_bytes, &|_| ()).map_err(failed)?;
        Ok(FrozenMachine { vmstate, delta: Delta::open(file.into(), ram_bytes)?, disk })
    }

    /// Lets children go on that are paused to disk: all, or the one of that name. Returns how many, when they are ready or
    /// over.
    pub fn resume_from_disk(&self, id: Option<&str>) -> Result<usize, BranchError> {
        let lie_there: Vec<_> = {
            let children = self.children();
            let meant = |child: &Child| id.is_none_or(|id| id == child.id) && child.on_disk.is_some();
            (0..children.len()).filter(|at| meant(&children[*at])).collect()
        };
        for at in &lie_there {
            self.start_from_disk(*at)?;
        }
        self.wait_until_ready(&lie_there);
        let failed = |at: &usize| {
            let child = &self.children()[*at];
            let error = child.error.clone().filter(|_| child.state.is_over());
            error.map(|error| BranchError::NotBack { id: child.id.clone(), error })
        };
        lie_there.iter().find_map(failed).map_or(Ok(lie_there.len()), Err)
    }

    fn start_from_disk(&self, at: usize) -> Result<(), BranchError> {
        // Whoever follows the children's reports looks for new ones meanwhile.
        let _one_at_a_time = self.next_number.lock().unwrap_or_else(PoisonError::into_inner);
        self.spawning.store(true, Ordering::Release);
        self.wake.call();
        let machine = Some(&mut self.children()[at])
            .filter(|child| !child.state.is_over())
            .and_then(|child| child.on_disk.take());
        let started = machine.map_or(Ok(()), |machine| {
            self.start_again(at, &machine).inspect_err(|_| self.children()[at].on_disk = Some(machine))
        });
        self.spawning.store(false, Ordering::Release);
        Ok(started?)
    }

    /// Starts a machine that goes on as the child was.
    fn start_again(&self, at: usize, frozen: &Arc<FrozenMachine>) -> Result<(), StartError> {
        let (id, number, machines, machine_id) = {
            let child = &self.children()[at];
            (child.id.clone(), child.client.0, child.machines, child.machine_id)
        };
        let network = self.network_of(number)?;
        let identity = network.as_ref().map(|network| network.identity);
        // Its agent knows by the id in the record that it has to wake up: that one is never the last one's.
        let told = if machines.is_multiple_of(2) { machine_id } else { [0; 16] };
        let record = identity::record(&id, number, told, identity, BTreeMap::new())?;
        let socket = self.run_dir.socket(&id);
        match fs::remove_file(&socket) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(StartError::File { operation: "removing", path: socket, source });
            }
            _ => {}
        }
        // The last one's cgroup may be there for a moment.
        let group = format!("{id}.{machines}");
        let disk = frozen.disk.as_deref();
        let (process, _) = self.start_machine((&id, &group), record, network.as_ref(), Some(frozen), disk)?;
        let network = network.map(|network| network.connect(&identity::hostname(&id))).transpose()?;
        let mut children = self.children();
        let child = &mut children[at];
        (child.pid, child.network, child.frozen) = (process.pid, network, Some(Arc::clone(frozen)));
        (child.first_instruction, child.ready, child.goes_on) = (None, None, false);
        (child.paused, child.overdue, child.machines) = (false, None, machines + 1);
        match child.state.is_over() {
            // It was killed meanwhile.
            true => process.kill(),
            false => child.state = ChildState::Starting,
        }
        child.process = Some(Arc::new(process));
        self.run_dir.note_paused(&id, false);
        Ok(())
    }

    /// Forgets the machines on disk of children that have been killed.
    pub(super) fn end_those_on_disk(&self) {
        let mut over = Vec::new();
        for (at, child) in self.children().iter_mut().enumerate() {
            if child.state.is_over() && child.on_disk.take().is_some() {
                child.ports.clear();
                child.disk = None;
                if child.parent.is_some() {
                    self.run_dir.forget(&child.id, false);
                }
                over.push(at);
            }
        }
        for at in over {
            self.end_publishing(at);
            self.tell(at);
        }
    }
}
