//! How many sandboxes there are, and the limit on them.
//!
//! The number is counted anew from the run directories every few seconds, and before anybody is refused. In between it
//! is what was counted and what has been reserved since.

use crate::sandboxes::{self, MarkedFork, Owner};
use forkd_engine::local::paths::Paths;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// See the module's description.
#[derive(Debug)]
pub struct Census {
    limit: usize,
    counts: Mutex<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// Those that were found, by state.
    found: BTreeMap<&'static str, usize>,
    forks: usize,
    /// Those that are being made, and those that were made since.
    reserved: usize,
    made: usize,
}

impl Counts {
    fn all(&self) -> usize {
        self.found.values().sum::<usize>() + self.reserved + self.made
    }
}

/// Room for sandboxes that are about to be made.
#[derive(Debug)]
pub struct Reservation {
    census: Arc<Census>,
    count: usize,
}

impl Reservation {
    /// They are there.
    pub fn fill(mut self) {
        let mut counts = self.census.counts();
        counts.reserved -= self.count;
        counts.made += self.count;
        self.count = 0;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.census.counts().reserved -= self.count;
    }
}

impl Census {
    /// With so many sandboxes at most.
    pub fn new(limit: usize) -> Arc<Census> {
        Arc::new(Census { limit, counts: Mutex::default() })
    }

    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The most there may be.
    pub fn limit(&self) -> usize {
        self.limit
    }

    /// Counts them. Blocks.
    pub fn count(&self, paths: &Paths) {
        let forks: Vec<MarkedFork> = match sandboxes::forks(paths, &Owner::User) {
            Ok(forks) => forks.collect(),
            Err(error) => return tracing::warn!(%error, "sandboxes cannot be counted"),
        };
        let mut found = BTreeMap::new();
        let children = forks.iter().flat_map(|fork| &fork.status.children);
        for child in children.filter(|child| !child.state.is_over()) {
            *found.entry(child.state.name()).or_default() += 1;
        }
        let mut counts = self.counts();
        (counts.found, counts.forks, counts.made) = (found, forks.len(), 0);
    }

    /// Room for more, without counting anew.
    pub fn reserve(self: &Arc<Census>, count: usize) -> Option<Reservation> {
        let mut counts = self.counts();
        (counts.all() + count <= self.limit).then(|| {
            counts.reserved += count;
            Reservation { census: Arc::clone(self), count }
        })
    }

    /// Those that were found the last time, by state; and their forks.
    pub fn found(&self) -> (BTreeMap<&'static str, usize>, usize) {
        let counts = self.counts();
        (counts.found.clone(), counts.forks)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_room_for_so_many_and_no_more() {
        let census = Census::new(3);
        let two = census.reserve(2).unwrap();
        assert!(census.reserve(2).is_none());
        census.reserve(1).unwrap().fill();
        assert!(census.reserve(1).is_none());
        drop(two);
        assert!(census.reserve(2).is_some() && census.reserve(3).is_none());
    }
}
