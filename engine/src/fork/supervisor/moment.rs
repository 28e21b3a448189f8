//! A moment of a machine, from its stop to what its branches go on from.

use crate::fork::agent::ClientError;
use forkd_vmm::memory::Delta;
use rustix::fd::OwnedFd;
use std::fs::File;
use std::sync::Arc;

/// A machine that has stopped to be branched.
#[derive(Debug)]
pub(super) struct StoppedMachine {
    pub(super) vmstate: OwnedFd,
    /// When, CLOCK_MONOTONIC, ns.
    pub(super) at_ns: u64,
}

/// What comes of having a child stop.
#[derive(Debug)]
pub(super) enum Stop {
    Stopped(StoppedMachine),
    Refused(ClientError),
}

/// A moment of a machine: what its branches go on from.
#[derive(Debug)]
pub(super) struct FrozenMachine {
    pub(super) vmstate: OwnedFd,
    pub(super) delta: Delta,
    /// Its scratch disk as it was then.
    pub(super) disk: Option<Arc<File>>,
}

/// Where a branch comes from.
#[derive(Debug, Clone)]
pub(super) struct BranchPoint {
    pub(super) parent: String,
    pub(super) frozen: Arc<FrozenMachine>,
}
