//! Who may send requests when: a budget of requests for each priority, and prefetch making way for demand on the link
//! they share.
//!
//! Not reading a body does not free the link: what the server may send ahead waits in socket buffers that are larger
//! than a frame (measured: pausing prefetch bodies changes nothing). What helps is not to have asked for it. So while
//! there is demand, prefetch asks in small requests, each as long as [`TURN`] at the speed the last ones had, and waits
//! before each for demand to pass; for [`LONGEST_WAIT`] at most, so that endless demand leaves it a share. Four streams
//! at 5 MB/s make a 256 KiB read take 1.9 times as long as an idle link, instead of 5.8 times (tests/priority.rs).

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;

use crate::source::priority::Priority;

/// For so long after demand and prefetch last met, prefetch keeps its requests small.
const CONTENTION: Duration = Duration::from_secs(2);
/// How long such a request is to take; two round trips when that is more, or connections would idle between requests.
const TURN: Duration = Duration::from_millis(40);
/// Longest wait for demand to pass. Shorter waits let prefetch back in before a frame is through a slow link; longer
/// ones gain nothing.
const LONGEST_WAIT: Duration = Duration::from_millis(100);
/// Bounds of such a request's length in bytes.
const SMALLEST: u64 = 64 << 10;
const LARGEST: u64 = 2 << 20;

/// The budgets of a client.
#[derive(Debug)]
pub(super) struct RequestBudgets {
    demand: Arc<Semaphore>,
    prefetch: Arc<Semaphore>,
    traffic: Arc<Traffic>,
}

/// What is under way, and how fast answers come.
#[derive(Debug, Default)]
struct Traffic {
    demands: AtomicUsize,
    prefetches: AtomicUsize,
    over: Notify,
    pace: Mutex<Pace>,
}

#[derive(Debug, Default)]
struct Pace {
    /// When demand and prefetch were last under way together.
    contended: Option<Instant>,
    /// Seconds until the first byte of an answer.
    latency: f64,
    /// Bytes a second of one body; 0 until one was measured.
    speed: f64,
}

/// The right to have one request under way.
#[derive(Debug)]
pub(super) struct Permit {
    _budget: OwnedSemaphorePermit,
    priority: Priority,
    traffic: Arc<Traffic>,
}

/// How one answer came.
#[derive(Debug)]
pub(super) struct Timing {
    asked: Instant,
    first: Option<Instant>,
    /// Bytes after the first piece.
    bytes: u64,
}

impl RequestBudgets {
    pub(super) fn new(demand: usize, prefetch: usize) -> Self {
        Self {
            demand: Arc::new(Semaphore::new(demand)),
            prefetch: Arc::new(Semaphore::new(prefetch)),
            traffic: Arc::default(),
        }
    }

    /// Waits for the right to send a request of that priority.
    pub(super) async fn permit(&self, priority: Priority) -> Permit {
        let budget = match priority {
            Priority::Demand => &self.demand,
            Priority::WorkingSet | Priority::Prefetch => &self.prefetch,
        };
        let budget = budget.clone().acquire_owned().await.expect("the budgets are never closed");
        if priority == Priority::Prefetch {
            let _ = timeout(LONGEST_WAIT, self.no_demand()).await;
        }
        self.traffic.count(priority).fetch_add(1, Relaxed);
        self.traffic.note_contention();
        Permit { _budget: budget, priority, traffic: self.traffic.clone() }
    }

    /// The most a prefetch request should ask for now.
    pub(super) fn turn(&self) -> u64 {
        let pace = self.traffic.pace();
        if pace.contended.is_none_or(|last| last.elapsed() > CONTENTION) {
            return u64::MAX;
        }
        let seconds = TURN.as_secs_f64().max(2.0 * pace.latency);
        match pace.speed > 0.0 {
            true => ((pace.speed * seconds) as u64).clamp(SMALLEST, LARGEST),
            false => LARGEST,
        }
    }

    /// Learns from an answer that is complete.
    pub(super) fn learn(&self, timing: &Timing) {
        let Some(first) = timing.first else { return };
        let (latency, took) = ((first - timing.asked).as_secs_f64(), first.elapsed().as_secs_f64());
        let mean = |before: f64, now: f64| if before == 0.0 { now } else { (before + now) / 2.0 };
        let mut pace = self.traffic.pace();
        pace.latency = mean(pace.latency, latency);
        if timing.bytes >= SMALLEST / 2 {
            pace.speed = mean(pace.speed, timing.bytes as f64 / took.max(1e-6));
        }
    }

    async fn no_demand(&self) {
        loop {
            let over = self.traffic.over.notified();
            if self.traffic.demands.load(Relaxed) == 0 {
                return;
            }
            over.await;
        }
    }
}

impl Traffic {
    fn count(&self, priority: Priority) -> &AtomicUsize {
        match priority {
            Priority::Demand => &self.demands,
            Priority::WorkingSet | Priority::Prefetch => &self.prefetches,
        }
    }

    fn note_contention(&self) {
        if self.demands.load(Relaxed) > 0 && self.prefetches.load(Relaxed) > 0 {
            self.pace().contended = Some(Instant::now());
        }
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        self.pace.lock().expect("no panics while held")
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.traffic.note_contention();
        let before = self.traffic.count(self.priority).fetch_sub(1, Relaxed);
        if self.priority == Priority::Demand && before == 1 {
            self.traffic.over.notify_waiters();
        }
    }
}

impl Timing {
    /// A request is about to be sent.
    pub(super) fn start() -> Self {
        Self { asked: Instant::now(), first: None, bytes: 0 }
    }

    /// So many bytes have come.
    pub(super) fn arrived(&mut self, len: u64) {
        match self.first {
            None => self.first = Some(Instant::now()),
            Some(_) => self.bytes += len,
        }
    }
}
