//! The zygote: a process forked while forkd has no threads yet, which forks one process a machine into its jail, and
//! sees how each ends.
//!
//! It ends when its owner does: it then kills the machines that are left, waits for them and removes their cgroups.
//! If it is killed itself, the kernel kills the machines.

use crate::cgroup::{CgroupError, Group, Groups};
use crate::channel::{Channel, ChannelError};
use crate::jail::{FILE_BYTES, Jail, JailOptions, UffdUse};
use crate::process::{
    MachineFiles, MachineProcess, MachineReport, MachineSpec, MachineStart, run_machine, take_channel,
};
use crate::sys::{self, ConfinedFork, ForkError, Forked, Lifetime};
use forkd_abi::chain::chain;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Epoll token of the owner's channel; machines count up from the next.
const OWNER: u64 = 0;

/// A machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum SpawnError {
    /// fork(2) of the zygote.
    #[error("the process that starts machines could not be created")]
    Fork(#[from] ForkError),
    /// The zygote is gone or confused.
    #[error("the process that starts machines does not answer")]
    Channel(#[from] ChannelError),
    /// The zygote could not fork.
    #[error("a machine's process could not be created: {error}")]
    Refused {
        /// Why.
        error: String,
    },
}

/// The process that forks machines. It ends with the last copy of this.
#[derive(Debug, Clone)]
pub struct Zygote {
    /// Requests and answers alternate on it.
    channel: Arc<Mutex<Channel>>,
    cgroups: Arc<Result<Cgroups, CgroupError>>,
}

/// Where machines' limits are set, and which there are.
#[derive(Debug)]
pub struct Cgroups {
    /// A [`Groups::path`].
    pub path: PathBuf,
    /// [`Groups::controllers`].
    pub controllers: Vec<&'static str>,
}

#[derive(Serialize, Deserialize)]
enum Spawned {
    /// Its id; a descriptor of the process comes with the message.
    Pid(i32),
    Failed(String),
}

impl Zygote {
    /// Forks the zygote. Must be called before this process starts any thread; the zygote and all machines end with it.
    pub fn start() -> Result<Zygote, SpawnError> {
        let (ours, theirs) = Channel::pair()?;
        let groups = Groups::find();
        match sys::fork_process(Lifetime::Independent)? {
            Forked::Parent(zygote) => {
                sys::start_elsewhere(zygote);
                let cgroups = groups.map(|groups| Cgroups {
                    path: groups.path().to_owned(),
                    controllers: groups.controllers().to_vec(),
                });
                Ok(Zygote { channel: Arc::new(Mutex::new(ours)), cgroups: Arc::new(cgroups) })
            }
            Forked::Child => {
                drop(ours);
                serve(theirs, groups.ok());
                sys::exit_now(0)
            }
        }
    }

    /// Starts a machine.
    pub fn spawn(&self, spec: &MachineSpec, files: &MachineFiles<'_>) -> Result<MachineProcess, SpawnError> {
        let (ours, theirs) = Channel::pair()?;
        let fds = files.encode(theirs.as_fd());
        let channel = self.channel.lock().unwrap_or_else(PoisonError::into_inner);
        channel.send(spec, &fds)?;
        match channel.receive()? {
            (Spawned::Pid(pid), mut fds) => {
                let gone = || SpawnError::Refused { error: "it came without its descriptor".to_owned() };
                Ok(MachineProcess { pid, channel: ours, pidfd: fds.pop().ok_or_else(gone)? })
            }
            (Spawned::Failed(error), _) => Err(SpawnError::Refused { error }),
        }
    }

    /// The machines' cgroups, or why this host lets this user have none.
    pub fn cgroups(&self) -> Result<&Cgroups, &CgroupError> {
        Result::as_ref(&self.cgroups)
    }
}

/// A machine's process, seen from the zygote.
struct ZygoteMachine {
    pidfd: OwnedFd,
    /// A copy of its own end: what it could not say itself is said for it.
    channel: Channel,
    group: Option<Group>,
}

struct ZygoteServer {
    owner: Channel,
    groups: Option<Groups>,
    jail: Jail,
    epoll: OwnedFd,
    machines: HashMap<u64, ZygoteMachine>,
    next_token: u64,
}

/// What the zygote is told to make, on its way into the new process.
struct NewMachine {
    spec: MachineSpec,
    fds: Vec<OwnedFd>,
    options: JailOptions,
}

/// How a machine's process ended when it could not say so itself.
#[derive(Debug, thiserror::Error)]
enum MachineDeath {
    #[error("the machine's process was ended by its system call filter")]
    Filter,
    #[error("the machine's process was ended because it went over its memory limit")]
    Memory,
    #[error("the machine's process crashed with signal {signal}")]
    Crash { signal: i32 },
}

fn serve(owner: Channel, groups: Option<Groups>) {
    // Whoever reads forkd's output waits until nobody can write to it any more; machines outlive that moment.
    if let Ok(null) = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()) {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
        let _ = rustix::stdio::dup2_stderr(&null);
    }
    // Ctrl-C reaches the whole terminal group; the owner decides when machines end.
    let _ = rustix::process::setsid();
    sys::default_child_signals();
    // Others may wait for the end of what forkd had open when it forked.
    let kept: Vec<_> = [owner.as_fd()].into_iter().chain(groups.as_ref().map(AsFd::as_fd)).collect();
    if sys::close_all_but(&kept).is_err() {
        return;
    }
    let (jail, epoll) = match Jail::build() {
        Ok(jail) => (jail, epoll::create(epoll::CreateFlags::CLOEXEC)),
        Err(error) => return refuse_all(&owner, &chain(&error)),
    };
    let Ok(epoll) = epoll else { return };
    if epoll::add(&epoll, &owner, EventData::new_u64(OWNER), EventFlags::IN).is_ok() {
        ZygoteServer { owner, groups, jail, epoll, machines: HashMap::new(), next_token: OWNER + 1 }.run();
    }
}

