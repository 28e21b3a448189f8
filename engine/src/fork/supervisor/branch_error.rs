//! Why a child cannot be branched, or a snapshot of it be taken.

use super::error::StartError;
use crate::fork::agent::ClientError;
use crate::fork::template::SaveChildError;
use forkd_vmm::channel::ChannelError;
use forkd_vmm::memory::MemoryError;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// How long the agent may take to ring, in a machine that is busy.
pub(super) const RING_TIMEOUT: Duration = Duration::from_secs(60);
/// Most branches of one request.
pub(super) const BRANCHES_MAX: usize = 1000;

/// A child cannot be branched.
#[derive(Debug, thiserror::Error)]
pub enum BranchError {
    /// No branches were asked for, or too many.
    #[error("{count} branches cannot be made at once: 1 to {BRANCHES_MAX} can")]
    Count {
        /// How many were asked for.
        count: usize,
    },
    /// There is no such child, or it is over.
    #[error("there is no running child `{id}`")]
    Unknown {
        /// Its name.
        id: String,
    },
    /// It is paused.
    #[error("{id} is paused")]
    Paused {
        /// Its name.
        id: String,
    },
    /// It has not started yet.
    #[error("{id} is not ready")]
    NotReady {
        /// Its name.
        id: String,
    },
    /// It has a disk.
    #[error("{id} has a scratch disk, which a snapshot does not hold")]
    Scratch {
        /// Its name.
        id: String,
    },
    /// Its agent does not do it.
    #[error("the agent of {id} does not ring for a snapshot")]
    Agent {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// Its machine did not stop.
    #[error("{id} did not stop within {} s", RING_TIMEOUT.as_secs())]
    Timeout {
        /// Its name.
        id: String,
    },
    /// It ended meanwhile.
    #[error("{id} has ended before its memory was copied")]
    Ended {
        /// Its name.
        id: String,
    },
    /// Its memory cannot be looked at.
    #[error("what {id} has written to its memory cannot be told")]
    Pages {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Its memory cannot be copied.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// It cannot be let go on.
    #[error("{id} cannot be let go on")]
    Resume {
        /// Its name.
        id: String,
        /// Why.
        #[source]
        source: ChannelError,
    },
    /// It cannot be put on disk.
    #[error("the machine cannot be written to {}", directory.display())]
    Disk {
        /// Where.
        directory: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It was on disk and did not come back.
    #[error("{id} did not come back from disk: {error}")]
    NotBack {
        /// Its name.
        id: String,
        /// Why, with causes.
        error: String,
    },
    /// The snapshot cannot be written.
    #[error(transparent)]
    Save(#[from] SaveChildError),
    /// The branches cannot be started.
    #[error(transparent)]
    Start(#[from] StartError),
}
