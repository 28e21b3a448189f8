//! What went through a child's gateway, and what it refused: counted by the gateway, shown by `forkd ps` and `forkd net`.

use super::policy::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

/// How many refusals are remembered, each with how often it came.
const REMEMBERED: usize = 64;

/// Counts of one child, as it sees them. Ethernet frames are counted with their headers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrafficCounts {
    /// Bytes that left it.
    pub bytes_sent: u64,
    /// Bytes that came to it.
    pub bytes_received: u64,
    /// Frames that left it.
    pub packets_sent: u64,
    /// Frames that came to it.
    pub packets_received: u64,
    /// Connections that were made for it, UDP's flows among them.
    pub connections: u64,
    /// Those that are open.
    pub open: u64,
    /// Names that it asked for.
    pub questions: u64,
    /// Connections, datagrams and names that were refused.
    pub refused: u64,
    /// Frames that nobody can answer: with another's address, of IPv6, in pieces, broken.
    pub dropped: u64,
}

/// Something that was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefusedTraffic {
    /// `tcp 10.0.0.5:22`, `udp 203.0.113.1:53`, `ping 203.0.113.1`, `protocol 47 203.0.113.1`, `name www.example.com`.
    pub what: String,
    /// Why.
    pub why: Refusal,
    /// How often.
    pub count: u64,
    /// The last time, seconds since 1970.
    pub last_unix: u64,
}

/// One child's counters, written by the gateway and read by anybody.
#[derive(Debug, Default)]
pub struct Traffic {
    counts: Mutex<TrafficCounts>,
    refusals: Mutex<VecDeque<RefusedTraffic>>,
}

impl Traffic {
    /// All counts now.
    pub fn counts(&self) -> TrafficCounts {
        *lock(&self.counts)
    }

    /// What was refused, the latest first; the oldest are forgotten.
    pub fn refusals(&self) -> Vec<RefusedTraffic> {
        lock(&self.refusals).iter().rev().cloned().collect()
    }

    pub(super) fn sent(&self, bytes: usize) {
        let mut counts = lock(&self.counts);
        counts.bytes_sent += bytes as u64;
        counts.packets_sent += 1;
    }

    pub(super) fn received(&self, bytes: usize) {
        let mut counts = lock(&self.counts);
        counts.bytes_received += bytes as u64;
        counts.packets_received += 1;
    }

    pub(super) fn dropped(&self) {
        lock(&self.counts).dropped += 1;
    }

    pub(super) fn asked(&self) {
        lock(&self.counts).questions += 1;
    }

    /// A connection was made; it is open as long as what is returned lives.
    pub(super) fn opened(self: &Arc<Self>) -> OpenConnection {
        let mut counts = lock(&self.counts);
        counts.connections += 1;
        counts.open += 1;
        OpenConnection(Arc::clone(self))
    }

    /// `what` has to be short, and harmless on a terminal.
    pub(super) fn refused(&self, what: String, why: Refusal) {
        lock(&self.counts).refused += 1;
        let last_unix = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let mut refusals = lock(&self.refusals);
        let known = refusals.iter().position(|known| known.what == what && known.why == why);
        let count = known.and_then(|at| refusals.remove(at)).map_or(0, |known| known.count) + 1;
        if refusals.len() == REMEMBERED {
            refusals.pop_front();
        }
        refusals.push_back(RefusedTraffic { what, why, count, last_unix });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Counts as an open connection.
#[derive(Debug)]
pub(super) struct OpenConnection(Arc<Traffic>);

impl Drop for OpenConnection {
    fn drop(&mut self) {
        lock(&self.0.counts).open -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_and_bounded() {
        let traffic = Arc::new(Traffic::default());
        for number in 0..200 {
            traffic.refused(format!("tcp 10.0.0.{number}:22"), Refusal::Inside);
        }
        traffic.refused("tcp 10.0.0.199:22".to_owned(), Refusal::Inside);
        traffic.refused("tcp 10.0.0.150:22".to_owned(), Refusal::Inside);
        let refusals = traffic.refusals();
        assert_eq!((refusals.len(), traffic.counts().refused), (REMEMBERED, 202));
        assert_eq!((refusals[0].what.as_str(), refusals[0].count), ("tcp 10.0.0.150:22", 2));
        assert_eq!((refusals[1].what.as_str(), refusals[1].count), ("tcp 10.0.0.199:22", 2));
    }

    #[test]
    fn a_connection_is_open_until_it_is_dropped() {
        let traffic = Arc::new(Traffic::default());
        let open = traffic.opened();
        assert_eq!((traffic.counts().connections, traffic.counts().open), (1, 1));
        drop(open);
        assert_eq!((traffic.counts().connections, traffic.counts().open), (1, 0));
    }
}
