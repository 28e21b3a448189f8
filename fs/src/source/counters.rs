//! What a source has transferred, and whether it fails at the moment.

use std::time::Instant;

/// What went over the wire (or came from the file) so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct TransferCounters {
    /// Requests sent, repeated ones included.
    pub requests: u64,
    /// Body bytes received, useless ones included.
    pub bytes: u64,
}

/// A source that does not deliver at the moment and is being retried.
#[derive(Debug, Clone)]
pub struct Outage {
    /// Since when nothing has arrived on the oldest failing read.
    pub since: Instant,
    /// What the last attempt met.
    pub last_error: String,
}
