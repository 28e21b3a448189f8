//! Why bytes are wanted, and how long it may take to get them.

use std::time::Duration;

/// Why bytes are wanted. Each priority has its own budget of requests, so demand never waits behind prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Priority {
    /// Someone is waiting for them now.
    Demand,
    /// A machine that starts will want them before it answers. Does not make way for demand, which would be for the
    /// same bytes a moment later; otherwise as prefetch.
    WorkingSet,
    /// Someone may want them soon.
    Prefetch,
}

impl Priority {
    /// Whether nobody waits for the bytes yet.
    pub fn is_ahead(self) -> bool {
        self != Priority::Demand
    }
}

/// How long a read may fail and be retried before it ends in an error. Counts from the last sign of progress; one
/// silent attempt may add the HTTP idle timeout.
#[derive(Debug, Clone, Copy)]
pub struct ReadDeadlines {
    /// For [`Priority::Demand`].
    pub demand: Duration,
    /// For the others.
    pub prefetch: Duration,
}
