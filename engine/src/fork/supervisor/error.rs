//! Why children cannot be started.

use crate::fork::forward::publish::PublishError;
use crate::fork::identity::IdentityError;
use crate::local::paths::PathsError;
use crate::local::run_dir::RunDirError;
use crate::local::snapshots::SnapshotError;
use crate::network::wire::NetworkError;
use forkd_vmm::pager::PagerError;
use forkd_vmm::zygote::SpawnError;
use std::io;
use std::path::PathBuf;

/// Children could not be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// forkd's directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The run directory.
    #[error(transparent)]
    RunDir(#[from] RunDirError),
    /// A process.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The pager.
    #[error(transparent)]
    Pager(#[from] PagerError),
    /// A file of a child.
    #[error("{operation} {} failed", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A thread of its own.
    #[error("a thread that looks after the children cannot be started")]
    Thread(#[source] io::Error),
    /// The socket on which others ask.
    #[error("the control socket cannot be used")]
    Control(#[source] io::Error),
    /// A scratch disk.
    #[error(transparent)]
    Scratch(#[from] SnapshotError),
    /// The children's networks.
    #[error(transparent)]
    Network(#[from] NetworkError),
    /// Their ports on the host.
    #[error(transparent)]
    Publish(#[from] PublishError),
    /// The children's identities.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// A limit was asked for that this host cannot set.
    #[error(
        "a limit on {resource} cannot be kept: this host has no cgroup (version 2) with a {controller} limit to hand on"
    )]
    NoLimit {
        /// What was to be limited.
        resource: &'static str,
        /// What is missing.
        controller: &'static str,
    },
}
