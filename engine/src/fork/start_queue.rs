//! Whose turn it is among the children of a fork that are more than the processors.
//!
//! Each waits at its first instruction until all have got there: guests that run already would take the time of those that
//! start. Then they go on; where KVM emulates the guests' kernels, only as many at once as there are processors: a guest that
//! was away has its timer's tick to serve when it comes back, which takes most of what it gets where many share.

use forkd_vmm::kvm::KvmKind;
use std::collections::VecDeque;
use std::num::NonZero;
use std::time::{Duration, Instant};

/// How long children that are at their first instruction wait for others that are not.
const GATHERING_MAX: Duration = Duration::from_secs(1);
/// A turn ends by itself that long after its child was ready: a request may take any time. Three times what one takes that
/// asks for little (100 ms on kvm_pvm).
const READY_MAX: Duration = Duration::from_millis(300);
/// And that long after its begin in any case: its guest may hang, or wait for the network. Long, because a busy host is slow,
/// and more guests at once make it slower.
const TURN_MAX: Duration = Duration::from_secs(3);

/// Whose turn it is.
#[derive(Debug)]
pub struct StartQueue {
    at_once: usize,
    /// Children that wait, in the order in which they came.
    waiting: VecDeque<usize>,
    /// Children whose turn it is, and when it ends at the latest.
    current: Vec<(usize, Instant)>,
    gathering: Gathering,
}

#[derive(Debug)]
enum Gathering {
    /// Not all are started yet.
    Starting,
    Since(Instant),
    Over,
}

impl StartQueue {
    /// A queue for `count` children on this host, if they need any.
    pub fn of(count: u32, kind: KvmKind) -> Option<StartQueue> {
        let processors = std::thread::available_parallelism().map_or(1, NonZero::get);
        let at_once = if kind == KvmKind::Pvm { processors } else { usize::MAX };
        (count as usize > processors).then(|| StartQueue::new(at_once))
    }

    fn new(at_once: usize) -> StartQueue {
        StartQueue { at_once, waiting: VecDeque::new(), current: Vec::new(), gathering: Gathering::Starting }
    }

    /// A child is at its first instruction and waits.
    pub fn wait(&mut self, child: usize) {
        self.waiting.push_back(child);
    }

    /// A child has done what it was wanted for, or is over.
    pub fn end(&mut self, child: usize) {
        self.waiting.retain(|waiting| *waiting != child);
        self.current.retain(|(current, _)| *current != child);
    }

    /// A child is ready for requests.
    pub fn ready(&mut self, child: usize, now: Instant) {
        for (_, end) in self.current.iter_mut().filter(|(current, _)| *current == child) {
            *end = (*end).min(now + READY_MAX);
        }
    }

    /// Every child is started; `all_there`: and none is left that has not come to its first instruction.
    pub fn gather(&mut self, all_there: bool, now: Instant) {
        self.gathering = match self.gathering {
            Gathering::Over => Gathering::Over,
            _ if all_there => Gathering::Over,
            Gathering::Starting => Gathering::Since(now),
            Gathering::Since(since) if now.duration_since(since) > GATHERING_MAX => Gathering::Over,
            Gathering::Since(since) => Gathering::Since(since),
        };
    }

    /// Whether anybody waits.
    pub fn are_awaited(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The next child that may go on now.
    pub fn next(&mut self, now: Instant) -> Option<usize> {
        if !matches!(self.gathering, Gathering::Over) {
            return None;
        }
        self.current.retain(|(_, end)| now <= *end);
        if self.current.len() >= self.at_once {
            return None;
        }
        let child = self.waiting.pop_front()?;
        self.current.push((child, now + TURN_MAX));
        Some(child)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(turns: &mut StartQueue, now: Instant) -> Vec<usize> {
        std::iter::from_fn(|| turns.next(now)).collect()
    }

    fn gathered(at_once: usize, children: std::ops::Range<usize>, now: Instant) -> StartQueue {
        let mut turns = StartQueue::new(at_once);
        children.for_each(|child| turns.wait(child));
        turns.gather(true, now);
        turns
    }

    #[test]
    fn nobody_goes_on_before_all_are_there_or_a_second_is_over() {
        let now = Instant::now();
        let mut turns = StartQueue::new(8);
        turns.wait(0);
        assert_eq!(turns.next(now), None, "not all are started");
        turns.gather(false, now);
        turns.gather(false, now + GATHERING_MAX);
        assert_eq!(turns.next(now + GATHERING_MAX), None);
        let later = now + GATHERING_MAX + Duration::from_millis(1);
        turns.gather(false, later);
        assert_eq!(turns.next(later), Some(0));
        turns.wait(1);
        turns.gather(false, later);
        assert_eq!(turns.next(later), Some(1), "one that comes late waits for nobody");
    }

    #[test]
    fn as_many_as_may_go_on_at_once_and_in_their_order() {
        let now = Instant::now();
        let mut turns = gathered(2, 0..5, now);
        assert_eq!(all(&mut turns, now), [0, 1]);
        turns.end(1);
        assert_eq!(all(&mut turns, now), [2]);
        turns.end(3);
        turns.end(0);
        assert_eq!(all(&mut turns, now), [4], "the one that is over is left out");
        assert!(!turns.are_awaited());
        assert_eq!(all(&mut gathered(usize::MAX, 0..5, now), now), [0, 1, 2, 3, 4]);
    }

    #[test]
    fn a_turn_ends_by_itself() {
        let now = Instant::now();
        let mut turns = gathered(1, 0..3, now);
        assert_eq!(all(&mut turns, now), [0]);
        assert_eq!(all(&mut turns, now + TURN_MAX), [0; 0]);
        let later = now + TURN_MAX * 2;
        assert_eq!(all(&mut turns, later), [1]);
        turns.ready(1, later);
        assert_eq!(all(&mut turns, later + READY_MAX), [0; 0]);
        assert_eq!(all(&mut turns, later + READY_MAX * 2), [2]);
    }

    #[test]
    fn few_children_need_no_turns() {
        assert!(StartQueue::of(1, KvmKind::Pvm).is_none());
        assert_eq!(StartQueue::of(u32::MAX, KvmKind::Hardware).unwrap().at_once, usize::MAX);
    }
}
