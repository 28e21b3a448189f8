//! Why there is no snapshot.

use crate::fork::agent::ClientError;
use crate::fork::run::ForkError;
use crate::fork::variables::VariablesError;
use crate::interrupt::Interrupted;
use crate::local::snapshots::SnapshotError;
use forkd_abi::generation::GenerationError;
use forkd_fs::trace::TraceError;
use forkd_vmm::channel::ChannelError;
use forkd_vmm::memory::MemoryError;
use forkd_vmm::pager::PagerError;
use forkd_vmm::zygote::SpawnError;
use std::time::Duration;

/// A snapshot could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// Files of the snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Starting a machine.
    #[error(transparent)]
    Spawn(#[from] SpawnError),
    /// The machine's process is gone.
    #[error("the machine's process ended while {doing}")]
    Gone {
        /// What was waited for.
        doing: &'static str,
        /// Why it cannot be heard.
        #[source]
        source: ChannelError,
    },
    /// The machine failed.
    #[error("the machine failed while {doing}: {error}")]
    Failed {
        /// What was waited for.
        doing: &'static str,
        /// Why.
        error: String,
    },
    /// It took too long.
    #[error("{doing} took longer than {} s", after.as_secs())]
    Timeout {
        /// What was waited for.
        doing: &'static str,
        /// How long.
        after: Duration,
    },
    /// The agent does not answer.
    #[error("the guest's agent failed while {doing}")]
    Agent {
        /// What was asked.
        doing: &'static str,
        /// Why.
        #[source]
        source: ClientError,
    },
    /// A service or the worker did not become ready.
    #[error("the machine is not ready: {reason}{}", stderr_part(stderr))]
    NotReady {
        /// What happened.
        reason: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// The probe's answer is wrong.
    #[error("the probe `{code}` answered {found}, not {expected}")]
    Probe {
        /// The code.
        code: String,
        /// What it answered.
        found: String,
        /// What it should have.
        expected: String,
    },
    /// What copies will do first did not work.
    #[error("the rehearsal `{what}` failed: {found}")]
    Rehearsal {
        /// The code, the command or the URL.
        what: String,
        /// What came of it.
        found: String,
    },
    /// Its content would be lost.
    #[error(
        "the machine wrote to its scratch disk before the snapshot; copies start with an empty one, so prepare it in them"
    )]
    ScratchWritten,
    /// Recording the trace.
    #[error("the first restore of the new snapshot could not be served")]
    Pager(#[from] PagerError),
    /// The generation record.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// A trial's fork.
    #[error(transparent)]
    Fork(Box<ForkError>),
    /// A trial's environment.
    #[error(transparent)]
    Variables(#[from] VariablesError),
    /// The trace.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The warm command does not encode.
    #[error("the warm command cannot be passed on")]
    WarmCommand(#[source] serde_json::Error),
    /// Ctrl-C.
    #[error(transparent)]
    Interrupted(#[from] Interrupted),
}

fn stderr_part(stderr: &str) -> String {
    if stderr.trim().is_empty() { String::new() } else { format!("; it wrote:\n{}", stderr.trim_end()) }
}

/// Why there is no snapshot, and what its machine, if there was one by then, said last.
#[derive(Debug)]
pub struct BuildFailure {
    /// Why.
    pub error: BuildError,
    /// The end of the machine's console, a guest's own words: control characters and all, at most a few lines; or empty.
    pub console: String,
}

impl<E: Into<BuildError>> From<E> for BuildFailure {
    fn from(error: E) -> BuildFailure {
        BuildFailure { error: error.into(), console: String::new() }
    }
}
