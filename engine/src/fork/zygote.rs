//! The zygote of a process that forks: with room for the descriptors of many children.

use forkd_vmm::zygote::{SpawnError, Zygote};
use rustix::process::{Resource, Rlimit};

/// To be called by a process of one thread.
pub fn start_zygote() -> Result<Zygote, SpawnError> {
    raise_file_limit();
    Zygote::start()
}

/// A thousand children need a few descriptors each.
pub fn raise_file_limit() {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(errno) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%errno, "the limit on open files stays as it is");
    }
}
