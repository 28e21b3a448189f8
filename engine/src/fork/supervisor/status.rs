//! What a supervisor says of its fork.

use super::{Child, Deadline, Supervisor};
use crate::local::run_dir::{ChildState, ChildStatus, ForkStatus};
use crate::network::wire::KeptNetwork;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// A child that waits longer than this for one chunk counts as stalled.
const STALLED_AFTER: Duration = Duration::from_secs(1);

impl Supervisor {
    /// What `forkd ps` shows.
    pub fn status(&self) -> ForkStatus {
        let progress = self.template.progress();
        let waits = self.template.pager().map(|pager| pager.waits()).unwrap_or_default();
        let shown = |child: &Child| {
            let stuck = waits.get(&child.client).is_some_and(|wait| *wait > STALLED_AFTER);
            let state = match child.state {
                state if state.is_over() => state,
                _ if child.paused => ChildState::Paused,
                _ if stuck => ChildState::Stalled,
                state => state,
            };
            let unfetched = || progress.last_error.clone().filter(|_| state == ChildState::Stalled);
            let deadline = child.deadline.as_ref().filter(|_| !state.is_over());
            let left = |deadline: &Deadline| deadline.at.saturating_duration_since(Instant::now());
            ChildStatus {
                id: child.id.clone(),
                // Another process may have it now.
                pid: if child.on_disk.is_some() { 0 } else { child.pid },
                state,
                error: child.error.clone().or_else(|| child.overdue.clone()).or_else(unfetched),
                network: child.network.as_ref().map(KeptNetwork::status),
                ports: child.ports.clone(),
                on_disk: child.on_disk.is_some(),
                parent: child.parent.clone(),
                expires_in_ms: deadline
                    .map(|deadline| left(deadline).as_millis().try_into().unwrap_or(u64::MAX)),
            }
        };
        let children = self.children();
        let needed = needed(&children);
        ForkStatus {
            pack: self.pack.clone(),
            forked_from: self.template.name().map(str::to_owned),
            bytes_fetched: progress.bytes_fetched,
            bytes_total: progress.bytes_total,
            children: children.iter().filter(|child| needed.contains(&child.id)).map(shown).collect(),
        }
    }
}

/// The children to be told of. Of a branch that is over nobody wants to know but who was branched from it.
fn needed(children: &[Child]) -> BTreeSet<String> {
    let mut needed = BTreeSet::new();
    // A branch comes after what it was branched from.
    for child in children.iter().rev() {
        if child.parent.is_none() || !child.state.is_over() || needed.contains(&child.id) {
            needed.insert(child.id.clone());
            needed.extend(child.parent.clone());
        }
    }
    needed
}