fn refuse_all(owner: &Channel, error: &str) {
    while owner.receive::<MachineSpec>().is_ok() {
        if owner.send(&Spawned::Failed(error.to_owned()), &[]).is_err() {
            return;
        }
    }
}

impl ZygoteServer {
    fn run(mut self) {
        let mut events = Vec::with_capacity(64);
        let mut owned = true;
        while owned || !self.machines.is_empty() {
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), None) {
                Ok(_) | Err(Errno::INTR) => {}
                // Its machines end with it.
                Err(_) => return,
            }
            for event in &events {
                match event.data.u64() {
                    OWNER => match self.owner.receive::<MachineSpec>() {
                        Ok((spec, fds)) => {
                            if let Some(NewMachine { spec, fds, options }) = self.answer(spec, fds) {
                                // A machine must not be able to ask for machines, or to take its siblings' descriptors:
                                // entering the jail closes them.
                                run_machine(spec, fds, self.jail, &options)
                            }
                        }
                        Err(_) => {
                            owned = false;
                            self.kill_machines();
                        }
                    },
                    token => self.reap(token),
                }
            }
        }
    }

    /// Makes a machine's process and tells the owner. `Some` in that process.
    fn answer(&mut self, spec: MachineSpec, fds: Vec<OwnedFd>) -> Option<NewMachine> {
        let created = self.groups.as_ref().map(|groups| groups.create(&spec.limits)).transpose();
        let group = match created {
            Ok(group) => group,
            Err(error) => return self.refuse(&error),
        };
        let forked = sys::fork_confined(self.jail.place(group.as_ref().map(AsFd::as_fd)));
        match forked {
            Ok(ConfinedFork::Child) => {
                let options = JailOptions {
                    number: self.next_token as u32,
                    file_bytes: FILE_BYTES.max(spec.scratch_bytes),
                    uffd: match spec.start {
                        MachineStart::Boot { .. } => UffdUse::None,
                        MachineStart::Restore { lazy: false, .. } => UffdUse::Tracking,
                        MachineStart::Restore { lazy: true, .. } => UffdUse::Filling,
                    },
                };
                Some(NewMachine { spec, fds, options })
            }
            Ok(ConfinedFork::Parent { pid, pidfd }) => {
                // An owner that is gone is noticed by the next wait.
                let _ = self.owner.send(&Spawned::Pid(pid.as_raw_nonzero().get()), &[pidfd.as_fd()]);
                let token = self.next_token;
                self.next_token += 1;
                let watched = epoll::add(&self.epoll, &pidfd, EventData::new_u64(token), EventFlags::IN);
                if let Some(channel) = take_channel(&mut fds.into_iter()) {
                    self.machines.insert(token, ZygoteMachine { pidfd, channel, group });
                }
                if watched.is_err() {
                    self.reap(token);
                }
                None
            }
            Err(error) => {
                if let (Some(groups), Some(group)) = (&self.groups, &group) {
                    let _ = groups.remove(group);
                }
                self.refuse(&error)
            }
        }
    }

    fn refuse(&self, error: &dyn std::error::Error) -> Option<NewMachine> {
        let _ = self.owner.send(&Spawned::Failed(chain(error)), &[]);
        None
    }

    /// The owner is gone: nobody wants the machines any more.
    fn kill_machines(&mut self) {
        let _ = epoll::delete(&self.epoll, &self.owner);
        for kept in self.machines.values() {
            let _ = rustix::process::pidfd_send_signal(&kept.pidfd, Signal::KILL);
        }
    }

    /// Takes note of a process that is over.
    fn reap(&mut self, token: u64) {
        let Some(ZygoteMachine { pidfd, channel, group }) = self.machines.remove(&token) else { return };
        // The owner has a copy of the descriptor, which would keep it among those that are waited for.
        let _ = epoll::delete(&self.epoll, &pidfd);
        let ending = rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED);
        let signal = ending.ok().flatten().and_then(|ending| ending.terminating_signal());
        let starved = group.as_ref().is_some_and(Group::ran_out_of_memory);
        let death = match signal {
            None => None,
            Some(signal) if signal == Signal::SYS.as_raw() => Some(MachineDeath::Filter),
            Some(signal) if signal == Signal::KILL.as_raw() => starved.then_some(MachineDeath::Memory),
            Some(signal) => Some(MachineDeath::Crash { signal }),
        };
        if let Some(death) = death {
            // Its process may have left the channel full, and the owner may not read it any more.
            let _ = rustix::io::ioctl_fionbio(&channel, true);
            let _ = channel.send(&MachineReport::Failed { error: death.to_string() }, &[]);
        }
        if let (Some(groups), Some(group)) = (&self.groups, &group) {
            let _ = groups.remove(group);
        }
    }
}
