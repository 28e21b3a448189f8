//! Who may send requests and read their answers when: a budget of requests for each class, and prefetch making way for
//! demand on the link they share.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::source::Class;

/// Longest pause of a prefetch body between two pieces while demand is under way: what keeps endless demand from
/// starving it.
const LONGEST_WAY: Duration = Duration::from_millis(100);

/// The budgets of a client.
#[derive(Debug)]
pub(super) struct Lanes {
    demand: Arc<Semaphore>,
    prefetch: Arc<Semaphore>,
    traffic: Arc<Traffic>,
}

/// Demand under way.
#[derive(Debug, Default)]
struct Traffic {
    demands: AtomicUsize,
    over: Notify,
}

/// The right to have one request under way.
#[derive(Debug)]
pub(super) struct Permit {
    _budget: OwnedSemaphorePermit,
    demand: Option<Arc<Traffic>>,
}

impl Lanes {
    pub(super) fn new(demand: usize, prefetch: usize) -> Self {
        Self {
            demand: Arc::new(Semaphore::new(demand)),
            prefetch: Arc::new(Semaphore::new(prefetch)),
            traffic: Arc::default(),
        }
    }

    /// Waits for the right to send a request of that class.
    pub(super) async fn permit(&self, class: Class) -> Permit {
        let budget = match class {
            Class::Demand => &self.demand,
            Class::Prefetch => &self.prefetch,
        };
        let budget = budget.clone().acquire_owned().await.expect("the budgets are never closed");
        let demand = (class == Class::Demand).then(|| {
            self.traffic.demands.fetch_add(1, Relaxed);
            self.traffic.clone()
        });
        Permit { _budget: budget, demand }
    }

    /// Waits, as a prefetch body, until no demand is under way, but not for long.
    pub(super) async fn give_way(&self) {
        let clear = async {
            loop {
                let over = self.traffic.over.notified();
                if self.traffic.demands.load(Relaxed) == 0 {
                    return;
                }
                over.await;
            }
        };
        let _ = tokio::time::timeout(LONGEST_WAY, clear).await;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if let Some(traffic) = self.demand.take()
            && traffic.demands.fetch_sub(1, Relaxed) == 1
        {
            traffic.over.notify_waiters();
        }
    }
}
